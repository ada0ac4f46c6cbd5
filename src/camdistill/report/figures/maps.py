"""Maps drawn over images, side by side."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from camdistill.report.figures.pictures import (
    DIVERGING,
    GAP,
    LINE,
    MARGIN,
    SEQUENTIAL,
    Grid,
    Picture,
    Shares,
    Sheet,
    add_frame,
    as_bytes,
    colorize,
    resize_image,
    resize_shares,
)

OPACITY = 0.6  # of the map over the image
PALEST = 0.35  # what black becomes below a map: on a dark image colors would not match their bar
NOT_A_NUMBER = (255, 0, 255)  # a color that no color map here has


class PanelRow(NamedTuple):
    """One row of a map panel.

    Attributes:
        image: (C, H, W) in [0, 1]; one channel is gray.
        teacher: The teacher's raw map, at any resolution.
        student: The student's, or None.
        caption: Lines beside the row, the first in bold: layer, classes, Pearson.
    """

    image: Float[np.ndarray, "channels height width"]
    teacher: Float[np.ndarray, "map_height map_width"]
    student: Float[np.ndarray, "other_height other_width"] | None = None
    caption: Sequence[str] = ()


class _Tile(NamedTuple):
    pixels: Picture
    note: str = ""


def map_panel(
    rows: Sequence[PanelRow],
    *,
    title: str = "",
    size: int = 128,
    scale: Literal["own", "shared"] = "own",
    abreast: int = 1,
    first: str = "teacher",
    unit: str = "logits/cell",
) -> Picture:
    """Image | teacher's map | student's map | difference, one row after the other.

    Maps are rectified. Within a row all colors mean the same; what they mean is written below.

    Args:
        rows: What to draw; rows without a student's map show the teacher's alone.
        title: Written on top.
        size: Longest side of a tile, about: small images grow by whole factors, without smoothing.
        scale: "own": each map is a share of its own maximum, as Pearson sees it. "shared": both are
            shares of the larger of the two maxima, as an L2 distance sees them.
        abreast: Rows set side by side in one line of the panel.
        first: What the network of the first map is called.
        unit: Unit of the maps, written beside their maxima; "" where maps have units of their own.
    """
    if not rows:
        raise ValueError("a panel needs at least one row")
    has_student = any(row.student is not None for row in rows)
    headings = ["image", first, "student", "student - teacher"][: 4 if has_student else 2]
    tiles = [_tiles(row, size, scale, has_student, unit) for row in rows]
    height = max(tile.pixels.shape[0] for line in tiles for tile in line)
    width = max(tile.pixels.shape[1] for line in tiles for tile in line)
    deepest = max(len(row.caption) for row in rows)
    text = 8 + 7 * max((len(line) for row in rows for line in row.caption), default=0)
    pitch = max(height + LINE, deepest * LINE) + GAP
    strip = text + len(headings) * (width + GAP) + MARGIN
    lines = -(-len(rows) // abreast)
    top = MARGIN + (LINE + GAP if title else 0)
    legend = 3 * LINE
    sheet = Sheet(
        2 * MARGIN + min(abreast, len(rows)) * strip,
        top + LINE + lines * pitch + legend + MARGIN,
    )
    sheet.write(MARGIN, MARGIN, title, bold=True, points=9.5)
    for place, (row, line) in enumerate(zip(rows, tiles, strict=True)):
        left = MARGIN + (place % abreast) * strip
        upper = top + LINE + (place // abreast) * pitch
        for number, words in enumerate(row.caption):
            sheet.write(left, upper + number * LINE, words, bold=number == 0)
        for number, tile in enumerate(line):
            x = left + text + number * (width + GAP)
            if place < abreast:
                sheet.write(x, top, headings[number], color="0.35")
            sheet.paste(x, upper, tile.pixels)
            sheet.write(x, upper + tile.pixels.shape[0] + 1, tile.note, color="0.35", points=7.0)
    share = "map / its own max" if scale == "own" else "map / row's max"
    bottom = top + LINE + lines * pitch + GAP
    left = MARGIN + text
    sheet.bar(left, bottom, 2 * width, SEQUENTIAL, ("0", share, "1"))
    if has_student:
        ends = ("-1", "difference", "1")
        sheet.bar(left + 2 * (width + GAP), bottom, 2 * width, DIVERGING, ends)
    return sheet.picture()


def overlay(
    image: Float[np.ndarray, "channels height width"], share: Shares, tall: int, wide: int
) -> Picture:
    """A map in [0, 1] in color over the image in pale gray; NaN is magenta."""
    gray = PALEST + (1 - PALEST) * resize_image(image, tall, wide).mean(axis=-1, keepdims=True)
    level, missing = resize_shares(share, tall, wide)
    mixed = (1 - OPACITY) * gray + OPACITY * colorize(level, SEQUENTIAL)
    mixed[missing] = np.array(NOT_A_NUMBER) / 255
    return as_bytes(mixed)


def _tiles(row: PanelRow, size: int, scale: str, has_student: bool, unit: str) -> list[_Tile]:
    tall, wide = _tile_size(row.image.shape[1:], size)
    plain = as_bytes(resize_image(row.image, tall, wide))
    peaks = [peak_of(grid) for grid in (row.teacher, row.student) if grid is not None]
    peak = {"teacher": peaks[0], "student": peaks[-1]}
    if scale == "shared":
        peak = dict.fromkeys(peak, max(peaks))
    teacher = share_of(row.teacher, peak["teacher"])
    tiles = [_Tile(plain), _Tile(overlay(row.image, teacher, tall, wide), _note(row.teacher, unit))]
    if row.student is not None:
        student = share_of(row.student, peak["student"])
        tiles.append(_Tile(overlay(row.image, student, tall, wide), _note(row.student, unit)))
        tiles.append(_Tile(_difference(student, teacher, tall, wide)))
    elif has_student:
        tiles += [_Tile(np.full((tall, wide, 3), 235, np.uint8), "none")] * 2
    return tiles


def _difference(student: Shares, teacher: Shares, tall: int, wide: int) -> Picture:
    """Shares against shares: white is equal, red where the student has more, blue where less."""
    (student_level, student_missing), (teacher_level, teacher_missing) = (
        resize_shares(share, tall, wide) for share in (student, teacher)
    )
    pixels = colorize((student_level - teacher_level + 1) / 2, DIVERGING)
    pixels[student_missing | teacher_missing] = np.array(NOT_A_NUMBER) / 255
    return add_frame(as_bytes(pixels))


def peak_of(values: Grid) -> float:
    """The largest finite value; 0 where none is positive."""
    finite = values[np.isfinite(values)]
    return max(float(finite.max()), 0.0) if finite.size else 0.0


def share_of(values: Grid, peak: float) -> Shares:
    """Rectified and divided by `peak`; a map with nothing positive is 0; NaN and inf are NaN."""
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    positive = np.maximum(values, 0)
    share: Shares = np.minimum(positive / peak, 1) if peak > 0 else positive * 0
    return share


def _note(values: Grid, unit: str) -> str:
    """The map's maximum with its unit, or what is the matter with it."""
    broken = int((~np.isfinite(values)).sum())
    if broken:
        return f"NaN: {broken} of {values.size}"
    if values.max() <= 0:
        return "blank"
    word = "constant" if values.min() == values.max() else "max"
    return f"{word} {values.max():.3g} {unit}".rstrip()


def _tile_size(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """Whole multiples of a small image; a large one shrinks to `size`."""
    height, width = shape
    longest = max(height, width)
    factor = max(round(size / longest), 1) if longest <= 1.25 * size else size / longest
    return max(round(height * factor), 1), max(round(width * factor), 1)
