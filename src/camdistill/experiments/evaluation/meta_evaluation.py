"""Tests the metrics: known orders, controls, agreement with re-rendered images, and reliability."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import rankdata

from camdistill.experiments.evaluation.evaluation_values import (
    ORACLE,
    Values,
    finite_mean,
    group_of,
    sign_of,
)
from camdistill.experiments.evaluation.pooling import (
    OF_FIRST,
    EvaluationPool,
    seed_and_image_interval,
)
from camdistill.measure.intervals import (
    Interval,
    bootstrap_means,
    percentile_interval,
)
from camdistill.measure.metrics import metric_of
from camdistill.report.results import Cell

REFERENCES = ("deletion_rerendered", "rank_accuracy")
_SPLITS, _RESAMPLES = 200, 1000

Means = Float[np.ndarray, "entries"]


@dataclass(frozen=True)
class Verdict:
    """What became of one metric.

    Attributes:
        ladder: Spearman correlation of the metric's order of the rungs with the true one, a mean
            over images: 1 finds it, 0 is chance, below 0 prefers worse maps.
        reliability: Kendall's tau between the orders of all maps in two halves of the images, a
            mean over random halves.
        tau: Kendall's tau with each reference over explainers and controls, intervals over images.
        tau_real: Kendall's tau over the explainers alone; None for fewer than three.
        beats: Controls that the metric puts above an explainer, as "control > explainer", where the
            paired 95 % interval over images is above 0.
        wrongly: Those of them that no reference confirms; None without a reference. An explainer
            can be worse than a control.
        oracle: Place of the oracle's mask among all maps, 1 being best; None without masks.
    """

    ladder: Interval | None
    reliability: float
    tau: dict[str, Interval]
    tau_real: dict[str, Interval]
    beats: list[str]
    wrongly: list[str] | None
    oracle: int | None


def list_defeats(pool: EvaluationPool, metric: str, seed: int) -> list[str]:
    """Explainers that the metric puts below a control, one line for each pair."""
    low_by_pair: dict[str, float] = {}
    single: dict[str, Means] = {}
    if pool.images < 2:  # one image has no interval
        return []
    for control in pool.controls:
        if control == ORACLE:
            continue
        for explainer in pool.real:
            # A blurred copy of the first explainer tells nothing about the others.
            if control in OF_FIRST and explainer != pool.real[0]:
                continue
            gain = sign_of(metric) * pool.gains(control, explainer, metric)
            pair = f"{control} > {explainer}"
            if len(gain) > 1 and (interval := seed_and_image_interval(gain, seed)) is not None:
                low_by_pair[pair] = interval.low
            elif len(gain) == 1 and not np.isnan(gain).all():
                single[pair] = gain[0]
    if single:  # one seed: all pairs with the same resamples of the images
        gains = np.stack(list(single.values()), 1)
        lows = np.nanpercentile(bootstrap_means(gains, seed, _RESAMPLES), 2.5, axis=0)
        low_by_pair |= dict(zip(single, lows.tolist(), strict=True))
    return [pair for pair, low in low_by_pair.items() if low > 0]


def verdicts(values: Values, seed: int) -> dict[str, Verdict]:
    """Of every metric that is not a gate; needs a ladder among the values."""
    chosen = [metric for metric in values.metrics if metric_of(metric).use != "gate"]
    beats = {metric: list_defeats(EvaluationPool((values,)), metric, seed) for metric in chosen}
    return {metric: _verdict(values, metric, beats, seed) for metric in chosen}


def _verdict(values: Values, metric: str, beats: Mapping[str, list[str]], seed: int) -> Verdict:
    # What needs a live explainer has no value for the controls.
    informative_entries = [
        name
        for name in dict.fromkeys(map(group_of, values.entries))
        if not np.isnan(_column(values, metric, name)).all()
    ]
    real = [
        name for name in dict.fromkeys(map(group_of, values.real)) if name in informative_entries
    ]
    entries = [*real, *(e for e in values.controls if e in informative_entries)]
    columns = _columns(values, metric, entries)
    tau, tau_real = {}, {}
    for reference in REFERENCES:
        if reference in values.metrics and reference != metric:
            truth = _columns(values, reference, entries)
            tau[reference] = _agreement(columns, truth, seed)
            if len(real) >= 3:
                first = slice(0, len(real))
                tau_real[reference] = _agreement(columns[:, first], truth[:, first], seed)
    means = np.nanmean(columns, 0)
    place = None
    if ORACLE in entries:
        place = 1 + int((means > means[entries.index(ORACLE)]).sum())
    true = [beats[name] for name in REFERENCES if name in beats and name != metric]
    true_pairs = {pair for pairs in true for pair in pairs}
    return Verdict(
        ladder=_ladder(values, metric, seed),
        reliability=_reliability(columns, seed),
        tau=tau,
        tau_real=tau_real,
        beats=beats[metric],
        wrongly=[pair for pair in beats[metric] if pair not in true_pairs] if true else None,
        oracle=place,
    )


def _columns(
    values: Values, metric: str, entries: Sequence[str]
) -> Float[np.ndarray, "images entries"]:
    """Higher is better in all of them."""
    columns = np.stack([_column(values, metric, entry) for entry in entries], 1)
    return columns * sign_of(metric)


def _column(values: Values, metric: str, name: str) -> Float[np.ndarray, "images"]:
    """Of several seeds the mean: one explainer is one map in an order."""
    return finite_mean(
        np.stack([values.of(e, metric) for e in values.entries if group_of(e) == name])
    )


def _ladder(values: Values, metric: str, seed: int) -> Interval | None:
    if not values.rungs:
        return None
    columns = _columns(values, metric, values.rungs)
    columns = columns[~np.isnan(columns).any(1)]
    if not len(columns):
        return None
    truth = np.arange(columns.shape[1])[::-1].astype(np.float64)
    ranks = rankdata(columns, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    truth = truth - truth.mean()
    size = np.sqrt((ranks**2).sum(1) * (truth**2).sum())
    # A metric that calls all rungs equal has found no order.
    alike = np.divide(ranks @ truth, size, out=np.zeros_like(size), where=size > 0)
    resampled_means = bootstrap_means(alike[:, None], seed, _RESAMPLES)[:, 0]
    return percentile_interval(float(alike.mean()), resampled_means, 0.95)


def _agreement(
    columns: Float[np.ndarray, "images entries"],
    truth: Float[np.ndarray, "images entries"],
    seed: int,
) -> Interval:
    """Kendall's tau-b of two orders of maps by their means; all resamples take the same images."""
    entries = columns.shape[1]
    resampled_means = bootstrap_means(np.concatenate([columns, truth], 1), seed, _RESAMPLES)
    taus = kendall(resampled_means[:, :entries], resampled_means[:, entries:])
    tau_of_all = kendall(np.nanmean(columns, 0)[None], np.nanmean(truth, 0)[None])
    return percentile_interval(float(tau_of_all[0]), taus, 0.95)


def _reliability(columns: Float[np.ndarray, "images entries"], seed: int) -> float:
    generator = np.random.default_rng(seed)
    halves: list[list[Means]] = [[], []]
    for _ in range(_SPLITS):
        parts = np.array_split(generator.permutation(len(columns)), 2)
        if all((~np.isnan(columns[part])).any(0).all() for part in parts):
            for half, part in zip(halves, parts, strict=True):
                half.append(np.nanmean(columns[part], 0))
    if not halves[0]:
        return float("nan")
    return float(kendall(np.stack(halves[0]), np.stack(halves[1])).mean())


def kendall(
    first: Float[np.ndarray, "rows entries"], second: Float[np.ndarray, "rows entries"]
) -> Float[np.ndarray, "rows"]:
    """Kendall's tau-b of each row; 0 where one side calls all entries equal (Kendall 1945)."""
    one, other = np.triu_indices(first.shape[1], 1)
    signs = [np.sign(side[:, one] - side[:, other]) for side in (first, second)]
    untied = np.sqrt(np.prod([(sign**2).sum(1) for sign in signs], axis=0))
    both: NDArray[np.float64] = np.divide(
        (signs[0] * signs[1]).sum(1), untied, out=np.zeros(len(first)), where=untied > 0
    )
    return both


def verdict_rows(verdict_by_metric: Mapping[str, Verdict]) -> dict[str, dict[str, Cell]]:
    """The verdicts as a table, metrics by their agreement with the references, best first."""
    table: dict[str, dict[str, Cell]] = {}
    by_tau = sorted(
        verdict_by_metric,
        key=lambda name: -sum(tau.mean for tau in verdict_by_metric[name].tau.values()),
    )
    for metric in by_tau:
        verdict = verdict_by_metric[metric]
        row: dict[str, Cell] = {
            "use": metric_of(metric).use,
            "ladder": verdict.ladder,
            "halves": verdict.reliability,
        }
        for reference in REFERENCES:
            row[f"tau {reference}"] = verdict.tau.get(reference)
        for reference, value in verdict.tau_real.items():
            row[f"explainers {reference}"] = value
        row["oracle's place"] = verdict.oracle
        row["controls above"] = len(verdict.beats)
        row["wrongly"] = None if verdict.wrongly is None else len(verdict.wrongly)
        table[metric] = row
    return table
