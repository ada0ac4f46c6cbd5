"""What stands where in an image of Shapes: labels, poses and the patch's place."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64, UInt64

from camdistill.data import shapes_drawing as drawing

Task = Literal["shape", "conjunction", "xor"]

AREA = (0.056, 0.0765)
"""Least and greatest area of a shape, as a fraction of the image's."""
MARGIN = np.float32(0.75)
"""Least distance of a center from the border, in radii: far tips may lie outside the image."""
PATCH_REGION = 0.4
"""The patch lies within this fraction of a side from a border, in both directions."""

_PATCH_ROOM = 0.3  # the widest patch, a quarter of the side, and what rounding to pixels takes
_ORDERS = np.array([[i // 6, i // 2 % 3, i % 2] for i in range(24)])
_STREAM, _MORE = 0, 1000
_TRIES = 16

_PerImage = Float32[np.ndarray, "n"]


@dataclass(frozen=True)
class ShapesScene:
    """The arrangement of n images; items are the object, the second object, the distractor.

    Attributes:
        labels: What is asked for.
        kinds: The object's shape.
        second_kinds: The second object's shape, another one.
        distractors: Which distractor.
        shortcut_labels: The class whose color the patch takes.
        poses: Poses of each item, as `shapes_drawing.shape_masks` takes them.
        patch: Left and top pixel of the patch.
    """

    labels: Int64[np.ndarray, "n"]
    kinds: Int64[np.ndarray, "n"]
    second_kinds: Int64[np.ndarray, "n"]
    distractors: Int64[np.ndarray, "n"]
    shortcut_labels: Int64[np.ndarray, "n"]
    poses: Float32[np.ndarray, "n 3 5"]
    patch: Int64[np.ndarray, "n 2"]


def draw_scenes(
    keys: UInt64[np.ndarray, "n"],
    *,
    size: int,
    classes: int,
    objects: int,
    agreement: float,
    patch: int,
    task: Task = "shape",
) -> ShapesScene:
    """Arrange images, each by its key.

    Args:
        keys: One an image.
        size: Side of the image in pixels.
        classes: Number of classes.
        objects: 1 or 2; with 1 the second object takes no room.
        agreement: Probability that `shortcut_labels` is the label.
        patch: Side of the patch in pixels.
        task: What labels say.
    """
    draw = drawing.uniforms_by_key(keys, _STREAM, 21).T
    kinds, second_kinds = _draw_kinds(draw[:3], classes, task)
    labels, other_labels = _draw_labels(draw[2], kinds, second_kinds, classes, task)
    low, high = (np.float32(np.sqrt(area / np.pi)) for area in AREA)
    # A disc is reserved that holds every shape, or the place would tell the class.
    radii = np.float32(drawing.REACH) * (low + (high - low) * draw[5:8])
    if objects == 1:
        centers, radii = _place_beside(
            radii, drawing.uniforms_by_key(keys, _STREAM + _MORE, 2 + 2 * _TRIES).T
        )
    else:
        centers = _place_in_cells(
            radii, draw[14:21], drawing.uniforms_by_key(keys, _STREAM + _MORE, 6).T
        )
    poses = np.empty((len(keys), 3, 5), np.float32)
    poses[:, :, :2] = centers.transpose(2, 1, 0) * size
    poses[:, :, 2] = radii.T / np.float32(drawing.REACH) * size
    # tan(15 degrees): rotations within +-30 degrees, which make no class look like another.
    poses[:, :, 3] = (2 * draw[8:11].T - 1) * np.float32(0.2679492)
    poses[:, :, 4] = np.where(draw[11:14].T < 0.5, -1, 1)
    places = drawing.uniforms_by_key(keys, _STREAM + 2 * _MORE, 2 * _TRIES).T
    return ShapesScene(
        labels=labels,
        kinds=kinds,
        second_kinds=second_kinds,
        distractors=_choice(draw[3], len(drawing.DISTRACTORS)),
        shortcut_labels=np.where(draw[4] < agreement, labels, other_labels),
        poses=poses,
        patch=_patch_corners(centers * size, radii * size, places, size, patch),
    )


def _draw_kinds(
    draw: Float32[np.ndarray, "3 n"], classes: int, task: Task
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Shapes of the object and of the second object, two different ones."""
    if task == "shape":
        kinds = _choice(draw[0], classes)
        return kinds, (kinds + 1 + _choice(draw[1], classes - 1)) % classes
    # Shapes 0 and 1 are asked about, the others fill the places of those that are absent.
    first = _choice(draw[1], classes - 2)
    second = (first + 1 + _choice(draw[2], classes - 3)) % (classes - 2)
    # Of six equal parts both are there in three; of four in one.
    code = _choice(draw[0], 6) if task == "conjunction" else _choice(draw[0], 4) + 2
    return np.where(code <= 3, 0, first + 2), np.where((code <= 2) | (code == 4), 1, second + 2)


def task_labels(
    kinds: Int64[np.ndarray, "n"], second_kinds: Int64[np.ndarray, "n"], task: Task
) -> Int64[np.ndarray, "n"]:
    """Labels: the object's shape, or whether shapes 0 and 1 are both there, or one alone."""
    if task == "shape":
        return kinds
    has_shape = [(kinds == shape) | (second_kinds == shape) for shape in (0, 1)]
    labels: Int64[np.ndarray, n] = (
        has_shape[0] & has_shape[1] if task == "conjunction" else has_shape[0] ^ has_shape[1]
    ).astype(np.int64)
    return labels


def _draw_labels(
    draw: _PerImage,
    kinds: Int64[np.ndarray, "n"],
    second_kinds: Int64[np.ndarray, "n"],
    classes: int,
    task: Task,
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Labels, and for each another one that a patch may show."""
    labels = task_labels(kinds, second_kinds, task)
    count = classes if task == "shape" else 2
    return labels, (labels + 1 + _choice(draw, count - 1)) % count


def _choice(draw: _PerImage, count: int) -> Int64[np.ndarray, "n"]:
    """A number below `count`; 24 bits times a small integer is exact in float64."""
    return np.floor(draw.astype(np.float64) * count).astype(np.int64)


def _cut_cells(
    item_sides: Float32[np.ndarray, "4 n"], draw: Float32[np.ndarray, "7 n"]
) -> tuple[Float32[np.ndarray, "2 4 n"], Float32[np.ndarray, "2 4 n"]]:
    """Cut each image into four cells, one an item and large enough for it.

    A cut across the image, then one through each half, each anywhere that leaves enough room; so
    that items never touch and yet are found everywhere.

    Args:
        item_sides: Side of the square that each item needs, at most 0.5.
        draw: Uniform numbers.

    Returns:
        Where the items' cells start and end, on both axes, in [0, 1].
    """
    images = np.arange(item_sides.shape[1])
    owners = _permutations(_choice(draw[0], 24))
    need = item_sides[owners, images]
    first, second = np.maximum(need[0], need[1]), np.maximum(need[2], need[3])
    cut = first + (1 - first - second) * draw[1]
    left, right = (
        need[2 * half] + (1 - need[2 * half] - need[2 * half + 1]) * draw[2 + half]
        for half in range(2)
    )
    zero, one = np.zeros_like(cut), np.ones_like(cut)
    starts = np.array([[zero, left, zero, right], [zero, zero, cut, cut]])
    ends = np.array([[left, one, right, one], [cut, cut, one, one]])
    transposed = draw[4] < 0.5
    starts = np.where(transposed, starts[::-1], starts)
    ends = np.where(transposed, ends[::-1], ends)
    cells = np.argsort(owners, axis=0)
    return starts[:, cells, images], ends[:, cells, images]


def _place_in_cells(
    radii: Float32[np.ndarray, "3 n"],
    cuts: Float32[np.ndarray, "7 n"],
    draw: Float32[np.ndarray, "6 n"],
) -> Float32[np.ndarray, "2 3 n"]:
    """Centers of three items, each in a cell of its own; the fourth cell is left to the patch."""
    item_sides = np.concatenate([2 * radii, np.full_like(radii[:1], _PATCH_ROOM)])
    starts, ends = _cut_cells(item_sides, cuts)
    slack = np.maximum(ends[:, :3] - starts[:, :3] - 2 * radii, 0)
    places = slack * _stretch_outward(draw.reshape(2, 3, -1))
    centers: Float32[np.ndarray, "2 3 n"] = starts[:, :3] + radii + places
    return centers


def _place_beside(
    radii: Float32[np.ndarray, "3 n"], draw: Float32[np.ndarray, "tries n"]
) -> tuple[Float32[np.ndarray, "2 3 n"], Float32[np.ndarray, "3 n"]]:
    """Centers of the object, anywhere, and of the distractor, anywhere beside it.

    Returns:
        The centers, and the radii: an object so near the center that nothing as large fits beside
        it is made smaller, and its distractor with it. The absent second object has radius 0.
    """
    object_radius, distractor_radius = radii[0], radii[2]
    center = _place_centers(object_radius, draw[:2])
    farthest = np.where(center < 0.5, 1 - distractor_radius, distractor_radius)
    tight = ((center - farthest) ** 2).sum(axis=0) < (object_radius + distractor_radius) ** 2
    object_radius, distractor_radius = (
        np.where(tight, np.minimum(r, np.float32(0.207)), r)
        for r in (object_radius, distractor_radius)
    )
    corner = np.where(center < 0.5, 1 - distractor_radius, distractor_radius)[:, None]
    candidates = _place_centers(distractor_radius, draw[2:].reshape(2, _TRIES, -1))
    candidates = np.concatenate([candidates, corner], axis=1)
    free = ((candidates - center[:, None]) ** 2).sum(axis=0) >= (
        object_radius + distractor_radius
    ) ** 2
    free[-1] = True
    first = free.argmax(axis=0)
    distractor_center = candidates[:, first, np.arange(len(first))]
    zero_radius = np.zeros_like(object_radius)
    return np.stack([center, np.full_like(center, -9), distractor_center], axis=1), np.stack(
        [object_radius, zero_radius, distractor_radius]
    )


def _permutations(numbers: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "4 n"]:
    """The permutation of four things that each number below 24 stands for."""
    permutations = np.tile(np.arange(4)[:, None], len(numbers))
    for index, code in enumerate(_ORDERS[numbers].T):
        swapped = index + code
        images = np.arange(len(numbers))
        permutations[index], permutations[swapped, images] = (
            permutations[swapped, images],
            permutations[index].copy(),
        )
    return permutations


def _place_centers(
    radius: _PerImage, draw: Float32[np.ndarray, "*tries n"]
) -> Float32[np.ndarray, "*tries n"]:
    """Coordinates of centers, drawn so that shapes cover the image evenly."""
    margin = MARGIN * radius
    places: Float32[np.ndarray, "*tries n"] = margin + (1 - 2 * margin) * _stretch_outward(draw)
    return places


def _stretch_outward(draw: Float32[np.ndarray, "*tries n"]) -> Float32[np.ndarray, "*tries n"]:
    """Stretch uniform numbers in [0, 1] towards both ends.

    Centers that were uniform would pile objects up in the middle of the image. With 1.36, the mean
    object over 24,000 images, pooled to a map of 8 x 8, varies by a factor of 1.33 within its
    inner 6 x 6 cells.
    """
    half = np.float32(0.5)
    stretched: Float32[np.ndarray, "*tries n"] = half + (draw - half) * np.float32(1.36)
    return stretched.clip(0, 1)


def _patch_corners(
    centers: Float32[np.ndarray, "2 3 n"],
    radii: Float32[np.ndarray, "3 n"],
    draw: Float32[np.ndarray, "tries n"],
    size: int,
    patch: int,
) -> Int64[np.ndarray, "n 2"]:
    """The first of some random places near the border that touches no item's disc.

    The four corners come last: a disc of half the image's width blocks one of them at most.
    """
    span = int(PATCH_REGION * size) - patch + 1
    inner = draw.reshape(2, _TRIES, -1)
    offset = np.floor(2 * span * inner).astype(np.int64)
    far = size - patch
    # Near the far border for the second half of the numbers.
    candidates = np.where(offset < span, offset, far + span - offset)
    corners = np.array([[0, 0, far, far], [0, far, 0, far]])
    places = np.concatenate([candidates, np.tile(corners[..., None], candidates.shape[2])], axis=1)
    free = np.ones(places.shape[1:], bool)
    for disc in range(3):
        gap = np.maximum(places - centers[:, None, disc], centers[:, None, disc] - places - patch)
        gap = np.maximum(gap, 0)
        free &= (gap * gap).sum(axis=0) >= radii[disc] ** 2
    first = free.argmax(axis=0)
    return places[:, first, np.arange(len(first))].T
