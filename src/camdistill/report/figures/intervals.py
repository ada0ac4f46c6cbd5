"""Charts of results with their intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from camdistill.measure.intervals import Interval
from camdistill.report.figures.pictures import Picture, render_figure


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
    wide = max(2.9 * len(measures), 0.085 * len(title) - names)  # the title is not cut
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
        figure.suptitle(title, fontsize=10, x=0.015, ha="left", weight="bold", parse_math=False)
    for axes, measure in zip(grid[0], measures, strict=True):
        interval_by_arm = {arm: row[measure] for arm, row in table.items() if measure in row}
        _draw_intervals(axes, arms, interval_by_arm, (references or {}).get(measure))
        axes.set_title(measure, fontsize=9, loc="left", parse_math=False)
    grid[0, 0].set_yticks(range(len(arms)), arms, fontsize=9, parse_math=False)
    grid[0, 0].set_ylim(len(arms) - 0.5, -0.6)
    return render_figure(figure)


def _draw_intervals(
    axes: Axes,
    arms: Sequence[str],
    interval_by_arm: Mapping[str, Interval],
    reference: float | int | None,
) -> None:
    if reference is not None:
        axes.axvline(reference, color="0.55", linestyle="--", linewidth=1, zorder=0)
    for place, arm in enumerate(arms):
        if arm not in interval_by_arm:
            continue
        mean, low, high = interval_by_arm[arm]
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
