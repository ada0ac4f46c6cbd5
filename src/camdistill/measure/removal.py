"""Removing pixels in a map's order: deletion, insertion and ROAD, curves and their areas.

All take raw maps at the images' resolution; only their order counts. A level takes exactly its
number of pixels, and equal values come in an order of chance: a constant map is worth what a
random one is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.perturb.batched_forward import Replacement, score_changes
from camdistill.perturb.imputers import noisy_linear
from camdistill.perturb.ranks import Ranks, first_pixels, level_counts
from camdistill.types import Images, Labels, PerImage

LEVELS = tuple(step / 16 for step in range(17))
ROAD_LEVELS = tuple(step / 10 for step in range(1, 10))


@dataclass(frozen=True)
class Curve:
    """A class's probability as pixels are removed or put in.

    Attributes:
        fractions: Fractions of the image that is removed (inserted), rising.
        probabilities: Probabilities of each image at each fraction.
    """

    fractions: tuple[float, ...]
    probabilities: Float[Tensor, "batch levels"]

    def area(self) -> PerImage:
        """Under the curve, by trapezoids, divided by its width: in [0, 1]."""
        ticks = torch.tensor(self.fractions, dtype=torch.float64).to(self.probabilities)
        return torch.trapezoid(self.probabilities, ticks, dim=1) / (ticks[-1] - ticks[0])

    def mean(self) -> PerImage:
        """Over the levels, each counting the same: in [0, 1]."""
        return self.probabilities.mean(1)


def deletion(
    network: nn.Module,
    images: Images,
    classes: Labels,
    order: Ranks,
    replacement: Replacement,
    fractions: Sequence[float] = LEVELS,
) -> Curve:
    """Most relevant pixels removed first; the smaller the area, the better.

    Petsiuk et al. 2018, https://arxiv.org/abs/1806.07421, section 4.1.

    Args:
        network: In eval mode.
        images: In [0, 1] for a network that normalizes them itself.
        classes: Classes whose probability is watched: the network's own top class needs no label.
        order: `ranks` of the maps.
        replacement: What stands where something is removed. It decides what is measured: with
            black, at 32 pixels, hardly the map.
        fractions: Removed at each level.
    """
    counts = level_counts(fractions, order[0].numel())
    removed = first_pixels(order, counts)
    scores = score_changes(network, images, classes, removed, replacement)
    return Curve(tuple(fractions), scores.probabilities)


def insertion(
    network: nn.Module,
    images: Images,
    classes: Labels,
    order: Ranks,
    replacement: Replacement,
    fractions: Sequence[float] = LEVELS,
) -> Curve:
    """Most relevant pixels put in first, over `replacement`; the larger the area, the better.

    Petsiuk et al. 2018, section 4.1, who put pixels into a blurred image. See `deletion`.
    """
    counts = level_counts(fractions, order[0].numel())
    removed = ~first_pixels(order, counts)
    scores = score_changes(network, images, classes, removed, replacement)
    return Curve(tuple(fractions), scores.probabilities)


@dataclass(frozen=True)
class Road:
    """Removal with linear imputation, from both ends of a map's order.

    Attributes:
        morf: Most relevant first; lower is better.
        lerf: Least relevant first; higher is better.
    """

    morf: Curve
    lerf: Curve

    def combine(self) -> PerImage:
        """(LeRF - MoRF) / 2 of the curves' means; higher, in [-0.5, 0.5]."""
        return (self.lerf.mean() - self.morf.mean()) / 2


def road(
    network: nn.Module,
    images: Images,
    classes: Labels,
    order: Ranks,
    generator: torch.Generator,
    *,
    fractions: Sequence[float] = ROAD_LEVELS,
    noise: float | int = 0.01,
) -> Road:
    """Remove and debias (Rong et al. 2022, https://arxiv.org/abs/2202.00449).

    Both halves and their combination are those of pytorch-grad-cam, but for the number of pixels:
    there a threshold removes all or nothing of a map that is 0 in most places. A smooth map leaves
    a smooth border, which favors blurred copies of a map: put that control beside it.

    Args:
        network: In eval mode.
        images: In [0, 1] for a network that normalizes them itself.
        classes: Classes whose probability is watched.
        order: `ranks` of the maps.
        generator: Generator of the noise.
        fractions: Removed at each level; neither 0 nor 1.
        noise: Standard deviation of what is added to the imputed pixels.
    """
    counts = level_counts(fractions, order[0].numel())
    fill = partial(noisy_linear, noise=noise, generator=generator)
    removals = (first_pixels(order, counts), first_pixels(order, counts, least=True))
    scores = score_changes(network, images, classes, torch.cat(removals, 1), fill)
    morf, lerf = torch.split(scores.probabilities, len(counts), 1)
    return Road(Curve(tuple(fractions), morf), Curve(tuple(fractions), lerf))
