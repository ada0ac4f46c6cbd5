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
    requested_classes = TopClasses(2) if runner_up and teacher.classes > 1 else None
    teacher_explanation = explain_images(
        teacher, images, [layer for _, layer, _ in pairs], requested_classes
    )
    student_explanation = explain_images(
        student, images, [layer for layer, _, _ in pairs], teacher_explanation.classes
    )
    return build_comparison(
        teacher_explanation.logits,
        teacher_explanation.classes,
        teacher_explanation.maps,
        student_explanation,
    )


def build_comparison(
    teacher_logits: Logits,
    classes: Int[Tensor, "batch *classes"],
    teacher_maps_by_layer: Mapping[str, Tensor],
    student: Explanation,
) -> Comparison:
    """A comparison from maps of one class, or of several of which the first two are told.

    Args:
        teacher_logits: The teacher's.
        classes: Classes of the maps, the teacher's likeliest first.
        teacher_maps_by_layer: [B, h, w], or [B, C, h, w] for classes [B, C].
        student: Maps of the same classes.
    """
    student_maps = {name: maps.float() for name, maps in student.maps.items()}
    if classes.dim() == 1:
        return Comparison(
            teacher_logits, student.logits, classes, dict(teacher_maps_by_layer), student_maps
        )
    first, second = (
        [
            {name: maps[:, index] for name, maps in side.items()}
            for side in (teacher_maps_by_layer, student_maps)
        ]
        for index in (0, 1)
    )
    return Comparison(teacher_logits, student.logits, classes[:, 0], *first, *second)


def update_meter(meter: FidelityMeter, batch: Batch, comparison: Comparison) -> None:
    """Hands a comparison to a meter."""
    meter.update(
        comparison.student_logits,
        comparison.teacher_logits,
        batch.labels,
        comparison.student_maps_by_layer,
        comparison.teacher_maps_by_layer,
        batch.counted,
        batch.ids,
        runner_up_maps(comparison),
    )


def runner_up_maps(comparison: Comparison) -> tuple[MapsByLayer, MapsByLayer] | None:
    """The student's and the teacher's maps of the second class, where there are any."""
    student_maps, teacher_maps = (
        comparison.student_runner_up_by_layer,
        comparison.teacher_runner_up_by_layer,
    )
    return None if student_maps is None or teacher_maps is None else (student_maps, teacher_maps)


def fidelity_scalars(student: StudentSummary) -> dict[str, float]:
    """What is logged of a summary, by tag; of each pair where there are several."""
    scalars = {
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
            scalars[tags.pearson(layer)] = values["pearson"]
            scalars[tags.spearman(layer)] = values["spearman"]
            scalars[tags.cosine(layer)] = values["cosine"]
            scalars[tags.skill(layer)] = values["skill"]
    return {tag: value for tag, value in scalars.items() if value is not None}


@torch.no_grad()
def mean_maps(
    teacher: Teacher, images: ImageSet, layers: Sequence[str]
) -> dict[str, Float[Tensor, "_ _"]]:
    """The teacher's mean ReLU map over a set of images, by layer: the zero of skill."""
    total: dict[str, Tensor] = {}
    for start in range(0, len(images), BATCH):
        pixels = images.batch(np.arange(start, min(start + BATCH, len(images)))).pixels
        explanation = explain_images(
            teacher, as_images(pixels.to(teacher.mean.device)), list(layers)
        )
        for layer, maps in explanation.maps.items():
            total[layer] = total.get(layer, torch.zeros(())).to(maps.device) + relu(maps).sum(0)
    return {layer: (maps / len(images)).cpu() for layer, maps in total.items()}


def build_map_comparison(
    batch: Batch, images: Images, comparison: Comparison, pairs: Pairs
) -> MapComparison:
    """A comparison as pictures need it."""
    multiclass = comparison.teacher_logits.shape[1] > 1
    return MapComparison(
        images.cpu(),
        batch.labels.cpu(),
        (comparison.classes if multiclass else predict_labels(comparison.teacher_logits)).cpu(),
        predict_labels(comparison.student_logits).cpu(),
        {layer: maps.cpu() for layer, maps in comparison.teacher_maps_by_layer.items()},
        {layer: maps.cpu() for layer, maps in comparison.student_maps_by_layer.items()},
        [(student_layer, teacher_layer) for student_layer, teacher_layer, _ in pairs],
        label_count(comparison.teacher_logits.shape[1]),
    )
