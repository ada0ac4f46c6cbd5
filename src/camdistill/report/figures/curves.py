"""Curves of several explainers over one axis."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from camdistill.report.figures.pictures import Picture, render_figure

# Okabe and Ito's and Tol's colors, which differ for every kind of color vision.
_COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#882255", "#117733", "#332288", "#AA4499"),
)
_GRAYS = ("0.6", "0.0", "0.3")


def removal_chart(
    charts: Mapping[str, Mapping[str, Float[np.ndarray, "images levels"]]],
    fractions: Sequence[float],
    *,
    dashed: Sequence[str] = (),
) -> Picture:
    """A chart for each way of removing: mean probability over the share of pixels.

    Args:
        charts: Probabilities by chart, then by map. An image without (NaN) is left out of that
            map's mean, and the legend says of how many it is; a map without any has no line.
        fractions: Fractions of the pixels, at each level.
        dashed: Maps drawn with dashes, in grays: the controls.
    """
    if not charts:
        raise ValueError("there is no curve to draw")
    figure = Figure(figsize=(5.2 * len(charts), 3.9), dpi=110, layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(1, len(charts), squeeze=False, sharey=True)[0], charts.items(), strict=True
    ):
        colors, grays = cycle(_COLORS), cycle(_GRAYS)
        for name, values in curves.items():
            curve = values[~np.isnan(values).any(1)]
            if not len(curve):
                continue
            axes.plot(
                fractions,
                curve.mean(0),
                label=name if len(curve) == len(values) else f"{name} (n = {len(curve)})",
                color=next(grays) if name in dashed else next(colors),
                linestyle="--" if name in dashed else "-",
                linewidth=1.6,
            )
        axes.set_title(title, fontsize=10, loc="left", parse_math=False)
        axes.set_xlabel("share of the pixels")
        axes.set_ylim(0, 1)
        axes.grid(color="0.92")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    first = figure.axes[0]
    first.set_ylabel(
        f"mean probability, n = {len(next(iter(next(iter(charts.values())).values())))}"
    )
    if figure.axes[-1].get_lines():
        for legend_text in figure.axes[-1].legend(fontsize=8, frameon=False).get_texts():
            legend_text.set_parse_math(False)
    return render_figure(figure)
