"""Scores of an image multiplied by its map: average drop and its easily fooled relatives.

They multiply the image by the min-max normalized map, so they reward a map for being large. On
ladders of ever worse maps the drop in deletion ranks backwards, and the average drop recovers half
of the order at best. A map of ones except for one pixel has a drop of about 0 (Poppi et al. 2021,
https://arxiv.org/abs/2104.10252, "Fake-CAM"). They are here because papers report them. Don't rank
explainers by them.

A constant map becomes 0 everywhere, so its masked image is black.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.explain.compare import pearson
from camdistill.explain.maps import normalize
from camdistill.perturb.batched_forward import logits_of
from camdistill.perturb.probability import probabilities
from camdistill.perturb.ranks import check_finite
from camdistill.types import Explain, Images, Labels, Maps, PerImage


class MaskingScores(NamedTuple):
    """Changes of the class's probability when the image is multiplied by the map, or by 1 - map.

    Here p is the class's probability of the image, q that of the image times the map, and d that of
    the image times (1 - map).

    Attributes:
        average_drop: max(0, p - q) / p; lower is better (Chattopadhay et al. 2018,
            https://arxiv.org/abs/1710.11063).
        increase: 1 where q > p, else 0; higher is better (the same paper).
        average_gain: max(0, q - p) / (1 - p); higher is better (Zhang et al. 2024, Opti-CAM).
        drop_in_deletion: (p - d) / p; higher is better (Jung and Oh 2021,
            https://arxiv.org/abs/2108.09670).
    """

    average_drop: PerImage
    increase: PerImage
    average_gain: PerImage
    drop_in_deletion: PerImage


def masking_scores(
    network: nn.Module, images: Images, classes: Labels, maps: Maps
) -> MaskingScores:
    """Returns average drop, increase, gain and drop in deletion.

    The module's docstring says why not to trust them.

    Args:
        network: In eval mode.
        images: In [0, 1]; a map of 0 turns a pixel into 0.
        classes: The class whose probability is measured, one for each image.
        maps: At the images' resolution.
    """
    share = _share(maps, images)
    before = _probability(network, images, classes)
    through_map = _probability(network, images * share, classes)
    without = _probability(network, images * (1 - share), classes)
    return MaskingScores(
        average_drop=(before - through_map).clamp(min=0) / before,
        increase=(through_map > before).to(before),
        average_gain=(through_map - before).clamp(min=0) / (1 - before).clamp(min=1e-12),
        drop_in_deletion=(before - without) / before,
    )


def adcc(
    network: nn.Module, images: Images, classes: Labels, maps: Maps, explain: Explain
) -> PerImage:
    """Returns the harmonic mean of coherency, 1 - complexity and 1 - average drop.

    In [0, 1]; higher is better. Poppi et al. 2021, https://arxiv.org/abs/2104.10252, eq. 5.
    Coherency is (1 + Pearson) / 2 of the map and the map of the masked image, for the same class.
    (Their released code takes the confidence of another class where the top class changes.)
    Complexity is the map's mean. The result is 0 where any of the three is 0.
    """
    share = _share(maps, images)
    maps_of_masked = explain(network, images * share, classes)
    check_finite(maps_of_masked)
    coherency = (1 + pearson(maps, maps_of_masked)) / 2
    before = _probability(network, images, classes)
    through_map = _probability(network, images * share, classes)
    drop = (before - through_map).clamp(min=0) / before
    simplicity = 1 - share.mean((1, 2, 3))
    parts = torch.stack([coherency.to(drop), simplicity.to(drop), 1 - drop])
    all_positive = (parts > 0).all(0)
    return torch.where(all_positive, 3 / (1 / parts.clamp(min=1e-12)).sum(0), 0)


def _share(maps: Maps, images: Images) -> Float[Tensor, "batch 1 height width"]:
    if len(maps) != len(images) or maps.shape[1:] != images.shape[2:]:
        raise ValueError(
            f"maps {list(maps.shape)} for images {list(images.shape)}: "
            "`explain.maps.upsample` them first"
        )
    check_finite(maps)
    return normalize(maps).to(images.dtype)[:, None]


def _probability(network: nn.Module, images: Images, classes: Labels) -> PerImage:
    class_probabilities = probabilities(logits_of(network, images)).gather(1, classes[:, None])[
        :, 0
    ]
    return class_probabilities.clamp(min=torch.finfo(class_probabilities.dtype).tiny)
