"""Images for a command: files, folders or a data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from camdistill.data.datasets import ImageSet
from camdistill.data.decode import decode
from camdistill.data.folders import scan
from camdistill.data.modules import CIFARData, FolderData, ImageData, ShapesData
from camdistill.distill.training import as_images
from camdistill.errors import UserError
from camdistill.types import Images


class ShownImages(NamedTuple):
    """Images in [0, 1] with their names and the names of their classes, where known."""

    images: Images
    names: list[str]
    classes: tuple[str, ...]


def images_from(paths: Sequence[Path], data: str | None, *, count: int, size: int) -> ShownImages:
    """At most `count` images of files and folders or of a data set's test split, spread evenly."""
    if bool(paths) == (data is not None):
        raise UserError("give either --images FILE_OR_FOLDER ... or --data shapes|cifar10|FOLDER")
    if count < 1:
        raise UserError(f"count is {count}; give 1 or more images")
    if data is not None:
        return _of_set(_test_set(data, size), count)
    files = [file for path in paths for file in _files(path)]
    chosen = [files[place] for place in _spread(len(files), count)]
    pixels = np.stack([decode(file, size)[0] for file in chosen])
    return ShownImages(as_images(torch.from_numpy(pixels)), _names(chosen), ())


def _names(files: Sequence[Path]) -> list[str]:
    """File names, with their folders where two files would have the same."""
    for parts in range(1, max(len(file.parts) for file in files) + 1):
        names = ["/".join(file.parts[-parts:]) for file in files]
        if len(set(names)) == len(names):
            break
    return names


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no file or folder '{path}'; check the path")
    found = scan(path)
    if not len(found):
        raise UserError(f"no images in '{path}'; give a folder with .png, .jpg, .webp or such")
    return [found.path(position) for position in range(len(found))]


def _test_set(data: str, size: int) -> ImageSet:
    module: ImageData
    if data == "shapes":
        module = ShapesData(size=size)
    elif data in ("cifar10", "cifar100"):
        module = CIFARData("cifar10" if data == "cifar10" else "cifar100")
    else:
        module = FolderData(Path(data), size=size)
    module.prepare_data()
    module.setup("test")
    assert module.test_set is not None, "setup made it"
    return module.test_set


def _of_set(images: ImageSet, count: int) -> ShownImages:
    places = _spread(len(images), count)
    batch = images.batch(places)
    names = [str(images.names[place]) for place in places.tolist()]
    return ShownImages(as_images(batch.pixels), names, images.classes)


def _spread(length: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.unique(np.linspace(0, length - 1, min(length, count)).astype(np.int64))
