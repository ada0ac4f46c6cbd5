"""Draws the card of a unit: patches, activity and concepts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes

from camdistill.report.figures.depth import COLORS, LogHistogram
from camdistill.report.figures.pictures import GAP, LINE, MARGIN, Picture, Sheet
from camdistill.report.figures.tiles import Tile

PATCH = 72  # pixels: side of a patch on a card
SIDE = 96  # of what stands beside the patches
CHART = 250  # width of the charts


class UnitCard(NamedTuple):
    """What is known of one unit; what isn't known is left empty.

    Attributes:
        title: Network, layer, unit.
        lines: Words below it: numbers, what stands out.
        patches: Pieces of images that excite it most, the best first; at most 9.
        beside: Other pictures with their names: the patches' mean, the maximizing image, the
            filter.
        histogram: Histogram of its activations.
        concepts: Name, intersection over union, and what chance has; the best first.
    """

    title: str
    lines: Sequence[str] = ()
    patches: Sequence[Tile] = ()
    beside: Sequence[tuple[str, Tile]] = ()
    histogram: LogHistogram | None = None
    concepts: Sequence[tuple[str, float, float]] = ()


def unit_card(card: UnitCard) -> Picture:
    """One card."""
    left = MARGIN
    middle = left + 3 * (PATCH + GAP) + 2 * GAP
    right = middle + (SIDE + 4 * GAP if card.beside else 0)
    charts = card.histogram is not None or bool(card.concepts)
    # The charts' labels stand left of them.
    width = right + (CHART + 110 if charts else 0) + MARGIN
    top = MARGIN + LINE + 2 + LINE * len(card.lines) + GAP
    tall = LINE + 3 * (PATCH + LINE)
    tall = max(tall, sum(LINE + tile.pixels.shape[0] + LINE for _, tile in card.beside))
    words = max([7 * len(card.title), *(6 * len(line) for line in card.lines)]) + 2 * MARGIN
    sheet = Sheet(max(width, words), top + tall + MARGIN)
    sheet.write(left, MARGIN, card.title, bold=True, points=9.5)
    for number, line in enumerate(card.lines):
        sheet.write(left, MARGIN + LINE + 2 + number * LINE, line, color="0.3")
    _draw_patches(sheet, left, top, card.patches[:9])
    y = top
    for name, tile in card.beside:
        sheet.write(middle, y, name, color="0.35")
        sheet.paste(middle, y + LINE, tile.pixels)
        sheet.write(
            middle, y + LINE + tile.pixels.shape[0] + 1, tile.note, color="0.35", points=7.0
        )
        y += 2 * LINE + tile.pixels.shape[0]
    if card.histogram is not None:
        sheet.write(right + 20, top, "activations above zero, all places", color="0.35")
        axes = sheet.axes(right + 30, top + LINE + 4, CHART, 84)
        _draw_histogram(axes, card.histogram)
    if card.concepts:
        y = top + LINE + 4 + 84 + 2 * LINE + 8 if card.histogram is not None else top
        sheet.write(right + 20, y, "responds to (IoU; tick: chance)", color="0.35")
        axes = sheet.axes(right + 110, y + LINE + 2, CHART - 120, 20 * len(card.concepts))
        _draw_concepts(axes, card.concepts)
    return sheet.picture()


def unit_sheet(cards: Sequence[UnitCard], *, abreast: int = 1) -> Picture:
    """Cards below each other, or side by side in rows."""
    if not cards:
        raise ValueError("a sheet needs at least one card")
    pictures = [unit_card(card) for card in cards]
    rows = [pictures[start : start + abreast] for start in range(0, len(pictures), abreast)]
    wide = max(picture.shape[1] for picture in pictures)
    lines = []
    for row in rows:
        tall = max(picture.shape[0] for picture in row)
        cells = [_fill_page(picture, tall, wide) for picture in row]
        cells += [np.full((tall, wide, 3), 255, np.uint8)] * (abreast - len(row))
        lines.append(np.concatenate(cells, 1))
    return np.concatenate(lines)


def _fill_page(picture: UInt8[np.ndarray, "_ _ 3"], tall: int, wide: int) -> Picture:
    """The picture at the top left of a white page, a thin line below it."""
    page = np.full((tall, wide, 3), 255, np.uint8)
    page[: picture.shape[0], : picture.shape[1]] = picture
    page[-1, MARGIN : wide - MARGIN] = 215
    return page


def _draw_patches(sheet: Sheet, left: int, top: int, patches: Sequence[Tile]) -> None:
    words = "most exciting, one an image" if patches else "nothing excites it"
    sheet.write(left, top, words, color="0.35")
    for number, tile in enumerate(patches):
        x = left + (number % 3) * (PATCH + GAP)
        y = top + LINE + (number // 3) * (PATCH + LINE)
        tall, wide, _ = tile.pixels.shape
        sheet.paste(x + (PATCH - wide) // 2, y + (PATCH - tall) // 2, tile.pixels)
        sheet.write(
            x + PATCH // 2, y + PATCH + 1, tile.note, color="0.35", points=6.5, align="center"
        )


def _draw_histogram(axes: Axes, histogram: LogHistogram) -> None:
    width = np.diff(histogram.edges)
    share = histogram.counts / max(histogram.counts.sum(), 1)
    axes.bar(histogram.edges[:-1], share / width, width, align="edge", color=COLORS[0], linewidth=0)
    used = np.flatnonzero(histogram.counts)
    if len(used):
        low, high = histogram.edges[used[0]], histogram.edges[used[-1] + 1]
        axes.set_xlim(max(low, high - 5), high)
    ticks = [tick for tick in range(-9, 10) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"$10^{{{tick}}}$" for tick in ticks])
    axes.set_yticks([])
    axes.tick_params(axis="x", length=2, labelsize=7)
    words = (
        "no finite value" if np.isnan(histogram.zeros) else f"zero {100 * histogram.zeros:.1f} %"
    )
    words += f"\nnot finite: {histogram.nonfinite}" if histogram.nonfinite else ""
    axes.text(0.02, 0.95, words, transform=axes.transAxes, fontsize=7.5, va="top", color="0.3")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_concepts(axes: Axes, concepts: Sequence[tuple[str, float, float]]) -> None:
    places = range(len(concepts))[::-1]
    values = [iou for _, iou, _ in concepts]
    axes.barh(places, values, 0.62, color=COLORS[0])
    for place, (_, iou, chance) in zip(places, concepts, strict=True):
        axes.plot([chance] * 2, [place - 0.4, place + 0.4], color=COLORS[1], linewidth=1.6)
        axes.text(max(iou, chance) + 0.015, place, f"{iou:.2f}", fontsize=7.5, va="center")
    axes.set_yticks(places, [name for name, _, _ in concepts], fontsize=7.5, parse_math=False)
    axes.set_xlim(0, max(0.3, 1.3 * max(values)))
    axes.set_ylim(-0.6, len(concepts) - 0.4)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
