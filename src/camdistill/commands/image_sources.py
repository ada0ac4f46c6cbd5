"""Images for a command: files, folders or a data set."""

import dataclasses
import errno
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from camdistill.data.datasets import ImageSet, Positions
from camdistill.data.decode import check_side, decode
from camdistill.data.folders import check_has_images, scan
from camdistill.data.modules import Carving, CIFARData, FolderData, ImageData, ShapesData
from camdistill.data.shapes import Shapes
from camdistill.distill.training import as_images
from camdistill.errors import UserError, check_each_once, nearest
from camdistill.store.atomic_files import check_memory, printable
from camdistill.types import Images

CIFAR_SIDE = 32


class ImageSelection(NamedTuple):
    """Images in [0, 1] with their names and the names of their classes, where known."""

    images: Images
    names: list[str]
    classes: tuple[str, ...]


def load_images(
    paths: Sequence[Path],
    data: str | None,
    *,
    count: int,
    size: int,
    carving: Carving = Carving(),  # noqa: B008  (a tuple)
) -> ImageSelection:
    """At most `count` images of files and folders or of a data set's test split, spread evenly."""
    if bool(paths) == (data is not None):
        raise UserError("give either --images FILE_OR_FOLDER ... or --data shapes|cifar10|FOLDER")
    if count < 1:
        raise UserError(f"count is {count}; give 1 or more images")
    if data is not None:
        return _select_from_set(_test_set(data, size, carving)[0], count)
    files = _all_files(paths)
    chosen_files = [files[position] for position in _spread_positions(len(files), count)]
    return ImageSelection(
        as_images(torch.from_numpy(_decode_files(chosen_files, size))), _names(chosen_files), ()
    )


class ImageSource(NamedTuple):
    """A set of images for a command that looks at many.

    Attributes:
        images: All of them; ids are the positions in the set.
        order: Positions of those that are looked at, in an order that has nothing to do with
            classes.
        name: What they are, for titles.
        shapes: Where images are procedural, what draws them.
    """

    images: ImageSet
    order: Positions
    name: str
    shapes: Shapes | None = None


def load_image_source(
    paths: Sequence[Path],
    data: str | None,
    *,
    count: int,
    size: int,
    carving: Carving = Carving(),  # noqa: B008  (a tuple)
    seed: int = 0,
) -> ImageSource:
    """At most `count` images of files and folders or of a data set's test split, spread evenly.

    Args:
        paths: Files and folders.
        data: shapes, cifar10, cifar100 or an image folder.
        count: At most so many.
        size: Side in pixels.
        carving: Which images test, where a folder doesn't say.
        seed: Seed of the order.

    Raises:
        UserError: Neither or both are given, or there is no image.
    """
    if bool(paths) == (data is not None):
        raise UserError("give either --data shapes|cifar10|FOLDER or --images FILE_OR_FOLDER ...")
    if count < 1:
        raise UserError(f"count is {count}; give 1 or more images")
    if data is not None:
        images, shapes = _test_set(data, size, carving)
        name = f"{Path(data).name} (test)"
    else:
        files = _all_files(paths)
        files = [files[position] for position in _spread_positions(len(files), count)]
        images, shapes = _image_set(files, size), None
        name = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files and folders"
    positions = np.arange(len(images), dtype=np.int64)
    # A set's ids may be those of a larger one; here an id shall find its image.
    images = dataclasses.replace(images, ids=positions)
    order = np.random.default_rng(seed).permutation(_spread_positions(len(images), count))
    return ImageSource(images, order, name, shapes)


def _image_set(files: Sequence[Path], size: int) -> ImageSet:
    pixels, count = _decode_files(files, size), len(files)
    return ImageSet(
        pixels=pixels,
        labels=np.full(count, -1, np.int64),
        ids=np.arange(count, dtype=np.int64),
        names=_names(files),
        classes=(),
        fingerprint="",
    )


def _names(files: Sequence[Path]) -> list[str]:
    """File names, with their folders where two files would have the same."""
    for parts in range(1, max(len(file.parts) for file in files) + 1):
        names = ["/".join(file.parts[-parts:]) for file in files]
        if len(set(names)) == len(names):
            break
    return [printable(name) for name in names]


def _decode_files(files: Sequence[Path], size: int) -> NDArray[np.uint8]:
    """The images of some files, which have to fit into memory."""
    check_side("--size", size)
    check_memory(len(files) * 3 * size**2, f"{len(files)} images of {size}x{size} pixels")
    return np.stack([decode(file, size)[0] for file in files])


def _all_files(paths: Sequence[Path]) -> list[Path]:
    """The files of several paths, each once."""
    files = [file for path in paths for file in _files(path)]
    check_each_once("--images", [str(file.absolute()) for file in files])
    return files


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.exists() and not path.is_dir():
        raise UserError(f"'{path}' is a pipe, a socket or a device; give files or folders")
    if path.is_symlink() and not path.exists():
        raise UserError(f"'{path}' is a link {_describe_broken(path)}; give the files themselves")
    if not path.is_dir():
        parent = path.parent
        neighbors = sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else []
        cure = f"in '{parent}' {nearest(path.name, neighbors)}" if neighbors else "check the path"
        raise UserError(f"no file or folder '{path}'; {cure}")
    image_files = scan(path)
    check_has_images(path, image_files)
    return [image_files.path(position) for position in range(len(image_files))]


def _describe_broken(link: Path) -> str:
    """Why a link leads to nothing."""
    try:
        link.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "that leads back to itself"
    return f"to '{link.readlink()}', which is not there"


def _test_set(data: str, size: int, carving: Carving) -> tuple[ImageSet, Shapes | None]:
    module: ImageData
    shapes = None
    if data == "shapes":
        module = ShapesData(size=size)
        shapes = module.shapes("test")
    elif data in ("cifar10", "cifar100"):
        if size != CIFAR_SIDE:
            raise UserError(
                f"{data}'s images are {CIFAR_SIDE} pixels wide, and {size} are asked for (by "
                f"--size or the network); give --size {CIFAR_SIDE} to look at them as they are"
            )
        module = CIFARData("cifar10" if data == "cifar10" else "cifar100")
    else:
        module = FolderData(
            Path(data),
            size=size,
            split_seed=carving.split_seed,
            test_fraction=carving.test_fraction,
        )
    # Without prepare_data, which decodes training images; setup fetches what is missing.
    module.setup("test")
    assert module.test_set is not None, "setup made it"
    return module.test_set, shapes


def _select_from_set(images: ImageSet, count: int) -> ImageSelection:
    positions = _spread_positions(len(images), count)
    batch = images.batch(positions)
    names = [str(images.names[position]) for position in positions.tolist()]
    return ImageSelection(as_images(batch.pixels), names, images.classes)


def _spread_positions(length: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.unique(np.linspace(0, length - 1, min(length, count)).astype(np.int64))
