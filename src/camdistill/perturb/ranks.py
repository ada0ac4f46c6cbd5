"""The order of a map's pixels, for every metric that removes pixels in an order.

A rectified map is 0 in most of its pixels. A threshold such as "the 30 % above the quantile" then
takes nothing or everything. Here a level takes exactly its number of pixels, and a generator
decides at random which of the equal ones come first.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from camdistill.types import Maps

Ranks = Int[Tensor, "batch height width"]


def ranks(maps: Maps, generator: torch.Generator) -> Ranks:
    """Returns each pixel's rank in its map: 0 is the largest value, h w - 1 the smallest.

    Args:
        maps: Finite maps.
        generator: Decides among equal values, all orders being equally likely.

    Raises:
        ValueError: If a map has NaN or infinity in it, so that it has no order.
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
    """Returns the number of pixels of each fraction of an image, rounded.

    Raises:
        ValueError: If a fraction lies outside [0, 1].
    """
    if not all(0 <= fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions are {list(fractions)}; they lie in [0, 1]")
    return [round(fraction * pixels) for fraction in fractions]


def first_pixels(
    order: Ranks, counts: Sequence[int], *, least: bool = False
) -> Bool[Tensor, "batch levels height width"]:
    """Returns masks of exactly so many pixels for each image, one for each count.

    Args:
        order: Ranks as `ranks` returns them.
        counts: Number of pixels of each mask.
        least: Take the smallest values instead of the largest.
    """
    if least:
        order = order[0].numel() - 1 - order
    limits = torch.tensor(counts, device=order.device)
    return order[:, None] < limits[None, :, None, None]


def check_finite(maps: Maps) -> None:
    """Checks that maps have neither NaN nor infinity; a NaN would pass through a mean unnoticed.

    Raises:
        ValueError: If a map has NaN or infinity in it.
    """
    broken = ~torch.isfinite(maps).flatten(1).all(1)
    if bool(broken.any()):
        which = broken.nonzero().flatten().tolist()
        raise ValueError(
            f"{len(which)} of {len(maps)} maps have NaN or infinity in them (the first is map "
            f"{which[0]}): leave these out and count them as failures"
        )
