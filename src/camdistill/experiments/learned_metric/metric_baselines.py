"""Compares a learned metric with hand-made metrics at predicting what maps teach."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from camdistill.data.datasets import ImageSet
from camdistill.distill.training import as_images
from camdistill.experiments.evaluation.evaluation_values import sign_of
from camdistill.experiments.evaluation.meta_evaluation import kendall
from camdistill.experiments.learned_metric.metric_training import Bag, BagSet, Float64Array
from camdistill.experiments.ranking.ranking_run import RankingRuns
from camdistill.experiments.ranking.teacher_outputs import pool_of
from camdistill.explain.maps import upsample
from camdistill.measure.intervals import Interval, percentile_interval
from camdistill.measure.metrics import METRICS
from camdistill.measure.panel import EvaluationBatch, measure, prepare_batch
from camdistill.networks.teachers import Teacher
from camdistill.store.atomic_files import write_atomically
from camdistill.types import Masks

RESAMPLES = 2000
VERSION = 1  # goes up when a metric changes its values
BASELINES_FILE = "by_hand.json"
USES = ("rank", "paper", "axis", "mask")
"""Of the metrics made by hand; gates need a live explainer, which a control has not."""


def measure_baselines(
    ranking: RankingRuns,
    teacher: Teacher,
    bag_set: BagSet,
    count: int,
    on_progress: Callable[[int, int], None],
) -> dict[str, dict[str, float]]:
    """Means of metrics made by hand by metric and arm; higher is better in all.

    They are asked about the first `count` images of those that the learned one is asked about. What
    was measured stands in the ranking's folder, arm by arm, and isn't measured again.
    """
    rows = bag_set.halves[1][:count]
    teacher_outputs = ranking.arm_trainer.room(ranking.study.n[0]).cached_answers
    pool = pool_of(teacher_outputs, ranking.study.n[0])
    images = as_images(pool.pixels[rows])
    masks = _load_masks(ranking, pool.ids[rows].numpy())
    train_set = ranking.study.data.train_set
    annotations = (
        [train_set.annotation_digest]
        if train_set is not None and train_set.annotation_digest
        else []
    )
    names = [
        name
        for name, entry in METRICS.items()
        if entry.use in USES
        and (entry.use != "mask" or masks is not None)
        and entry.family != "adcc"
    ]
    size = (images.shape[-2], images.shape[-1])
    path = ranking.study.folder / BASELINES_FILE
    stored_means = _read_stored_means(path)
    batch: EvaluationBatch | None = None
    values: dict[str, dict[str, float]] = {}
    for number, bag in enumerate(bag_set.bags):
        maps = bag.maps[rows]
        key = _measurement_key(
            maps, [VERSION, teacher_outputs.sha256, rows.tolist(), names, *annotations]
        )
        if key not in stored_means:
            batch = batch or prepare_batch(teacher, images, names, "learn", masks=masks)
            means = measure(batch, upsample(maps, size), names).values.items()
            stored_means[key] = {
                name: float(torch.nanmean(entry.double())) for name, entry in means
            }
            write_atomically(path, json.dumps(stored_means).encode())
        for name, value in stored_means[key].items():
            values.setdefault(name, {})[bag.name] = sign_of(name) * value
        on_progress(number + 1, len(bag_set.bags))
    bag_names = {bag.name for bag in bag_set.bags}
    return {
        name: entry
        for name, entry in values.items()
        if set(entry) == bag_names and np.isfinite(list(entry.values())).all()
    }


def _read_stored_means(path: Path) -> dict[str, dict[str, float]]:
    try:
        stored_means: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return stored_means


def _measurement_key(maps: Tensor, parts: Sequence[object]) -> str:
    content = hashlib.sha256(maps.contiguous().numpy().tobytes())
    content.update(json.dumps(parts).encode())
    return content.hexdigest()


def _load_masks(ranking: RankingRuns, ids: NDArray[np.int64]) -> Masks | None:
    images: ImageSet | None = ranking.study.data.train_set
    assert images is not None, "the ranking set it up"
    if images.masks is None:
        return None
    row_by_id = {int(number): row for row, number in enumerate(images.ids)}
    rows = np.array([row_by_id[int(number)] for number in ids])
    return torch.from_numpy(np.asarray(images.masks[rows]) > 0)


class Agreement(NamedTuple):
    """How well a metric's order of arms is the order of their gains.

    Attributes:
        tau: Kendall's tau-b.
        rho: Spearman's rho.
        over: The learned metric's tau minus this one's, paired; None of itself.
    """

    tau: Interval
    rho: Interval
    over: Interval | None


def metric_agreements(
    bags: Sequence[Bag],
    learned: Mapping[str, float],
    baseline_scores: Mapping[str, Mapping[str, float]],
    seed: int = 0,
) -> dict[str, Agreement]:
    """Of the learned metric and all others, best first; the learned one is called "learned".

    Intervals are 95 % percentiles of a bootstrap over groups of arms (layers, controls and mixtures
    of one method stay together) and over students' seeds; all metrics see the same resamples.

    Args:
        bags: The arms; with one group for each, arms are resampled alone.
        learned: Mean score by arm.
        baseline_scores: By metric, then by arm.
        seed: Seed of the resampling.
    """
    names = [bag.name for bag in bags]
    columns = {"learned": learned, **baseline_scores}
    scores = np.array([[entry[name] for name in names] for entry in columns.values()])
    gains = np.stack([bag.gains for bag in bags], 1)
    correlations = [correlate(scores, gains.mean(0)) for correlate in (_tau, _rho)]
    generator = np.random.default_rng(seed)
    groups = [bag.group for bag in bags]
    distinct_groups = sorted(set(groups))
    members = [np.flatnonzero([group == entry for group in groups]) for entry in distinct_groups]
    resampled: list[list[Float64Array]] = [[], []]
    while len(resampled[0]) < RESAMPLES:
        chosen = generator.integers(0, len(distinct_groups), len(distinct_groups))
        rows = np.concatenate([members[entry] for entry in chosen])
        seeds = generator.integers(0, len(gains), len(gains))
        if len(set(rows.tolist())) < 3:
            continue
        mean = gains[seeds].mean(0)[rows]
        for index, correlate in enumerate((_tau, _rho)):
            resampled[index].append(correlate(scores[:, rows], mean))
    taus, rhos = (np.stack(entry) for entry in resampled)
    agreement_by_metric = {}
    for index, name in enumerate(columns):
        difference = None
        if index:
            gap = float(correlations[0][0] - correlations[0][index])
            difference = percentile_interval(gap, taus[:, 0] - taus[:, index], 0.95)
        agreement_by_metric[name] = Agreement(
            percentile_interval(float(correlations[0][index]), taus[:, index], 0.95),
            percentile_interval(float(correlations[1][index]), rhos[:, index], 0.95),
            difference,
        )
    return dict(sorted(agreement_by_metric.items(), key=lambda item: -item[1].tau.mean))


def _tau(scores: Float64Array, gains: Float64Array) -> Float64Array:
    return kendall(scores, np.broadcast_to(gains, scores.shape))


def _rho(scores: Float64Array, gains: Float64Array) -> Float64Array:
    ranks, goal = rankdata(scores, axis=1), rankdata(gains)
    ranks, goal = ranks - ranks.mean(1, keepdims=True), goal - goal.mean()
    norm = np.sqrt((ranks**2).sum(1) * (goal**2).sum())
    correlations: Float64Array = np.divide(
        ranks @ goal, norm, out=np.zeros(len(scores)), where=norm > 0
    )
    return correlations
