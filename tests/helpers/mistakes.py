"""A mistaken command line, and the one line that it gives."""

import dataclasses
import hashlib
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from camdistill.cli import main

Prepare = Callable[[Path], object]


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A command line in a prepared folder, and what the line on stderr must say."""

    line: str | Sequence[str]
    says: str
    prepare: Prepare = lambda folder: None


def change_config(change: Callable[[dict], object]) -> Prepare:  # type: ignore[type-arg]
    """Changes `tiny.yaml` itself."""

    def prepare(folder: Path) -> None:
        content = yaml.safe_load((folder / "tiny.yaml").read_text())
        change(content)
        (folder / "tiny.yaml").write_text(yaml.safe_dump(content))

    return prepare


def digests(folder: Path) -> dict[Path, str]:
    """Of all regular files below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def mistaken_line(
    line: str | Sequence[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    """The one line that a mistaken command line gives; nothing that was there has changed."""
    before = digests(folder)
    capsys.readouterr()
    assert main(shlex.split(line) if isinstance(line, str) else line) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("camdistill: ")
    assert len(lines[0]) < 500
    assert not {"Traceback", "class '", "Namespace", "jsonargparse"} & set(lines[0].split())
    after = digests(folder)
    assert after == before
    return lines[0]
