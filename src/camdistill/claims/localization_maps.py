"""Maps of the lab's images, and the thresholds that other images choose."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from camdistill.claims.claim import Drawn, Lab, drawn
from camdistill.explain.maps import relu
from camdistill.explain.methods import at_image
from camdistill.measure.boxes import box_around, localisation_error
from camdistill.measure.controls import random_maps
from camdistill.measure.localization import iou
from camdistill.types import Explain, Images, Labels, Maps, Masks, PerImage

BATCH = 64
PAPER = 0.15
"""Of a map's maximum: the paper's threshold for boxes."""
THRESHOLDS = tuple(step / 20 for step in range(1, 19))
RANDOM = "random"


def tops(network: nn.Module, images: Images) -> Labels:
    """Each image's own top class."""
    with torch.no_grad():
        return torch.cat([network(part).argmax(1) for part in torch.split(images, BATCH)])


def made(explain: Explain, network: nn.Module, images: Images, classes: Labels) -> Maps:
    """Maps of many images, some at a time."""
    parts = zip(torch.split(images, BATCH), torch.split(classes, BATCH), strict=True)
    return torch.cat([explain(network, some, of).detach() for some, of in parts])


def maps_of(
    lab: Lab, network: nn.Module, scene: Drawn, methods: Sequence[str], classes: Labels
) -> dict[str, Maps]:
    """Rectified maps at the images' resolution by method; `random` asks no network."""
    found = {}
    for method in methods:
        if method == RANDOM:
            found[method] = random_maps(scene.images, lab.generator("random maps"))
        else:
            found[method] = relu(made(at_image(method), network, scene.images, classes))
    return found


def choosing(lab: Lab) -> Drawn:
    """Other images than those that are measured on: thresholds are chosen here."""
    return drawn(lab, replace(lab.shapes, split="val"))


def box_error(maps: Maps, masks: Masks, threshold: float) -> PerImage:
    """1 where the box misses the object (IoU below 0.5)."""
    return localisation_error(maps, box_around(masks), threshold)


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
    found = {step: float(measure(maps, masks, step).mean()) for step in THRESHOLDS}
    return (max if higher else min)(found, key=lambda step: found[step])


def at_best(
    lab: Lab,
    network: nn.Module,
    method: str,
    measure: Callable[[Maps, Masks, float], PerImage],
    *,
    higher: bool,
) -> PerImage:
    """A method's values on the lab's images, at the threshold that is best on other ones."""
    scene, other = drawn(lab), choosing(lab)
    before, maps = (
        maps_of(lab, network, some, [method], tops(network, some.images))[method]
        for some in (other, scene)
    )
    step = best_threshold(measure, before, other.masks["object"], higher=higher)
    return measure(maps, scene.masks["object"], step)
