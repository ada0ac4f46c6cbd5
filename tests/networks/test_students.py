"""The shallow student and what it costs."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from camdistill.errors import UserError
from camdistill.networks.students import ShallowCNN, multiply_adds, parameter_count


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("residual", [False, True])
def test_student_equals_its_formula(residual: bool) -> None:
    student = ShallowCNN(4, (6, 6, 8), (2, 1, 1), kernel_size=5, residual=residual).double().eval()
    for name, buffer in student.named_buffers():
        if "running" in name:
            buffer.copy_(noise(*buffer.shape).abs() + 0.1)
    state, x = student.state_dict(), noise(2, 3, 17, 20)
    logits = student(x)
    for stage, stride in (("stage1", 2), ("stage2", 1), ("stage3", 1)):
        hidden = F.conv2d(x, state[f"{stage}.conv.weight"], stride=stride, padding=2)
        mean, var = state[f"{stage}.bn.running_mean"], state[f"{stage}.bn.running_var"]
        hidden = (hidden - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-5).sqrt()
        if residual and stage == "stage2":
            hidden = hidden + x
        x = hidden.clamp(min=0)
    wanted = torch.einsum("bkhw,ck->bc", x, state["linear.weight"]) / x[0, 0].numel()
    assert torch.allclose(logits, wanted + state["linear.bias"], atol=1e-12)


@given(
    channels=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    data=st.data(),
    size=st.integers(4, 20),
    kernel=st.sampled_from([1, 3, 5]),
)
@settings(max_examples=25, deadline=None)
def test_cost_is_the_sum_over_stages(
    channels: list[int], data: st.DataObject, size: int, kernel: int
) -> None:
    strides = [data.draw(st.integers(1, 3)) for _ in channels]
    student = ShallowCNN(3, channels, strides, in_channels=2, kernel_size=kernel)
    side, cost, parameters = size, 3 * channels[-1], 3 * channels[-1] + 3
    for (before, after), stride in zip(pairwise([2, *channels]), strides, strict=True):
        side = (side + 2 * (kernel // 2) - kernel) // stride + 1
        cost += side * side * before * after * kernel * kernel
        parameters += before * after * kernel * kernel + 2 * after
    assert multiply_adds(student, (size, size), channels=2) == cost
    assert parameter_count(student) == parameters


def test_counting_leaves_the_network_as_it_was() -> None:
    student = ShallowCNN(4, (4,), (1,)).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    multiply_adds(student, (8, 8))
    assert student.training
    assert all(parameter.device.type == "cpu" for parameter in student.parameters())
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_default_student_keeps_to_the_budget_of_a_shallow_explainer() -> None:
    student = ShallowCNN()
    assert sum(isinstance(module, nn.Conv2d) for module in student.modules()) <= 5
    assert parameter_count(student) <= 700_000
    assert multiply_adds(student, (32, 32)) <= 35_000_000


def test_last_stage_is_what_the_head_pools() -> None:
    student = ShallowCNN(4, (4, 6), (1, 2)).double().eval()
    seen = []
    student.get_submodule(student.last_stage).register_forward_hook(
        lambda module, given, output: seen.append(output)
    )
    logits = student(noise(2, 3, 8, 8))
    by_hand = seen[0].mean((2, 3)) @ student.linear.weight.T + student.linear.bias
    assert student.last_stage == "stage2"
    assert torch.allclose(logits, by_hand, atol=1e-12)


def test_residual_adds_nothing_where_shapes_differ() -> None:
    plain = ShallowCNN(3, (4, 8), (1, 2)).double().eval()
    other = ShallowCNN(3, (4, 8), (1, 2), residual=True).double().eval()
    other.load_state_dict(plain.state_dict())
    x = noise(2, 3, 8, 8)
    assert torch.equal(plain(x), other(x))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"channels": (4, 4), "strides": (1,)}, "channels has 2 numbers and strides 1"),
        ({"channels": (), "strides": ()}, "at least one"),
        ({"channels": (4, 0), "strides": (1, 1)}, "channels has 0"),
        ({"kernel_size": 4}, "odd number"),
        ({"classes": 0}, "classes has 0"),
        ({"in_channels": -1}, "in_channels has -1"),
    ],
)
def test_impossible_numbers_are_refused_in_one_line(
    arguments: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        ShallowCNN(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
