import re

import pytest
import torch
from torch import nn

from camdistill.errors import UserError
from camdistill.layers.sweep.layer_patterns import select_layers_by_network
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.students import ShallowCNN

IMAGES = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def networks() -> dict[str, nn.Module]:
    return {"teacher": CifarResNet(8, 6).eval(), "student": ShallowCNN(6, (4, 6), (1, 2)).eval()}


def test_pattern_for_all_is_taken_by_the_networks_that_have_such_layers(
    networks: dict[str, nn.Module],
) -> None:
    found = select_layers_by_network(networks, IMAGES, ["layer3", "stage?", "re*u"])
    names = {name: [layer.name for layer in layers] for name, (layers, _) in found.items()}
    assert names == {"teacher": ["relu", "layer3"], "student": ["stage1", "stage2"]}


@pytest.mark.parametrize(
    ("typo", "nearest"), [("stgae1", "stage1"), ("layr3.0", "layer3.0"), ("liner", "linear")]
)
def test_typo_is_told_with_the_nearest_names_of_both_networks(
    networks: dict[str, nn.Module], typo: str, nearest: str
) -> None:
    told = f"no layer '{typo}' in the teacher and none in the student; nearest: '{nearest}'"
    with pytest.raises(UserError, match=re.escape(told)):
        select_layers_by_network(networks, IMAGES, ["layer3", typo, "stage2"])


def test_typo_of_one_network_is_told_with_its_class(networks: dict[str, nn.Module]) -> None:
    told = "no layer 'stgae1' in ShallowCNN; nearest: 'stage1'"
    with pytest.raises(UserError, match=re.escape(told)):
        select_layers_by_network({"student": networks["student"]}, IMAGES, ["stgae1"])


class UnitsLast(nn.Module):
    """Its `mix` gives [B, h, w, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.mix = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.mix(self.act(self.conv(images)).permute(0, 2, 3, 1)).mean((1, 2))


def test_layer_that_exists_but_gives_its_units_last_is_no_typo(
    networks: dict[str, nn.Module],
) -> None:
    both = {"teacher": UnitsLast(), "student": networks["student"]}
    with pytest.raises(UserError, match=r"layers 'mix' give .* with their units last"):
        select_layers_by_network(both, IMAGES, ["mix", "stage1"])


def test_network_that_has_none_of_the_layers_is_told(networks: dict[str, nn.Module]) -> None:
    with pytest.raises(UserError, match=r"none of the layers .* are in the teacher"):
        select_layers_by_network(networks, IMAGES, ["stage1"])
