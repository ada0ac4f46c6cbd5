"""Losses against numpy written from the papers' equations, laws, and bugs of public code."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor, nn
from torch.nn import functional as F

from camdistill.distill.losses import (
    attention_distance,
    attention_map,
    attention_transfer,
    beta_factor,
    class_map_distance,
    cross_entropy,
    map_distance,
    several_maps_distance,
    soft_targets_kl,
)

KINDS = ("pearson", "cosine", "l2", "l1")
REFUSED = (ValueError, TypeCheckError)  # the second one where the suite checks types
PLACES = 1e-10  # float64 against numpy


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows**2).sum(-1, keepdims=True))


# Attention transfer


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 4.0, 1.5])
def test_attention_map_is_sum_of_powers_of_absolute_activations(p: float) -> None:
    activations = normal(3, 5, 4, 6)
    expected = np.zeros((3, 4, 6))
    for unit_ in range(5):
        expected += np.abs(activations[:, unit_].numpy()) ** p
    np.testing.assert_allclose(attention_map(activations, p), expected, rtol=PLACES)


def test_attention_map_of_odd_power_ignores_signs() -> None:
    # mdistiller raises signed activations to the power, so that units of odd powers cancel.
    activations = normal(2, 6, 3, 3)
    torch.testing.assert_close(attention_map(activations, 3.0), attention_map(-activations, 3.0))


def test_attention_map_refuses_powers_without_a_gradient_at_zero() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        attention_map(normal(1, 2, 3, 3), 0.5)


def paper_equation_2(student: np.ndarray, teacher: np.ndarray, p: float) -> float:
    """(1/2) sum_j || Q_S / ||Q_S||_2 - Q_T / ||Q_T||_2 ||_2, averaged over images, one pair."""
    total = 0.0
    for a, b in zip(student, teacher, strict=True):
        q_student = (np.abs(a) ** p).sum(0).ravel()
        q_teacher = (np.abs(b) ** p).sum(0).ravel()
        total += 0.5 * np.sqrt(((unit(q_student) - unit(q_teacher)) ** 2).sum())
    return total / len(student)


def released_at_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """As in the authors' utils.py."""

    def at(x: Tensor) -> Tensor:
        return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))

    return (at(student) - at(teacher)).pow(2).mean()


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
def test_batch_mean_of_paper_form_is_equation_2(p: int) -> None:
    student, teacher = normal(4, 5, 6, 3, seed=1), normal(4, 7, 6, 3, seed=2)
    ours = attention_transfer(student, teacher, form="paper", p=p)
    assert ours.shape == (4,)
    expected = paper_equation_2(student.numpy(), teacher.numpy(), p)
    np.testing.assert_allclose(ours.mean(), expected, rtol=PLACES)


def test_batch_mean_of_code_form_is_the_released_loss() -> None:
    student, teacher = normal(4, 5, 6, 3, seed=1), normal(4, 7, 6, 3, seed=2)
    ours = attention_transfer(student, teacher, form="code")
    torch.testing.assert_close(ours.mean(), released_at_loss(student, teacher))


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (14, 14), (3, 5)])
def test_code_form_times_beta_is_cosine_distance_times_two_beta_over_cells(
    size: tuple[int, int],
) -> None:
    beta, cells = 1000.0, size[0] * size[1]
    student, teacher = normal(5, 6, *size, seed=3), normal(5, 4, *size, seed=4)
    attention = beta * attention_transfer(student, teacher, form="code")
    cosine = map_distance(attention_map(student), attention_map(teacher), "cosine")
    torch.testing.assert_close(attention, 2 * beta / cells * cosine)


def test_paper_form_is_half_the_l2_distance_of_attention_maps() -> None:
    student, teacher = normal(5, 6, 4, 4, seed=3), normal(5, 4, 4, 4, seed=4)
    l2 = map_distance(attention_map(student), attention_map(teacher), "l2")
    torch.testing.assert_close(attention_transfer(student, teacher, form="paper"), l2 / 2)


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize(("student", "teacher"), [((8, 8), (4, 4)), ((4, 4), (8, 8))])
def test_maps_of_different_size_meet_on_the_smaller_grid(
    form: str, student: tuple[int, int], teacher: tuple[int, int]
) -> None:
    maps = normal(2, *student, seed=5).abs(), normal(2, *teacher, seed=6).abs()
    blocks = [
        m.numpy().reshape(2, 4, m.shape[1] // 4, 4, m.shape[2] // 4).mean((2, 4)).reshape(2, -1)
        for m in maps
    ]
    difference = unit(blocks[0]) - unit(blocks[1])
    squares = (difference**2).sum(1)
    expected = np.sqrt(squares) / 2 if form == "paper" else squares / 16
    np.testing.assert_allclose(attention_distance(*maps, form=form), expected, rtol=PLACES)  # type: ignore[arg-type]


def test_attention_distance_of_mixed_sides_takes_the_smaller_of_each() -> None:
    tall, wide = torch.ones(1, 8, 4), torch.ones(1, 4, 8)
    assert float(attention_distance(tall, wide)) == pytest.approx(0, abs=1e-12)


def test_unknown_forms_and_kinds_are_refused() -> None:
    maps = normal(1, 2, 2).abs()
    with pytest.raises(REFUSED, match="papers"):
        attention_distance(maps, maps, form="papers")  # type: ignore[arg-type]
    with pytest.raises(REFUSED, match="kl"):
        map_distance(maps, maps, "kl")  # type: ignore[arg-type]
    with pytest.raises(REFUSED, match="step"):
        beta_factor("step", 0.5)  # type: ignore[arg-type]


# Grad-CAM transfer


def numpy_distance(student: np.ndarray, teacher: np.ndarray, kind: str) -> float:
    s, t = np.maximum(student, 0).ravel(), np.maximum(teacher, 0).ravel()
    if kind == "pearson":
        return 1 - np.corrcoef(s, t)[0, 1]
    if kind == "cosine":
        return 1 - s @ t / math.sqrt(s @ s) / math.sqrt(t @ t)
    order = 2 if kind == "l2" else 1
    return float(np.linalg.norm(unit(s) - unit(t), order))


@pytest.mark.parametrize("kind", KINDS)
def test_map_distance_is_the_papers(kind: str) -> None:
    student, teacher = normal(6, 4, 5, seed=1), normal(6, 4, 5, seed=2)
    pairs = zip(student.numpy(), teacher.numpy(), strict=True)
    expected = [numpy_distance(s, t, kind) for s, t in pairs]
    np.testing.assert_allclose(map_distance(student, teacher, kind), expected, rtol=1e-7)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_map_distance_has_the_gradient_of_finite_differences(kind: str) -> None:
    # FACIL's learning-without-memorizing detaches the maps: its distillation loss had no gradient.
    student = normal(3, 3, 4, seed=1).requires_grad_()
    teacher = normal(3, 3, 4, seed=2)
    assert torch.autograd.gradcheck(lambda maps: map_distance(maps, teacher, kind), (student,))  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(map_distance(student, teacher, kind).sum(), student)  # type: ignore[arg-type]
    assert (gradient.flatten(1).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize(("kind", "far"), [("pearson", 2.0), ("cosine", 2.0), ("l2", 2.0)])
def test_opposite_maps_are_farthest_when_not_rectified(kind: str, far: float) -> None:
    teacher = normal(4, 3, 3, seed=2)
    distance = map_distance(-teacher, teacher, kind, rectify=False)  # type: ignore[arg-type]
    torch.testing.assert_close(distance, torch.full_like(distance, far))


@pytest.mark.parametrize("kind", KINDS)
def test_image_with_a_blank_teacher_map_contributes_nothing(kind: str) -> None:
    student = normal(3, 4, 4, seed=1).requires_grad_()
    teacher = normal(3, 4, 4, seed=2)
    teacher[1] = -teacher[1].abs()
    distance = map_distance(student, teacher, kind)  # type: ignore[arg-type]
    assert distance[1] == 0
    assert (distance[[0, 2]] > 0).all()
    (gradient,) = torch.autograd.grad(distance.sum(), student)
    assert torch.isfinite(gradient).all()
    assert (gradient[1] == 0).all()


def test_constant_teacher_map_is_no_target_for_pearson() -> None:
    distance = map_distance(normal(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.float64), "pearson")
    assert distance.tolist() == [0]


@pytest.mark.parametrize(("kind", "far"), [("pearson", 1), ("cosine", 1), ("l2", 1)])
def test_blank_student_map_is_at_similarity_zero_with_finite_gradient(kind: str, far: int) -> None:
    student = (-normal(2, 4, 4).abs()).requires_grad_()
    teacher = normal(2, 4, 4, seed=2)
    distance = map_distance(student, teacher, kind)  # type: ignore[arg-type]
    torch.testing.assert_close(distance, torch.full_like(distance, far))
    (gradient,) = torch.autograd.grad(distance.sum(), student)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(4, 4), (16, 16), (5, 9)])
def test_student_map_is_rectified_and_then_taken_to_the_teachers_grid(
    kind: str, size: tuple[int, int]
) -> None:
    from camdistill.explain.maps import resize

    student, teacher = normal(3, *size, seed=1), normal(3, 8, 8, seed=2)
    on_grid = resize(student.clamp_min(0), (8, 8))
    torch.testing.assert_close(
        map_distance(student, teacher, kind),  # type: ignore[arg-type]
        map_distance(on_grid, teacher, kind),  # type: ignore[arg-type]
    )


# Laws


shapes = st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(2, 5))
seeds = st.integers(0, 10_000)
scales = st.floats(-12, 12).map(lambda power: 10.0**power)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=seeds, a=scales, b=scales, kind=st.sampled_from(KINDS))
def test_map_distance_does_not_see_the_scale_of_either_map(
    shape: tuple[int, int, int], seed: int, a: float, b: float, kind: str
) -> None:
    student, teacher = normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
    torch.testing.assert_close(
        map_distance(a * student, b * teacher, kind),  # type: ignore[arg-type]
        map_distance(student, teacher, kind),  # type: ignore[arg-type]
        rtol=1e-6,
        atol=1e-6,
    )


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=seeds, a=scales, b=scales, form=st.sampled_from(["paper", "code"]))
def test_attention_transfer_does_not_see_the_scale_of_activations(
    shape: tuple[int, int, int], seed: int, a: float, b: float, form: str
) -> None:
    batch, height, width = shape
    student, teacher = normal(batch, 3, height, width, seed=seed), normal(batch, 4, height, width)
    torch.testing.assert_close(
        attention_transfer(a * student, b * teacher, form=form),  # type: ignore[arg-type]
        attention_transfer(student, teacher, form=form),  # type: ignore[arg-type]
    )


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=seeds, kind=st.sampled_from(KINDS))
def test_map_distance_is_symmetric_bounded_and_zero_for_equal_maps(
    shape: tuple[int, int, int], seed: int, kind: str
) -> None:
    student, teacher = normal(*shape, seed=seed).abs(), normal(*shape, seed=seed + 1).abs()
    there = map_distance(student, teacher, kind)  # type: ignore[arg-type]
    back = map_distance(teacher, student, kind)  # type: ignore[arg-type]
    torch.testing.assert_close(there, back)
    cells = shape[1] * shape[2]
    bound = {"pearson": 2.0, "cosine": 1.0, "l2": math.sqrt(2), "l1": 2 * math.sqrt(cells)}[kind]
    assert ((there >= 0) & (there <= bound + 1e-9)).all()
    same = map_distance(student, student, kind)  # type: ignore[arg-type]
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-6, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, temperature=st.floats(0.5, 20))
def test_distillation_is_zero_for_equal_distributions_and_positive_else(
    seed: int, temperature: float
) -> None:
    student, teacher = normal(3, 5, seed=seed), normal(3, 5, seed=seed + 1)
    assert (soft_targets_kl(student, teacher, temperature) > 0).all()
    shifted = soft_targets_kl(teacher + 7, teacher, temperature)
    torch.testing.assert_close(shifted, torch.zeros_like(shifted), atol=1e-9, rtol=0)


@settings(max_examples=30, deadline=None)
@given(progress=st.floats(0, 1), other=st.floats(0, 1))
def test_beta_schedules_stay_in_the_unit_interval_and_are_monotone(
    progress: float, other: float
) -> None:
    early, late = sorted((progress, other))
    for schedule in ("constant", "linear", "cosine"):
        assert 0 <= beta_factor(schedule, late) <= beta_factor(schedule, early) <= 1  # type: ignore[arg-type]
    assert 0 <= beta_factor("warmup", early) <= beta_factor("warmup", late) <= 1


def test_beta_schedules_have_their_published_ends_and_middles() -> None:
    assert [beta_factor("constant", t) for t in (0.0, 0.5, 1.0)] == [1, 1, 1]
    assert [beta_factor("linear", t) for t in (0.0, 0.5, 1.0)] == [1, 0.5, 0]
    np.testing.assert_allclose(
        [beta_factor("cosine", t) for t in (0.0, 0.5, 1.0)], [1, 0.5, 0], atol=1e-15
    )
    np.testing.assert_allclose(
        [beta_factor("warmup", t) for t in (0.0, 0.05, 0.1, 1.0)], [0, 0.5, 1, 1]
    )
    assert beta_factor("linear", 1.0001) == 0


# All classes (CAT-KD)


@pytest.mark.parametrize("kind", ["pearson", "cosine", "l2", "l1"])
def test_several_maps_are_half_the_first_and_half_the_mean_of_the_others_signed(kind) -> None:
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    teacher[1, 2] = 0.7 if kind == "pearson" else 0  # an image's third class tells nothing
    found = several_maps_distance(student, teacher, kind)

    def distance(own: np.ndarray, its: np.ndarray) -> float:
        if kind == "pearson":
            own, its = own - own.mean(), its - its.mean()
        sizes = [np.sqrt((one**2).sum()) for one in (own, its)]
        if sizes[1] < 1e-12:
            return 0.0
        own, its = own / sizes[0], its / sizes[1]
        if kind in ("pearson", "cosine"):
            return 1 - (own * its).sum()
        return np.abs(own - its).sum() if kind == "l1" else np.sqrt(((own - its) ** 2).sum())

    for image in range(3):
        first = distance(student[image, 0].numpy().clip(0), teacher[image, 0].numpy().clip(0))
        others = [distance(student[image, k].numpy(), teacher[image, k].numpy()) for k in (1, 2, 3)]
        assert found[image].item() == pytest.approx((first + np.mean(others)) / 2, abs=1e-9)
    alone = several_maps_distance(student[:, :1], teacher[:, :1], kind)
    torch.testing.assert_close(alone, map_distance(student[:, 0], teacher[:, 0], kind))


def test_class_map_distance_of_grad_cams_is_the_mse_of_cat_kds_class_activation_maps() -> None:
    # CAT-KD turns the head into a 1x1 convolution before the pooling; Grad-CAM keeps it behind it.
    classes, pool = 4, 2
    found, cams = [], []
    for seed, units, size in ((1, 5, 8), (2, 3, 4)):
        activations, head = normal(3, units, size, size, seed=seed), normal(classes, units, seed=9)
        conv = nn.Conv2d(units, classes, 1, bias=False, dtype=torch.float64)
        conv.weight.data = head[:, :, None, None]
        found.append(F.adaptive_avg_pool2d(conv(activations).detach(), pool))
        leaf = activations.requires_grad_()
        logits = leaf.mean((2, 3)) @ head.T
        maps = []
        for label in range(classes):
            (gradient,) = torch.autograd.grad(logits[:, label].sum(), leaf, retain_graph=True)
            maps.append((gradient.mean((2, 3), keepdim=True) * leaf).sum(1).detach())
        cams.append(torch.stack(maps, 1))
    ours = class_map_distance(cams[0], cams[1], pool=pool)
    torch.testing.assert_close(ours.mean(), F.mse_loss(found[0], found[1]))


def test_class_map_distance_keeps_signs_and_scale_and_refuses_other_classes() -> None:
    maps = normal(2, 3, 4, 4)
    cells = maps.shape[2] * maps.shape[3]
    pooled = maps.numpy().reshape(2, 3, 2, 2, 2, 2).mean((3, 5)) * cells
    expected = ((2 * pooled) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(class_map_distance(maps, -maps), expected, rtol=PLACES)
    with pytest.raises(ValueError, match="3 classes, the teacher of 2"):
        class_map_distance(maps, maps[:, :2])


# Distillation and labels


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_hintons_sum_over_classes_mean_over_images(temperature: float) -> None:
    student, teacher = 3 * normal(6, 10, seed=1), 3 * normal(6, 10, seed=2)
    scaled = [np.exp(z.numpy() / temperature) for z in (teacher, student)]
    p, q = (z / z.sum(1, keepdims=True) for z in scaled)
    expected = temperature**2 * (p * np.log(p / q)).sum(1)
    ours = soft_targets_kl(student, teacher, temperature)
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
    # Torch's default reduction, in several public ports, is a factor of the classes too small.
    with pytest.warns(UserWarning, match="reduction: 'mean'"):
        wrong = nn.KLDivLoss()(torch.from_numpy(np.log(q)), torch.from_numpy(p)) * temperature**2
    torch.testing.assert_close(ours.mean(), 10 * wrong)


def test_distillation_gradient_at_high_temperature_is_that_of_matched_logits() -> None:
    # Hinton et al. 2015, Eq. 4: (z_S - z_T) / (K T^2) for zero-mean logits; T^2 takes the T^2 away.
    student, teacher = (normal(4, 5, seed=seed) for seed in (1, 2))
    student, teacher = (z - z.mean(1, keepdim=True) for z in (student, teacher))
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(soft_targets_kl(student, teacher, 1e4).sum(), student)
    torch.testing.assert_close(gradient, ((student - teacher) / 5).detach(), rtol=1e-3, atol=1e-4)


def test_distillation_refuses_a_temperature_of_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        soft_targets_kl(normal(1, 2), normal(1, 2), 0.0)


def test_cross_entropy_is_the_negative_log_probability_and_0_without_a_label() -> None:
    logits = normal(4, 3).requires_grad_()
    labels = torch.tensor([2, -1, 0, 1])
    z = logits.detach().numpy()
    logs = z - np.log(np.exp(z).sum(1, keepdims=True))
    expected = [-logs[0, 2], 0, -logs[2, 0], -logs[3, 1]]
    ours = cross_entropy(logits, labels)
    np.testing.assert_allclose(ours.detach(), expected, rtol=PLACES)
    (gradient,) = torch.autograd.grad(ours.sum(), logits)
    assert (gradient[1] == 0).all()


def test_unlabeled_batch_has_zero_cross_entropy_and_gradient() -> None:
    logits = normal(3, 4).requires_grad_()
    loss = cross_entropy(logits, torch.full((3,), -1)).mean()
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


# Numerics


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_reduced_in_float32(dtype: torch.dtype) -> None:
    student, teacher = normal(4, 6, 8, 8, seed=1).to(dtype), normal(4, 6, 8, 8, seed=2).to(dtype)
    labels = torch.arange(4)
    halves = (
        lambda a, b: attention_transfer(a, b),
        lambda a, b: map_distance(a[:, 0], b[:, 0]),
        lambda a, b: class_map_distance(a, b),
        lambda a, b: soft_targets_kl(a[:, :, 0, 0], b[:, :, 0, 0]),
        lambda a, b: cross_entropy(a[:, :, 0, 0], labels),
    )
    for loss in halves:
        ours = loss(student, teacher)
        assert ours.dtype == torch.float32
        exact = loss(student.double(), teacher.double())
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)


def test_autocast_changes_no_loss() -> None:
    student, teacher = normal(4, 9, 16, seed=1).float(), normal(4, 8, 8, seed=2).float()
    for kind in KINDS:
        plain = map_distance(student, teacher, kind)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            cast = map_distance(student, teacher, kind)  # type: ignore[arg-type]
        assert torch.equal(plain, cast)


def test_equal_attention_has_a_finite_gradient() -> None:
    for form in ("paper", "code"):
        student = normal(2, 3, 4, 4).requires_grad_()
        attention_transfer(student, student.detach(), form=form).sum().backward()  # type: ignore[arg-type]
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()


def test_losses_change_no_argument() -> None:
    student, teacher = normal(2, 3, 4, 4, seed=1), normal(2, 3, 8, 8, seed=2)
    before = student.clone(), teacher.clone()
    attention_transfer(student, teacher)
    map_distance(student[:, 0], teacher[:, 0])
    class_map_distance(student, teacher)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])
