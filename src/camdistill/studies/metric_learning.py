"""A metric learnt from rankings: maps are worth what students gained from them.

Every arm of a ranking is a bag: the maps that its students were taught with, and their gain. The
mean score of a bag shall be its gain, in deviations of the gains of its network. A metric is then
asked about methods that it never saw (all layers, controls and mixtures of one are left out
together), about a network that it never saw, and always about images that it never saw; metrics
made by hand are asked about the same maps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F

from camdistill.data.datasets import ImageSet
from camdistill.distill.training import as_images, seeded
from camdistill.errors import UserError
from camdistill.explain.maps import upsample
from camdistill.measure.intervals import Interval, percentiles
from camdistill.measure.learned import Context, LearnedMetric, context
from camdistill.measure.metrics import METRICS
from camdistill.measure.panel import measure, scene
from camdistill.networks.teachers import Teacher
from camdistill.studies.classroom import NONE, Arm
from camdistill.studies.meta_evaluation import kendall
from camdistill.studies.ranking import scores_of
from camdistill.studies.simulatability import Found
from camdistill.studies.teacher_work import pool_of
from camdistill.studies.values import signed
from camdistill.types import Masks

RESAMPLES = 2000
USES = ("rank", "paper", "axis", "mask")
"""Of the metrics made by hand; gates need a live explainer, which a control has not."""
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Recipe:
    """How a metric is trained.

    Args:
        steps: Updates of each member.
        images: Of each bag in a step.
        lr: AdamW's.
        weight_decay: Likewise.
        members: Small networks whose mean the metric is.
        units: Of their convolutions.
        seed: Of everything that is random.
    """

    steps: int = 400
    images: int = 32
    lr: float = 3e-3
    weight_decay: float = 0.05
    members: int = 5
    units: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.images, self.members, self.units) < 1 or self.lr <= 0:
            raise UserError("fit: steps, images, members and units are 1 or more, lr above 0")


@dataclass(frozen=True, eq=False)
class Bag:
    """One arm of a ranking.

    Attributes:
        name: The arm's.
        group: What is left out together with it.
        of_method: Whether these are a method's maps as they are.
        maps: As students got them, of the network's images.
        gains: Agreement over that of students without maps, by seed.
    """

    name: str
    group: str
    of_method: bool
    maps: Float[Tensor, "images rows columns"]
    gains: Values

    @property
    def gain(self) -> float:
        """The mean over seeds."""
        return float(self.gains.mean())


@dataclass(frozen=True, eq=False)
class Lessons:
    """What a network's ranking teaches a metric.

    Attributes:
        bags: Its arms.
        context: Of the images.
        halves: Positions of the images that a metric is trained on, and is asked about.
    """

    bags: Sequence[Bag]
    context: Context
    halves: tuple[Tensor, Tensor]

    def targets(self, kept: Sequence[Bag]) -> Float[Tensor, "bags"]:
        """Gains in deviations of those that are kept."""
        gains = np.array([bag.gain for bag in kept])
        return torch.tensor((gains - gains.mean()) / max(gains.std(), 1e-6), dtype=torch.float32)


def group_of(arm: Arm) -> str:
    """The method, without its layer; of a control that needs no method, its own name."""
    return arm.method.partition("@")[0] if arm.method else arm.name


def lessons_of(found: Found, teacher: Teacher, seed: int = 0) -> Lessons:
    """Bags of a ranking's first family and first n, and what its network says of the images."""
    family, n = next(iter(found.study.students)), found.study.n[0]
    pool = pool_of(found.classroom.known, n)
    classes = pool.logits[:, 0].argmax(1)
    base = scores_of(found, (family, n), NONE)
    assert base is not None, "the arm without maps always runs"
    bags = []
    for arm in found.arms:
        scores = scores_of(found, (family, n), arm)
        maps = found.classroom.maps(arm, family, n)
        if arm != NONE and scores is not None and maps is not None:
            gains = (scores - base).mean(1)
            bags.append(Bag(arm.name, group_of(arm), arm.of_method, maps[:, 0].clone(), gains))
    if len({bag.group for bag in bags}) < 4:
        raise UserError(
            f"a ranking of {len(bags)} arms is too few to learn from: give methods of 4 kinds or "
            "more"
        )
    device = teacher.mean.device
    parts = [
        context(teacher, as_images(pixels.to(device)), of.to(device)).cpu()
        for pixels, of in zip(torch.split(pool.pixels, 64), torch.split(classes, 64), strict=True)
    ]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return Lessons(bags, torch.cat(parts), (order[: n // 2], order[n // 2 :]))


def fitted(
    lessons: Mapping[str, Lessons], kept: Callable[[str, Bag], bool], how: Recipe
) -> LearnedMetric:
    """A metric trained on the bags that are kept, of any number of networks.

    Args:
        lessons: By network.
        kept: Whether a network's bag is one of them.
        how: The training.
    """
    bags = {name: [bag for bag in one.bags if kept(name, bag)] for name, one in lessons.items()}
    bags = {name: some for name, some in bags.items() if len(some) > 1}
    maps = {name: torch.stack([bag.maps for bag in some]) for name, some in bags.items()}
    goals = {name: lessons[name].targets(some) for name, some in bags.items()}
    metric = seeded(how.seed, lambda: LearnedMetric(how.members, how.units))
    optimiser = torch.optim.AdamW(metric.parameters(), lr=how.lr, weight_decay=how.weight_decay)
    generator = torch.Generator().manual_seed(how.seed)
    for step in range(how.steps):
        for group in optimiser.param_groups:
            group["lr"] = how.lr * (1 - step / how.steps)
        loss = torch.zeros(())
        for name, whole in maps.items():
            rows = lessons[name].halves[0]
            chosen = rows[torch.randint(len(rows), (how.images,), generator=generator)]
            # Every member on its own, or they would share one error.
            scores = _by_member(metric, whole[:, chosen], lessons[name].context[chosen])
            loss = loss + F.mse_loss(scores, goals[name].expand_as(scores))
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    return metric.requires_grad_(False).eval()


def _by_member(
    metric: LearnedMetric, maps: Float[Tensor, "bags images rows columns"], known: Context
) -> Float[Tensor, "members bags"]:
    count = len(maps)
    flat, planes = maps.flatten(0, 1), known.repeat(count, 1, 1, 1)
    return torch.stack([one.view(count, -1).mean(1) for one in metric.scores(flat, planes)])


@torch.no_grad()
def predicted(metric: LearnedMetric, lessons: Lessons, bag: Bag) -> Values:
    """Scores of a bag's maps, on images that no metric was trained on."""
    rows = lessons.halves[1]
    return metric(bag.maps[rows], lessons.context[rows]).double().numpy()  # type: ignore[no-any-return]


def without(group: str, network: str | None = None) -> Callable[[str, Bag], bool]:
    """Keeps what is neither of the group nor of the network."""

    def kept(name: str, bag: Bag) -> bool:
        return bag.group != group and name != network

    return kept


def unseen_methods(
    lessons: Mapping[str, Lessons], how: Recipe, told: Callable[[int, int], None]
) -> dict[str, dict[str, float]]:
    """Mean scores by network and arm, from metrics that never saw the arm's method anywhere."""
    groups = sorted({bag.group for one in lessons.values() for bag in one.bags})
    found: dict[str, dict[str, float]] = {name: {} for name in lessons}
    for number, group in enumerate(groups):
        metric = fitted(lessons, without(group), how)
        for name, one in lessons.items():
            found[name] |= _means(metric, one, group)
        told(number + 1, len(groups))
    return found


def unseen_networks(
    lessons: Mapping[str, Lessons], how: Recipe, told: Callable[[int, int], None]
) -> dict[str, dict[str, float]]:
    """Mean scores by network and arm, from metrics that saw neither the network nor the method.

    Empty for a single network.
    """
    found: dict[str, dict[str, float]] = {}
    names = list(lessons) if len(lessons) > 1 else []
    jobs = [(name, group) for name in names for group in groups_of(lessons[name])]
    for number, (name, group) in enumerate(jobs):
        metric = fitted(lessons, without(group, name), how)
        found.setdefault(name, {}).update(_means(metric, lessons[name], group))
        told(number + 1, len(jobs))
    return found


def groups_of(lessons: Lessons) -> list[str]:
    """Its methods, and its controls that need none."""
    return sorted({bag.group for bag in lessons.bags})


def _means(metric: LearnedMetric, lessons: Lessons, group: str) -> dict[str, float]:
    return {
        bag.name: float(predicted(metric, lessons, bag).mean())
        for bag in lessons.bags
        if bag.group == group
    }


def by_hand(
    found: Found,
    teacher: Teacher,
    lessons: Lessons,
    count: int,
    told: Callable[[int, int], None],
) -> dict[str, dict[str, float]]:
    """Means of metrics made by hand by metric and arm; higher is better in all.

    They are asked about the first `count` images of those that the learned one is asked about.
    """
    rows = lessons.halves[1][:count]
    pool = pool_of(found.classroom.known, found.study.n[0])
    images = as_images(pool.pixels[rows])
    masks = _masks(found, pool.ids[rows].numpy())
    names = [
        name
        for name, one in METRICS.items()
        if one.use in USES and (one.use != "mask" or masks is not None) and one.family != "adcc"
    ]
    asked = scene(teacher, images, names, "learn", masks=masks)
    values: dict[str, dict[str, float]] = {}
    size = (images.shape[-2], images.shape[-1])
    for number, bag in enumerate(lessons.bags):
        measured = measure(asked, upsample(bag.maps[rows], size), names)
        for name, one in measured.values.items():
            mean = float(torch.nanmean(one.double()))
            values.setdefault(name, {})[bag.name] = signed(name) * mean
        told(number + 1, len(lessons.bags))
    whole = {bag.name for bag in lessons.bags}
    return {
        name: one
        for name, one in values.items()
        if set(one) == whole and np.isfinite(list(one.values())).all()
    }


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
            over = percentiles(gap, taus[:, 0] - taus[:, place], 0.95)
        found[name] = Agreement(
            percentiles(float(whole[0][place]), taus[:, place], 0.95),
            percentiles(float(whole[1][place]), rhos[:, place], 0.95),
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
