"""Control maps that must lose, maps that must win, and a ladder of ever worse ones.

A metric that ranks a control of the first kind above an explainer is not to be trusted. All maps
are at the images' resolution.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from camdistill.perturb.imputers import gaussian_blur
from camdistill.types import Images, Maps, Masks

RUNGS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def random_maps(images: Images, generator: torch.Generator) -> Maps:
    """Returns maps of independent uniform noise."""
    shape = (len(images), *images.shape[2:])
    return torch.rand(shape, generator=generator, device=generator.device).to(images.device)


def smooth_random_maps(images: Images, generator: torch.Generator, cells: int = 4) -> Maps:
    """Returns noise as smooth as a map of 4 x 4 cells.

    A coarse layer that has learned nothing would give such maps.
    """
    shape = (len(images), 1, cells, cells)
    coarse_noise = torch.rand(shape, generator=generator, device=generator.device).to(images.device)
    size = (images.shape[2], images.shape[3])
    return F.interpolate(coarse_noise, size=size, mode="bilinear", align_corners=False)[:, 0]


def sobel_edges(images: Images) -> Maps:
    """Returns Sobel's gradient magnitude of the mean over channels.

    Such a map depends on the image alone, not on the network.
    """
    gray = (images if images.dtype == torch.float64 else images.float()).mean(1, keepdim=True)
    padded = F.pad(gray, (1, 1, 1, 1), mode="replicate")
    across = gray.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    kernels = torch.stack([across, across.T])[:, None]
    return F.conv2d(padded, kernels).square().sum(1).sqrt()


def center(images: Images) -> Maps:
    """Returns a Gaussian in the middle of the image, its sigma a quarter of each side.

    People photograph objects in the middle.
    """
    rows, columns = (
        torch.linspace(-1, 1, length, device=images.device) for length in images.shape[2:]
    )
    bump = torch.exp(-2 * (rows[:, None].square() + columns[None].square()))
    return bump.expand(len(images), -1, -1)


def invert(maps: Maps) -> Maps:
    """Returns the map with its sign changed: worse than chance wherever the map is better."""
    return -maps


def blur_maps(maps: Maps) -> Maps:
    """Returns the map blurred, with a sigma of an eighth of its side: it has no new information.

    Removal metrics that leave a smooth border prefer it to the map.
    """
    return gaussian_blur(maps[:, None])[:, 0]


def mask_maps(masks: Masks) -> Maps:
    """Returns a mask as a map: the object's is the oracle, the distractor's must lose."""
    return masks.float()


def ladder(
    maps: Maps, generator: torch.Generator, rungs: Sequence[float] = RUNGS
) -> Float[Tensor, "rungs batch height width"]:
    """Returns ever worse copies of a map, mixed with more and more smooth noise.

    The noise is independent of the map and the network. Map and noise are first brought to the same
    mean and spread, so that the order is one of information and not of size. The test of a metric
    is whether it recovers that order.

    Args:
        maps: The best maps available: the oracle's, or an explainer's.
        generator: Generator of the noise; all rungs of an image share the noise.
        rungs: Shares of the noise, from 0, the map itself, to 1, noise alone.
    """
    noise = smooth_random_maps(maps[:, None], generator, cells=8)
    standard_maps, standard_noise = _standardize(maps), _standardize(noise)
    return torch.stack([(1 - rung) * standard_maps + rung * standard_noise for rung in rungs])


def _standardize(maps: Maps) -> Maps:
    float_maps = maps if maps.dtype == torch.float64 else maps.float()
    centered = float_maps - float_maps.mean((1, 2), keepdim=True)
    spread = centered.square().mean((1, 2), keepdim=True).sqrt()
    return centered / torch.where(spread > 0, spread, 1)
