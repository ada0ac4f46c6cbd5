"""Arrays in, pictures out: maps over images, and results with their intervals.

Pictures are RGB uint8 arrays (height, width, 3), ready for `save_png` and for TensorBoard. Nothing
here knows a network or a logger; `save_png` alone touches a file.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from PIL.Image import Resampling

from camdistill.measure.intervals import Interval
from camdistill.report.results import write_atomically

Picture = UInt8[np.ndarray, "tall wide 3"]
Colours = Float[np.ndarray, "tall wide 3"]
# Maps of two networks have two resolutions, so their axes have no common name.
Grid = Shaped[np.ndarray, "_ _"]
Shares = Float[np.ndarray, "_ _"]

SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"
OPACITY = 0.6  # of the map over the image
PALEST = 0.35  # what black becomes below a map: on a dark image colours would not match their bar
NOT_A_NUMBER = (255, 0, 255)  # a colour that no colour map here has
DPI = 100
GAP, LINE, MARGIN = 6, 17, 10  # pixels: between tiles, of a line of text, around everything


class Row(NamedTuple):
    """One row of a map panel.

    Attributes:
        image: (C, H, W) in [0, 1]; one channel is grey.
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
    rows: Sequence[Row],
    *,
    title: str = "",
    size: int = 128,
    scale: Literal["own", "shared"] = "own",
    abreast: int = 1,
    first: str = "teacher",
) -> Picture:
    """Image | teacher's map | student's map | difference, one row after the other.

    Maps are rectified. Within a row all colours mean the same; what they mean is written below.

    Args:
        rows: What to draw; rows without a student's map show the teacher's alone.
        title: Written on top.
        size: Longest side of a tile, about: small images grow by whole factors, without smoothing.
        scale: "own": each map is a share of its own maximum, as Pearson sees it. "shared": both are
            shares of the larger of the two maxima, as an L2 distance sees them.
        abreast: Rows set side by side in one line of the panel.
        first: What the network of the first map is called.
    """
    if not rows:
        raise ValueError("a panel needs at least one row")
    compared = any(row.student is not None for row in rows)
    heads = ["image", first, "student", "student - teacher"][: 4 if compared else 2]
    tiles = [_tiles(row, size, scale, compared) for row in rows]
    height = max(tile.pixels.shape[0] for line in tiles for tile in line)
    width = max(tile.pixels.shape[1] for line in tiles for tile in line)
    deepest = max(len(row.caption) for row in rows)
    text = 8 + 7 * max((len(line) for row in rows for line in row.caption), default=0)
    pitch = max(height + LINE, deepest * LINE) + GAP
    strip = text + len(heads) * (width + GAP) + MARGIN
    lines = -(-len(rows) // abreast)
    top = MARGIN + (LINE + GAP if title else 0)
    legend = 3 * LINE
    sheet = _Sheet(
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
                sheet.write(x, top, heads[number], colour="0.35")
            sheet.paste(x, upper, tile.pixels)
            sheet.write(x, upper + tile.pixels.shape[0] + 1, tile.note, colour="0.35", points=7.0)
    share = "map / its own max" if scale == "own" else "map / row's max"
    bottom = top + LINE + lines * pitch + GAP
    left = MARGIN + text
    sheet.bar(left, bottom, 2 * width, SEQUENTIAL, ("0", share, "1"))
    if compared:
        ends = ("-1", "difference", "1")
        sheet.bar(left + 2 * (width + GAP), bottom, 2 * width, DIVERGING, ends)
    return sheet.picture()


def overlay(
    image: Float[np.ndarray, "channels height width"], share: Shares, tall: int, wide: int
) -> Picture:
    """A map in [0, 1] in colour over the image in pale grey; NaN is magenta."""
    grey = PALEST + (1 - PALEST) * _enlarged(image, tall, wide).mean(axis=-1, keepdims=True)
    level, missing = _stretched(share, tall, wide)
    mixed = (1 - OPACITY) * grey + OPACITY * _coloured(level, SEQUENTIAL)
    mixed[missing] = np.array(NOT_A_NUMBER) / 255
    return _bytes(mixed)


def interval_chart(
    table: Mapping[str, Mapping[str, Interval]],
    *,
    title: str = "",
    references: Mapping[str, float | int] | None = None,
) -> Picture:
    """A dot with its interval for each arm (row), one chart for each measure (column).

    Args:
        table: Intervals by arm, then by measure.
        title: Written on top: what the interval is, and of how many.
        references: A dashed line in the chart of a measure: a target, a control.
    """
    arms = list(table)
    measures = list(dict.fromkeys(name for row in table.values() for name in row))
    if not measures:
        raise ValueError("a chart needs at least one arm with one measure")
    # Fixed heights above and below the charts, in inches, however many arms there are.
    above, below, tall = 0.65 if title else 0.35, 0.4, 0.36 * len(arms) + 0.15
    names = 0.15 + 0.08 * max(map(len, arms))
    wide = 2.9 * len(measures)
    figure = Figure(figsize=(names + wide + 0.2, above + tall + below), dpi=130)
    grid = figure.subplots(1, len(measures), squeeze=False, sharey=True)
    figure.subplots_adjust(
        left=names / (names + wide + 0.2),
        right=1 - 0.2 / (names + wide + 0.2),
        bottom=below / (above + tall + below),
        top=1 - above / (above + tall + below),
        wspace=0.12,
    )
    if title:
        figure.suptitle(title, fontsize=10, x=0.015, ha="left", weight="bold")
    for axes, measure in zip(grid[0], measures, strict=True):
        found = {arm: row[measure] for arm, row in table.items() if measure in row}
        _draw_intervals(axes, arms, found, (references or {}).get(measure))
        axes.set_title(measure, fontsize=9, loc="left")
    grid[0, 0].set_yticks(range(len(arms)), arms, fontsize=9)
    grid[0, 0].set_ylim(len(arms) - 0.5, -0.6)
    return _rendered(figure)


def save_png(path: Path, picture: Picture) -> Path:
    """Writes a picture without loss, whole or not at all; gives back the path.

    Raises:
        UserError: The file can't be written.
    """
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG", optimize=True)
    write_atomically(path, content.getvalue())
    return path


class _Sheet:
    """A white page with pixel positions from the top left, on which tiles keep their pixels."""

    def __init__(self, width: int, height: int) -> None:
        self._height = height
        self._figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        self._tiles: list[tuple[int, int, Picture]] = []

    def write(
        self,
        x: int,
        y: int,
        words: str,
        *,
        bold: bool = False,
        colour: str = "black",
        points: float = 8.0,
        align: Literal["left", "center", "right"] = "left",
    ) -> None:
        width = self._figure.get_figwidth() * DPI
        self._figure.text(
            x / width,
            1 - y / self._height,
            words,
            va="top",
            ha=align,
            color=colour,
            fontsize=points,
            weight="bold" if bold else "normal",
            parse_math=False,
        )

    def paste(self, x: int, y: int, pixels: Picture) -> None:
        self._tiles.append((x, y, pixels))

    def bar(self, x: int, y: int, width: int, colours: str, words: tuple[str, str, str]) -> None:
        """A horizontal colour bar with words at its left end, middle and right end."""
        ramp = np.broadcast_to(np.linspace(0, 1, width), (8, width))
        self.paste(x, y, _bytes(_coloured(ramp, colours)))
        places: tuple[tuple[int, Literal["left", "center", "right"]], ...] = (
            (x, "left"),
            (x + width // 2, "center"),
            (x + width, "right"),
        )
        for (place, align), word in zip(places, words, strict=True):
            self.write(place, y + 11, word, colour="0.35", points=7.5, align=align)

    def picture(self) -> Picture:
        page = _rendered(self._figure)
        for x, y, pixels in self._tiles:
            height, width, _ = pixels.shape
            page[y : y + height, x : x + width] = pixels
        return page


def _tiles(row: Row, size: int, scale: str, compared: bool) -> list[_Tile]:
    tall, wide = _tile_size(row.image.shape[1:], size)
    plain = _bytes(_enlarged(row.image, tall, wide))
    peaks = [_peak(grid) for grid in (row.teacher, row.student) if grid is not None]
    peak = {"teacher": peaks[0], "student": peaks[-1]}
    if scale == "shared":
        peak = dict.fromkeys(peak, max(peaks))
    teacher = _share(row.teacher, peak["teacher"])
    tiles = [_Tile(plain), _Tile(overlay(row.image, teacher, tall, wide), _note(row.teacher))]
    if row.student is not None:
        student = _share(row.student, peak["student"])
        tiles.append(_Tile(overlay(row.image, student, tall, wide), _note(row.student)))
        tiles.append(_Tile(_difference(student, teacher, tall, wide)))
    elif compared:
        tiles += [_Tile(np.full((tall, wide, 3), 235, np.uint8), "none")] * 2
    return tiles


def _difference(student: Shares, teacher: Shares, tall: int, wide: int) -> Picture:
    """Shares against shares: white is equal, red where the student has more, blue where less."""
    (more, gone), (less, lost) = (_stretched(share, tall, wide) for share in (student, teacher))
    pixels = _coloured((more - less + 1) / 2, DIVERGING)
    pixels[gone | lost] = np.array(NOT_A_NUMBER) / 255
    return _framed(_bytes(pixels))


def _peak(values: Grid) -> float:
    finite = values[np.isfinite(values)]
    return max(float(finite.max()), 0.0) if finite.size else 0.0


def _share(values: Grid, peak: float) -> Shares:
    """Rectified and divided by `peak`; a map with nothing positive is 0; NaN and inf are NaN."""
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    positive = np.maximum(values, 0)
    share: Shares = np.minimum(positive / peak, 1) if peak > 0 else positive * 0
    return share


def _note(values: Grid) -> str:
    """The map's maximum, or what is the matter with it."""
    broken = int((~np.isfinite(values)).sum())
    if broken:
        return f"NaN: {broken} of {values.size}"
    if values.max() <= 0:
        return "blank"
    return f"{'constant' if values.min() == values.max() else 'max'} {values.max():.3g}"


def _tile_size(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """Whole multiples of a small image; a large one shrinks to `size`."""
    height, width = shape
    longest = max(height, width)
    factor = max(round(size / longest), 1) if longest <= 1.25 * size else size / longest
    return max(round(height * factor), 1), max(round(width * factor), 1)


def _enlarged(image: Float[np.ndarray, "channels height width"], tall: int, wide: int) -> Colours:
    """The image as RGB at its tile's size: pixels stay square when it grows."""
    colours = np.moveaxis(np.clip(np.nan_to_num(image), 0, 1), 0, -1)
    if colours.shape[-1] not in (1, 3):
        raise ValueError(f"an image has 1 or 3 channels, not {colours.shape[-1]}")
    colours = np.broadcast_to(colours, (*colours.shape[:2], 3))
    grows = tall >= colours.shape[0]
    way = Resampling.NEAREST if grows else Resampling.LANCZOS
    resized = Image.fromarray(_bytes(colours)).resize((wide, tall), way)
    return np.asarray(resized, np.float64) / 255


def _stretched(
    share: Shares, tall: int, wide: int
) -> tuple[Float[np.ndarray, "tall wide"], Bool[np.ndarray, "tall wide"]]:
    """Bilinear, edges held, as `align_corners=False`; and where a NaN's cell is."""
    known = Image.fromarray(np.nan_to_num(share).astype(np.float32))
    level = np.asarray(known.resize((wide, tall), Resampling.BILINEAR), np.float64)
    missing = Image.fromarray(np.isnan(share).astype(np.uint8))
    return level, np.asarray(missing.resize((wide, tall), Resampling.NEAREST)) > 0


def _coloured(level: Shares, colours: str) -> Colours:
    rgb: Colours = mpl.colormaps[colours](level)[..., :3]
    return rgb


def _bytes(colours: Colours) -> Picture:
    pixels: Picture = np.rint(np.clip(colours, 0, 1) * 255).astype(np.uint8)
    return pixels


def _framed(pixels: Picture) -> Picture:
    """A thin grey border, so that white has an end."""
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        pixels[edge] = 200
    return pixels


def _draw_intervals(
    axes: Axes, arms: Sequence[str], found: Mapping[str, Interval], reference: float | int | None
) -> None:
    if reference is not None:
        axes.axvline(reference, color="0.55", linestyle="--", linewidth=1, zorder=0)
    for place, arm in enumerate(arms):
        if arm not in found:
            continue
        mean, low, high = found[arm]
        if np.isfinite([low, high]).all():
            axes.plot([low, high], [place, place], color="#3b528b", linewidth=2.2, zorder=2)
            axes.plot([low, high], [place, place], "|", color="#3b528b", markersize=7, zorder=2)
        axes.plot(mean, place, "o", color="#3b528b", markersize=5.5, zorder=3)
        axes.annotate(
            f"{mean:.3f}",
            (mean, place),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
        )
    axes.margins(x=0.16)
    axes.grid(axis="x", color="0.92", zorder=0)
    axes.tick_params(axis="both", length=0, labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _rendered(figure: Figure) -> Picture:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
