"""Grids of small pictures: filters, patches, feature maps."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from camdistill.report.figures.pictures import (
    DIVERGING,
    GAP,
    LINE,
    MARGIN,
    SEQUENTIAL,
    Picture,
    Sheet,
    as_bytes,
    colorize,
    resize_image,
    resize_shares,
)

Filters = Float[np.ndarray, "units channels height width"]
MARK = (214, 39, 40)  # around what one should look at: dead units
LETTER = 6  # pixels of a small letter


class Tile(NamedTuple):
    """A small picture with what is written below it.

    Attributes:
        pixels: Ready to be shown.
        note: Short: a unit's number, a value.
        marked: Whether it is framed in red.
    """

    pixels: Picture
    note: str = ""
    marked: bool = False


class Bar(NamedTuple):
    """What colors mean: a color map's name and the words at its ends and in its middle."""

    colors: str
    words: tuple[str, str, str]


def tile_grid(
    tiles: Sequence[Tile],
    *,
    title: str = "",
    lines: Sequence[str] = (),
    columns: int | None = None,
    bar: Bar | None = None,
) -> Picture:
    """Tiles in rows, in their order, their notes below.

    Args:
        tiles: At least one; the largest sets the pitch.
        title: In bold on top.
        lines: Words under the title.
        columns: Tiles in a row; None makes the grid about twice as wide as high.
        bar: The colors' meaning, at the bottom.
    """
    if not tiles:
        raise ValueError("a grid needs at least one tile")
    tall = max(tile.pixels.shape[0] for tile in tiles)
    wide = max(tile.pixels.shape[1] for tile in tiles)
    columns_used = columns or min(max(round((2 * len(tiles)) ** 0.5), 4), 16)
    columns_used = min(columns_used, len(tiles))
    has_notes = any(tile.note for tile in tiles)
    widest = max(len(tile.note) for tile in tiles)
    step = max(wide + GAP, LETTER * widest + GAP)
    pitch = tall + GAP + (LINE - 4 if has_notes else 0)
    words = max([0, *(LETTER * len(line) for line in lines), round(1.3 * LETTER * len(title))])
    rows = -(-len(tiles) // columns_used)
    top = MARGIN + (LINE + 2 if title else 0) + LINE * len(lines) + (GAP if lines or title else 0)
    legend = 2 * LINE if bar else 0
    width = 2 * MARGIN + max(columns_used * step - GAP, words, 220 if bar else 0)
    sheet = Sheet(width, top + rows * pitch + legend + MARGIN)
    sheet.write(MARGIN, MARGIN, title, bold=True, points=9.5)
    for number, line in enumerate(lines):
        y = MARGIN + (LINE + 2 if title else 0) + number * LINE
        sheet.write(MARGIN, y, line, color="0.35")
    for place, tile in enumerate(tiles):
        x, y = MARGIN + (place % columns_used) * step, top + (place // columns_used) * pitch
        sheet.paste(x, y, add_border(tile.pixels, MARK) if tile.marked else tile.pixels)
        note = y + tile.pixels.shape[0] + 1
        middle = x + tile.pixels.shape[1] // 2
        sheet.write(middle, note, tile.note, color="0.35", points=6.5, align="center")
    if bar:
        length = min(max(columns_used * step - GAP, 200), 360)
        sheet.bar(MARGIN, top + rows * pitch + 2, length, *bar)
    return sheet.picture()


def filter_tiles(
    filters: Filters, *, shared: bool = False, size: int = 40, marked: Collection[int] = ()
) -> list[Tile]:
    """Filters as tiles: zero is mid-gray (one channel: white) and the sign is kept.

    Three channels are red, green and blue; one is in diverging colors; of others, the three
    directions in which they vary most (principal components over all filters) are taken as colors.

    Args:
        filters: [K, C, h, w].
        shared: False shows shapes: each by its own largest weight. True shows sizes: all by the
            99th percentile of all magnitudes, so that a weak filter stays gray.
        size: Side of a tile, about.
        marked: Units that are framed.
    """
    finite = np.isfinite(filters).all((1, 2, 3))
    filters = np.nan_to_num(filters.astype(np.float64))
    visible = filters if filters.shape[1] in (1, 3) else _principal_components(filters)
    magnitude = np.abs(visible)
    if shared:
        scale = np.full(len(visible), np.quantile(magnitude, 0.99) if magnitude.size else 1.0)
    else:
        scale = magnitude.reshape(len(visible), -1).max(1)
    level = visible / np.where(scale > 0, scale, 1)[:, None, None, None]
    norms = np.sqrt((filters.reshape(len(filters), -1) ** 2).sum(1))
    factor = max(round(size / max(filters.shape[2:])), 1)
    tall, wide = filters.shape[2] * factor, filters.shape[3] * factor
    tiles = []
    for unit, color_level in enumerate(np.clip((level + 1) / 2, 0, 1)):
        if len(color_level) == 3:
            pixels = as_bytes(resize_image(color_level, tall, wide))
        else:
            flat = as_bytes(colorize(color_level[0], DIVERGING))
            pixels = np.repeat(np.repeat(flat, factor, 0), factor, 1)
        note = f"{unit}: {norms[unit]:.2g}" if shared else str(unit)
        note = note if finite[unit] else f"{unit}: NaN"
        tiles.append(Tile(pixels, note, unit in marked))
    return tiles


def map_tiles(
    maps: Float[np.ndarray, "units height width"],
    notes: Sequence[str],
    *,
    size: int = 64,
    marked: Collection[int] = (),
) -> list[Tile]:
    """Feature maps, each from 0 to its own maximum; not a number is magenta."""
    longest = max(maps.shape[1:])
    factor = max(round(size / longest), 1) if longest <= size else size / longest
    tall, wide = (max(round(length * factor), 1) for length in maps.shape[1:])
    tiles = []
    for place, (unit_map, note) in enumerate(zip(maps, notes, strict=True)):
        finite = np.where(np.isfinite(unit_map), unit_map, np.nan).astype(np.float64)
        positive = np.maximum(finite, 0)
        finite_values = positive[np.isfinite(positive)]
        peak = float(finite_values.max()) if finite_values.size else 0.0
        share = positive / peak if peak > 0 else positive * 0
        if longest <= size:
            cells = as_bytes(colorize(np.nan_to_num(share), SEQUENTIAL))
            cells[np.isnan(share)] = (255, 0, 255)
            pixels = np.repeat(np.repeat(cells, int(factor), 0), int(factor), 1)
        else:
            level, missing = resize_shares(share, tall, wide)
            pixels = as_bytes(colorize(level, SEQUENTIAL))
            pixels[missing] = (255, 0, 255)
        tiles.append(Tile(pixels, note, place in marked))
    return tiles


def patch_tile(
    image: Float[np.ndarray, "channels height width"],
    *,
    size: int,
    inside: Bool[np.ndarray, "height width"] | None = None,
    region: Bool[np.ndarray, "height width"] | None = None,
    note: str = "",
) -> Tile:
    """A patch at a tile's size; what lies outside the region is dimmed, beyond the image hatched.

    Args:
        image: In [0, 1].
        size: Longest side.
        inside: Which pixels are the image's.
        region: Where a unit is active in it.
        note: Written below.
    """
    height, width = image.shape[1:]
    factor = size / max(height, width)
    tall, wide = (max(round(length * factor), 1) for length in (height, width))
    colors = resize_image(image, tall, wide)
    rows = np.arange(tall) * height // tall
    columns = np.arange(wide) * width // wide
    if region is not None:
        lit = region[rows][:, columns]
        colors = np.where(lit[..., None], colors, 0.35 * colors + 0.1)
        edge = lit & ~_erode(lit)
        colors[edge] = (1.0, 0.85, 0.1)
    if inside is not None:
        beyond = ~inside[rows][:, columns]
        stripes = (np.add.outer(np.arange(tall), np.arange(wide)) // 3) % 2
        colors[beyond] = np.where(stripes[beyond], 0.86, 0.93)[:, None]
    return Tile(as_bytes(colors), note)


def add_border(pixels: Picture, color: tuple[int, int, int], width: int = 2) -> Picture:
    """The picture with its outermost pixels in one color."""
    bordered_pixels = pixels.copy()
    bordered_pixels[:width] = bordered_pixels[-width:] = color
    bordered_pixels[:, :width] = bordered_pixels[:, -width:] = color
    return bordered_pixels


def _erode(lit: Bool[np.ndarray, "tall wide"]) -> Bool[np.ndarray, "tall wide"]:
    padded = np.pad(lit, 1, constant_values=True)
    inner: Bool[np.ndarray, "tall wide"] = (
        lit & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    )
    return inner


def _principal_components(filters: Filters) -> Float[np.ndarray, "units 3 height width"]:
    """Three directions of the channels instead of all."""
    rows = np.moveaxis(filters, 1, -1).reshape(-1, filters.shape[1])
    _, _, directions = np.linalg.svd(rows, full_matrices=False)
    components = rows @ directions[:3].T
    components = np.pad(components, ((0, 0), (0, 3 - components.shape[1])))
    shape = (len(filters), *filters.shape[2:], 3)
    return np.moveaxis(components.reshape(shape), -1, 1)
