"""Does a map say where the network's score comes from? Answered from a perturbation bank.

All take raw, signed maps at the images' resolution and a bank of the same images and classes; none
asks the network. A map that is constant over a bank's changes says nothing: it is worth 0 in the
correlations and 1, the worst, in the infidelity.
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
    """Pearson correlation of a map's sums over random subsets with the score's drops; higher.

    Bhatt et al. 2020, https://arxiv.org/abs/2005.00631, eq. 1, with subsets of whole cells, as
    single pixels hardly move a network. In [-1, 1]. Of the bank's shares the first is taken.
    """
    _check_maps_fit(maps, bank)
    return _correlation(maps, next(iter(bank.subsets.values())), score)


def sensitivity_n(maps: Maps, bank: Bank, score: WatchedScore = "logit") -> PerImage:
    """The same correlation for several sizes of the subset, averaged over them; higher.

    Ancona et al. 2018, https://arxiv.org/abs/1711.06104, section 4, where n is the subsets' size:
    the bank's plan says which sizes there are.
    """
    _check_maps_fit(maps, bank)
    correlations = [
        _correlation(maps, perturbations, score) for perturbations in bank.subsets.values()
    ]
    return torch.stack(correlations).mean(0)


def infidelity(maps: Maps, bank: Bank, score: WatchedScore = "logit") -> PerImage:
    """Share of the drops' energy that no positive multiple of the map explains; lower, in [0, 1].

    Yeh et al. 2019, https://arxiv.org/abs/1901.09392: E (I a - drop)^2 for square removals, the
    bank's occluders, of which a map's sums over the squares stand for I a. The map is first
    multiplied by the best beta (their section 4), as the raw form measures its scale; then divided
    by E drop^2. beta is held at 0 or above, or an inverted map would be as good as the map.
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
    """Spearman correlation of the map with the occlusion map of the same squares; higher.

    Selvaraju et al. 2017, section 5.3; in [-1, 1]. It depends on the occluder: report two sides.

    Args:
        maps: At the images' resolution.
        bank: With occluders of that side.
        side: In cells.
        score: Score whose drop is measured.
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
    """By the largest, so that squares of tiny maps don't underflow."""
    largest = values.abs().amax(1, keepdim=True)
    return values / torch.where(largest > 0, largest, 1)


def _check_maps_fit(maps: Maps, bank: Bank) -> None:
    if tuple(maps.shape[1:]) != bank.size or len(maps) != len(bank.classes):
        raise ValueError(
            f"maps {list(maps.shape)} for a bank of {len(bank.classes)} images of "
            f"{bank.size[0]}x{bank.size[1]}: `explain.maps.upsample` them first"
        )
    check_finite(maps)
