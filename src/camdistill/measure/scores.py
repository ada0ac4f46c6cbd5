"""Scores of a student against its teacher for each image: the same prediction, the same map.

Maps are compared on the teacher's grid. A blank or constant student map scores 0. An image whose
teacher map is blank or constant has no value (NaN).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from camdistill.explain.compare import cosine, pearson, spearman
from camdistill.explain.maps import relu, resize
from camdistill.perturb.probability import expand_single_logit, predict_labels
from camdistill.types import Labels, Logits, Maps, PerImage

FLAT = 1e-6  # share of a map's largest value; one that varies less is constant up to rounding


class MapScores(NamedTuple):
    """Similarities of maps in [-1, 1]; NaN where the teacher's map is blank or constant."""

    pearson: PerImage
    spearman: PerImage
    cosine: PerImage


def agreement(student_logits: Logits, teacher_logits: Logits) -> PerImage:
    """Returns 1 where student and teacher predict the same label, else 0.

    A single logit predicts by its sign.
    """
    return (predict_labels(student_logits) == predict_labels(teacher_logits)).float()


def divergence(student_logits: Logits, teacher_logits: Logits) -> PerImage:
    """Returns KL(teacher || student) of the class probabilities, in nats."""
    student = F.log_softmax(expand_single_logit(student_logits.float()), dim=1)
    teacher = F.log_softmax(expand_single_logit(teacher_logits.float()), dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def correct(logits: Logits, labels: Labels) -> PerImage:
    """Returns 1 where the prediction is the label, 0 where it isn't, and NaN without a label (-1).

    A single logit predicts label 1 where it is above 0, else label 0.
    """
    hit = (predict_labels(logits) == labels).float()
    return torch.where(labels >= 0, hit, torch.full_like(hit, torch.nan))


def map_scores(student_maps: Maps, teacher_maps: Float[Tensor, "batch rows columns"]) -> MapScores:
    """Returns the fidelity of a student's raw maps to a teacher's.

    Maps are rectified first; the module's docstring says how blank and constant ones score.
    """
    student, teacher = relu(student_maps.float()), relu(teacher_maps.float())
    blank, has_shape = is_constant(student), ~is_constant(teacher)
    if student.shape[-2:] != teacher.shape[-2:]:
        student = resize(student, (teacher.shape[-2], teacher.shape[-1]))
        blank = blank | is_constant(student)
    values = [measure(student, teacher) for measure in (pearson, spearman, cosine)]
    nan = torch.full_like(values[0], torch.nan)
    return MapScores(
        *(torch.where(has_shape, value.masked_fill(blank, 0), nan) for value in values)
    )


def signed_pearson(
    student_maps: Maps, teacher_maps: Float[Tensor, "batch rows columns"]
) -> PerImage:
    """Returns the Pearson correlation of signed maps on the teacher's grid.

    A constant student map scores 0; the value is NaN where the teacher's map is constant.
    """
    student, teacher = student_maps.float(), teacher_maps.float()
    if student.shape[-2:] != teacher.shape[-2:]:
        student = resize(student, (teacher.shape[-2], teacher.shape[-1]))
    value = pearson(student, teacher).masked_fill(is_constant(student), 0)
    return value.masked_fill(is_constant(teacher), torch.nan)


def is_constant(maps: Maps) -> Bool[Tensor, "batch"]:
    """Returns whether a map is blank or constant.

    Its values then vary by no more than rounding, as after an interpolation.
    """
    high, low = maps.amax((1, 2)), maps.amin((1, 2))
    return high - low <= FLAT * high.abs().maximum(low.abs())


def level_constant_maps(maps: Maps) -> Maps:
    """Returns maps in which those that are constant up to rounding are exactly constant.

    Rounding has an order, and a metric that removes pixels in a map's order would follow it.
    """
    flat = is_constant(maps) & torch.isfinite(maps).flatten(1).all(1)
    return torch.where(flat[:, None, None], maps.amax((1, 2), keepdim=True), maps)
