"""Shapes: procedural images whose evidence is known exactly, pixel by pixel.

An image holds an object, whose shape is its label, a distractor of the same size, contrast and
texture whose shape means nothing, a background of 1/f noise and, on request, a second object and
a shortcut: a colored patch that agrees with the label with a set probability. Color, texture,
brightness, size, rotation and position say nothing about the label. There is no file and no
state: image i is a function of (version, split, seed, i).

The design follows BAM (Yang and Kim 2019), FunnyBirds (Hesse et al. 2023, interventions by
rendering again) and XAI-TRIS (Clark et al. 2023, suppressors).
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt8, UInt64

from camdistill.data import shapes_drawing as drawing
from camdistill.data.shapes_painting import PATCH_COLORS, paint_images
from camdistill.data.shapes_scene import Task, draw_scenes, task_labels
from camdistill.errors import UserError, nearest

VERSION = 1
"""Goes up whenever any pixel of any image changes; part of every image's hash."""

Split = Literal["train", "val", "test", "aligned", "neutral", "conflict"]
Removable = Literal["object", "second", "distractor", "shortcut"]

_REMOVABLE: tuple[Removable, ...] = get_args(Removable)


@dataclass(frozen=True)
class RenderedShapes:
    """Images and all that is known about them.

    Attributes:
        pixels: The images, 0 to 255.
        labels: What is asked for: the object's shape (after `swap_class`), or what `task` asks.
        kinds: The object's shape.
        second_labels: The second object's shape, never the first one's; None with one object.
        shortcut_labels: The class whose color the patch has; -1 without a patch.
        distractors: Which distractor shape.
        masks: Exact, by name: `object`, `distractor`, `shortcut`, `background` and, with two
            objects, `second` split the image without overlap or rest. `parts` (`second_parts`)
            is what of the object can tell classes apart: all but the core, a disc that every
            class has in the same place. An element that was removed has an empty mask.
    """

    pixels: UInt8[np.ndarray, "n 3 size size"]
    labels: Int64[np.ndarray, "n"]
    kinds: Int64[np.ndarray, "n"]
    second_labels: Int64[np.ndarray, "n"] | None
    shortcut_labels: Int64[np.ndarray, "n"]
    distractors: Int64[np.ndarray, "n"]
    masks: dict[str, Bool[np.ndarray, "n size size"]]


@dataclass(frozen=True)
class Shapes:
    """A split of procedural images with exact masks; holds no pixels, renders any index at once.

    Args:
        split: `train`, `val` and `test` have images of their own. `aligned`, `neutral` and
            `conflict` are the images of `test` with a patch that always agrees with the label,
            agrees by chance (1 / classes), or never agrees.
        length: How many images.
        size: Side in pixels: 32, 64 or 96.
        seed: Another seed, other images.
        classes: How many shapes are told apart, 6 to 10.
        shortcut: Probability that the patch agrees with the label (in train, val and test);
            0 draws no patch.
        shortcut_cells: Side of the patch in cells of a map of 8 x 8, 0.5 to 2.
        objects: 1, or 2 objects of different classes.
        suppressor: Strength in [0, 1] of one more noise field, shared by all that is drawn:
            the background then tells about the object's pixels, but not about the label.
        task: What the label is. `shape`: of the (first) object. With two objects it can be what no
            object tells alone: `conjunction`, whether a disc and a triangle are both there (in half
            of the images; else one of them or none), or `xor`, whether one of them is there without
            the other (each is there in half of the images, and says nothing by itself).
    """

    split: Split
    length: int
    size: int = 32
    seed: int = 0
    classes: int = 8
    shortcut: float = 0.0
    shortcut_cells: float = 1.0
    objects: int = 1
    suppressor: float = 0.0
    task: Task = "shape"

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise UserError(
                f"Shapes has no split {self.split!r}; {nearest(self.split, get_args(Split))}"
            )
        if self.size not in (32, 64, 96):
            raise UserError(f"Shapes of size {self.size}: choose 32, 64 or 96")
        for name, low, high in (
            ("length", 1, 2**40),
            ("classes", 6, len(drawing.CLASSES)),
            ("shortcut", 0, 1),
            ("shortcut_cells", 0.5, 2),
            ("objects", 1, 2),
            ("suppressor", 0, 1),
        ):
            if not low <= getattr(self, name) <= high:
                setting = getattr(self, name)
                raise UserError(f"Shapes with {name}={setting}: choose a value in [{low}, {high}]")
        if self.task not in get_args(Task):
            raise UserError(
                f"Shapes has no task {self.task!r}; {nearest(self.task, get_args(Task))}"
            )
        if self.task != "shape" and self.objects != 2:
            raise UserError(
                f"task {self.task!r} asks about two objects, but objects={self.objects}: "
                "give objects=2"
            )
        if self._is_shortcut_split and self.shortcut == 0:
            raise UserError(
                f"split {self.split!r} is about the shortcut, but shortcut=0 draws none: "
                "give the training split's shortcut, above 0"
            )

    def __len__(self) -> int:
        return self.length

    @property
    def class_names(self) -> tuple[str, ...]:
        """The labels' names in their order."""
        if self.task == "shape":
            return self.shape_names
        first, second = self.shape_names[:2]
        if self.task == "conjunction":
            return f"not {first} and {second}", f"{first} and {second}"
        return f"{first} and {second}, or neither", f"{first} or {second} alone"

    @property
    def shape_names(self) -> tuple[str, ...]:
        """The shapes' names in the order of their kinds."""
        return tuple(drawing.CLASSES)[: self.classes]

    @property
    def patch_colors(self) -> tuple[str, ...]:
        """Red, green and blue of each label's patch, in hexadecimal."""
        return tuple(bytes(color).hex() for color in PATCH_COLORS[: len(self.class_names)])

    @property
    def fingerprint(self) -> str:
        """A sha256 that is the same only for the same images."""
        # 1 and 1.0 give the same images.
        values = [
            str(value if isinstance(value := getattr(self, field.name), str) else float(value))
            for field in fields(self)
            # Images of the plain task have kept the name that they had before there were others.
            if field.name != "task" or self.task != "shape"
        ]
        return hashlib.sha256(f"shapes {VERSION} {' '.join(values)}".encode()).hexdigest()

    @property
    def agreement(self) -> float:
        """Probability that the patch agrees with the label in this split."""
        by_split = {"aligned": 1.0, "neutral": 1 / len(self.class_names), "conflict": 0.0}
        return by_split.get(self.split, self.shortcut)

    @property
    def _is_shortcut_split(self) -> bool:
        return self.split in ("aligned", "neutral", "conflict")

    def render(
        self,
        indices: Integer[np.ndarray, "n"],
        *,
        remove: Collection[Removable] = (),
        swap_class: int = 0,
        swap_background: int = 0,
    ) -> RenderedShapes:
        """Render images by their index, as they are or with an intervention.

        An intervention draws the same scene again: pixels that it doesn't concern keep their bits.

        Args:
            indices: In [0, length), in any order.
            remove: What is left out: the background that was always behind it shows.
            swap_class: Added to each object's shape, modulo classes: another shape in the same
                pose, color and texture, and the label that goes with it. Patch and second object
                stay as they are, so choose a shift that doesn't meet the latter's shape.
            swap_background: Which other background, from 1; 0 is the image's own.

        Raises:
            ValueError: An index is out of range, or `remove` names what isn't there.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < self.length):
            raise ValueError(f"indices must lie in [0, {self.length})")
        if unknown := set(remove) - set(_REMOVABLE):
            raise ValueError(f"can't remove {sorted(unknown)}; there are {_REMOVABLE}")
        # Blocks whose fields stay in the processor's cache.
        block_size = max(1, 128 * 32**2 // self.size**2)
        blocks = [
            self._render_block(
                indices[start : start + block_size], set(remove), swap_class, swap_background
            )
            for start in range(0, max(1, len(indices)), block_size)
        ]
        return _concatenate(blocks)

    def _render_block(
        self,
        indices: Int64[np.ndarray, "n"],
        remove: set[Removable],
        swap_class: int,
        swap_background: int,
    ) -> RenderedShapes:
        keys = self._image_keys(indices)
        patch = max(1, round(self.shortcut_cells * self.size / 8))
        scenes = draw_scenes(
            keys,
            size=self.size,
            classes=self.classes,
            objects=self.objects,
            agreement=self.agreement,
            patch=patch,
            task=self.task,
        )
        kinds = (scenes.kinds + swap_class) % self.classes
        labels = task_labels(kinds, scenes.second_kinds, self.task)
        kinds_by_item = {"object": kinds, "second": scenes.second_kinds}
        kinds_by_item["distractor"] = scenes.distractors + len(drawing.CLASSES)
        masks, parts = {}, {}
        for index, (name, item_kinds) in enumerate(kinds_by_item.items()):
            if name == "second" and self.objects == 1:
                continue
            mask, core = drawing.shape_masks(item_kinds, scenes.poses[:, index], self.size)
            masks[name] = np.zeros_like(mask) if name in remove else mask
            parts[name] = masks[name] & ~core
        has_patch = self.shortcut > 0 and "shortcut" not in remove
        masks["shortcut"] = _square_masks(scenes.patch, patch * has_patch, self.size)
        masks["background"] = ~np.logical_or.reduce(list(masks.values()))
        masks["parts"] = parts["object"]
        if self.objects == 2:
            masks["second_parts"] = parts["second"]
        shortcut_labels = scenes.shortcut_labels if has_patch else np.full_like(labels, -1)
        return RenderedShapes(
            pixels=paint_images(
                keys, masks, shortcut_labels, suppressor=self.suppressor, swap=swap_background
            ),
            labels=labels,
            kinds=kinds,
            second_labels=scenes.second_kinds if self.objects == 2 else None,
            shortcut_labels=shortcut_labels,
            distractors=scenes.distractors,
            masks=masks,
        )

    def _image_keys(self, indices: Int64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
        scenes = "test" if self._is_shortcut_split else self.split
        root = hashlib.sha256(f"shapes {VERSION} {scenes} {self.seed}".encode()).digest()
        start = np.uint64(int.from_bytes(root[:8], "little"))
        return drawing.splitmix64(start + indices.astype(np.uint64) * drawing.GOLDEN)


def _square_masks(
    corners: Int64[np.ndarray, "n 2"], side: int, size: int
) -> Bool[np.ndarray, "n size size"]:
    """Squares by their left and top pixel."""
    ticks = np.arange(size)
    inside = (ticks >= corners[..., None]) & (ticks < corners[..., None] + side)
    return inside[:, 1, :, None] & inside[:, 0, None, :]


def _concatenate(blocks: list[RenderedShapes]) -> RenderedShapes:
    """Blocks one after the other."""
    if len(blocks) == 1:
        return blocks[0]
    seconds = [part.second_labels for part in blocks if part.second_labels is not None]
    return RenderedShapes(
        pixels=np.concatenate([part.pixels for part in blocks]),
        labels=np.concatenate([part.labels for part in blocks]),
        kinds=np.concatenate([part.kinds for part in blocks]),
        second_labels=np.concatenate(seconds) if seconds else None,
        shortcut_labels=np.concatenate([part.shortcut_labels for part in blocks]),
        distractors=np.concatenate([part.distractors for part in blocks]),
        masks={
            name: np.concatenate([part.masks[name] for part in blocks]) for name in blocks[0].masks
        },
    )
