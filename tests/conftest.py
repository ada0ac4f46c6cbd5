"""What all tests share: their own generators, one thread's worth of patience, and the real images."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of the test's own."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def images_folder() -> Path:
    """The folder of real images that CAMDISTILL_DATA names."""
    folder = os.environ.get("CAMDISTILL_DATA")
    if not folder:
        pytest.skip("CAMDISTILL_DATA names no folder with real images")
    return Path(folder)


@pytest.fixture(autouse=True)
def _caches_of_the_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches go to a folder of the test, never to the user's."""
    before = os.environ.get("CAMDISTILL_CACHE")
    os.environ["CAMDISTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["CAMDISTILL_CACHE"]
    else:
        os.environ["CAMDISTILL_CACHE"] = before
