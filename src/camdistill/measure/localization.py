"""Localization: whether a map lies on the object. It needs masks or boxes.

It equals faithfulness only where the network looks at the object, so report an intervention beside
it. Maps are at the masks' resolution. The value of an image without ground truth is NaN. A blank
map points nowhere: it gets 0 where energy or a threshold counts. Where the order counts, its pixels
are in random order, as all equal values are.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from camdistill.explain.maps import normalize, relu
from camdistill.perturb.ranks import Ranks, check_finite
from camdistill.types import Maps, Masks, PerImage


def relevance_rank_accuracy(order: Ranks, masks: Masks) -> PerImage:
    """Returns the share of the n most relevant pixels that lie in a mask of n pixels.

    In [0, 1]; higher is better. Arras et al. 2022, https://arxiv.org/abs/2003.07258, eq. 2. Chance
    is the mask's share of the image.
    """
    area = masks.flatten(1).sum(1)
    hits = ((order < area[:, None, None]) & masks).flatten(1).sum(1)
    return _nan_without_mask(hits / area.clamp(min=1), masks)


def pointing_game(order: Ranks, masks: Masks, tolerance: float | int = 0) -> PerImage:
    """Returns 1 if the map's largest pixel lies in the mask or near it, else 0; higher is better.

    Zhang et al. 2018, https://arxiv.org/abs/1608.00507, section 4.1. Of equal largest pixels one is
    drawn. (Quantus counts a hit if any of them is in the mask, so a near-constant map always hits.)

    Args:
        order: `ranks` of the maps.
        masks: Ground truth.
        tolerance: Distance in pixels that still counts as a hit. The paper has 15, for images of
            about 500 pixels.
    """
    height, width = masks.shape[1:]
    place = (order == 0).flatten(1).float().argmax(1)
    y, x = place // width, place % width
    rows = torch.arange(height, device=masks.device)[None, :, None] - y[:, None, None]
    columns = torch.arange(width, device=masks.device)[None, None, :] - x[:, None, None]
    near = rows.square() + columns.square() <= tolerance**2
    return _nan_without_mask((near & masks).flatten(1).any(1).float(), masks)


def energy_pointing_game(maps: Maps, masks: Masks) -> PerImage:
    """Returns the share of the map's positive part that lies in the mask.

    In [0, 1]; higher is better. Wang et al. 2020, https://arxiv.org/abs/1910.01279, section 4.3.
    Chance is the mask's share of the image: see `energy_lift`.
    """
    check_finite(maps)
    positive = relu(normalize(_upcast_maps(maps), "max"))
    total = positive.sum((1, 2))
    inside = (positive * masks).sum((1, 2))
    return _nan_without_mask(
        torch.where(total > 0, inside / torch.where(total > 0, total, 1), 0), masks
    )


def energy_lift(maps: Maps, masks: Masks) -> PerImage:
    """Returns the share of energy in the mask, divided by the mask's share of the image.

    1 is chance; higher is better.
    """
    share = masks.flatten(1).float().mean(1)
    return energy_pointing_game(maps, masks) / share.clamp(min=1e-12)


def iou(maps: Maps, masks: Masks, threshold: float | None = 0.5) -> PerImage:
    """Returns the intersection over union of the mask and the thresholded map.

    In [0, 1]; higher is better.

    Args:
        maps: Any scale.
        masks: Ground truth.
        threshold: Threshold of the min-max normalized map. None takes each image's best of 0.05,
            0.1, ..., 0.95, which flatters every map alike.
    """
    check_finite(maps)
    share = normalize(_upcast_maps(maps))
    steps = [step / 20 for step in range(1, 20)] if threshold is None else [threshold]
    scores = []
    for step in steps:
        thresholded = share > step
        intersection = (thresholded & masks).flatten(1).sum(1)
        scores.append(intersection / (thresholded | masks).flatten(1).sum(1).clamp(min=1))
    return _nan_without_mask(torch.stack(scores).amax(0), masks)


def average_precision(maps: Maps, masks: Masks) -> PerImage:
    """Returns the mean precision over the mask's pixels in the map's order.

    In [0, 1]; higher is better. Equal values form one step, as in scikit-learn; chance is the
    mask's share of the image. It separates maps better than the area under the ROC curve, which
    most pixels decide and which is high for all maps.
    """
    check_finite(maps)
    values, inside = _upcast_maps(maps).flatten(1), masks.flatten(1)
    rising, order = values.sort(1)
    count = values.shape[1]
    # For each value: how many pixels are at least as large, and how many of them are inside.
    at_least_as_large = count - torch.searchsorted(rising, rising)
    below = torch.cumsum(inside.gather(1, order).to(values.dtype), 1)
    area = inside.sum(1, keepdim=True)
    before = torch.cat([torch.zeros_like(below[:, :1]), below], 1).gather(
        1, count - at_least_as_large
    )
    precision = (area - before) / at_least_as_large
    hits = (precision * inside.gather(1, order)).sum(1)
    return _nan_without_mask(hits / area[:, 0].clamp(min=1), masks)


def inside_outside(maps: Maps, masks: Masks) -> PerImage:
    """Returns the mean of the positive part inside the mask, divided by that outside.

    1 is chance; higher is better. Selvaraju et al. 2017, section 8.1, for captions. The value is
    infinite where all of the positive part is inside, and 0 for a blank map.
    """
    check_finite(maps)
    positive = relu(normalize(_upcast_maps(maps), "max"))
    inside = (positive * masks).sum((1, 2)) / masks.flatten(1).sum(1).clamp(min=1)
    outside = (positive * ~masks).sum((1, 2)) / (~masks).flatten(1).sum(1).clamp(min=1)
    return _nan_without_mask(torch.where(inside > 0, inside / outside, 0), masks)


def _nan_without_mask(values: Tensor, masks: Masks) -> PerImage:
    has_mask = masks.flatten(1).any(1)
    return torch.where(has_mask, values.to(torch.get_default_dtype()), torch.nan)


def _upcast_maps(maps: Maps) -> Float[Tensor, "batch height width"]:
    return maps if maps.dtype == torch.float64 else maps.float()
