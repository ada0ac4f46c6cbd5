"""A metric learnt from rankings: maps are worth what students gained from them.

Every arm of a ranking is a bag: the maps that its students were taught with, and their gain. The
mean score of a bag shall be its gain, in deviations of the gains of its network. A metric is then
asked about methods that it never saw (all layers, controls and mixtures of one are left out
together), about a network that it never saw, and always about images that it never saw; metrics
made by hand are asked about the same maps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from camdistill.distill.training import as_images, build_with_seed
from camdistill.errors import UserError, check_number
from camdistill.experiments.ranking.ranking_analysis import scores_of
from camdistill.experiments.ranking.ranking_arms import NONE, Arm, arms_of
from camdistill.experiments.ranking.ranking_config import Study
from camdistill.experiments.ranking.ranking_run import Found
from camdistill.experiments.ranking.student_task import Pool
from camdistill.experiments.ranking.teacher_outputs import pool_of
from camdistill.measure.learned import Context, LearnedMetric, image_context
from camdistill.networks.teachers import Teacher
from camdistill.types import Labels

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

    steps: int = 200
    images: int = 8
    lr: float = 3e-3
    weight_decay: float = 0.05
    members: int = 3
    units: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "images", "members", "units"):
            check_number(f"fit.{name}", getattr(self, name), "[1, inf)", "give 1 or more")
        check_number("fit.lr", self.lr, "(0, inf)", "give a learning rate above 0")
        check_number("fit.weight_decay", self.weight_decay, "[0, inf)", "give 0 or more")
        check_number("fit.seed", self.seed, "[0, inf)", "give 0 or more")


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


def demand_kinds(name: str, study: Study) -> None:
    """Refuse a ranking of too few kinds of arms, before its students are trained."""
    every = study.methods, study.controls, study.with_controls, study.shares, study.methods
    arms = [arm for arm in arms_of(*every) if arm != NONE and study.n[0] in study.n_of(arm)]
    kinds = sorted({group_of(arm) for arm in arms})
    if len(kinds) < 4:
        raise UserError(
            f"studies.{name}: a ranking of {', '.join(kinds)} is too few to learn from: give "
            "methods of 4 kinds or more (layers and controls of one are of its kind)"
        )


def images_of(found: Found) -> Labels:
    """The ids of a ranking's images, of its first n."""
    return _pool(found).ids


def halves_of(images: Mapping[str, Labels], seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Positions of each ranking's images that a metric is trained on, and is asked about.

    An image of several rankings is in the same half of all.

    Args:
        images: Their ids, by ranking.
        seed: Of the drawing.
    """
    learnt: dict[int, bool] = {}
    halves = {}
    for name, ids in images.items():
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        new = [one for one in ids[order].tolist() if one not in learnt]
        learnt |= {one: place < len(new) // 2 for place, one in enumerate(new)}
        first = torch.tensor([learnt[one] for one in ids[order].tolist()])
        halves[name] = (order[first], order[~first])
    return halves


def _pool(found: Found) -> Pool:
    return pool_of(found.classroom.known, found.study.n[0])


def lessons_of(found: Found, teacher: Teacher, halves: tuple[Tensor, Tensor]) -> Lessons:
    """Bags of a ranking's first family and first n, and what its network says of the images."""
    family, n = next(iter(found.study.students)), found.study.n[0]
    pool = _pool(found)
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
    device = teacher.mean.device
    parts = [
        image_context(teacher, as_images(pixels.to(device)), of.to(device)).cpu()
        for pixels, of in zip(torch.split(pool.pixels, 64), torch.split(classes, 64), strict=True)
    ]
    return Lessons(bags, torch.cat(parts), halves)


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
    metric = build_with_seed(how.seed, lambda: LearnedMetric(how.members, how.units))
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
