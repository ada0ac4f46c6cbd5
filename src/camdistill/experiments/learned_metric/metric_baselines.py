"""How well metrics foretell what maps teach: one that was learnt, beside those made by hand."""

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
from camdistill.experiments.evaluation.evaluation_values import signed
from camdistill.experiments.evaluation.meta_evaluation import kendall
from camdistill.experiments.learned_metric.metric_training import Bag, Lessons, Values
from camdistill.experiments.ranking.ranking_run import Found
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
MEASURED = "by_hand.json"
USES = ("rank", "paper", "axis", "mask")
"""Of the metrics made by hand; gates need a live explainer, which a control has not."""


def by_hand(
    found: Found,
    teacher: Teacher,
    lessons: Lessons,
    count: int,
    told: Callable[[int, int], None],
) -> dict[str, dict[str, float]]:
    """Means of metrics made by hand by metric and arm; higher is better in all.

    They are asked about the first `count` images of those that the learned one is asked about. What
    was measured stands in the ranking's folder, arm by arm, and isn't measured again.
    """
    rows = lessons.halves[1][:count]
    known_answers = found.classroom.room(found.study.n[0]).known
    pool = pool_of(known_answers, found.study.n[0])
    images = as_images(pool.pixels[rows])
    masks = _masks(found, pool.ids[rows].numpy())
    located = found.study.data.train_set
    truth = [located.annotation_digest] if located is not None and located.annotation_digest else []
    names = [
        name
        for name, one in METRICS.items()
        if one.use in USES and (one.use != "mask" or masks is not None) and one.family != "adcc"
    ]
    size = (images.shape[-2], images.shape[-1])
    path = found.study.folder / MEASURED
    known = _known(path)
    asked: EvaluationBatch | None = None
    values: dict[str, dict[str, float]] = {}
    for number, bag in enumerate(lessons.bags):
        maps = bag.maps[rows]
        key = _key(maps, [VERSION, known_answers.sha256, rows.tolist(), names, *truth])
        if key not in known:
            asked = asked or prepare_batch(teacher, images, names, "learn", masks=masks)
            means = measure(asked, upsample(maps, size), names).values.items()
            known[key] = {name: float(torch.nanmean(one.double())) for name, one in means}
            write_atomically(path, json.dumps(known).encode())
        for name, value in known[key].items():
            values.setdefault(name, {})[bag.name] = signed(name) * value
        told(number + 1, len(lessons.bags))
    whole = {bag.name for bag in lessons.bags}
    return {
        name: one
        for name, one in values.items()
        if set(one) == whole and np.isfinite(list(one.values())).all()
    }


def _known(path: Path) -> dict[str, dict[str, float]]:
    try:
        found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found


def _key(maps: Tensor, parts: Sequence[object]) -> str:
    content = hashlib.sha256(maps.contiguous().numpy().tobytes())
    content.update(json.dumps(parts).encode())
    return content.hexdigest()


def _masks(found: Found, ids: NDArray[np.int64]) -> Masks | None:
    images: ImageSet | None = found.study.data.train_set
    assert images is not None, "the ranking set it up"
    if images.masks is None:
        return None
    place = {int(number): row for row, number in enumerate(images.ids)}
    rows = np.array([place[int(number)] for number in ids])
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


def agreements(
    bags: Sequence[Bag],
    learned: Mapping[str, float],
    others: Mapping[str, Mapping[str, float]],
    seed: int = 0,
) -> dict[str, Agreement]:
    """Of the learned metric and all others, best first; the learned one is called "learned".

    Intervals are 95 % percentiles of a bootstrap over groups of arms (layers, controls and mixtures
    of one method stay together) and over students' seeds; all metrics see the same resamples.

    Args:
        bags: The arms; with one group for each, arms are resampled alone.
        learned: Mean score by arm.
        others: By metric, then by arm.
        seed: Of the resampling.
    """
    names = [bag.name for bag in bags]
    columns = {"learned": learned, **others}
    own = np.array([[one[name] for name in names] for one in columns.values()])
    gains = np.stack([bag.gains for bag in bags], 1)
    whole = [kind(own, gains.mean(0)) for kind in (_tau, _rho)]
    generator = np.random.default_rng(seed)
    groups = [bag.group for bag in bags]
    known = sorted(set(groups))
    members = [np.flatnonzero([group == one for group in groups]) for one in known]
    drawn: list[list[Values]] = [[], []]
    while len(drawn[0]) < RESAMPLES:
        chosen = generator.integers(0, len(known), len(known))
        rows = np.concatenate([members[one] for one in chosen])
        seeds = generator.integers(0, len(gains), len(gains))
        if len(set(rows.tolist())) < 3:
            continue
        mean = gains[seeds].mean(0)[rows]
        for place, kind in enumerate((_tau, _rho)):
            drawn[place].append(kind(own[:, rows], mean))
    taus, rhos = (np.stack(one) for one in drawn)
    found = {}
    for place, name in enumerate(columns):
        over = None
        if place:
            gap = float(whole[0][0] - whole[0][place])
            over = percentile_interval(gap, taus[:, 0] - taus[:, place], 0.95)
        found[name] = Agreement(
            percentile_interval(float(whole[0][place]), taus[:, place], 0.95),
            percentile_interval(float(whole[1][place]), rhos[:, place], 0.95),
            over,
        )
    return dict(sorted(found.items(), key=lambda item: -item[1].tau.mean))


def _tau(own: Values, gains: Values) -> Values:
    return kendall(own, np.broadcast_to(gains, own.shape))


def _rho(own: Values, gains: Values) -> Values:
    ranks, goal = rankdata(own, axis=1), rankdata(gains)
    ranks, goal = ranks - ranks.mean(1, keepdims=True), goal - goal.mean()
    size = np.sqrt((ranks**2).sum(1) * (goal**2).sum())
    found: Values = np.divide(ranks @ goal, size, out=np.zeros(len(own)), where=size > 0)
    return found
