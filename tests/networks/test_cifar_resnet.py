"""The networks of the two papers, against forwards written anew from their state dicts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.networks.cifar_resnet import CIFAR_DEPTHS, CifarResNet, WideResNet
from camdistill.networks.students import multiply_adds, parameter_count

State = dict[str, Tensor]


def images(count: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


def unsettled(network: nn.Module, seed: int = 1) -> nn.Module:
    """The network in float64 with running statistics and affine terms that matter."""
    generator = torch.Generator().manual_seed(seed)
    network = network.double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator).double())
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator).double() / 4)
    return network


def norm(state: State, name: str, x: Tensor) -> Tensor:
    """Ioffe & Szegedy 2015, algorithm 2, with the stored statistics."""
    mean, var, gamma, beta = (
        state[f"{name}.{part}"].view(1, -1, 1, 1)
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return gamma * (x - mean) / torch.sqrt(var + 1e-5) + beta


def resnet_by_hand(state: State, x: Tensor, blocks: int) -> Tensor:
    """He et al. 2016, section 4.2, from weights by name."""
    x = norm(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=1)).clamp(min=0)
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            hidden = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            hidden = norm(state, f"{name}.bn1", hidden).clamp(min=0)
            hidden = F.conv2d(hidden, state[f"{name}.conv2.weight"], padding=1)
            hidden = norm(state, f"{name}.bn2", hidden)
            if stride == 2:
                padded = torch.zeros_like(hidden)
                quarter = hidden.shape[1] // 4
                padded[:, quarter:-quarter] = x[:, :, ::2, ::2]
                x = padded
            x = (hidden + x).clamp(min=0)
    return x.mean(dim=(2, 3)) @ state["linear.weight"].T + state["linear.bias"]


def wide_by_hand(state: State, x: Tensor, blocks: int) -> Tensor:
    """Zagoruyko & Komodakis 2016, table 1 and figure 1 (a), from weights by name."""
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            first = norm(state, f"{name}.bn1", x).clamp(min=0)
            hidden = F.conv2d(first, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            hidden = norm(state, f"{name}.bn2", hidden).clamp(min=0)
            hidden = F.conv2d(hidden, state[f"{name}.conv2.weight"], padding=1)
            if f"{name}.shortcut.weight" in state:
                x = F.conv2d(first, state[f"{name}.shortcut.weight"], stride=stride)
            x = x + hidden
    x = norm(state, "bn", x).clamp(min=0)
    return x.mean(dim=(2, 3)) @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize("depth", [8, 20, 32])
def test_resnet_equals_the_forward_written_from_the_paper(depth: int) -> None:
    network = unsettled(CifarResNet(depth, classes=7))
    with torch.no_grad():
        wanted = resnet_by_hand(network.state_dict(), images(), (depth - 2) // 6)
        assert torch.allclose(network(images()), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 1), (16, 2)])
def test_wide_resnet_equals_the_forward_written_from_the_paper(depth: int, width: int) -> None:
    network = unsettled(WideResNet(depth, width, classes=7))
    with torch.no_grad():
        wanted = wide_by_hand(network.state_dict(), images(), (depth - 4) // 6)
        assert torch.allclose(network(images()), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_resnet_has_the_published_size(depth: int) -> None:
    # He et al. 2016, table 6, in millions.
    published = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}
    count = parameter_count(CifarResNet(depth))
    assert math.isclose(count / 1e6, published[depth], abs_tol=0.05 if depth == 110 else 0.006)
    # Counted by hand: three stages of 2n convolutions, two of which widen, and their norms.
    n = (depth - 2) // 6
    convs = 9 * (3 * 16 + 2 * n * 16**2 + 16 * 32 + (2 * n - 1) * 32**2)
    convs += 9 * (32 * 64 + (2 * n - 1) * 64**2)
    assert count == convs + 2 * (16 + 2 * n * (16 + 32 + 64)) + 650


@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(16, 1, 0.2), (16, 2, 0.7), (40, 1, 0.6), (40, 2, 2.2)]
)
def test_wide_resnet_has_the_published_size(depth: int, width: int, millions: float) -> None:
    # Zagoruyko & Komodakis 2017 (attention transfer), table 1.
    count = parameter_count(WideResNet(depth, width))
    assert round(count / 1e6, 1) == millions
    n, (a, b, c) = (depth - 4) // 6, (16 * width, 32 * width, 64 * width)
    convs = 9 * (3 * 16 + 16 * a + a * b + b * c + (2 * n - 1) * (a**2 + b**2 + c**2))
    shortcuts = (16 * a if width > 1 else 0) + a * b + b * c
    norms = 2 * (16 + a + b + (2 * n - 1) * (a + b + c) + c)
    assert count == convs + shortcuts + norms + 10 * c + 10


def test_wrn_28_10_has_the_size_of_the_papers_table() -> None:
    # Zagoruyko & Komodakis 2016, table 4: 36.5 M; multiply-adds: 5.2 G.
    with torch.device("meta"):
        network = WideResNet(28, 10)
    assert round(parameter_count(network) / 1e6, 1) == 36.5
    assert round(multiply_adds(network, (32, 32)) / 1e9, 1) == 5.2


def test_resnet_20_costs_its_published_multiply_adds() -> None:
    # 40.8 M in tables that count the convolutions' biases and norms too; by hand 40.55 M.
    blocks = 6 * 9 * 16 * 16 * 32**2 + 9 * (16 * 32 + 5 * 32**2) * 16**2
    blocks += 9 * (32 * 64 + 5 * 64**2) * 8**2
    assert multiply_adds(CifarResNet(20), (32, 32)) == 9 * 3 * 16 * 32**2 + blocks + 640


@pytest.mark.parametrize("network", [CifarResNet(8), WideResNet(10, 1)], ids=["resnet", "wide"])
def test_head_pools_the_stage_that_is_named_last(network: nn.Module) -> None:
    """Hooks at `last_stage` give what the linear layer averages: the map there is exact."""
    unsettled(network)
    seen = []
    handle = network.get_submodule(network.last_stage).register_forward_hook(
        lambda module, given, output: seen.append(output)
    )
    with torch.no_grad():
        logits = network(images())
    handle.remove()
    by_hand = seen[-1].mean((2, 3)) @ network.linear.weight.T + network.linear.bias
    assert torch.allclose(logits, by_hand, atol=1e-12)
    assert (seen[-1] >= 0).all()


@pytest.mark.parametrize("network", [CifarResNet(8), WideResNet(10, 2)], ids=["resnet", "wide"])
def test_layout_and_size_of_the_image_are_free(network: nn.Module) -> None:
    unsettled(network)
    with torch.no_grad():
        wanted = network(images(size=48))
        last = network.to(memory_format=torch.channels_last)
        given = images(size=48).to(memory_format=torch.channels_last)
        assert torch.allclose(last(given), wanted, atol=1e-12)
        rounded = network.bfloat16()(images(size=48).bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.double(), wanted, atol=0.05 * wanted.abs().max().item())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: CifarResNet(18),
        lambda: CifarResNet(2),
        lambda: WideResNet(20, 1),
        lambda: WideResNet(16, 0),
    ],
)
def test_impossible_depth_is_refused_with_a_possible_one(wrong: object) -> None:
    with pytest.raises(UserError, match=r"take 6n \+|1 or more"):
        wrong()  # type: ignore[operator]
