"""Maps of the lab's images, and the thresholds that other images choose."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from camdistill.claims.claim import ClaimSetup, ShapesBatch, draw_batch
from camdistill.explain.maps import relu
from camdistill.explain.methods import image_explainer
from camdistill.measure.boxes import box_around, localization_error
from camdistill.measure.controls import random_maps
from camdistill.measure.localization import iou
from camdistill.types import Explain, Images, Labels, Maps, Masks, PerImage

BATCH = 64
PAPER_THRESHOLD = 0.15
"""Of a map's maximum: the paper's threshold for boxes."""
THRESHOLDS = tuple(step / 20 for step in range(1, 19))
RANDOM = "random"


def top_classes(network: nn.Module, images: Images) -> Labels:
    """Each image's own top class."""
    with torch.no_grad():
        return torch.cat([network(part).argmax(1) for part in torch.split(images, BATCH)])


def explain_in_batches(
    explain: Explain, network: nn.Module, images: Images, classes: Labels
) -> Maps:
    """Maps of many images, some at a time."""
    parts = zip(torch.split(images, BATCH), torch.split(classes, BATCH), strict=True)
    return torch.cat(
        [
            explain(network, part_images, part_classes).detach()
            for part_images, part_classes in parts
        ]
    )


def relu_maps(
    setup: ClaimSetup,
    network: nn.Module,
    batch: ShapesBatch,
    methods: Sequence[str],
    classes: Labels,
) -> dict[str, Maps]:
    """Rectified maps at the images' resolution by method; `random` asks no network."""
    maps_by_method = {}
    for method in methods:
        if method == RANDOM:
            maps_by_method[method] = random_maps(batch.images, setup.generator("random maps"))
        else:
            maps_by_method[method] = relu(
                explain_in_batches(image_explainer(method), network, batch.images, classes)
            )
    return maps_by_method


def draw_validation_batch(setup: ClaimSetup) -> ShapesBatch:
    """Other images than those that are measured on: thresholds are chosen here."""
    return draw_batch(setup, replace(setup.shapes, split="val"))


def box_error(maps: Maps, masks: Masks, threshold: float) -> PerImage:
    """1 where the box misses the object (IoU below 0.5)."""
    return localization_error(maps, box_around(masks), threshold)


def overlap(maps: Maps, masks: Masks, threshold: float) -> PerImage:
    """IoU of the mask with the map above a share of its range."""
    return iou(maps, masks, threshold)


def best_threshold(
    measure: Callable[[Maps, Masks, float], PerImage],
    maps: Maps,
    masks: Masks,
    *,
    higher: bool,
) -> float:
    """The threshold with the best mean."""
    mean_by_threshold = {
        threshold: float(measure(maps, masks, threshold).mean()) for threshold in THRESHOLDS
    }
    return (max if higher else min)(
        mean_by_threshold, key=lambda threshold: mean_by_threshold[threshold]
    )


def score_at_best_threshold(
    setup: ClaimSetup,
    network: nn.Module,
    method: str,
    measure: Callable[[Maps, Masks, float], PerImage],
    *,
    higher: bool,
) -> PerImage:
    """A method's values on the lab's images, at the threshold that is best on other ones."""
    batch, other_batch = draw_batch(setup), draw_validation_batch(setup)
    other_maps, maps = (
        relu_maps(setup, network, source, [method], top_classes(network, source.images))[method]
        for source in (other_batch, batch)
    )
    threshold = best_threshold(measure, other_maps, other_batch.masks["object"], higher=higher)
    return measure(maps, batch.masks["object"], threshold)
