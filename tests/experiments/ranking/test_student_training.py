"""A stack of students equals students alone, and arms of one seed differ in nothing but maps."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from camdistill.data.views import Augment, draw_view, view_images
from camdistill.distill.optimization import Optimization
from camdistill.distill.training import build_with_seed
from camdistill.errors import UserError
from camdistill.experiments.ranking.student_task import ImagePool, Recipe, StudentTask, batch_at
from camdistill.experiments.ranking.student_training import (
    Students,
    find_pooled_layer,
    measure_students,
    train_students,
)
from camdistill.explain.gradcam import grad_cam
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import NetworkSpec, Preprocessed, build_preprocessed

FAMILY = NetworkSpec("shallow_cnn", args={"channels": [6, 8], "strides": [2, 2]})
WIDE = NetworkSpec("wrn_16_1")
CLASSES = 5


@pytest.fixture
def pool(generator: torch.Generator) -> ImagePool:
    pixels = torch.randint(0, 256, (20, 3, 16, 16), generator=generator, dtype=torch.uint8)
    logits = 3 * torch.randn(20, 2, CLASSES, generator=generator)
    return ImagePool(pixels, torch.arange(20) + 100, logits)


@pytest.fixture
def maps(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(3, 20, 2, 4, 4, generator=generator)


def recipe(**options: object) -> Recipe:
    return Recipe(**({"steps": 6, "batch_size": 8} | options))  # type: ignore[arg-type]


def alone(
    pool: ImagePool, lesson: StudentTask, how: Recipe, family: NetworkSpec, layer: str
) -> Students:
    found = Students.from_seeds(family, CLASSES, [lesson.seed], layer=layer, dtype=torch.float64)
    train_students(found, pool, [lesson], how)
    return found


@pytest.mark.parametrize(
    ("family", "layer", "optimizer", "distance"),
    [
        (FAMILY, "stage2", "sgd", "pearson"),
        (FAMILY, "stage2", "adamw", "cosine"),
        (WIDE, "relu", "sgd", "l2"),
    ],
    ids=["shallow", "adamw", "wide"],
)
def test_stack_equals_students_alone(
    pool: ImagePool,
    maps: torch.Tensor,
    family: NetworkSpec,
    layer: str,
    optimizer: str,
    distance: str,
) -> None:
    how = recipe(
        distance=distance,
        optimization=Optimization(optimizer, 0.05 if optimizer == "sgd" else 1e-3),
    )  # type: ignore[arg-type]
    lessons = [
        StudentTask(3, 2.0, maps[0]),
        StudentTask(3),
        StudentTask(4, 0.5, maps[1]),
        StudentTask(4, 0.0, maps[1]),
        StudentTask(3, 30.0, maps[2]),
    ]
    seeds = [lesson.seed for lesson in lessons]
    stack = Students.from_seeds(family, CLASSES, seeds, layer=layer, dtype=torch.float64)
    train_students(stack, pool, lessons, how)
    together = measure_students(stack, pool.pixels, pool.logits[:, 0])
    for number, lesson in enumerate(lessons):
        single = alone(pool, lesson, how, family, layer)
        for name, value in single.state(0).items():
            # running statistics and counts too
            torch.testing.assert_close(
                stack.state(number)[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: n + m
            )
        by_itself = measure_students(single, pool.pixels, pool.logits[:, 0])
        torch.testing.assert_close(together.kl[number], by_itself.kl[0])
        assert torch.equal(together.agrees[number], by_itself.agrees[0])
    weights = [stack.state(number)["network.linear.weight"] for number in range(5)]
    assert not torch.equal(weights[0], weights[1])
    # a weight of 0 is no map, in a stack with others that have one
    plain = alone(pool, StudentTask(4), how, family, layer).state(0)["network.linear.weight"]
    torch.testing.assert_close(weights[3], plain)


def test_a_stacks_step_in_half_precision_is_that_of_students_alone(
    pool: ImagePool, maps: torch.Tensor
) -> None:
    """One step: over several, batch normalization of so few images makes rounding grow."""
    how = recipe(
        steps=1,
        precision="bfloat16",
        augment=Augment(crop="resized", flip=True),
        optimization=Optimization(lr=0.1, schedule="constant", warmup=0.0),
    )
    lessons = [StudentTask(3, 2.0, maps[0]), StudentTask(4)]
    stack = Students.from_seeds(FAMILY, CLASSES, [3, 4], layer="stage2")
    before = [
        {name: value.clone() for name, value in stack.state(number).items()} for number in range(2)
    ]
    train_students(stack, pool, lessons, how)
    for number, lesson in enumerate(lessons):
        single = Students.from_seeds(FAMILY, CLASSES, [lesson.seed], layer="stage2")
        train_students(single, pool, [lesson], how)
        for name in ("network.stage1.conv.weight", "network.linear.weight"):
            start = before[number][name]
            moved, wanted = (one[name] - start for one in (stack.state(number), single.state(0)))
            assert (moved - wanted).norm() < 0.1 * wanted.norm()


def test_training_alone_is_plain_torch(pool: ImagePool, maps: torch.Tensor) -> None:
    """The loop against one written from the definitions, with Grad-CAM by autograd."""
    how = recipe(optimization=Optimization(lr=0.05, momentum=0.8), augment=Augment(flip=True))
    network = (
        build_with_seed(7, lambda: build_preprocessed(FAMILY, classes=CLASSES)).double().train()
    )
    single = Students.from_seeds(FAMILY, CLASSES, [7], layer="stage2", dtype=torch.float64)
    train_students(single, pool, [StudentTask(7, 3.0, maps[0])], how)
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": 5e-4},
            {"params": [p for p in network.parameters() if p.ndim == 1], "weight_decay": 0},
        ],
        lr=0.05,
        momentum=0.8,
        nesterov=True,
    )
    for step in range(how.steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * how.optimization.lr_factor(step / how.steps)
        batch = batch_at(pool, how, 7, step)
        wanted = torch.stack(
            [pool.logits[i, int(f)] for i, f in zip(batch.positions, batch.view.flip, strict=True)]
        ).double()
        target = torch.stack(
            [maps[0][i, int(f)] for i, f in zip(batch.positions, batch.view.flip, strict=True)]
        ).double()
        images = batch.images.double()
        top = wanted.argmax(1)
        own = grad_cam(network, images, ["stage2"], top, grad="full")["stage2"].relu()
        logits = network(images)
        x, y = own.flatten(1), target.flatten(1)
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
        r = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp_min(1e-12)
        kl = (
            16
            * (
                F.softmax(wanted / 4, 1)
                * (F.log_softmax(wanted / 4, 1) - F.log_softmax(logits / 4, 1))
            )
            .sum(1)
            .mean()
        )
        optimizer.zero_grad()
        (kl + 3 * (1 - r).mean()).backward()
        optimizer.step()
        network.eval()
        network.train()
    for name, value in network.named_parameters():
        torch.testing.assert_close(single.state(0)[name], value.detach(), rtol=1e-6, atol=1e-8)


def test_arms_of_one_seed_start_and_see_the_same_bit_for_bit(
    pool: ImagePool, maps: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[torch.Tensor]] = []
    answers = Students.answers

    def note(self: Students, images: torch.Tensor, *, shared: bool = False) -> object:
        if not shared:
            seen[-1].append(images.clone())
        return answers(self, images, shared=shared)

    monkeypatch.setattr(Students, "answers", note)
    starts = []
    for lesson in (StudentTask(1), StudentTask(1, 5.0, maps[0]), StudentTask(2, 5.0, maps[0])):
        seen.append([])
        torch.manual_seed(len(seen))  # nothing may depend on it
        students = Students.from_seeds(FAMILY, CLASSES, [lesson.seed], layer="stage2")
        starts.append(copy.deepcopy(students.state(0)))
        train_students(students, pool, [lesson], recipe())
    assert len(seen[0]) == 6
    assert all(torch.equal(one, other) for one, other in zip(seen[0], seen[1], strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(seen[0], seen[2], strict=True))
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    weight = "network.linear.weight"
    assert not torch.equal(starts[0][weight], starts[2][weight])


def test_a_lesson_without_maps_equals_one_of_weight_zero_bit_for_bit(
    pool: ImagePool, maps: torch.Tensor
) -> None:
    states = []
    for lesson in (StudentTask(1), StudentTask(1, 0.0, maps[0])):
        students = Students.from_seeds(FAMILY, CLASSES, [1], layer="stage2")
        train_students(students, pool, [lesson], recipe())
        states.append(students.state(0))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_batches_go_through_the_whole_pool_in_a_new_order_each_time(pool: ImagePool) -> None:
    how = recipe(batch_size=8)
    stream = torch.cat([batch_at(pool, how, 3, step).positions for step in range(10)])
    for start in range(0, 80, 20):
        assert sorted(stream[start : start + 20].tolist()) == list(range(20))
    assert not torch.equal(stream[:20], stream[20:40])
    small = ImagePool(*(part[:5] for part in pool))
    assert sorted(batch_at(small, how, 3, 0).positions.tolist()) == list(range(5))


def test_views_are_those_of_the_ids_and_the_step(pool: ImagePool) -> None:
    how = recipe(augment=Augment(crop="pad", padding=3, flip=True))
    batch = batch_at(pool, how, 9, 4)
    ids = pool.ids[batch.positions]
    view = draw_view(how.augment, ids, (16, 16), seed=9, epoch=4)
    wanted = view_images(pool.pixels[batch.positions], view).float() / 255
    assert torch.equal(batch.images, wanted)


def test_judged_is_top_class_and_divergence_in_eval_mode(pool: ImagePool) -> None:
    network = build_with_seed(0, lambda: build_preprocessed(FAMILY, classes=CLASSES))
    students = Students([copy.deepcopy(network)], "stage2")
    found = measure_students(students, pool.pixels, pool.logits[:, 0])
    with torch.no_grad():
        own = network.eval()(pool.pixels.float() / 255)
    wanted = pool.logits[:, 0]
    assert torch.equal(found.agrees[0], own.argmax(1) == wanted.argmax(1))
    p, q = wanted.softmax(1).numpy(), own.softmax(1).numpy()
    np.testing.assert_allclose(found.kl[0], (p * np.log(p / q)).sum(1), rtol=1e-3, atol=1e-5)


def test_students_need_a_pooled_linear_head(generator: torch.Generator) -> None:
    images = torch.rand(4, 3, 16, 16, generator=generator)
    assert find_pooled_layer(FAMILY, CLASSES, images) == ("stage2", (4, 4))
    assert find_pooled_layer(WIDE, CLASSES, images) == ("relu", (4, 4))
    with pytest.raises(UserError, match="don't end in global average pooling"):
        find_pooled_layer(NetworkSpec("vgg11"), 10, torch.rand(2, 3, 64, 64, generator=generator))


def test_students_that_draw_at_random_are_refused(generator: torch.Generator) -> None:
    images = torch.rand(2, 3, 64, 64, generator=generator)
    with pytest.raises(UserError, match="'mobilenet_v2' have dropout"):
        find_pooled_layer(NetworkSpec("mobilenet_v2"), 10, images)
    find_pooled_layer(NetworkSpec("mobilenet_v2", args={"dropout": 0.0}), 10, images)


def test_mistakes_are_told(pool: ImagePool, maps: torch.Tensor) -> None:
    for options in ({"steps": 0}, {"batch_size": 1}, {"temperature": 0.0}):
        with pytest.raises(UserError, match="recipe"):
            recipe(**options)
    students = Students.from_seeds(FAMILY, CLASSES, [0], layer="stage2")
    with pytest.raises(ValueError, match="2 lessons for 1 students"):
        train_students(students, pool, [StudentTask(0), StudentTask(0)], recipe())
    hot = recipe(optimization=Optimization(lr=1e30))
    with pytest.raises(UserError, match=r"not a number after 6 steps .*--recipe.optimization.lr"):
        train_students(students, pool, [StudentTask(0)], hot)
    assert isinstance(Preprocessed(ShallowCNN()), Preprocessed)
