"""Map against map, one value an image: what losses and fidelity both stand on.

The maps are compared as vectors of h w numbers, as they come: rectify and resize them first.
A map that says nothing - blank, or constant where only the shape counts - is worth 0 in every
similarity, with a gradient of 0. Half precision is compared in float32.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from camdistill.types import Maps, PerImage

Vectors = Float[Tensor, "batch cells"]


def pearson(maps: Maps, reference: Maps) -> PerImage:
    """Pearson correlation over the cells, in [-1, 1]; 0 if either map is constant."""
    vectors, others = _pair(maps, reference)
    return (_standard(vectors) * _standard(others)).sum(1)


def spearman(maps: Maps, reference: Maps) -> PerImage:
    """Pearson correlation of the ranks, equal values sharing their mean rank; 0 if constant.

    Not differentiable: ranks are steps.
    """
    vectors, others = _pair(maps.detach(), reference.detach())
    return (_standard(_ranks(vectors)) * _standard(_ranks(others))).sum(1)


def cosine(maps: Maps, reference: Maps) -> PerImage:
    """Cosine of the angle between the maps, in [-1, 1]; 0 if either is blank."""
    vectors, others = _pair(maps, reference)
    return (_unit(vectors) * _unit(others)).sum(1)


def l2(maps: Maps, reference: Maps) -> PerImage:
    """Euclidean distance of the maps after each is divided by its L2 norm, in [0, 2].

    A blank map is the zero vector, at distance 1 from every other. The gradient of equal maps is 0.
    """
    vectors, others = _pair(maps, reference)
    return _norm(_unit(vectors) - _unit(others))[:, 0]


def l1(maps: Maps, reference: Maps) -> PerImage:
    """Sum of absolute differences of the maps after each is divided by its L2 norm.

    At most 2 sqrt(h w). A blank map is the zero vector.
    """
    vectors, others = _pair(maps, reference)
    return (_unit(vectors) - _unit(others)).abs().sum(1)


def _pair(maps: Maps, reference: Maps) -> tuple[Vectors, Vectors]:
    if maps.shape != reference.shape:
        raise ValueError(
            f"maps of shape {tuple(maps.shape)} against {tuple(reference.shape)}: "
            "bring them to one grid with `resize`"
        )
    double = torch.float64 in (maps.dtype, reference.dtype)
    dtype = torch.float64 if double else torch.float32
    return maps.to(dtype).flatten(1), reference.to(dtype).flatten(1)


def _norm(vectors: Vectors) -> Float[Tensor, "batch 1"]:
    """L2 norm whose gradient at 0 is 0 and not NaN; scaled, so that tiny maps don't underflow."""
    scale = vectors.detach().abs().amax(1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    square = (vectors / scale).square().sum(1, keepdim=True)
    blank = square == 0
    return torch.where(blank, 0, torch.where(blank, 1, square).sqrt() * scale)


def _unit(vectors: Vectors) -> Vectors:
    norm = _norm(vectors)
    blank = norm == 0
    return torch.where(blank, 0, vectors / torch.where(blank, 1, norm))


def _standard(vectors: Vectors) -> Vectors:
    """Centered, with norm 1; 0 where what is left after centring is rounding."""
    centered = vectors - vectors.mean(1, keepdim=True)
    largest = vectors.detach().abs().amax(1, keepdim=True)
    spread = centered.detach().abs().amax(1, keepdim=True)
    constant = spread <= 16 * torch.finfo(vectors.dtype).eps * largest
    return _unit(torch.where(constant, 0, centered))


def _ranks(vectors: Vectors) -> Vectors:
    """Mean ranks, from 0: of n equal values the mean of their places in the order."""
    ordered, order = vectors.sort(1)
    first = torch.searchsorted(ordered, ordered, right=False)
    last = torch.searchsorted(ordered, ordered, right=True) - 1
    shared = (first + last).to(vectors.dtype) / 2
    return torch.zeros_like(vectors).scatter(1, order, shared)
