"""Charts over depth: profiles, ridges of histograms, similarity of layers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from camdistill.report.figures.pictures import SEQUENTIAL, Picture, render_figure

COLORS = ("#3b528b", "#e1622f", "#2a9d6f", "#8a5fb0")  # of networks, in their order
BESIDE = ("#e1622f", "#8a5fb0")  # of what is compared with: apart from every shade of viridis
Series = Float[np.ndarray, "_"]


class ProfileLine(NamedTuple):
    """A statistic of every layer of one network.

    Attributes:
        depth: In percent, 0 at the image and 100 at the head.
        values: NaN where it isn't defined: a gap in the line.
    """

    depth: Series
    values: Series


class LogHistogram(NamedTuple):
    """Counts of positive values between powers of ten, and what is not among them.

    Attributes:
        edges: log10 of the bins' edges.
        counts: One fewer.
        zeros: Share of all finite values that are exactly zero; NaN without any.
        nonfinite: How many are not finite.
    """

    edges: Float[np.ndarray, "bins_and_one"]
    counts: Float[np.ndarray, "bins"]
    zeros: float = 0.0
    nonfinite: int = 0


def profile_chart(
    table: Mapping[str, Mapping[str, ProfileLine]],
    *,
    title: str = "",
    notes: Mapping[str, str] | None = None,
    columns: int = 3,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    graded: bool = False,
    references: Mapping[str, Mapping[str, ProfileLine]] | None = None,
) -> Picture:
    """One chart a statistic, against depth, all networks on the same axes.

    Args:
        table: Profiles by statistic, then by network.
        title: On top.
        notes: A line below a statistic's name: its meaning or unit.
        columns: Charts in a row.
        ranges: Ends of a statistic's axis, where they are known.
        graded: Whether lines are stages of one network, so that colors go from dark to bright.
        references: Profiles to compare with, likewise: dashed, in colors of their own.
    """
    if not table:
        raise ValueError("a chart needs at least one statistic")
    rows = -(-len(table) // columns)
    columns_used = min(columns, len(table))
    tall, wide = 2.35 * rows + 0.75, 3.5 * columns_used + 0.2
    figure = Figure(figsize=(wide, tall), dpi=120)
    grid = figure.subplots(rows, columns_used, squeeze=False)
    figure.subplots_adjust(
        left=0.5 / wide, right=1 - 0.15 / wide, bottom=0.5 / tall, top=1 - 0.85 / tall,
        hspace=0.55, wspace=0.24,
    )  # fmt: skip
    names = list(dict.fromkeys(name for lines in table.values() for name in lines))
    shades = _shades(names, graded)
    reference_names = dict.fromkeys(name for lines in (references or {}).values() for name in lines)
    dashed = dict(zip(reference_names, BESIDE, strict=False))
    for axes, (statistic, lines) in zip(grid.flat, table.items(), strict=False):
        for name, line in lines.items():
            axes.plot(*line, "o-", color=shades[name], markersize=3, linewidth=1.5)
        for name, line in (references or {}).get(statistic, {}).items():
            axes.plot(*line, "--", color=dashed[name], linewidth=1.2)
        axes.set_title(statistic, fontsize=9, loc="left", weight="bold", pad=15, parse_math=False)
        note = (notes or {}).get(statistic, "")
        axes.text(
            0, 1.04, note, transform=axes.transAxes, fontsize=7, color="0.4", parse_math=False
        )
        axes.set_xlim(-3, 103)
        if ranges and statistic in ranges:
            low, high = ranges[statistic]
            axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
        _style_axes(axes)
    for axes in grid.flat[len(table) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("depth (% of layers)", fontsize=8)
    _headline(figure, 0.12 / wide, 1 - 0.22 / tall, title)
    _legend(figure, shades, dashed, wide, tall)
    return render_figure(figure)


def ridge_chart(
    histograms: Mapping[str, Mapping[str, LogHistogram]],
    *,
    title: str = "",
    axis: str = "activation",
) -> Picture:
    """Histograms of all layers one above the other, first layer on top; one column a network.

    Zeros are not drawn: their share is written at the right, so that they make no spike.

    Args:
        histograms: By network, then by layer in the order of depth.
        title: On top.
        axis: What is counted.
    """
    if not histograms or not all(histograms.values()):
        raise ValueError("a ridge chart needs at least one network with one layer")
    most_layers = max(len(layers) for layers in histograms.values())
    letters = max(len(layer) for layers in histograms.values() for layer in layers)
    pitch = 0.3 if most_layers <= 24 else 0.22
    names = 0.25 + 0.075 * letters
    column_width = names + 3.3 + 0.75
    wide, tall = column_width * len(histograms), pitch * (most_layers + 1) + 1.15
    figure = Figure(figsize=(wide, tall), dpi=120)
    limits = _axis_limits(histograms)
    for place, (network, layers) in enumerate(histograms.items()):
        height = pitch * (len(layers) + 1)
        axes = figure.add_axes(
            (
                (place * column_width + names) / wide,
                (tall - 0.65 - height) / tall,
                3.3 / wide,
                height / tall,
            )
        )
        color = COLORS[place % len(COLORS)]
        _ridges(axes, layers, limits, color)
        axes.set_title(
            network, fontsize=9.5, color=color, weight="bold", loc="left", pad=6, parse_math=False
        )
        axes.set_xlabel(f"{axis}, powers of ten", fontsize=8, parse_math=False)
        axes.text(1.02, 1.01, "zero", transform=axes.transAxes, fontsize=7.5, color="0.35")
    _headline(figure, 0.12 / wide, 1 - 0.2 / tall, title)
    return render_figure(figure)


def _ridges(
    axes: Axes, layers: Mapping[str, LogHistogram], limits: tuple[float, float], color: str
) -> None:
    for number, histogram in enumerate(layers.values()):
        base = len(layers) - 1 - number
        axes.axhline(base, color="0.9", linewidth=0.7, zorder=number)
        density = np.asarray(histogram.counts, np.float64) / np.diff(histogram.edges)
        if density.sum() > 0:
            level = 1.55 * density / density.max()
            middle = (histogram.edges[1:] + histogram.edges[:-1]) / 2
            axes.fill_between(
                middle, base, base + level, color=color, alpha=0.55, linewidth=0, zorder=number + 1
            )
            axes.plot(middle, base + level, color=color, linewidth=0.9, zorder=number + 1)
        broken = histogram.nonfinite > 0
        words = "–" if np.isnan(histogram.zeros) else f"{100 * histogram.zeros:.0f} %"
        if broken:
            words = "none finite" if np.isnan(histogram.zeros) else f"{words} NaN!"
        axes.text(
            1.02,
            base + 0.15,
            words,
            transform=axes.get_yaxis_transform(),
            fontsize=7.5,
            color="#d62728" if broken or histogram.zeros > 0.99 else "0.35",
        )
    axes.set_yticks(range(len(layers)), list(layers)[::-1], fontsize=7.5, parse_math=False)
    axes.set_ylim(-0.2, len(layers) + 0.75)
    axes.set_xlim(*limits)
    axes.tick_params(axis="both", length=0, labelsize=7.5)
    axes.set_xticks(
        ticks := list(range(int(np.ceil(limits[0])), int(np.floor(limits[1])) + 1)),
        [f"$10^{{{tick}}}$" for tick in ticks],
    )
    axes.grid(axis="x", color="0.94", zorder=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _axis_limits(histograms: Mapping[str, Mapping[str, LogHistogram]]) -> tuple[float, float]:
    """An axis that holds all but the outermost 0.05 % of every layer, in tenths of a decade."""
    low, high = [], []
    for layers in histograms.values():
        for histogram in layers.values():
            total = np.cumsum(histogram.counts)
            if total[-1] > 0:
                low.append(histogram.edges[np.searchsorted(total, 0.0005 * total[-1])])
                high.append(histogram.edges[1:][np.searchsorted(total, 0.9995 * total[-1])])
    if not low:
        return -1.0, 1.0
    first, last = float(np.floor(min(low) * 10) / 10), float(np.ceil(max(high) * 10) / 10)
    return max(first, last - 6.0), last + 0.1


def similarity_chart(
    values: Float[np.ndarray, "rows columns"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    note: str = "",
    row_axis: str = "teacher",
    column_axis: str = "student",
) -> Picture:
    """A heat map from 0 to 1 with the numbers in it; NaN is gray and says so.

    Args:
        values: Similarity of each row's layer to each column's.
        rows: Layers from top to bottom.
        columns: Layers from left to right.
        title: On top.
        note: Below the title: which estimator, of how many images.
        row_axis: What the rows are.
        column_axis: What the columns are.
    """
    cell = 0.42 if max(values.shape) <= 14 else 0.27
    left = 0.5 + 0.078 * max(map(len, rows))
    below = 0.45 + 0.06 * max(map(len, columns))
    tall, wide = values.shape[0] * cell, values.shape[1] * cell
    figure_width = max(left + wide + 0.95, 0.075 * max(1.25 * len(title), len(note)) + 0.3)
    height = 0.75 + tall + below
    figure = Figure(figsize=(figure_width, height), dpi=120)
    axes = figure.add_axes(
        (left / figure_width, below / height, wide / figure_width, tall / height)
    )
    finite_values = np.ma.masked_invalid(values)
    axes.set_facecolor("0.8")
    image = axes.imshow(finite_values, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
    if cell > 0.3 or values.size <= 400:
        for (row, column), value in np.ndenumerate(values):
            words = "–" if np.isnan(value) else f"{value:.2f}".replace("0.", ".")
            dark = bool(value < 0.6)
            axes.text(
                column, row, words, ha="center", va="center",
                fontsize=7 if cell > 0.3 else 5, color="white" if dark else "black",
            )  # fmt: skip
    axes.set_xticks(
        range(len(columns)), columns, rotation=45, ha="right", fontsize=7.5, parse_math=False
    )
    axes.set_yticks(range(len(rows)), rows, fontsize=7.5, parse_math=False)
    axes.tick_params(length=0)
    axes.set_xlabel(column_axis, fontsize=8.5, parse_math=False)
    axes.set_ylabel(row_axis, fontsize=8.5, parse_math=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.add_axes(
        ((left + wide + 0.18) / figure_width, below / height, 0.12 / figure_width, tall / height)
    )
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=7, length=2)
    bar.spines["outline"].set_visible(False)
    _headline(figure, 0.12 / figure_width, 1 - 0.2 / height, title)
    figure.text(
        *(0.12 / figure_width, 1 - 0.42 / height, note),
        fontsize=7.5, color="0.4", va="center", parse_math=False,
    )  # fmt: skip
    return render_figure(figure)


def _headline(figure: Figure, x: float, y: float, title: str) -> None:
    # A title may hold a path of the user's, and that two dollars.
    figure.text(x, y, title, fontsize=10.5, weight="bold", va="center", parse_math=False)


def _style_axes(axes: Axes) -> None:
    axes.grid(color="0.92", zorder=0)
    axes.tick_params(axis="both", length=0, labelsize=7.5)
    axes.locator_params(axis="y", nbins=5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("0.7")


def _shades(names: Sequence[str], graded: bool) -> dict[str, str]:
    if not graded:
        return {name: COLORS[place % len(COLORS)] for place, name in enumerate(names)}
    # The brightest end of viridis is lost on white.
    levels = np.linspace(0, 0.85, len(names))
    return {
        name: to_hex(mpl.colormaps[SEQUENTIAL](level))
        for name, level in zip(names, levels, strict=True)
    }


def _legend(
    figure: Figure, shades: Mapping[str, str], dashed: Mapping[str, str], wide: float, tall: float
) -> None:
    """Names at the top right; of many the first and the last."""
    name_limit = 2 if dashed else 4  # beside a title
    named = list(shades) if len(shades) <= name_limit else [next(iter(shades)), list(shades)[-1]]
    marks = [("●", name, shades[name]) for name in named]
    marks += [("╌", name, color) for name, color in dashed.items()]
    right_edge = wide - 0.2
    for mark, name, color in reversed(marks):
        figure.text(
            right_edge / wide,
            1 - 0.22 / tall,
            f"{mark} {name}",
            parse_math=False,
            color=color,
            fontsize=9.5,
            weight="bold",
            ha="right",
            va="center",
        )
        right_edge -= 0.35 + 0.09 * len(name)
