"""Removal of pixels in a map's order: curves of deletion, insertion and ROAD, and their areas.

All functions take the ranks of raw maps at the images' resolution; only the order counts. A level
takes exactly its number of pixels. Equal values are in random order, so a constant map gets the
value of a random one.
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
    """A class's probability as pixels are removed or inserted.

    Attributes:
        fractions: Shares of the image that are removed (inserted), rising.
        probabilities: Probability of each image at each fraction.
    """

    fractions: tuple[float, ...]
    probabilities: Float[Tensor, "batch levels"]

    def area(self) -> PerImage:
        """Returns the area under the curve, by trapezoids, divided by its width: in [0, 1]."""
        ticks = torch.tensor(self.fractions, dtype=torch.float64).to(self.probabilities)
        return torch.trapezoid(self.probabilities, ticks, dim=1) / (ticks[-1] - ticks[0])

    def mean(self) -> PerImage:
        """Returns the mean over the levels, with equal weights: in [0, 1]."""
        return self.probabilities.mean(1)


def deletion(
    network: nn.Module,
    images: Images,
    classes: Labels,
    order: Ranks,
    replacement: Replacement,
    fractions: Sequence[float] = LEVELS,
) -> Curve:
    """Removes the most relevant pixels first; the smaller the area, the better.

    Petsiuk et al. 2018, https://arxiv.org/abs/1806.07421, section 4.1.

    Args:
        network: In eval mode.
        images: In [0, 1] for a network that normalizes them itself.
        classes: The class whose probability is measured; the network's top class needs no label.
        order: `ranks` of the maps.
        replacement: What replaces the removed pixels. It decides what is measured: black, at 32
            pixels, hardly measures the map.
        fractions: Share that is removed at each level.
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
    """Inserts the most relevant pixels first, over `replacement`; the larger the area, the better.

    Petsiuk et al. 2018, section 4.1, who insert pixels into a blurred image. The arguments are
    those of `deletion`.
    """
    counts = level_counts(fractions, order[0].numel())
    removed = ~first_pixels(order, counts)
    scores = score_changes(network, images, classes, removed, replacement)
    return Curve(tuple(fractions), scores.probabilities)


@dataclass(frozen=True)
class Road:
    """Removal with linear imputation, from both ends of a map's order.

    Attributes:
        morf: Curve with the most relevant pixels removed first; lower is better.
        lerf: Curve with the least relevant pixels removed first; higher is better.
    """

    morf: Curve
    lerf: Curve

    def combine(self) -> PerImage:
        """Returns (LeRF - MoRF) / 2 of the curves' means, in [-0.5, 0.5]; higher is better."""
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
    """Computes ROAD, remove and debias (Rong et al. 2022, https://arxiv.org/abs/2202.00449).

    Both halves and their combination are those of pytorch-grad-cam, except for the number of
    pixels. There a threshold removes all or nothing of a map that is 0 in most places. A smooth map
    leaves a smooth border, which favors blurred copies of a map: report that control beside it.

    Args:
        network: In eval mode.
        images: In [0, 1] for a network that normalizes them itself.
        classes: The class whose probability is measured.
        order: `ranks` of the maps.
        generator: Generator of the noise.
        fractions: Share that is removed at each level; neither 0 nor 1.
        noise: Standard deviation of what is added to the imputed pixels.
    """
    counts = level_counts(fractions, order[0].numel())
    fill = partial(noisy_linear, noise=noise, generator=generator)
    removals = (first_pixels(order, counts), first_pixels(order, counts, least=True))
    scores = score_changes(network, images, classes, torch.cat(removals, 1), fill)
    morf, lerf = torch.split(scores.probabilities, len(counts), 1)
    return Road(Curve(tuple(fractions), morf), Curve(tuple(fractions), lerf))
