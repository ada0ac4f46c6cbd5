"""Faithfulness: whether a map shows where the network's score comes from, by a perturbation bank.

All functions take raw, signed maps at the images' resolution, and a bank of the same images and
classes. None of them runs the network. A map that is constant over a bank's changes carries no
information: it gets 0 in the correlations and 1, the worst, in the infidelity.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from camdistill.explain.compare import pearson, spearman
from camdistill.perturb.bank import Bank, PerturbationSet
from camdistill.perturb.ranks import check_finite
from camdistill.types import Maps, PerImage

WatchedScore = Literal["logit", "probability"]


def faithfulness_correlation(maps: Maps, bank: Bank, score: WatchedScore = "logit") -> PerImage:
    """Returns the Pearson correlation of a map's sums over random subsets with the score's drops.

    Bhatt et al. 2020, https://arxiv.org/abs/2005.00631, eq. 1, with subsets of whole cells, as
    single pixels hardly change a score. In [-1, 1]; higher is better. The first of the bank's
    shares is used.
    """
    _check_maps_fit(maps, bank)
    return _correlation(maps, next(iter(bank.subsets.values())), score)


def sensitivity_n(maps: Maps, bank: Bank, score: WatchedScore = "logit") -> PerImage:
    """Returns the faithfulness correlation averaged over several sizes of the subset.

    Higher is better. Ancona et al. 2018, https://arxiv.org/abs/1711.06104, section 4, where n is
    the subsets' size. The bank's plan sets the sizes.
    """
    _check_maps_fit(maps, bank)
    correlations = [
        _correlation(maps, perturbations, score) for perturbations in bank.subsets.values()
    ]
    return torch.stack(correlations).mean(0)


def infidelity(maps: Maps, bank: Bank, score: WatchedScore = "logit") -> PerImage:
    """Returns the share of the drops' energy that no positive multiple of the map explains.

    In [0, 1]; lower is better. Yeh et al. 2019, https://arxiv.org/abs/1901.09392: E (I a - drop)^2
    for square removals, which are the bank's occluders. A map's sums over the squares stand for I
    a. The map is first multiplied by the best beta (their section 4), as the raw form measures its
    scale. The result is then divided by E drop^2. beta is at least 0, or an inverted map would be
    as good as the map.
    """
    _check_maps_fit(maps, bank)
    sums = torch.cat([perturbations.sums(maps) for perturbations in bank.occluders.values()], 1)
    drops = torch.cat(
        [_drops(perturbations, score) for perturbations in bank.occluders.values()], 1
    ).to(sums)
    sums, drops = _rescale(sums), _rescale(drops)
    overlap = (sums * drops).sum(1).clamp(min=0)
    energy = sums.square().sum(1) * drops.square().sum(1)
    share = torch.where(energy > 0, overlap.square() / torch.where(energy > 0, energy, 1), 0)
    return (1 - share).clamp(0, 1)


def occlusion_correlation(
    maps: Maps, bank: Bank, side: int = 1, score: WatchedScore = "logit"
) -> PerImage:
    """Returns the Spearman correlation of the map with the occlusion map of the same squares.

    Selvaraju et al. 2017, section 5.3. In [-1, 1]; higher is better. It depends on the occluder, so
    report two sides.

    Args:
        maps: At the images' resolution.
        bank: A bank with occluders of that side.
        side: Side of the occluder in cells.
        score: The score whose drops are compared.
    """
    _check_maps_fit(maps, bank)
    perturbations = bank.occluders[side]
    sums = perturbations.sums(maps)
    return spearman(sums[:, None], _drops(perturbations, score).to(sums)[:, None])


def _correlation(maps: Maps, perturbations: PerturbationSet, score: WatchedScore) -> PerImage:
    sums = perturbations.sums(maps)
    return pearson(sums[:, None], _drops(perturbations, score).to(sums)[:, None])


def _drops(perturbations: PerturbationSet, score: WatchedScore) -> Float[Tensor, "batch changes"]:
    if score not in ("logit", "probability"):
        raise ValueError(f"score is {score!r}; it is 'logit' or 'probability'")
    return perturbations.logit_drops if score == "logit" else perturbations.probability_drops


def _rescale(values: Float[Tensor, "batch changes"]) -> Float[Tensor, "batch changes"]:
    """Values divided by the largest, so that squares of tiny maps don't underflow."""
    largest = values.abs().amax(1, keepdim=True)
    return values / torch.where(largest > 0, largest, 1)


def _check_maps_fit(maps: Maps, bank: Bank) -> None:
    if tuple(maps.shape[1:]) != bank.size or len(maps) != len(bank.classes):
        raise ValueError(
            f"maps {list(maps.shape)} for a bank of {len(bank.classes)} images of "
            f"{bank.size[0]}x{bank.size[1]}: `explain.maps.upsample` them first"
        )
    check_finite(maps)
