"""Learning rates at the schedule's corners, weight decay where it belongs, mistakes."""

import math

import pytest
import torch
from torch import nn

from camdistill.distill.optimization import END, START, Optimization
from camdistill.errors import UserError
from camdistill.networks.students import ShallowCNN


def test_one_cycle_starts_at_a_25th_peaks_after_warmup_and_ends_near_nothing() -> None:
    recipe = Optimization(schedule="one_cycle", warmup=0.2)
    assert recipe.lr_factor(0.0) == pytest.approx(1 / 25)
    assert recipe.lr_factor(0.1) == pytest.approx((1 / 25 + 1) / 2)  # half of a cosine
    assert recipe.lr_factor(0.2) == pytest.approx(1)
    assert recipe.lr_factor(0.6) == pytest.approx((1 + END) / 2)
    assert recipe.lr_factor(1.0) == pytest.approx(1e-4)
    assert recipe.lr_factor(1.2) == pytest.approx(1e-4)


def test_one_cycle_equals_torchs_own() -> None:
    steps, weight = 40, nn.Parameter(torch.zeros(2, 2))
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD([weight], lr=1, momentum=0.9),
        max_lr=1,
        total_steps=steps + 1,
        pct_start=0.25,
        div_factor=1 / START,
        final_div_factor=START / END,
        cycle_momentum=False,
    )
    # OneCycleLR peaks at pct_start * total_steps - 1, so its rise and fall are shifted: compare
    # each half on its own progress.
    rise, fall = 0.25 * (steps + 1) - 1, steps - (0.25 * (steps + 1) - 1)
    recipe = Optimization(schedule="one_cycle", warmup=0.25)
    for step in range(steps + 1):
        done = 0.25 * step / rise if step <= rise else 0.25 + 0.75 * (step - rise) / fall
        assert recipe.lr_factor(done) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        theirs.optimizer.step()
        if step < steps:
            theirs.step()


def test_cosine_rises_linearly_and_falls_along_a_cosine() -> None:
    recipe = Optimization(schedule="cosine", warmup=0.5)
    assert recipe.lr_factor(0.0) == END
    assert recipe.lr_factor(0.125) == pytest.approx(0.25)
    assert recipe.lr_factor(0.5) == pytest.approx(1)
    assert recipe.lr_factor(0.75) == pytest.approx(
        END + (1 - END) * (1 + math.cos(math.pi / 2)) / 2
    )
    assert recipe.lr_factor(1.0) == pytest.approx(END)


def test_constant_stays_after_the_rise_and_no_warmup_starts_at_the_top() -> None:
    recipe = Optimization(schedule="constant", warmup=0.1)
    assert recipe.lr_factor(0.05) == pytest.approx(0.5)
    assert [recipe.lr_factor(done) for done in (0.1, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    for schedule in ("constant", "cosine", "one_cycle"):
        assert Optimization(schedule=schedule, warmup=0.0).lr_factor(0.0) == pytest.approx(1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_optimizer_follows_the_schedule_step_by_step(optimizer: str) -> None:
    recipe = Optimization(optimizer, lr=0.4)  # type: ignore[arg-type]
    configured = recipe.configure(nn.Linear(2, 2), 10)
    schedule = configured["lr_scheduler"]["scheduler"]  # type: ignore[index]
    assert configured["lr_scheduler"]["interval"] == "step"  # type: ignore[index]
    for step in range(11):
        expected = 0.4 * recipe.lr_factor(step / 10)
        assert all(rate == pytest.approx(expected) for rate in schedule.get_last_lr())
        configured["optimizer"].step()
        schedule.step()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_norms_and_biases_are_never_decayed(optimizer: str) -> None:
    network = ShallowCNN(classes=4, channels=[3, 5], strides=[1, 2])
    recipe = Optimization(
        optimizer,  # type: ignore[arg-type]
        lr=0.5,
        momentum=0.0,
        weight_decay=0.1,
        schedule="constant",
        warmup=0.0,
    )
    optimizer_ = recipe.configure(network, 3)["optimizer"]
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer_.step()
    for name, parameter in network.named_parameters():
        decayed = name in ("stage1.conv.weight", "stage2.conv.weight", "linear.weight")
        expected = before[name] * (1 - 0.5 * 0.1) if decayed else before[name]
        torch.testing.assert_close(parameter.detach(), expected)


def test_frozen_parameters_are_left_out() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    network[0].requires_grad_(False)
    groups = Optimization().configure(network, 1)["optimizer"].param_groups
    found = {id(parameter) for group in groups for parameter in group["params"]}
    assert found == {id(parameter) for parameter in network[1].parameters()}


def test_sgd_is_nesterovs_with_torchs_formula() -> None:
    weight = nn.Linear(1, 1, bias=False)
    nn.init.constant_(weight.weight, 0.5)
    recipe = Optimization(lr=0.1, momentum=0.9, weight_decay=0.0, schedule="constant", warmup=0.0)
    optimizer = recipe.configure(weight, 9)["optimizer"]
    value, velocity = float(weight.weight.detach()), 0.0
    for gradient in (1.0, -0.5, 2.0):
        weight.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        velocity = 0.9 * velocity + gradient
        value -= 0.1 * (gradient + 0.9 * velocity)
        assert float(weight.weight.detach()) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({"lr": 0.0}, "above 0"),
        ({"lr": -1.0}, "above 0"),
        ({"weight_decay": -1e-4}, "0 or more"),
        ({"warmup": 1.0}, r"\[0, 1\)"),
        ({"momentum": 1.0}, r"\[0, 1\)"),
    ],
)
def test_mistakes_are_told(options: dict[str, float], cure: str) -> None:
    with pytest.raises(UserError, match=cure):
        Optimization(**options)  # type: ignore[arg-type]
