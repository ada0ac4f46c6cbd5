"""One image's maps by many methods, side by side."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from camdistill.report.figures.maps import overlay, peak_of, share_of
from camdistill.report.figures.pictures import (
    GAP,
    LINE,
    MARGIN,
    SEQUENTIAL,
    Grid,
    Picture,
    Sheet,
    as_bytes,
    resize_image,
)

LETTER = 6  # pixels of a small letter
NARROWEST = 180  # pixels that the color bar's words need


class MethodMap(NamedTuple):
    """What one method says.

    Attributes:
        method: Its name, written above.
        layer: Below that.
        values: The raw map, at any resolution.
        note: Below the map; the map's maximum stands before it.
    """

    method: str
    layer: str
    values: Grid
    note: str = ""


def method_panel(
    image: Float[np.ndarray, "channels height width"],
    maps: Mapping[str, Sequence[MethodMap]],
    *,
    title: str = "",
    size: int = 96,
    across: int = 7,
) -> Picture:
    """The image, and beside it every method's map; one block a network and class.

    Maps are rectified, and each is a share of its own maximum: methods have different units, so
    their sizes can't be compared.

    Args:
        image: In [0, 1].
        maps: By what is explained ("teacher: circle").
        title: In bold on top.
        size: Longest side of a tile, about: small images grow by whole factors.
        across: Maps in a line.
    """
    if not any(maps.values()):
        raise ValueError("a panel needs at least one map")
    height, width = image.shape[1:]
    longest = max(height, width)
    factor = max(round(size / longest), 1) if longest <= 1.25 * size else size / longest
    tall, wide = (max(round(length * factor), 1) for length in (height, width))
    largest_block = max(len(block) for block in maps.values())
    across = min(across, largest_block)
    words = max(len(method_map.method) for block in maps.values() for method_map in block)
    step = max(wide, LETTER * words) + GAP
    pitch = 2 * LINE - 4 + tall + LINE
    lines = {name: -(-len(block) // across) for name, block in maps.items()}
    left, top = MARGIN + wide + 2 * GAP, MARGIN + (LINE + GAP if title else 0)
    sheet = Sheet(
        max(
            left + max(across * step, NARROWEST) + MARGIN,
            round(1.3 * LETTER * len(title)) + 2 * MARGIN,
        ),
        top + sum(LINE + count * pitch + GAP for count in lines.values()) + 3 * LINE + MARGIN,
    )
    sheet.write(MARGIN, MARGIN, title, bold=True, points=9.5)
    first = top + 3 * LINE - 4
    sheet.paste(MARGIN, first, as_bytes(resize_image(image, tall, wide)))
    sheet.write(MARGIN, first + tall + 1, "image", color="0.35", points=7.0)
    y = top
    for name, block in maps.items():
        sheet.write(left, y, name, bold=True)
        for place, method_map in enumerate(block):
            x, upper = left + (place % across) * step, y + LINE + (place // across) * pitch
            _draw_tile(sheet, x, upper, image, method_map, (tall, wide))
        y += LINE + lines[name] * pitch + GAP
    length = max(min(across * step - GAP, 3 * wide), NARROWEST)
    sheet.bar(left, y, length, SEQUENTIAL, ("0", "map / its own maximum", "1"))
    unit = "max: in the method's own unit; Grad-CAM's is logits per cell"
    sheet.write(MARGIN, y + 2 * LINE, unit, color="0.35", points=6.5)
    return sheet.picture()


def _draw_tile(
    sheet: Sheet,
    x: int,
    y: int,
    image: Float[np.ndarray, "channels height width"],
    method_map: MethodMap,
    tile: tuple[int, int],
) -> None:
    peak = peak_of(method_map.values)
    sheet.write(x, y, method_map.method, points=7.5)
    sheet.write(x, y + LINE - 4, method_map.layer, color="0.35", points=7.0)
    sheet.paste(x, y + 2 * LINE - 4, overlay(image, share_of(method_map.values, peak), *tile))
    peak_text = f"max {peak:.2g}" if peak > 0 else "blank"
    peak_text = peak_text if np.isfinite(method_map.values).all() else "NaN"
    note = "   ".join(word for word in (peak_text, method_map.note) if word)
    sheet.write(x, y + 2 * LINE - 4 + tile[0] + 1, note, color="0.35", points=6.5)
