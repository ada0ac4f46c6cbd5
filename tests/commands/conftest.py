"""What tests of several commands share."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the trained run, where the test is; commands that need none have their own."""
    copy = tmp_path / "here"
    shutil.copytree(trained, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("CAMDISTILL_RUN_FOLDER", "")
    return copy
