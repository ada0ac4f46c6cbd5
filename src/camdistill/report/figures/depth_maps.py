"""One image's maps at all layers of several networks, on comparable scales."""

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
    colorize,
    resize_image,
)

ACROSS = 10  # maps in a line
UNIT = "bar below a map: its maximum in logits per cell, one scale a method"


class LayerMap(NamedTuple):
    """A layer's map.

    Attributes:
        layer: Its name.
        values: The raw map, in logits per cell.
    """

    layer: str
    values: Grid


def depth_panel(
    image: Float[np.ndarray, "channels height width"],
    maps: Mapping[str, Mapping[str, Sequence[LayerMap]]],
    *,
    title: str = "",
    lines: Sequence[str] = (),
    size: int = 84,
) -> Picture:
    """Maps through depth: one row a method and network, the first layer left.

    Colors are shares of each map's own maximum, so that every map can be read; the bar below it is
    that maximum, with the number, on one scale for all layers and networks of a method.

    Args:
        image: In [0, 1].
        maps: By method, then by network.
        title: In bold on top.
        lines: Words under it: classes, what stands out.
        size: Longest side of a tile.
    """
    peaks = {
        method: max(
            (
                peak_of(layer_map.values)
                for layers in maps_by_network.values()
                for layer_map in layers
            ),
            default=0.0,
        )
        for method, maps_by_network in maps.items()
    }
    rows = [
        (f"{network}, {method}" if not start else "", peaks[method], layers[start : start + ACROSS])
        for method, maps_by_network in maps.items()
        for network, layers in maps_by_network.items()
        for start in range(0, len(layers), ACROSS)
    ]
    if not rows:
        raise ValueError("a panel needs at least one layer")
    across = max(len(layers) for _, _, layers in rows)
    height, width = image.shape[1:]
    factor = size / max(height, width)
    tall, wide = (max(round(length * factor), 1) for length in (height, width))
    pitch = LINE + tall + 10 + LINE + GAP
    step = max(wide, 80) + GAP
    top = MARGIN + LINE + 2 + LINE * len(lines) + GAP
    left = MARGIN + wide + 2 * GAP
    heading_height = LINE * sum(bool(name) for name, _, _ in rows)
    words = (
        max([7 * len(title), *(6 * len(line) for line in lines), left + 5 * len(UNIT)]) + 2 * MARGIN
    )
    sheet = Sheet(
        max(left + across * step + MARGIN, words),
        top + len(rows) * pitch + heading_height + 3 * LINE + MARGIN,
    )
    sheet.write(MARGIN, MARGIN, title, bold=True, points=9.5)
    for number, line in enumerate(lines):
        sheet.write(MARGIN, MARGIN + LINE + 2 + number * LINE, line, color="0.35")
    y = top
    sheet.paste(MARGIN, y + 2 * LINE, as_bytes(resize_image(image, tall, wide)))
    sheet.write(MARGIN, y + 2 * LINE + tall + 1, "image", color="0.35", points=7.0)
    for name, peak, layers in rows:
        if name:
            sheet.write(left, y, name, bold=True)
            y += LINE
        for place, layer_map in enumerate(layers):
            _draw_layer(sheet, left + place * step, y, image, layer_map, (tall, wide), peak)
        y += pitch
    share = ("0", "map / its own maximum", "1")
    sheet.bar(left, y + 2, min(3 * step, across * step - GAP), SEQUENTIAL, share)
    sheet.write(left, y + 2 * LINE + 2, UNIT, color="0.35", points=7.5)
    return sheet.picture()


def _draw_layer(
    sheet: Sheet,
    x: int,
    y: int,
    image: Float[np.ndarray, "channels height width"],
    layer_map: LayerMap,
    tile: tuple[int, int],
    highest: float,
) -> None:
    tall, wide = tile
    peak = peak_of(layer_map.values)
    sheet.write(x, y, _shorten_name(layer_map.layer), color="0.35", points=7.0)
    sheet.paste(x, y + LINE - 2, overlay(image, share_of(layer_map.values, peak), tall, wide))
    length = round(wide * peak / highest) if highest > 0 else 0
    if length:
        sheet.paste(x, y + LINE + tall + 1, np.tile(_BAR, (5, length, 1)))
    rows, columns = layer_map.values.shape
    note = (f"{peak:.0f}" if peak >= 10 else f"{peak:.2g}") if peak > 0 else "blank"
    note = note if np.isfinite(layer_map.values).all() else "NaN"
    sheet.write(x, y + LINE + tall + 8, f"{note}   {rows}x{columns}", color="0.35", points=6.5)


_BAR = as_bytes(colorize(np.full((1, 1), 0.25), SEQUENTIAL))


def _shorten_name(layer: str, max_length: int = 14) -> str:
    return layer if len(layer) <= max_length else f"…{layer[-max_length + 1 :]}"
