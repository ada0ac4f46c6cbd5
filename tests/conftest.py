"""What all tests share: generators of their own, caches of their own, images, a trained run."""

import errno
import http.client
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# Lightning calls jsonargparse by its old names, and warnings are errors here.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


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


CONFIG = """
model:
  class_path: camdistill.distill.distilled_explainer.DistilledExplainer
  init_args:
    teacher:
      {name: shallow_cnn, weights: teacher.safetensors, args: {channels: [4, 6], strides: [1, 2]}}
    student: {name: shallow_cnn, args: {channels: [4, 6], strides: [1, 2]}}
    cached: false
data:
  class_path: camdistill.data.modules.FolderData
  init_args: {root: images, batch_size: 6}
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false}
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that nobody changes: images of 6 classes, a teacher, `tiny.yaml`, and its run."""
    from camdistill.cli import main
    from camdistill.networks.students import ShallowCNN
    from camdistill.networks.weights import save_safetensors

    folder = tmp_path_factory.mktemp("trained")
    for split in ("train", "val", "test"):
        for number in range(36):
            path = folder / "images" / split / f"c{number % 6}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = ShallowCNN(6, (4, 6), (1, 2)).state_dict()
    normalization = {"mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]"}
    save_safetensors(folder / "teacher.safetensors", state, normalization)
    (folder / "tiny.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CAMDISTILL_CACHE", str(folder / "cache"))
        patch.setenv("CAMDISTILL_RUN_FOLDER", "")
        assert main(["fit", "-c", "tiny.yaml"]) == 0
    return folder


@pytest.fixture
def offline_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A copy of `trained` to make mistakes in, where the test is, without internet."""
    copy = tmp_path / "here"
    shutil.copytree(trained, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(http.client.HTTPConnection, "connect", _no_route)
    yield copy
    monkeypatch.delenv("CAMDISTILL_RUN_FOLDER", raising=False)


def _no_route(*args: object, **options: object) -> None:
    raise OSError(errno.EHOSTUNREACH, "no route to host")
