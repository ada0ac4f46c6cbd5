"""Which pixels come first: every metric that removes pixels in an order takes it from here.

A rectified map is 0 in most of its pixels. A threshold "the 30 % above the quantile" then takes
nothing or everything; here a level takes exactly its number of pixels, and which of equal ones is
chance, from a generator.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from camdistill.types import Maps

Ranks = Int[Tensor, "batch height width"]


def ranks(maps: Maps, generator: torch.Generator) -> Ranks:
    """Each pixel's place in its map's order: 0 is the largest value, h w - 1 the smallest.

    Args:
        maps: Finite.
        generator: Decides among equal values, all orders being equally likely.

    Raises:
        ValueError: A map has NaN or infinity in it: there is no order.
    """
    check_finite(maps)
    values = maps.detach().flatten(1)
    random_values = torch.rand(values.shape, generator=generator, device=generator.device)
    shuffled = random_values.to(values.device).argsort(1)
    order = values.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    order = shuffled.gather(1, order)
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(maps.shape)


def level_counts(fractions: Sequence[float], pixels: int) -> list[int]:
    """How many pixels each fraction of an image is, to the nearest."""
    if not all(0 <= fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions are {list(fractions)}; they lie in [0, 1]")
    return [round(fraction * pixels) for fraction in fractions]


def first_pixels(
    order: Ranks, counts: Sequence[int], *, least: bool = False
) -> Bool[Tensor, "batch levels height width"]:
    """Masks of exactly so many pixels an image, one for each count.

    Args:
        order: Order of the pixels, from `ranks`.
        counts: How many pixels.
        least: Take the smallest values and not the largest.
    """
    if least:
        order = order[0].numel() - 1 - order
    limits = torch.tensor(counts, device=order.device)
    return order[:, None] < limits[None, :, None, None]


def check_finite(maps: Maps) -> None:
    """Refuse maps that can't be measured; a NaN would pass through a mean unseen."""
    broken = ~torch.isfinite(maps).flatten(1).all(1)
    if bool(broken.any()):
        which = broken.nonzero().flatten().tolist()
        raise ValueError(
            f"{len(which)} of {len(maps)} maps have NaN or infinity in them (the first is map "
            f"{which[0]}): leave these out and count them as failures"
        )
