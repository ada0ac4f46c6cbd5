"""Writes an evaluation as pictures, as files and into TensorBoard."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from camdistill import tags
from camdistill.experiments.evaluation.evaluation_run import (
    Evaluation,
    example_maps,
    explainer_maps,
)
from camdistill.experiments.evaluation.evaluation_values import CURVES, Values, sign_of
from camdistill.experiments.evaluation.pooling import EvaluationPool
from camdistill.measure.intervals import Interval
from camdistill.measure.metrics import metric_of
from camdistill.measure.removal import LEVELS
from camdistill.report.figures.curves import removal_chart
from camdistill.report.figures.intervals import interval_chart
from camdistill.report.figures.maps import PanelRow, map_panel
from camdistill.report.figures.pictures import Picture, save_png
from camdistill.report.tensorboard import TensorBoardLogger

SHOWN = 4  # best images, and as many worst ones
ABREAST = 5  # charts in one line


def write_pictures(
    evaluation: Evaluation,
    pool: EvaluationPool,
    table: Mapping[str, Mapping[str, Interval]],
    text: str,
    folder: Path,
) -> None:
    """Writes charts, curves, best and worst images of one evaluation as PNG files and as cards."""
    charts_by_name = draw_charts(pool, table)
    charts_by_name[tags.BEST_AND_WORST] = _best_and_worst(evaluation, pool.runs[0])
    write_cards(charts_by_name, text, folder)


def write_cards(charts_by_name: Mapping[str, Picture | None], text: str, folder: Path) -> None:
    """Writes pictures, by their tag, as PNG files and as TensorBoard cards, beside the text.

    What an earlier run left of these, in files and in cards, goes: None is no picture.
    """
    for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
        old.unlink()
    logger = TensorBoardLogger(folder, version="tensorboard")
    for tag, picture in charts_by_name.items():
        path = folder / f"{tags.short(tag)}.png"
        if picture is None:
            path.unlink(missing_ok=True)
        else:
            save_png(path, picture)
            logger.log_picture(tag, picture, 0)
    logger.log_text(tags.EVALUATION_TABLE, f"```\n{text}\n```")
    logger.log_text(tags.HOW_TO_READ, tags.how_to_read())
    logger.finalize("success")


def draw_charts(
    pool: EvaluationPool, table: Mapping[str, Mapping[str, Interval]]
) -> dict[str, Picture | None]:
    """By tag: intervals of what was measured, and the curves; None where there is nothing."""
    return {
        tags.FAITHFULNESS: _chart(pool, table, mask=False),
        tags.LOCALIZATION: _chart(pool, table, mask=True),
        tags.CURVES: _curves(pool),
    }


def _chart(
    pool: EvaluationPool, table: Mapping[str, Mapping[str, Interval]], *, mask: bool
) -> Picture | None:
    chosen = [metric for metric in pool.metrics if (metric_of(metric).use == "mask") == mask]
    titles = {metric: f"{metric} ({'+' if metric_of(metric).higher else '-'})" for metric in chosen}
    rows = {
        entry: {titles[metric]: row[metric] for metric in chosen if metric in row}
        for entry, row in table.items()
    }
    drawn_titles = [
        title for title in titles.values() if any(title in row for row in rows.values())
    ]
    several = " and seeds" if any(pool.seeds(name) > 1 for name in pool.real) else ""
    title = f"+ higher, - lower is better; 95 % intervals over {pool.images} images{several}"
    lines = []
    for start in range(0, len(drawn_titles), ABREAST):
        part = drawn_titles[start : start + ABREAST]
        chosen_rows = {
            entry: {name: row[name] for name in part if name in row} for entry, row in rows.items()
        }
        lines.append(interval_chart(chosen_rows, title=title if start == 0 else ""))
    return _stack_lines(lines) if lines else None


def _stack_lines(lines: Sequence[Picture]) -> Picture:
    """One below the other, on white."""
    width = max(line.shape[1] for line in lines)
    wide = [
        np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255)
        for line in lines
    ]
    return np.concatenate(wide)


def _curves(pool: EvaluationPool) -> Picture | None:
    curves_by_metric: dict[str, dict[str, Float[np.ndarray, "rows levels"]]] = {}
    for metric in CURVES:
        for name in (*pool.real, "random", "oracle"):
            if (curve := pool.curve(name, metric)) is not None:
                curves_by_metric.setdefault(metric, {})[name] = curve
    return (
        removal_chart(curves_by_metric, LEVELS, dashed=("random", "oracle"))
        if curves_by_metric
        else None
    )


def _best_and_worst(evaluation: Evaluation, values: Values) -> Picture | None:
    """Of the first explainer, by the first metric that ranks."""
    chosen = [metric for metric in values.metrics if metric_of(metric).use == "rank"]
    if not chosen:
        return None
    metric, explainer = chosen[0], evaluation.explainers[0]
    scores = values.of(explainer.name, metric)
    order = np.argsort(-sign_of(metric) * scores)
    order = order[~np.isnan(scores[order])]
    picture_count = min(SHOWN, len(order) // 2)
    rows = []
    for place in (*order[:picture_count], *order[len(order) - picture_count :]):
        start = int(place) // evaluation.batch * evaluation.batch
        images = example_maps(evaluation, start)
        classes = evaluation.subject.network(images).argmax(1)
        maps = explainer_maps(explainer, evaluation.subject.network, images, classes, start)
        within = int(place) - start
        name = str(evaluation.subject.images.names[int(place)])
        caption = [name[-20:], f"{scores[place]:.3f}"]
        rows.append(
            PanelRow(images[within].cpu().numpy(), maps[within].cpu().numpy(), None, caption)
        )
    title = f"best and worst by {metric}"
    # Of an explainer of any kind, whose unit isn't known.
    return map_panel(rows, title=title, abreast=2, first=explainer.name, unit="") if rows else None
