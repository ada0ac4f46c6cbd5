"""What a student is trained on: attention transfer, map distances and distillation.

Every function is pure, reduces in float32 (float64 stays) and returns one value per image, whose
mean over a batch is the published batch loss. Teachers are constant if they carry no graph.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from camdistill.explain.compare import cosine, l1, l2, pearson
from camdistill.explain.maps import relu, resize
from camdistill.perturb.probability import expand_single_logit
from camdistill.types import Activations, ClassMaps, Labels, Logits, Maps, PerImage

AttentionForm = Literal["paper", "code"]
MapDistance = Literal["pearson", "cosine", "l2", "l1"]
BetaSchedule = Literal["constant", "linear", "cosine", "warmup"]
TeacherActivations = Float[Tensor, "batch teacher_units rows columns"]
TeacherMaps = Float[Tensor, "batch rows columns"]
TeacherClassMaps = Float[Tensor, "batch teacher_classes rows columns"]

WARMUP = 0.1  # of the training; a student's first maps are noise


def attention_map(activations: Activations, p: float = 2.0) -> Maps:
    """Attention F^p_sum: the sum over units of |A|^p.

    Zagoruyko and Komodakis 2017 (https://arxiv.org/abs/1612.03928), section 3.1. Their code takes
    the mean over units instead, which the L2 normalization undoes. Absolute values matter for odd
    p: ports that leave them out let signed activations cancel.

    Args:
        activations: A layer's output, of any sign.
        p: Power, at least 1; a larger one looks more at the strongest unit.
    """
    if p < 1:
        raise ValueError(f"p is {p}; it must be at least 1, below it the gradient at 0 is infinite")
    return _upcast(activations).abs().pow(p).sum(1)


def attention_transfer(
    student_activations: Activations,
    teacher_activations: TeacherActivations,
    *,
    form: AttentionForm = "code",
    p: float = 2.0,
) -> PerImage:
    """Attention transfer of one pair of layers (Zagoruyko and Komodakis 2017, Eq. 2).

    With a and b the L2-normalized attention maps of student and teacher as vectors of HW numbers:

    - "paper": 1/2 ||a - b||_2, the norm not squared. The half is Eq. 2's, so that `beta` is the
      paper's and multiplies this value. The norm stays the L2 norm whatever `p` is, as in all their
      experiments.
    - "code": the mean of (a - b)^2 over HW, as in the released code (utils.py, `at_loss`), where
      beta = 1000. It is 2 (1 - cos(a, b)) / HW, so beta here is a cosine distance with weight
      lambda = 2 beta / HW.

    Maps of different size meet on the smaller grid (per axis), by adaptive average pooling of the
    maps. A blank attention map is the zero vector.
    """
    return attention_distance(
        attention_map(student_activations, p), attention_map(teacher_activations, p), form=form
    )


def attention_distance(
    student_maps: Maps, teacher_maps: TeacherMaps, *, form: AttentionForm = "code"
) -> PerImage:
    """`attention_transfer` from attention maps, for a teacher whose maps come from a cache."""
    grid = (
        min(student_maps.shape[-2], teacher_maps.shape[-2]),
        min(student_maps.shape[-1], teacher_maps.shape[-1]),
    )
    difference = _normalize_rows(_pool(student_maps, grid)) - _normalize_rows(
        _pool(teacher_maps, grid)
    )
    if form == "paper":
        norm: Tensor = torch.linalg.vector_norm(difference, dim=1)
        return norm / 2
    if form == "code":
        return difference.square().mean(1)
    raise ValueError(f"form is {form!r}; it is 'paper' or 'code'")


def map_distance(
    student_maps: Maps,
    teacher_maps: TeacherMaps,
    kind: MapDistance = "pearson",
    rectify: bool = True,
) -> PerImage:
    """Distance between a student's and a teacher's map of the same class (Grad-CAM transfer).

    Both maps are rectified at their own resolution, then the student's is resized to the teacher's
    grid. An image whose teacher map is blank (all zero; for "pearson" also constant) has no target
    and contributes 0. A blank student map is at the distance of similarity 0 and has no gradient.

    Args:
        student_maps: Raw maps; they carry the graph.
        teacher_maps: Raw maps.
        kind: "pearson" is 1 - r, in [0, 2]; it ignores the level that all maps share and learns
            fastest. "cosine" is 1 - cos, in [0, 1] (e2KD, Parchami-Araghi et al. 2024,
            https://arxiv.org/abs/2402.03119). "l2" and "l1" are the norms (not squared) of the
            difference of L2-normalized maps: "l2" is twice attention transfer's "paper" form,
            "l1" is LwM's (Dhar et al. 2019, https://arxiv.org/abs/1811.08051).
        rectify: Compare ReLU maps; False compares the signed ones.
    """
    if rectify:
        student_maps, teacher_maps = relu(student_maps), relu(teacher_maps)
    student_maps, teacher_maps = _upcast(student_maps), _upcast(teacher_maps)
    if student_maps.shape[-2:] != teacher_maps.shape[-2:]:
        student_maps = resize(student_maps, (teacher_maps.shape[-2], teacher_maps.shape[-1]))
    if kind == "pearson":
        distance = 1 - pearson(student_maps, teacher_maps)
        has_target = teacher_maps.amax((1, 2)) > teacher_maps.amin((1, 2))
    elif kind == "cosine":
        distance = 1 - cosine(student_maps, teacher_maps)
        has_target = teacher_maps.abs().amax((1, 2)) > 0
    elif kind in ("l2", "l1"):
        distance = (l2 if kind == "l2" else l1)(student_maps, teacher_maps)
        has_target = teacher_maps.abs().amax((1, 2)) > 0
    else:
        raise ValueError(f"kind is {kind!r}; it is 'pearson', 'cosine', 'l2' or 'l1'")
    return torch.where(has_target, distance, torch.zeros_like(distance))


def several_maps_distance(
    student_maps: ClassMaps, teacher_maps: TeacherClassMaps, kind: MapDistance = "pearson"
) -> PerImage:
    """Distance of the maps of several classes, the teacher's top class first.

    Half of it is `map_distance` of the first class; the other half is the mean over the other
    classes, of signed maps: what speaks against a class is most of what a map of it says. A student
    that is taught the first class alone draws much the same map whatever class it is asked for.

    Args:
        student_maps: Raw maps; they carry the graph.
        teacher_maps: Raw maps of the same classes, any grid.
        kind: See `map_distance`.
    """
    first = map_distance(student_maps[:, 0], teacher_maps[:, 0], kind)
    other_classes = student_maps.shape[1] - 1
    if not other_classes:
        return first
    rest = map_distance(
        student_maps[:, 1:].flatten(0, 1), teacher_maps[:, 1:].flatten(0, 1), kind, rectify=False
    )
    return (first + rest.view(-1, other_classes).mean(1)) / 2


def class_map_distance(
    student_maps: ClassMaps, teacher_maps: TeacherClassMaps, *, pool: int = 2
) -> PerImage:
    """Class attention transfer of CAT-KD: the maps of all classes, pooled, in mean squared error.

    Guo et al. 2023 (CVPR) and the released code: MSE over classes and cells between class
    activation maps average-pooled to pool x pool, signed and not normalized. Their map is
    sum_k w_k A_k, whose mean is the logit less its bias; the raw Grad-CAM of such a head is that
    map over HW, so maps are multiplied by their own number of cells here: published betas hold.

    Args:
        student_maps: Raw Grad-CAMs of every class; they carry the graph.
        teacher_maps: The same classes, any grid.
        pool: Side of the pooled grid: 2 for CIFAR, 4 for ImageNet in the paper.
    """
    if student_maps.shape[1] != teacher_maps.shape[1]:
        raise ValueError(
            f"the student has maps of {student_maps.shape[1]} classes, "
            f"the teacher of {teacher_maps.shape[1]}"
        )
    student, teacher = (
        F.adaptive_avg_pool2d(_upcast(maps) * (maps.shape[-2] * maps.shape[-1]), pool)
        for maps in (student_maps, teacher_maps)
    )
    return (student - teacher).square().mean((1, 2, 3))


def soft_targets_kl(
    student_logits: Logits, teacher_logits: Logits, temperature: float = 4.0
) -> PerImage:
    """Hinton's distillation term, T^2 KL(softmax(z_T / T) || softmax(z_S / T)), in nats.

    Hinton et al. 2015 (https://arxiv.org/abs/1503.02531), section 2. Summed over classes: torch's
    `KLDivLoss()` with its default reduction would divide by the number of classes too. A single
    logit stands for the two answers of a yes-or-no question: its KL is between sigmoids.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    student = F.log_softmax(expand_single_logit(_upcast(student_logits)) / temperature, dim=1)
    teacher = F.log_softmax(expand_single_logit(_upcast(teacher_logits)) / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def cross_entropy(logits: Logits, labels: Labels) -> PerImage:
    """Cross-entropy in nats; an image without a label (-1) contributes 0.

    A single logit's is the binary one, of its sigmoid with the labels 0 and 1.
    """
    class_logits = expand_single_logit(_upcast(logits))
    return F.cross_entropy(class_logits, labels.long(), ignore_index=-1, reduction="none")


def beta_factor(schedule: BetaSchedule, progress: float) -> float:
    """What the weight of attention transfer is multiplied by, in [0, 1].

    Zagoruyko and Komodakis decay beta during training when attention transfer joins distillation.

    Args:
        schedule: "constant" is 1; "linear" and "cosine" fall from 1 to 0; "warmup" rises from 0 to
            1 over the first tenth and stays.
        progress: The part of the training that is done, in [0, 1]; values outside are clamped.
    """
    done = min(max(progress, 0.0), 1.0)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return (1.0 + math.cos(math.pi * done)) / 2
    if schedule == "warmup":
        return min(done / WARMUP, 1.0)
    raise ValueError(f"schedule is {schedule!r}; it is 'constant', 'linear', 'cosine' or 'warmup'")


def _upcast(values: Tensor) -> Tensor:
    """Half precision goes to float32: norms and differences of it lose the map."""
    return values if values.dtype == torch.float64 else values.float()


def _pool(maps: Maps, grid: tuple[int, int]) -> Tensor:
    wide = _upcast(maps)
    return wide if wide.shape[-2:] == grid else F.adaptive_avg_pool2d(wide, grid)


def _normalize_rows(maps: Maps) -> Tensor:
    """Maps as rows of length 1; divided by their largest value first, so that none underflows."""
    rows = maps.flatten(1)
    scale = rows.detach().abs().amax(1, keepdim=True)
    return F.normalize(rows / torch.where(scale > 0, scale, torch.ones_like(scale)), dim=1)
