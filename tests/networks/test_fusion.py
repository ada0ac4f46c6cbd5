"""Folding batch normalization: exact where it happens, and not done where it can't be."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from camdistill.networks.cifar_resnet import CifarResNet, WideResNet
from camdistill.networks.fusion import _NORMS, find_foldable, fuse_network
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import NetworkSpec, Teacher


def unsettled(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


NETWORKS = {
    "resnet20": (lambda: CifarResNet(20), 0),
    # Of 13, the 6 between two convolutions and the one after conv1 go; the others read a sum.
    "wrn_16_2": (lambda: WideResNet(16, 2), 6),
    "shallow_cnn": (ShallowCNN, 0),
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), 0),
    "resnet50": (lambda: torchvision.models.resnet50(weights=None), 0),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(weights=None), 0),
    "densenet121": (lambda: torchvision.models.densenet121(weights=None), 62),
    "vit": (lambda: torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32), 0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_network_is_the_same_function(name: str) -> None:
    make, left = NETWORKS[name]
    torch.manual_seed(0)
    network = unsettled(make())
    other = fuse_network(network, (32, 32))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        wanted, given = network(images), other(images)
        assert (given - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert norms(other) == left
    assert [n for n, _ in network.named_modules()] == [n for n, _ in other.named_modules()]
    assert not any(parameter.requires_grad for parameter in other.parameters())


def test_activations_after_a_normalization_stay_under_the_same_names() -> None:
    network = unsettled(CifarResNet(8)).double()
    other = fuse_network(network, (32, 32)).double()
    seen: dict[str, list[Tensor]] = {}
    names = [n for n, m in network.named_modules() if n and "conv" not in n]
    for each in (network, other):
        for name in names:
            each.get_submodule(name).register_forward_hook(
                lambda module, given, output, name=name: seen.setdefault(name, []).append(output)
            )
        each(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double())
    for name in names:
        first, second = seen[name][: len(seen[name]) // 2], seen[name][len(seen[name]) // 2 :]
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(first, second, strict=True))


def test_layers_to_keep_keep_their_outputs() -> None:
    network = unsettled(CifarResNet(8))
    other = fuse_network(network, (32, 32), keep=["layer1.0.conv1", "layer2.0.bn2"])
    assert norms(other) == 2
    assert torch.equal(other.layer1[0].conv1.weight, network.layer1[0].conv1.weight)
    assert isinstance(other.layer2[0].bn2, nn.BatchNorm2d)


class Awkward(nn.Module):
    """Every way in which a normalization after a convolution may not be folded."""

    def __init__(self) -> None:
        super().__init__()
        names = ("read_twice", "shared", "plain", "tied", "viewed")
        for name in names:
            self.add_module(name, nn.Conv2d(3, 3, 1))
            self.add_module(f"bn_{name}", nn.BatchNorm2d(3))
        self.bn_shared_again = nn.BatchNorm2d(3)
        self.no_statistics = nn.BatchNorm2d(3, track_running_stats=False)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        once = self.read_twice(x)
        x = self.bn_read_twice(once) + once
        x = self.bn_shared(self.shared(x))
        x = self.bn_shared_again(self.shared(x))
        x = self.bn_tied(self.tied(x)) * self.tied.weight.sum()
        x = self.bn_viewed(self.viewed(x).flip(-1))
        x = self.no_statistics(self.bn_plain(self.plain(x)))
        return self.fc(F.relu(x).mean((2, 3)))


def test_only_a_normalization_that_alone_reads_a_convolution_is_folded() -> None:
    network = unsettled(Awkward())
    images = torch.randn(2, 3, 8, 8)
    assert find_foldable(network, images) == [("plain", "bn_plain")]
    other = fuse_network(network, (8, 8))
    assert torch.allclose(network(images), other(images), atol=1e-5)


class NormThenActivation(nn.BatchNorm2d):
    """As in timm: one module that normalizes and activates."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def test_subclass_that_does_more_is_left_alone() -> None:
    network = unsettled(
        nn.Sequential(nn.Conv2d(3, 4, 3), NormThenActivation(4), nn.Flatten(), nn.Linear(144, 2))
    )
    other = fuse_network(network, (8, 8))
    images = torch.randn(2, 3, 8, 8)
    assert type(other[1]) is NormThenActivation
    assert torch.equal(network(images), other(images))


def test_network_that_cannot_run_on_the_size_stays_unfused_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = unsettled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(7, 2)))
    with caplog.at_level(logging.WARNING):
        other = fuse_network(network, (32, 32))
    assert norms(other) == 1
    assert "stays unfused: it can't run on 32 x 32" in caplog.text


class Drifting(nn.Module):
    """Answers differently every time, as a network with noise in it does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(self.bn(self.conv(x)).mean((2, 3))) * self.calls


def test_folding_that_cannot_be_confirmed_is_undone_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        other = fuse_network(Drifting(), (8, 8))
    assert norms(other) == 1
    assert "stays unfused: folding changes its logits" in caplog.text


def test_fusing_changes_nothing_in_the_network_or_its_precision_and_layout() -> None:
    network = CifarResNet(8).to(torch.bfloat16).to(memory_format=torch.channels_last).train()
    before = copy.deepcopy(network.state_dict())
    other = fuse_network(network, (32, 32))
    assert network.training
    assert all(torch.equal(before[n], value) for n, value in network.state_dict().items())
    for parameter in other.parameters():
        assert parameter.dtype == torch.bfloat16
    weight = other.layer2[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_fused_teacher_is_a_teacher_of_the_same_file() -> None:
    teacher = Teacher(NetworkSpec("resnet20", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1)))
    other = teacher.fuse_batch_norm()
    images = torch.rand(3, 3, 32, 32)
    assert torch.allclose(teacher(images), other(images), atol=1e-4)
    assert (other.spec, other.sha256, other.classes) == (teacher.spec, teacher.sha256, 10)
    assert norms(teacher.network) == 19
    assert norms(other.network) == 0


@pytest.mark.parametrize("name", ["native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"])
def test_normalizations_are_known_by_the_names_that_torch_calls_on_a_gpu(name: str) -> None:
    """Input first and the mean fourth, where the recorder reads them."""
    read = [one.name for one in getattr(torch.ops.aten, name).default._schema.arguments[:5]]
    assert read == ["input", "weight", "bias", "running_mean", "running_var"]
    assert name in _NORMS
