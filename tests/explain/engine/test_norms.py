"""Batch normalisation that keeps nothing: the same maps, half the memory, and put back."""

import pytest
import torch
import torchvision
from cam_oracles import close, out_of_place, reference, seeded, state_of, untouched
from live_bytes import LiveBytes
from torch import nn

from camdistill.explain.engine import norms
from camdistill.explain.gradcam import grad_cam

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
