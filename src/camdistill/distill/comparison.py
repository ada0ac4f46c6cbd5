"""Teacher and student on the same images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camdistill.data.datasets import ImageSet
from camdistill.distill.training import as_images
from camdistill.explain.gradcam import explain
from camdistill.explain.maps import relu
from camdistill.networks.teachers import Teacher
from camdistill.types import Images, Labels, Logits, Maps

BATCH = 256


class Comparison(NamedTuple):
    """What both networks say; the raw maps are of the teacher's top class."""

    teacher_logits: Logits
    student_logits: Logits
    classes: Labels
    teacher_maps_by_layer: dict[str, Maps]
    student_maps_by_layer: dict[str, Maps]


class MapComparison(NamedTuple):
    """A few images with the maps of both networks, all on the CPU, for pictures.

    Attributes:
        images01: In [0, 1].
        labels: -1 where there is none.
        teacher_classes: The teacher's top class, of which all maps are.
        student_classes: The student's top class.
        teacher_maps_by_layer: Raw maps by the teacher's layer, in the order of the pairs.
        student_maps_by_layer: Raw maps by the student's layer, in the same order.
    """

    images01: Images
    labels: Labels
    teacher_classes: Labels
    student_classes: Labels
    teacher_maps_by_layer: dict[str, Maps]
    student_maps_by_layer: dict[str, Maps]


@torch.no_grad()
def mean_maps(
    teacher: Teacher, images: ImageSet, layers: Sequence[str]
) -> dict[str, Float[Tensor, "height width"]]:
    """The teacher's mean ReLU map over a set of images, by layer: what skill is measured against."""
    total: dict[str, Tensor] = {}
    for start in range(0, len(images), BATCH):
        pixels = images.batch(np.arange(start, min(start + BATCH, len(images)))).pixels
        found = explain(teacher, as_images(pixels.to(teacher.mean.device)), list(layers))
        for layer, maps in found.maps.items():
            total[layer] = total.get(layer, torch.zeros(())).to(maps.device) + relu(maps).sum(0)
    return {layer: (maps / len(images)).cpu() for layer, maps in total.items()}
