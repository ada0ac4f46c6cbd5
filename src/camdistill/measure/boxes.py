"""Weakly supervised localization: a box from a map, as in the Grad-CAM paper.

Boxes are (xmin, ymin, xmax, ymax) in pixels, bounds included. Selvaraju et al. 2017, section 4.1:
the map is thresholded at 15 % of its maximum, and its largest connected part gives the box. The box
is right at an IoU (intersection over union) of 0.5.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from camdistill.perturb.ranks import check_finite
from camdistill.types import Maps, Masks, PerImage

Boxes = Float[Tensor, "batch 4"]


def box_of(maps: Maps, threshold: float = 0.15) -> Boxes:
    """Returns the box around the largest connected part of each map; NaN where nothing is positive.

    Args:
        maps: Raw maps; their negative part doesn't count.
        threshold: Share of each map's maximum.
    """
    check_finite(maps)
    peak = maps.amax((1, 2), keepdim=True)
    return box_around(_largest_part((maps >= threshold * peak) & (peak > 0)))


def box_around(masks: Masks) -> Boxes:
    """Returns the smallest box that contains each mask; NaN for an empty mask."""
    bounds = []
    for along in (masks.any(1), masks.any(2)):
        ticks = torch.arange(along.shape[1], device=along.device).float()
        low = torch.where(along, ticks, torch.inf).amin(1)
        high = torch.where(along, ticks, -torch.inf).amax(1)
        bounds.append(torch.stack([low, high], 1))
    (xmin, xmax), (ymin, ymax) = (limits.unbind(1) for limits in bounds)
    boxes = torch.stack([xmin, ymin, xmax, ymax], 1)
    return torch.where(masks.flatten(1).any(1)[:, None], boxes, torch.nan)


def inside_boxes(boxes: Boxes, size: tuple[int, int]) -> Masks:
    """Returns boxes as masks of an image's size; empty where a box is NaN."""
    rows = torch.arange(size[0], device=boxes.device)[None, :, None]
    columns = torch.arange(size[1], device=boxes.device)[None, None, :]
    xmin, ymin, xmax, ymax = (edge[:, None, None] for edge in boxes.unbind(1))
    return (columns >= xmin) & (columns <= xmax) & (rows >= ymin) & (rows <= ymax)


def box_iou(boxes: Boxes, others: Boxes) -> PerImage:
    """Returns the intersection over union of two boxes, in [0, 1]; NaN where one of them is NaN."""
    low = torch.maximum(boxes[:, :2], others[:, :2])
    high = torch.minimum(boxes[:, 2:], others[:, 2:])
    intersection = (high - low + 1).clamp(min=0).prod(1)
    areas = [(box[:, 2:] - box[:, :2] + 1).prod(1) for box in (boxes, others)]
    return intersection / (areas[0] + areas[1] - intersection)


def localization_error(
    maps: Maps, boxes: Boxes, threshold: float = 0.15, correct: Bool[Tensor, "batch"] | None = None
) -> PerImage:
    """Returns 1 where the map's box misses the object's (IoU below 0.5), else 0; lower is better.

    Args:
        maps: Raw maps of the located class, at the boxes' resolution.
        boxes: Boxes of the objects. NaN where there is no object, and the image's value is then
            NaN.
        threshold: Share of each map's maximum: 0.15 in the paper. Try several, as the best one
            differs between explainers.
        correct: Where the predicted class is right. A wrong class is an error, whatever the box
            (the paper's top-1 and top-5 errors). None ignores the prediction.
    """
    overlap = box_iou(box_of(maps, threshold), boxes)
    right = torch.nan_to_num(overlap, nan=0.0) >= 0.5
    if correct is not None:
        right = right & correct
    return torch.where(boxes.isnan().any(1), torch.nan, (~right).float())


def _largest_part(masks: Masks) -> Masks:
    """The part with most pixels (the first of equals); parts connect by sides and corners."""
    count, height, width = masks.shape
    numbers = torch.arange(1, height * width + 1, device=masks.device, dtype=torch.float32)
    marks = numbers.view(1, height, width) * masks
    # The highest number of each part spreads through it, one pixel at each step.
    while True:
        spread = F.max_pool2d(marks[:, None], 3, stride=1, padding=1)[:, 0] * masks
        if torch.equal(spread, marks):
            break
        marks = spread
    part: Int[Tensor, "batch pixels"] = marks.flatten(1).long()
    sizes = torch.zeros(count, height * width + 1, device=masks.device)
    sizes.scatter_add_(1, part, torch.ones_like(sizes[:, 1:]))
    sizes[:, 0] = 0
    return (part == sizes.argmax(1, keepdim=True)).view(masks.shape) & masks
