"""Batch normalization that keeps nothing: the same maps, half the memory, and put back."""

import pytest
import torch
import torchvision
from cam_oracles import close, out_of_place, reference, seeded, state_of, untouched
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from camdistill.errors import UserError
from camdistill.explain.engine import norms
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.methods import Method, find_method

NAMES = ["layer1", "layer3", "layer4"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_maps_are_autograds(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(norms, "LEAST", 1)
    network = seeded(lambda: torchvision.models.resnet18(num_classes=5)).to(dtype).eval()
    network.layer4[0].bn1 = nn.BatchNorm2d(512, affine=False).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 64, generator=generator).to(dtype)
    true = reference(out_of_place(network), images, NAMES, torch.tensor([1, 2]))
    before = state_of(network)
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.03}[dtype]
    for _ in range(2):
        found = grad_cam(network, images, NAMES, torch.tensor([[1, 0], [2, 2]]))
        for name in NAMES:
            close(found[name][:, 0], true[name], bound)
    untouched(network, before)
    assert not any("forward" in vars(part) for part in network.modules())


def test_what_is_kept_is_half(monkeypatch: pytest.MonkeyPatch) -> None:
    network = seeded(lambda: torchvision.models.resnet50(num_classes=5)).eval()
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    most = []
    for least in (10**9, 1):
        monkeypatch.setattr(norms, "LEAST", least)
        grad_cam(network, images, NAMES)
        with LiveBytes() as live:
            grad_cam(network, images, NAMES)
        most.append(live.most)
    assert most[1] < 0.6 * most[0]


def test_forwards_are_put_back_and_changed_or_training_ones_left() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)).eval()
    network[1].train()
    own = lambda values: values  # noqa: E731
    network[2].forward = own
    network.append(nn.BatchNorm2d(3, track_running_stats=False).eval())

    def fails() -> None:
        with norms.light_norms(list(network.modules())):
            assert ["forward" in vars(part) for part in network] == [True, False, True, False]
            assert network[2].forward is own
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert ["forward" in vars(part) for part in network] == [False, False, True, False]


class Checkpointed(nn.Module):
    """Its blocks run inside checkpoints, each inside its own or all inside one."""

    def __init__(self, at_once: bool) -> None:
        super().__init__()
        self.first, self.second = self.block(3, 4), self.block(4, 5)
        self.fc = nn.Linear(5, 4)
        self.at_once, self.checkpoints = at_once, True

    @staticmethod
    def block(units: int, given: int) -> nn.Sequential:
        norms = nn.BatchNorm2d(given), nn.BatchNorm2d(given)
        convolutions = nn.Conv2d(units, given, 3), nn.Conv2d(given, given, 3)
        return nn.Sequential(convolutions[0], norms[0], nn.ReLU(True), convolutions[1], norms[1])

    def features(self, images: Tensor) -> Tensor:
        return self.second(self.first(images))

    def forward(self, images: Tensor) -> Tensor:
        for part in (self.features,) if self.at_once else (self.first, self.second):
            if self.checkpoints:
                images = checkpoint(part, images, use_reentrant=False)
            else:
                images = part(images)
        return self.fc(images.mean((2, 3)))


def checkpointed(at_once: bool, checkpoints: bool = True) -> nn.Module:
    network = seeded(lambda: Checkpointed(at_once)).double().eval()
    network.checkpoints = checkpoints
    return network


@pytest.mark.parametrize("at_once", [False, True], ids=["each", "all"])
@pytest.mark.parametrize(
    "method",
    [
        "grad_cam",
        "grad_cam_plus_plus",
        "hires_cam",
        "layer_cam",
        "x_grad_cam",
        "guided_backprop",
        "guided_grad_cam",
        "gradient",
        "integrated_gradients",
    ],
)
def test_networks_with_checkpoints_have_the_maps_of_those_without(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, method: Method, at_once: bool
) -> None:
    """Most were CheckpointErrors: the backward ran torch's own normalization again."""
    monkeypatch.setattr(norms, "LEAST", 1)
    images = torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    layers, classes = ["first", "first.3", "second.1"], torch.tensor([[0, 1], [3, 2]])
    for frozen in (False, True):
        network = checkpointed(at_once).requires_grad_(not frozen)
        plain = checkpointed(at_once, checkpoints=False)
        maps = find_method(method)(network, images, layers, classes)
        for name, expected in find_method(method)(plain, images, layers, classes).items():
            close(maps[name], expected, 1e-10)


def test_layers_inside_a_frozen_checkpoint_are_told_where_the_whole_map_has_a_graph(
    generator: torch.Generator,
) -> None:
    images = torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    network = checkpointed(at_once=True).requires_grad_(False)
    with pytest.raises(UserError, match="ask for a layer outside them, or don't call checkpoint"):
        grad_cam(network, images, ["first.3"], 1, grad="full")
    network.requires_grad_(True)
    maps = grad_cam(network, images, ["first.3"], 1, grad="full")["first.3"]
    close(maps.detach(), grad_cam(network, images, ["first.3"], 1)["first.3"], 1e-10)


def test_weights_made_under_inference_mode_are_told_where_a_checkpoint_needs_them_again(
    generator: torch.Generator,
) -> None:
    images = torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        network = checkpointed(at_once=False)
    with pytest.raises(UserError, match="build or load the network outside of it"):
        find_method("gradient")(network, images, None, 1)
