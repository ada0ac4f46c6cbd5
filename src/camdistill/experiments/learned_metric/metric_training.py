"""Trains a metric on rankings: a map is worth what students gained from it.

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
from camdistill.experiments.ranking.ranking_config import RankingStudy
from camdistill.experiments.ranking.ranking_run import RankingRuns
from camdistill.experiments.ranking.student_task import ImagePool
from camdistill.experiments.ranking.teacher_outputs import pool_of
from camdistill.measure.learned import Context, LearnedMetric, image_context
from camdistill.networks.teachers import Teacher
from camdistill.types import Labels

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class MetricRecipe:
    """How a metric is trained.

    Args:
        steps: Updates of each member.
        images: Number of images of each bag in a step.
        lr: AdamW's.
        weight_decay: Weight decay of AdamW.
        members: Small networks whose mean the metric is.
        units: Units of their convolutions.
        seed: Seed of everything that is random.
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
        maps: Maps as students learned them, for the network's images.
        gains: Agreement over that of students without maps, by seed.
    """

    name: str
    group: str
    of_method: bool
    maps: Float[Tensor, "images rows columns"]
    gains: Float64Array

    @property
    def gain(self) -> float:
        """The mean over seeds."""
        return float(self.gains.mean())


@dataclass(frozen=True, eq=False)
class BagSet:
    """What a network's ranking teaches a metric.

    Attributes:
        bags: Its arms.
        context: Context of the images.
        halves: Positions of the images that a metric is trained on, and is asked about.
    """

    bags: Sequence[Bag]
    context: Context
    halves: tuple[Tensor, Tensor]

    def targets(self, chosen_bags: Sequence[Bag]) -> Float[Tensor, "bags"]:
        """Gains in deviations of those that are kept."""
        gains = np.array([bag.gain for bag in chosen_bags])
        return torch.tensor((gains - gains.mean()) / max(gains.std(), 1e-6), dtype=torch.float32)


def arm_group(arm: Arm) -> str:
    """The method, without its layer; of a control that needs no method, its own name."""
    return arm.method.partition("@")[0] if arm.method else arm.name


def check_arm_kinds(name: str, study: RankingStudy) -> None:
    """Refuse a ranking of too few kinds of arms, before its students are trained."""
    arm_options = study.methods, study.controls, study.with_controls, study.shares, study.methods
    arms = [arm for arm in arms_of(*arm_options) if arm != NONE and study.n[0] in study.n_of(arm)]
    kinds = sorted({arm_group(arm) for arm in arms})
    if len(kinds) < 4:
        raise UserError(
            f"studies.{name}: a ranking of {', '.join(kinds)} is too few to learn from: give "
            "methods of 4 kinds or more (layers and controls of one are of its kind)"
        )


def ranking_image_ids(ranking: RankingRuns) -> Labels:
    """The ids of a ranking's images, of its first n."""
    return _image_pool(ranking).ids


def split_images(
    ids_by_ranking: Mapping[str, Labels], seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Positions of each ranking's images that a metric is trained on, and is asked about.

    An image of several rankings is in the same half of all.

    Args:
        ids_by_ranking: Their ids, by ranking.
        seed: Seed of the drawing.
    """
    is_training: dict[int, bool] = {}
    halves = {}
    for name, ids in ids_by_ranking.items():
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        new_ids = [image_id for image_id in ids[order].tolist() if image_id not in is_training]
        is_training |= {
            image_id: index < len(new_ids) // 2 for index, image_id in enumerate(new_ids)
        }
        in_training = torch.tensor([is_training[image_id] for image_id in ids[order].tolist()])
        halves[name] = (order[in_training], order[~in_training])
    return halves


def _image_pool(ranking: RankingRuns) -> ImagePool:
    return pool_of(ranking.arm_trainer.cached_answers, ranking.study.n[0])


def build_bag_set(ranking: RankingRuns, teacher: Teacher, halves: tuple[Tensor, Tensor]) -> BagSet:
    """Bags of a ranking's first family and first n, and what its network says of the images."""
    family, n = next(iter(ranking.study.students)), ranking.study.n[0]
    pool = _image_pool(ranking)
    classes = pool.logits[:, 0].argmax(1)
    baseline = scores_of(ranking, (family, n), NONE)
    assert baseline is not None, "the arm without maps always runs"
    bags = []
    for arm in ranking.arms:
        scores = scores_of(ranking, (family, n), arm)
        maps = ranking.arm_trainer.maps(arm, family, n)
        if arm != NONE and scores is not None and maps is not None:
            gains = (scores - baseline).mean(1)
            bags.append(Bag(arm.name, arm_group(arm), arm.of_method, maps[:, 0].clone(), gains))
    device = teacher.mean.device
    contexts = [
        image_context(teacher, as_images(pixel_chunk.to(device)), class_chunk.to(device)).cpu()
        for pixel_chunk, class_chunk in zip(
            torch.split(pool.pixels, 64), torch.split(classes, 64), strict=True
        )
    ]
    return BagSet(bags, torch.cat(contexts), halves)


def fit_metric(
    bag_sets: Mapping[str, BagSet], keep: Callable[[str, Bag], bool], recipe: MetricRecipe
) -> LearnedMetric:
    """A metric trained on the bags that are kept, of any number of networks.

    Args:
        bag_sets: By network.
        keep: Whether a network's bag is one of them.
        recipe: The training.
    """
    bags = {
        name: [bag for bag in bag_set.bags if keep(name, bag)] for name, bag_set in bag_sets.items()
    }
    bags = {name: network_bags for name, network_bags in bags.items() if len(network_bags) > 1}
    maps = {
        name: torch.stack([bag.maps for bag in network_bags]) for name, network_bags in bags.items()
    }
    targets = {name: bag_sets[name].targets(network_bags) for name, network_bags in bags.items()}
    metric = build_with_seed(recipe.seed, lambda: LearnedMetric(recipe.members, recipe.units))
    optimizer = torch.optim.AdamW(
        metric.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * (1 - step / recipe.steps)
        loss = torch.zeros(())
        for name, network_maps in maps.items():
            rows = bag_sets[name].halves[0]
            chosen = rows[torch.randint(len(rows), (recipe.images,), generator=generator)]
            # Every member on its own, or they would share one error.
            scores = _member_scores(metric, network_maps[:, chosen], bag_sets[name].context[chosen])
            loss = loss + F.mse_loss(scores, targets[name].expand_as(scores))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return metric.requires_grad_(False).eval()


def _member_scores(
    metric: LearnedMetric, maps: Float[Tensor, "bags images rows columns"], features: Context
) -> Float[Tensor, "members bags"]:
    count = len(maps)
    flat_maps, planes = maps.flatten(0, 1), features.repeat(count, 1, 1, 1)
    return torch.stack(
        [
            member_scores.view(count, -1).mean(1)
            for member_scores in metric.scores(flat_maps, planes)
        ]
    )


@torch.no_grad()
def score_bag(metric: LearnedMetric, bag_set: BagSet, bag: Bag) -> Float64Array:
    """Scores of a bag's maps, on images that no metric was trained on."""
    rows = bag_set.halves[1]
    return metric(bag.maps[rows], bag_set.context[rows]).double().numpy()  # type: ignore[no-any-return]


def leave_out(group: str, network: str | None = None) -> Callable[[str, Bag], bool]:
    """Keeps what is neither of the group nor of the network."""

    def keep(name: str, bag: Bag) -> bool:
        return bag.group != group and name != network

    return keep


def score_unseen_methods(
    bag_sets: Mapping[str, BagSet], recipe: MetricRecipe, on_progress: Callable[[int, int], None]
) -> dict[str, dict[str, float]]:
    """Mean scores by network and arm, from metrics that never saw the arm's method anywhere."""
    groups = sorted({bag.group for bag_set in bag_sets.values() for bag in bag_set.bags})
    scores_by_network: dict[str, dict[str, float]] = {name: {} for name in bag_sets}
    for number, group in enumerate(groups):
        metric = fit_metric(bag_sets, leave_out(group), recipe)
        for name, bag_set in bag_sets.items():
            scores_by_network[name] |= _mean_scores(metric, bag_set, group)
        on_progress(number + 1, len(groups))
    return scores_by_network


def score_unseen_networks(
    bag_sets: Mapping[str, BagSet], recipe: MetricRecipe, on_progress: Callable[[int, int], None]
) -> dict[str, dict[str, float]]:
    """Mean scores by network and arm, from metrics that saw neither the network nor the method.

    Empty for a single network.
    """
    scores_by_network: dict[str, dict[str, float]] = {}
    names = list(bag_sets) if len(bag_sets) > 1 else []
    jobs = [(name, group) for name in names for group in list_groups(bag_sets[name])]
    for number, (name, group) in enumerate(jobs):
        metric = fit_metric(bag_sets, leave_out(group, name), recipe)
        scores_by_network.setdefault(name, {}).update(_mean_scores(metric, bag_sets[name], group))
        on_progress(number + 1, len(jobs))
    return scores_by_network


def list_groups(bag_set: BagSet) -> list[str]:
    """Its methods, and its controls that need none."""
    return sorted({bag.group for bag in bag_set.bags})


def _mean_scores(metric: LearnedMetric, bag_set: BagSet, group: str) -> dict[str, float]:
    return {
        bag.name: float(score_bag(metric, bag_set, bag).mean())
        for bag in bag_set.bags
        if bag.group == group
    }
