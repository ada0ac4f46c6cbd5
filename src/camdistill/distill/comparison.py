"""Teacher and student on the same images."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from camdistill import tags
from camdistill.data.datasets import ImageSet
from camdistill.distill.training import as_images
from camdistill.explain.gradcam import Explanation, TopClasses, explain_images
from camdistill.explain.maps import relu
from camdistill.measure.fidelity import FidelityMeter, StudentSummary
from camdistill.networks.teachers import Preprocessed, Teacher
from camdistill.perturb.probability import label_count, predict_labels
from camdistill.types import Batch, Images, Labels, Logits, Maps

BATCH = 256

MapsByLayer = dict[str, Float[Tensor, "batch _ _"]]  # each layer has its own grid
Pairs = Sequence[tuple[str, str, float]]  # the student's layer, the teacher's, and a weight


class Comparison(NamedTuple):
    """What both networks say; the raw maps are of the teacher's top class.

    The maps of its second likeliest class may stand beside them.
    """

    teacher_logits: Logits
    student_logits: Logits
    classes: Labels
    teacher_maps_by_layer: MapsByLayer
    student_maps_by_layer: MapsByLayer
    teacher_runner_up_by_layer: MapsByLayer | None = None
    student_runner_up_by_layer: MapsByLayer | None = None


class MapComparison(NamedTuple):
    """A few images with the maps of both networks, all on the CPU, for pictures.

    Attributes:
        images01: In [0, 1].
        labels: -1 where there is none.
        teacher_classes: What the teacher predicts; maps are of that class (of a single logit's
            only class, whatever it predicts).
        student_classes: What the student predicts.
        teacher_maps_by_layer: Raw maps by the teacher's layer.
        student_maps_by_layer: Raw maps by the student's layer.
        pairs: The student's layer and the teacher's; one of the teacher's may stand in several.
        class_count: How many classes the networks tell apart, which needn't be the labels'.
    """

    images01: Images
    labels: Labels
    teacher_classes: Labels
    student_classes: Labels
    teacher_maps_by_layer: dict[str, Maps]
    student_maps_by_layer: dict[str, Maps]
    pairs: list[tuple[str, str]]
    class_count: int


@torch.no_grad()
def compare(
    student: Preprocessed,
    teacher: Teacher,
    images: Images,
    pairs: Pairs,
    *,
    runner_up: bool = False,
) -> Comparison:
    """Both networks on images in [0, 1], at pairs of layers.

    Args:
        student: The student.
        teacher: The teacher.
        images: In [0, 1].
        pairs: Layers.
        runner_up: Whether maps of the teacher's second class are compared too, where it has one.
    """
    asked = TopClasses(2) if runner_up and teacher.classes > 1 else None
    told = explain_images(teacher, images, [layer for _, layer, _ in pairs], asked)
    shown = explain_images(student, images, [layer for layer, _, _ in pairs], told.classes)
    return compared(told.logits, told.classes, told.maps, shown)


def compared(
    teacher_logits: Logits,
    classes: Int[Tensor, "batch *classes"],
    teacher_maps_by_layer: Mapping[str, Tensor],
    student: Explanation,
) -> Comparison:
    """A comparison from maps of one class, or of several of which the first two are told.

    Args:
        teacher_logits: The teacher's.
        classes: Of which the maps are, the teacher's likeliest first.
        teacher_maps_by_layer: [B, h, w], or [B, C, h, w] for classes [B, C].
        student: Maps of the same classes.
    """
    own = {name: maps.float() for name, maps in student.maps.items()}
    if classes.dim() == 1:
        return Comparison(teacher_logits, student.logits, classes, dict(teacher_maps_by_layer), own)
    first, second = (
        [
            {name: maps[:, place] for name, maps in side.items()}
            for side in (teacher_maps_by_layer, own)
        ]
        for place in (0, 1)
    )
    return Comparison(teacher_logits, student.logits, classes[:, 0], *first, *second)


def score(meter: FidelityMeter, batch: Batch, found: Comparison) -> None:
    """Hands a comparison to a meter."""
    meter.update(
        found.student_logits,
        found.teacher_logits,
        batch.labels,
        found.student_maps_by_layer,
        found.teacher_maps_by_layer,
        batch.counted,
        batch.ids,
        runner_up_of(found),
    )


def runner_up_of(found: Comparison) -> tuple[MapsByLayer, MapsByLayer] | None:
    """The student's and the teacher's maps of the second class, where there are any."""
    own, its = found.student_runner_up_by_layer, found.teacher_runner_up_by_layer
    return None if own is None or its is None else (own, its)


def fidelity_scalars(student: StudentSummary) -> dict[str, float]:
    """What is logged of a summary, by tag; of each pair where there are several."""
    shown = {
        tags.ACCURACY_STUDENT: student["accuracy"],
        tags.AGREEMENT: student["agreement"],
        tags.PEARSON: student["pearson"],
        tags.SPEARMAN: student["spearman"],
        tags.COSINE: student["cosine"],
        tags.SKILL: student["skill"],
        tags.RUNNER_UP: student["runner_up"],
    }
    if len(student["layers"]) > 1:
        for layer, values in student["layers"].items():
            shown[tags.pearson(layer)] = values["pearson"]
            shown[tags.spearman(layer)] = values["spearman"]
            shown[tags.cosine(layer)] = values["cosine"]
            shown[tags.skill(layer)] = values["skill"]
    return {tag: value for tag, value in shown.items() if value is not None}


@torch.no_grad()
def mean_maps(
    teacher: Teacher, images: ImageSet, layers: Sequence[str]
) -> dict[str, Float[Tensor, "_ _"]]:
    """The teacher's mean ReLU map over a set of images, by layer: the zero of skill."""
    total: dict[str, Tensor] = {}
    for start in range(0, len(images), BATCH):
        pixels = images.batch(np.arange(start, min(start + BATCH, len(images)))).pixels
        found = explain_images(teacher, as_images(pixels.to(teacher.mean.device)), list(layers))
        for layer, maps in found.maps.items():
            total[layer] = total.get(layer, torch.zeros(())).to(maps.device) + relu(maps).sum(0)
    return {layer: (maps / len(images)).cpu() for layer, maps in total.items()}


def for_pictures(batch: Batch, images: Images, found: Comparison, pairs: Pairs) -> MapComparison:
    """A comparison as pictures need it."""
    several = found.teacher_logits.shape[1] > 1
    return MapComparison(
        images.cpu(),
        batch.labels.cpu(),
        (found.classes if several else predict_labels(found.teacher_logits)).cpu(),
        predict_labels(found.student_logits).cpu(),
        {layer: maps.cpu() for layer, maps in found.teacher_maps_by_layer.items()},
        {layer: maps.cpu() for layer, maps in found.student_maps_by_layer.items()},
        [(own, teacher) for own, teacher, _ in pairs],
        label_count(found.teacher_logits.shape[1]),
    )
