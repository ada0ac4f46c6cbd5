"""Robustness: how much a map changes when its image hardly does.

A constant map never changes, so these metrics gate explainers and don't rank them. The value of a
constant map is NaN, a failure to be counted. The class stays fixed, so that a changed prediction is
not a changed map.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.measure.scores import is_constant
from camdistill.perturb.ranks import check_finite
from camdistill.types import Explain, Images, Labels, Maps, PerImage


def max_sensitivity(
    explain: Explain,
    network: nn.Module,
    images: Images,
    classes: Labels,
    generator: torch.Generator,
    *,
    radius: float = 0.02,
    samples: int = 10,
) -> PerImage:
    """Returns the largest relative change of the map, ||a(x') - a(x)|| / ||a(x)||, near an image.

    Lower is better. Yeh et al. 2019, https://arxiv.org/abs/1901.09392, definition 3, estimated from
    samples.

    Args:
        explain: The explainer that gives the maps.
        network: In eval mode.
        images: In [0, 1].
        classes: The class of the maps.
        generator: Draws the nearby images.
        radius: Largest change of a pixel, in the images' units.
        samples: Number of nearby images for each image.
    """
    maps, largest = _finite_maps(explain, network, images, classes), None
    for nearby in _nearby(images, radius, samples, generator):
        change = _norm(_finite_maps(explain, network, nearby, classes) - maps)
        largest = change if largest is None else torch.maximum(largest, change)
    assert largest is not None, "there is at least one sample"
    return _nan_where_constant(largest / _norm(maps), maps)


def local_lipschitz(
    explain: Explain,
    network: nn.Module,
    images: Images,
    classes: Labels,
    generator: torch.Generator,
    *,
    radius: float = 0.02,
    samples: int = 10,
) -> PerImage:
    """Returns the largest ||a(x') - a(x)|| / ||x' - x|| over nearby images; lower is better.

    Alvarez-Melis and Jaakkola 2018, https://arxiv.org/abs/1806.08049, eq. 2. Each map is first
    divided by ||a(x)||, or the number would depend on the map's scale.
    """
    maps, largest = _finite_maps(explain, network, images, classes), None
    for nearby in _nearby(images, radius, samples, generator):
        change = _norm(_finite_maps(explain, network, nearby, classes) - maps)
        ratio = change / _norm(nearby - images).clamp(min=1e-12)
        largest = ratio if largest is None else torch.maximum(largest, ratio)
    assert largest is not None, "there is at least one sample"
    return _nan_where_constant(largest / _norm(maps), maps)


def _finite_maps(explain: Explain, network: nn.Module, images: Images, classes: Labels) -> Maps:
    maps = explain(network, images, classes)
    check_finite(maps)
    return maps if maps.dtype == torch.float64 else maps.float()


def _nearby(
    images: Images, radius: float, samples: int, generator: torch.Generator
) -> Iterator[Images]:
    if radius <= 0 or samples < 1:
        raise ValueError(f"radius {radius} and samples {samples}: both must be above 0")
    for _ in range(samples):
        uniform = torch.rand(images.shape, generator=generator, device=generator.device)
        yield images + radius * (2 * uniform - 1).to(images)


def _norm(values: Float[Tensor, "batch ..."]) -> PerImage:
    norm: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1)
    return norm


def _nan_where_constant(values: PerImage, maps: Maps) -> PerImage:
    return torch.where(is_constant(maps), torch.nan, values)
