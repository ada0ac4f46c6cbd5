"""Builds the tables of one or several evaluations: intervals, differences and warnings."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from camdistill.experiments.evaluation.meta_evaluation import (
    Verdict,
    list_defeats,
    verdict_rows,
    verdicts,
)
from camdistill.experiments.evaluation.pooling import (
    EvaluationPool,
    Table,
    difference_table,
    mean_table,
)
from camdistill.measure.intervals import Interval
from camdistill.measure.metrics import OF_WEIGHTS, Use, metric_of
from camdistill.report.results import Cell, text_table

_BLOCKS: dict[str, tuple[Use, ...]] = {
    "faithfulness": ("rank", "reference"),
    "from papers, not to be trusted": ("paper",),
    "localization": ("mask",),
    "learned from what maps taught": ("learned",),
    "size of the map, and gates": ("axis", "gate"),
}
_COMPARED: tuple[Use, ...] = ("rank", "reference", "mask", "learned")
TableCells = Mapping[str, Mapping[str, Cell]]


def summarize_pool(
    pool: EvaluationPool, seed: int, *, meta: bool
) -> tuple[dict[str, object], Table, str]:
    """What was found: for results.json, for charts, and as text.

    Args:
        pool: One evaluation or several.
        seed: Seed of the resampling.
        meta: Put the metrics to the test: needs a ladder.
    """
    table, gains = mean_table(pool, seed), difference_table(pool, seed)
    beats = {metric: list_defeats(pool, metric, seed) for metric in pool.metrics}
    verdicts_by_run = [verdicts(run, seed) for run in pool.runs] if meta else []
    blocks = _blocks(pool, {_row_title(pool, name): row for name, row in table.items()})
    of_use = [metric for metric in pool.metrics if metric_of(metric).use in _COMPARED]
    minus = {f"{_row_title(pool, name)} minus {pool.real[0]}": row for name, row in gains.items()}
    if of_use and any(minus.values()):
        blocks.append(_block("differences, image by image", of_use, minus, f"n = {pool.images}"))
    blocks.append(_warnings(pool, beats))
    blocks.append(_costs(pool))
    if verdicts_by_run:
        runs = len(verdicts_by_run)
        over = f"; means of {runs} evaluations [lowest, highest]" if runs > 1 else ""
        blocks.append(
            "The metrics, put to the test (tau: Kendall's with the reference, over all maps or the "
            f"explainers alone{over})\n"
            + text_table(_meta_rows(verdicts_by_run), corner="metric", digits=2)
        )
    all_names = (*pool.real, *pool.controls)
    results: dict[str, object] = {
        "n": pool.images,
        "seeds": {name: pool.seeds(name) for name in pool.real},
        "explainers": {name: table[name] for name in pool.real},
        "controls": {name: table[name] for name in pool.controls},
        "minus_first": gains,
        "failed": {name: pool.count_flags("failed", name) for name in all_names},
        "blank": {name: pool.count_flags("blank", name) for name in all_names},
        "seconds_a_map": {name: pool.seconds(name) for name in pool.real},
        "controls_above": {metric: pairs for metric, pairs in beats.items() if pairs},
    }
    if verdicts_by_run:
        by_run = [
            {name: asdict(verdict) for name, verdict in metric_verdicts.items()}
            for metric_verdicts in verdicts_by_run
        ]
        results["meta"] = by_run[0] if len(by_run) == 1 else by_run
    return results, table, "\n\n".join(blocks) + "\n"


def _row_title(pool: EvaluationPool, name: str) -> str:
    """A row's name, with the number of its seeds."""
    count = pool.seeds(name)
    return f"{name} ({count} seeds)" if count > 1 else name


def _blocks(pool: EvaluationPool, table: Table) -> list[str]:
    blocks = []
    for title, uses in _BLOCKS.items():
        columns = [metric for metric in pool.metrics if metric_of(metric).use in uses]
        if columns:
            blocks.append(_block(title, columns, table, f"n = {pool.images}"))
    return blocks


def _block(
    title: str, columns: Sequence[str], table: Mapping[str, Mapping[str, Interval]], corner: str
) -> str:
    arrows = {metric: f"{metric} {'+' if metric_of(metric).higher else '-'}" for metric in columns}
    cells_by_row: dict[str, dict[str, Cell]] = {
        entry: {arrows[metric]: row.get(metric) for metric in columns}
        for entry, row in table.items()
        if any(metric in row for metric in columns)
    }
    return f"{title}\n{text_table(cells_by_row, corner=corner)}"


def _warnings(pool: EvaluationPool, beats: Mapping[str, Sequence[str]]) -> str:
    lines = ["+ higher is better, - lower is better; 95 % intervals over images, and seeds if any."]
    for metric, pairs in beats.items():
        if pairs and metric_of(metric).use in ("rank", "paper", "mask", "learned"):
            lines.append(f"Don't rank by {metric} here, controls stand above: {', '.join(pairs)}")
    for name in pool.real:
        lines += _gaps(pool, name)
    return "\n".join(lines)


def _gaps(pool: EvaluationPool, name: str) -> list[str]:
    """What of an explainer could not be measured."""
    lines = _by_construction(pool, name)
    map_count = pool.images * pool.maps(name)
    if count := pool.count_flags("failed", name):
        lines.append(f"{name}: {count} of {map_count} maps failed (NaN or infinity)")
    if count := pool.count_flags("blank", name):
        lines.append(f"{name}: {count} of {map_count} maps blank")
    for metric in pool.metrics:
        is_finite = ~np.isnan(pool.scores(name, metric))
        if 0 < (without := int((~is_finite.any(1)).sum())) < len(is_finite):
            lines.append(f"{name}: {without} of {len(is_finite)} seeds have no value of {metric}")
        common = int(is_finite[is_finite.any(1)].all(0).sum()) if is_finite.any() else 0
        if 0 < common < pool.images:
            lines.append(f"{name}: {metric} is over {common} of {pool.images} images")
    return lines


def _by_construction(pool: EvaluationPool, name: str) -> list[str]:
    """What isn't measured of an explainer whose maps another network makes."""
    if np.isnan(pool.seconds(name)) or pool.count_flags("failed", name) == pool.images:
        return []
    return [
        f"{name}: no {metric}, which would be {OF_WEIGHTS[metric]} by construction: its maps are "
        "another network's, and redrawing the weights of the explained one changes nothing"
        for metric in pool.metrics
        if metric in OF_WEIGHTS and np.isnan(pool.scores(name, metric)).all()
    ]


def _costs(pool: EvaluationPool) -> str:
    costs = ", ".join(
        f"{name} {1e3 * pool.seconds(name):.2f}"
        for name in pool.real
        if not np.isnan(pool.seconds(name))
    )
    return f"Milliseconds to make a map, batched: {costs or 'stored'}"


def _meta_rows(verdicts_by_run: Sequence[Mapping[str, Verdict]]) -> dict[str, dict[str, Cell]]:
    """One evaluation's verdicts; of several the mean with the lowest and the highest."""
    tables = [verdict_rows(run_verdicts) for run_verdicts in verdicts_by_run]
    if len(tables) == 1:
        return tables[0]
    shared = [metric for metric in tables[0] if all(metric in table for table in tables)]
    return {
        metric: {
            column: _over_runs([table[metric].get(column) for table in tables])
            for column in tables[0][metric]
        }
        for metric in shared
    }


def _over_runs(cells: Sequence[Cell]) -> Cell:
    numbers = [cell.mean if isinstance(cell, Interval) else cell for cell in cells]
    finite_numbers = [number for number in numbers if isinstance(number, int | float)]
    if len(finite_numbers) < len(numbers):
        return cells[0] if isinstance(cells[0], str) else None
    if all(isinstance(number, int) for number in finite_numbers):
        return (
            f"{min(finite_numbers)} to {max(finite_numbers)}"
            if min(finite_numbers) < max(finite_numbers)
            else min(finite_numbers)
        )
    return Interval(
        float(np.mean(finite_numbers)), float(min(finite_numbers)), float(max(finite_numbers))
    )
