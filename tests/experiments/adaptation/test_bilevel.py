"""One step of a student, differentiated: against finite differences and plain torch."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from camdistill.data.views import Augment
from camdistill.distill.optimization import Optimization
from camdistill.distill.training import build_with_seed
from camdistill.errors import UserError
from camdistill.experiments.adaptation.bilevel import (
    AdaptationTask,
    DifferentiableStudent,
    adapt_once,
    look_ahead,
    pool_contributions,
)
from camdistill.experiments.ranking.ranking_arms import Family
from camdistill.experiments.ranking.student_task import ImagePool, Recipe, StudentTask, batch_at
from camdistill.experiments.ranking.student_training import Students, train_students
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.learnable import LearnableCAM
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import NetworkSpec, Teacher, build_preprocessed

SPEC = NetworkSpec("shallow_cnn", args={"channels": [5, 6], "strides": [2, 2]})
FAMILY = Family(SPEC, "stage2", (4, 4))
CLASSES = 4
UNITS = {"early": 3, "late": 4}


def recipe(**options: object) -> Recipe:
    known: dict[str, object] = {
        "steps": 5,
        "batch_size": 6,
        "augment": Augment(crop="pad", flip=True),
        "optimization": Optimization(lr=0.05),
    }
    return Recipe(**(known | options))  # type: ignore[arg-type]


@pytest.fixture
def task(generator: torch.Generator) -> AdaptationTask:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    pixels = torch.randint(0, 256, (14, 3, 16, 16), generator=generator, dtype=torch.uint8)
    pool = ImagePool(pixels, torch.arange(14), 3 * draw(14, 2, CLASSES))
    parts = {"early": draw(14, 2, 3, 8, 8), "late": draw(14, 2, 4, 4, 4)}
    asked = torch.randint(0, 256, (9, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return AdaptationTask(pool, parts, asked, 3 * draw(9, CLASSES))


@pytest.fixture
def explainer() -> LearnableCAM:
    """Away from its start, so that every parameter matters."""
    found = LearnableCAM(UNITS)
    with torch.no_grad():
        found.mix.copy_(torch.tensor([0.4, 0.6]))
        found.power.copy_(torch.tensor([0.8, 1.7]))
        found.slope.copy_(torch.tensor([0.3, 0.7]))
        for gates in found.gates:
            gates.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return found.double()


def simulated_plainly(
    network: torch.nn.Module,
    explainer: LearnableCAM,
    task: AdaptationTask,
    how: Recipe,
    asked: Tensor,
    *,
    beta: float,
    eta: float,
) -> float:
    """L_sim after a step, by backward() and an update in place, with Grad-CAM by autograd."""
    student = copy.deepcopy(network).train()
    batch = batch_at(task.pool, how, 7, 3)
    flips = batch.view.flip.long()
    wanted = task.pool.logits[batch.positions, flips].double()
    images = batch.images.double()
    with torch.no_grad():
        parts = {n: p[batch.positions, flips].double() for n, p in task.contributions.items()}
        target = explainer.maps(parts).relu()
    own = grad_cam(student, images, ["stage2"], wanted.argmax(1), grad="full")["stage2"].relu()
    x, y = (m.flatten(1) - m.flatten(1).mean(1, keepdim=True) for m in (own, target))
    r = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp_min(1e-12)
    logits = student(images)
    kl = 16 * F.kl_div(
        F.log_softmax(logits / 4, 1), F.softmax(wanted / 4, 1), reduction="batchmean"
    )
    (kl + beta * (1 - r).mean()).backward()
    with torch.no_grad():
        for weight in student.parameters():
            assert weight.grad is not None
            weight -= eta * weight.grad
        answers = student(task.simulation_pixels[asked].double() / 255)
        goal = F.softmax(task.simulation_logits[asked].double() / 4, 1)
        return float(16 * F.kl_div(F.log_softmax(answers / 4, 1), goal, reduction="batchmean"))


def test_unrolled_gradient_is_the_finite_difference_of_plain_training(
    task: AdaptationTask, explainer: LearnableCAM
) -> None:
    """float64, every parameter, batch normalization in train mode, flips among the views."""
    how = recipe(augment=Augment(crop="none", flip=True))
    network = build_with_seed(7, lambda: build_preprocessed(SPEC, classes=CLASSES)).double()
    plain = copy.deepcopy(network)
    exact = task._replace(
        contributions={name: part.double() for name, part in task.contributions.items()}
    )
    asked = torch.tensor([0, 2, 3, 5, 8])
    learner = DifferentiableStudent(network, "stage2")
    found = look_ahead(
        learner, explainer, exact, batch_at(task.pool, how, 7, 3), asked,
        grid=(4, 4), beta=3.0, eta=0.2, recipe=how,
    )  # fmt: skip

    def loss() -> float:
        return simulated_plainly(plain, explainer, task, how, asked, beta=3.0, eta=0.2)

    assert float(found.simulation_loss.detach()) == pytest.approx(loss(), rel=1e-9)
    phi = list(explainer.parameters())
    gradients = torch.autograd.grad(found.simulation_loss, phi)
    assert all(bool(gradient.count_nonzero()) for gradient in gradients)
    for own, gradient in zip(phi, gradients, strict=True):
        for place in range(own.numel()):
            values = []
            for step in (1e-5, -1e-5):
                own.data[place] += step
                values.append(loss())
                own.data[place] -= step
            difference = (values[0] - values[1]) / 2e-5
            assert float(gradient[place]) == pytest.approx(difference, rel=2e-4, abs=1e-8)


def test_looking_ahead_leaves_the_students_weights_and_notes_one_batch(
    task: AdaptationTask, explainer: LearnableCAM
) -> None:
    network = build_with_seed(7, lambda: build_preprocessed(SPEC, classes=CLASSES))
    before = copy.deepcopy(network.state_dict())
    learner = DifferentiableStudent(network, "stage2")
    look_ahead(
        learner, explainer.float(), task, batch_at(task.pool, recipe(), 7, 0), torch.arange(4),
        grid=(4, 4), beta=1.0, eta=0.1, recipe=recipe(),
    )  # fmt: skip
    after = network.state_dict()
    for name, value in dict(network.named_parameters()).items():
        assert torch.equal(value, before[name])
    assert int(after["network.stage1.bn.num_batches_tracked"]) == 1
    assert not torch.equal(
        after["network.stage1.bn.running_mean"], before["network.stage1.bn.running_mean"]
    )


def test_the_student_beside_a_still_explainer_is_the_rankings_student(
    task: AdaptationTask, explainer: LearnableCAM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no step of the parameters, the student's training is `stacked.teach`'s."""
    made: list[DifferentiableStudent] = []
    start = DifferentiableStudent.__init__

    def note(self: DifferentiableStudent, *given: object) -> None:
        start(self, *given)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(DifferentiableStudent, "__init__", note)
    single = explainer.float()
    how = recipe(augment=Augment(crop="none", flip=True))
    adapt_once(single, task, FAMILY, how, seed=5, beta=2.0, lr=0.0)
    students = Students.from_seeds(SPEC, CLASSES, [5], layer="stage2")
    train_students(students, task.pool, [StudentTask(5, 2.0, task.targets(single, (4, 4)))], how)
    wanted = students.state(0)
    for name, value in {**made[0].weights, **made[0].buffers}.items():
        if name in wanted:
            torch.testing.assert_close(value.detach(), wanted[name], rtol=1e-3, atol=1e-4)


def test_one_seed_gives_the_same_parameters_bit_for_bit(task: AdaptationTask) -> None:
    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # nothing may depend on it
        explainer = LearnableCAM(UNITS)
        adapt_once(explainer, task, FAMILY, recipe(), seed=3, beta=5.0, lr=0.01)
        found.append(explainer.state_dict())
    other = LearnableCAM(UNITS)
    adapt_once(other, task, FAMILY, recipe(), seed=4, beta=5.0, lr=0.01)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["gates.1"], other.state_dict()["gates.1"])


def planted(
    generator: torch.Generator, layer: str, unit: int
) -> tuple[AdaptationTask, Callable[[LearnableCAM], tuple[float, float]]]:
    """Images whose class is the color of a patch among gray clutter, which one unit alone shows.

    The other units show the clutter, or noise.
    """
    count = 320
    place = torch.randint(0, 4, (count, 2), generator=generator)
    clutter = torch.randint(0, 4, (count, 3, 2), generator=generator)
    classes = torch.randint(0, 3, (count,), generator=generator)
    cells = torch.zeros(count, 4, 4)
    noise = torch.zeros(count, 4, 4)
    for number in range(count):
        for y, x in clutter[number].tolist():
            noise[number, y, x] = 1
        y, x = place[number].tolist()
        cells[number, y, x] = 1
        noise[number, y, x] = 0
    grown, loud = (m.repeat_interleave(4, 1).repeat_interleave(4, 2) for m in (cells, noise))
    pixels = 120 + 40 * torch.rand(count, 3, 16, 16, generator=generator)
    pixels += 80 * loud[:, None] * torch.randn(count, 3, 1, 1, generator=generator)
    color = F.one_hot(classes, 3)[:, :, None, None] * 60.0
    pixels = (pixels + grown[:, None] * color).clamp(0, 255).to(torch.uint8)
    logits = 6.0 * F.one_hot(classes, 3).float()
    parts = {}
    for name, (units, side) in {"early": (3, 8), "late": (4, 4)}.items():
        whole = torch.rand(count, 2, units, side, side, generator=generator)
        if name == layer:
            shown = cells.repeat_interleave(side // 4, 1).repeat_interleave(side // 4, 2)
            whole[:, 0, unit] = shown
            whole[:, 1, unit] = shown.flip(-1)
        parts[name] = whole
    first, rest = slice(0, 160), slice(160, count)
    pool = ImagePool(pixels[first], torch.arange(160), logits[first, None].repeat(1, 2, 1))
    task = AdaptationTask(pool, {n: p[first] for n, p in parts.items()}, pixels[rest], logits[rest])

    def told(explainer: LearnableCAM) -> tuple[float, float]:
        """The planted unit's gate over the mean of its layer's others, and its layer's mix."""
        which = list(UNITS).index(layer)
        gates = explainer.gates[which].detach()
        others = torch.cat([gates[:unit], gates[unit + 1 :]])
        return float(gates[unit] - others.mean()), float(explainer.mix[which].detach())

    return task, told


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "unit"), [("late", 2), ("early", 0)], ids=["unit", "layer"])
def test_the_only_useful_unit_is_found(generator: torch.Generator, layer: str, unit: int) -> None:
    task, told = planted(generator, layer, unit)
    explainer = LearnableCAM(UNITS)
    how = recipe(steps=150, batch_size=64, augment=Augment(flip=True))
    for seed in range(2):
        adapt_once(explainer, task, FAMILY, how, seed=seed, beta=5.0, lr=0.01)
    gate, mix = told(explainer)
    assert gate > 0.5
    assert mix > 0.4


def test_parts_are_of_the_class_that_the_pool_says(generator: torch.Generator) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        teacher = Teacher.from_network(ShallowCNN(CLASSES, (4, 5), (2, 2)))
    pixels = torch.randint(0, 256, (5, 3, 16, 16), generator=generator, dtype=torch.uint8)
    pool = ImagePool(pixels, torch.arange(5), torch.randn(5, 2, CLASSES, generator=generator))
    seen: list[tuple[int, int]] = []
    parts = pool_contributions(teacher, pool, ["stage2"], lambda *done: seen.append(done))
    for view in range(2):
        images = (pixels.flip(-1) if view else pixels).float() / 255
        classes = pool.logits[:, view].argmax(1)
        wanted = grad_cam(teacher, images, ["stage2"], classes)["stage2"]
        torch.testing.assert_close(parts["stage2"][:, view].sum(1), wanted, rtol=1e-4, atol=1e-6)
    assert seen == [(5, 5)]


def test_a_loss_that_is_no_number_is_told(task: AdaptationTask) -> None:
    hot = recipe(optimization=Optimization(lr=1e30))
    with pytest.raises(UserError, match=r"not a number at step \d; try a third"):
        adapt_once(LearnableCAM(UNITS), task, FAMILY, hot, seed=0, beta=5.0, lr=0.01)
