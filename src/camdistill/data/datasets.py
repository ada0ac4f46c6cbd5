"""Sets of images in memory or in a memory-mapped file, and where they come from."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from camdistill.data import annotations, cache, folders
from camdistill.data.shapes import Shapes
from camdistill.errors import UserError, nearest
from camdistill.store.atomic_files import expand_home, printable
from camdistill.types import Batch

Positions = NDArray[np.int64]


@runtime_checkable
class PixelArray(Protocol):
    """What holds pixels: an array, a memory map, or some rows of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, positions: Positions, /) -> NDArray[np.uint8]: ...


class RowView:
    """Some rows of an array, fetched when asked for: a subset of a memory map costs nothing."""

    def __init__(self, array: PixelArray, rows: Positions) -> None:
        self._array = array
        self._rows = rows
        self.shape = (len(rows), *array.shape[1:])
        self.dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, positions: Positions | slice | int, /) -> NDArray[np.uint8]:
        rows = self._rows[positions]
        return self._array[rows]

    def __array__(
        self, dtype: np.dtype[np.uint8] | None = None, copy: bool | None = None
    ) -> NDArray[np.uint8]:
        return np.asarray(self._array[self._rows], dtype=dtype)


@dataclass(frozen=True)
class ImageSet:
    """Images with what is known about them; arrays agree in their first axis.

    Attributes:
        pixels: uint8 [N, 3, H, W], an array or a memory map.
        labels: int64 [N]; -1 where an image has none.
        ids: int64 [N]; the image's number in the whole set, also in a subset.
        names: What to call each image (a path relative to the data's folder).
        classes: Names of the classes; empty where images have no labels.
        fingerprint: sha256 of the whole set's content: with an id it names an image for good.
        boxes: float32 [N, 4] (xmin, ymin, xmax, ymax), inclusive pixels of the stored images; NaN
            where an image has none. None where no image has one.
        masks: uint8 [N, H, W], 1 on the object; all 0 where an image has none.
        annotation_digest: sha256 of boxes and masks that lie in files of their own; else empty.
    """

    pixels: PixelArray
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    names: Sequence[str]
    classes: tuple[str, ...]
    fingerprint: str
    boxes: NDArray[np.float32] | None = None
    masks: PixelArray | None = None
    annotation_digest: str = ""

    def __post_init__(self) -> None:
        for field in ("labels", "ids", "names", "boxes", "masks"):
            column = getattr(self, field)
            if column is not None and len(column) != len(self.pixels):
                raise ValueError(f"{len(self.pixels)} images, but {len(column)} {field}")

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[2], self.pixels.shape[3]

    @property
    def labeled(self) -> bool:
        """Whether the images have labels."""
        return bool(self.classes)

    def subset(self, positions: Positions) -> "ImageSet":
        """The images at some positions; they keep their ids and the fingerprint of the whole."""
        rows = np.asarray(positions, dtype=np.int64)
        return dataclasses.replace(
            self,
            pixels=RowView(self.pixels, rows),
            labels=self.labels[rows],
            ids=self.ids[rows],
            names=tuple(self.names[row] for row in rows.tolist()),
            boxes=None if self.boxes is None else self.boxes[rows],
            masks=None if self.masks is None else RowView(self.masks, rows),
        )

    def batch(
        self, positions: Sequence[int] | Positions, counted: NDArray[np.bool_] | None = None
    ) -> Batch:
        """The images at some positions as tensors on the CPU.

        Args:
            positions: Positions in this set (not ids).
            counted: False for images that only fill up a shard; None counts all.
        """
        rows = np.asarray(positions, dtype=np.int64)
        counts = np.ones(len(rows), dtype=np.bool_) if counted is None else counted
        return Batch(
            torch.from_numpy(np.ascontiguousarray(self.pixels[rows])),
            torch.from_numpy(self.labels[rows]),
            torch.from_numpy(self.ids[rows]),
            torch.from_numpy(counts),
        )


def carve(
    images: ImageSet, fraction: float, seed: int, *, purpose: str = "val"
) -> tuple[ImageSet, ImageSet]:
    """Split a set in two by seed alone.

    Args:
        images: The set to split.
        fraction: Share of the second part in [0, 1), or a number of images where it is 1 or more.
        seed: The split's seed.
        purpose: Splits for different purposes are independent.

    Returns:
        What is left, and the part cut out (at least one image unless `fraction` is 0).

    Raises:
        UserError: When one of the parts would be empty.
    """
    if not 0 <= fraction < math.inf or (fraction >= 1 and fraction != int(fraction)):
        raise UserError(
            f"{purpose}_fraction is {fraction}; give a share in [0, 1) or a whole number of images"
        )
    count = len(images)
    # a share is rounded up, whatever the float's last digit
    cut_count = int(fraction) if fraction >= 1 else math.ceil(fraction * count - 1e-9)
    if cut_count >= count:
        raise UserError(
            f"{purpose}_fraction {fraction} asks for {cut_count} of {count} images and leaves "
            "none to "
            "train on; give a smaller one"
        )
    order = _generator(seed, purpose).permutation(count)
    return images.subset(np.sort(order[cut_count:])), images.subset(np.sort(order[:cut_count]))


def limit_set(images: ImageSet, count: int | None, seed: int) -> ImageSet:
    """At most so many images, chosen by seed; a larger choice contains the smaller ones.

    Classes are drawn in turn, so that every class has the same number, as far as it goes.
    """
    if count is None:
        return images
    if count < 1:
        raise UserError(f"limit is {count}; give 1 or more training images, or null for all")
    order = _generator(seed, "limit").permutation(len(images))
    labels = images.labels[order]
    turn = np.zeros(len(order), dtype=np.int64)
    for label in np.unique(labels):
        members = labels == label
        turn[members] = np.arange(int(members.sum()))
    return images.subset(np.sort(order[np.argsort(turn, kind="stable")[:count]]))


def _generator(seed: int, purpose: str) -> np.random.Generator:
    if seed < 0:
        raise UserError(f"seed is {seed}; give 0 or more")
    return np.random.default_rng([seed, *purpose.encode()])


def shapes_set(shapes: Shapes) -> ImageSet:
    """Procedural images, drawn at once; masks are of the whole object, or of both it takes."""
    count = len(shapes)
    rendered = shapes.render(np.arange(count, dtype=np.int64))
    evidence = rendered.masks["object"]
    if shapes.task != "shape":
        evidence = evidence | rendered.masks["second"]
    return ImageSet(
        pixels=rendered.pixels,
        labels=rendered.labels,
        ids=np.arange(count, dtype=np.int64),
        names=tuple(f"{shapes.split}/{index:06d}" for index in range(count)),
        classes=shapes.class_names,
        fingerprint=shapes.fingerprint,
        masks=evidence.astype(np.uint8),
    )


def load_cifar(
    name: Literal["cifar10", "cifar100"],
    root: Path,
    split: Literal["train", "test"],
    *,
    download: bool = True,
) -> ImageSet:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009) through torchvision.

    Args:
        name: `cifar10` or `cifar100`.
        root: Folder with torchvision's files, or where to put them.
        split: `train` (50,000 images) or `test` (10,000).
        download: Fetch the files where they are missing.

    Raises:
        UserError: When the files are neither there nor to be had.
    """
    from torchvision.datasets import CIFAR10, CIFAR100  # a second of imports that others don't need

    dataset_class = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    root = expand_home(root)
    try:
        source = dataset_class(str(root), train=split == "train", download=download)
    except (OSError, RuntimeError) as error:
        message = str(getattr(error, "reason", error))
        reason = message.splitlines()[0] if message else type(error).__name__
        cure = f"put {dataset_class.filename} (from {dataset_class.url}) into {root}"
        raise UserError(f"no {name} in {root} ({reason}); {cure}, or use an image folder") from None
    count = len(source.data)
    return ImageSet(
        pixels=np.ascontiguousarray(source.data.transpose(0, 3, 1, 2)),
        labels=np.asarray(source.targets, dtype=np.int64),
        ids=np.arange(count, dtype=np.int64),
        names=tuple(f"{split}/{index:05d}" for index in range(count)),
        classes=tuple(source.classes),
        # torchvision checks the files' md5 whenever it opens them
        fingerprint=hashlib.sha256(f"{name} {split} {dataset_class.tgz_md5}".encode()).hexdigest(),
    )


def load_folder(
    root: Path,
    split: folders.Split = "train",
    *,
    size: int | None = None,
    labeled: bool | None = None,
    on_broken: cache.OnBroken = "raise",
    cache_dir: Path | None = None,
) -> ImageSet:
    """One split of an image folder, whole (see `folders.find_layout` for which folder that is).

    Files are ordered by their path and classes by their name, as torchvision's ImageFolder orders
    them. `boxes.csv` and `masks/` in the root are read where they are.

    Args:
        root: Folder with train, val and test folders, or class folders, or images.
        split: Which of them; a folder without splits is all `train`.
        size: Shorter side after scaling, and side of the square cut from the middle; None for
            images that have one size already.
        labeled: True requires class folders; False ignores them; None looks.
        on_broken: `raise` names a broken file; `skip` goes on without it.
        cache_dir: Where decoded images are kept; None: CAMDISTILL_CACHE or ~/.cache/camdistill.

    Raises:
        UserError: A missing folder or split, no images, one class only, an empty class, a broken
            file, classes that differ between splits, boxes of unknown images.
    """
    layout = folders.find_layout(Path(root))
    split_folders = layout.split_folders()
    if split not in split_folders:
        raise UserError(f"{root} has no {split} split; {nearest(split, split_folders)}")
    split_folder = split_folders[split]
    classes = folders.find_classes(layout.train, labeled)
    if classes and split != "train":
        folders.check_same_classes(layout.train, split_folder)
    if (
        split_folder != layout.root
        and (split_folder / folders.MASKS).is_dir()
        and folders.has_masks(split_folder)
    ):
        raise UserError(
            f"{split_folder / folders.MASKS} holds masks of the images beside it; move it to "
            f"{layout.root / folders.MASKS / split_folder.name}, where masks are read"
        )
    files = folders.scan(split_folder)
    folders.check_has_images(split_folder, files)
    labels = folders.labels_from_paths(files, classes) if classes else None
    images = cache.load_or_decode(files, size, cache_dir, on_broken)
    prefix = "" if split_folder == layout.root else f"{split_folder.name}/"
    names = tuple(prefix + files.names[position] for position in images.positions.tolist())
    count = len(names)
    image_labels = (
        np.full(count, -1, dtype=np.int64) if labels is None else labels[images.positions]
    )
    missing = set(range(len(classes))) - set(image_labels.tolist())
    if missing:
        broken = classes[min(missing)]
        raise UserError(
            f"all images of class {broken!r} in {split_folder} are broken; replace them"
        )
    key = hashlib.sha256(f"{images.digest} {images.pixels.shape}".encode())
    boxes = annotations.load_boxes(layout.root, names, images.sizes, size)
    masks = annotations.load_masks(layout.root, names, images.sizes, size)
    return ImageSet(
        pixels=images.pixels,
        labels=image_labels,
        ids=np.arange(count, dtype=np.int64),
        names=tuple(map(printable, names)),
        classes=tuple(map(printable, classes)),
        fingerprint=key.hexdigest(),
        boxes=boxes,
        masks=masks,
        annotation_digest=annotations.annotation_digest(boxes, masks),
    )
