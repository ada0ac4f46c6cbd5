import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import efficientnet_b0, mobilenet_v2, resnet18, vgg11
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.feature_extraction import get_graph_node_names
from torchvision.models.swin_transformer import SwinTransformer

from camdistill.errors import UserError
from camdistill.layers.sweep.layer_selection import find_layers, list_layers, select_layers
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.students import ShallowCNN

IMAGES = torch.zeros(2, 3, 32, 32)


def names(network: nn.Module, patterns: list[str] | None = None) -> list[str]:
    return [layer.name for layer in find_layers(network.eval(), IMAGES, patterns)]


class Functional(nn.Module):
    """No block, no module for its ReLUs; one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.conv2(F.relu(self.conv1(images))))
        return self.head(hidden.mean((2, 3)))


def test_residual_networks_have_a_stem_and_blocks() -> None:
    assert names(resnet18(weights=None)) == [
        "relu",
        *(f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)),
    ]
    assert names(CifarResNet(20))[:3] == ["relu", "layer1.0", "layer1.1"]
    assert len(names(CifarResNet(56))) == 28


def test_a_block_is_read_at_its_last_relu_whose_input_is_read_too() -> None:
    (layer,) = find_layers(resnet18(weights=None).eval(), IMAGES, ["layer2.0"])
    assert layer.key == "layer2.0.relu#1"
    assert layer.activated
    assert layer.relu
    assert layer.shape == (128, 4, 4)


def test_students_have_stages_and_vggs_their_relus() -> None:
    assert names(ShallowCNN(channels=(4, 6, 8), strides=(1, 2, 1))) == [
        "stage1",
        "stage2",
        "stage3",
    ]
    found = names(vgg11(weights=None, init_weights=False))
    assert found[0] == "features.1"
    assert found[-1] == "classifier.4"
    assert len(found) == 10


def test_blocks_without_a_relu_at_the_end_are_read_themselves() -> None:
    layers = find_layers(mobilenet_v2(weights=None).eval(), IMAGES)
    block = next(layer for layer in layers if layer.name == "features.3")
    assert not block.activated
    assert block.key == "features.3#0"
    assert layers[0].bound == 6


def test_gates_inside_blocks_are_no_blocks() -> None:
    found = names(efficientnet_b0(weights=None))
    assert found[:3] == ["features.0.2", "features.1.0", "features.2.0"]
    assert found[-1] == "features.8.2"
    assert len(found) == 18


def test_a_network_without_blocks_and_relu_modules_is_read_at_its_convolutions() -> None:
    layers = find_layers(Functional().eval(), torch.zeros(1, 1, 9, 9))
    assert [layer.name for layer in layers] == ["conv1", "conv2"]
    assert not any(layer.rectified for layer in layers)


def test_every_call_of_a_shared_relu_is_a_layer_as_in_torchvisions_graph() -> None:
    network = resnet18(weights=None).eval()
    nodes = get_graph_node_names(network)[1]
    relus = [node.replace("relu_1", "relu#1") for node in nodes if "relu" in node]
    ours = names(network, ["*relu"])
    assert [name.removesuffix("#0") for name in ours] == relus


def test_patterns_choose_calls_layers_and_stages() -> None:
    network = resnet18(weights=None)
    assert names(network, ["layer3.?"]) == ["layer3.0", "layer3.1"]
    assert names(network, ["layer1.0.relu#0"]) == ["layer1.0.relu#0"]
    assert names(network, ["layer4", "layer1"]) == ["layer1", "layer4"]
    assert names(network, ["layer1.1", "layer1.1.relu#1"]) == ["layer1.1"]
    assert names(network, ["fc"]) == ["fc"]


def test_layers_are_in_the_order_in_which_they_run() -> None:
    found = [layer.name for layer in list_layers(resnet18(weights=None).eval(), IMAGES)]
    assert found.index("conv1") < found.index("relu") < found.index("maxpool")
    assert found[-1] == "fc"
    assert len(found) == len(set(found))


def test_a_name_that_fits_nothing_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no layer 'layr3\.0' in ResNet; nearest: 'layer3\.0'"):
        names(resnet18(weights=None), ["layr3.0"])


def swin(window: int = 2) -> SwinTransformer:
    return SwinTransformer([4, 4], 8, [1, 1], [2, 2], [window, window], num_classes=3).eval()


def test_layers_with_their_units_last_are_left_out_and_named() -> None:
    """Every Swin layer between its patches and its head; a shape alone can't tell 8 rows from 8
    units, so the oracle is torchvision's source: all but the embedding and what follows `permute`.
    """
    layers, others = select_layers(swin(), IMAGES, ["*"])
    first = {layer.name for layer in layers}
    assert first == {"features.0.0", "permute", "avgpool", "flatten", "head"}
    assert {"features.0.1", "features.0.2", "features.1.0", "features.1.0.attn"} <= set(others)
    assert {"features.1.0.mlp.1", "features.2.reduction", "features.3", "norm"} <= set(others)


def test_a_convnext_block_is_read_and_what_is_inside_with_units_last_is_not() -> None:
    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    network = ConvNeXt(blocks, num_classes=3).eval()
    layers, others = select_layers(network, IMAGES, ["*"])
    inner = [f"features.{stage}.0.block.{place}" for stage in (1, 3) for place in range(1, 6)]
    # Permutation, normalization, linear, GELU, linear; then it permutes back.
    assert set(others) == set(inner)
    shapes = {layer.name: layer.shape for layer in layers}
    assert shapes["features.1.0"] == shapes["features.1.0.block.6"] == (8, 8, 8)
    assert shapes["features.3.0"] == (16, 4, 4)
    assert select_layers(network, IMAGES)[1] == ()


def test_where_no_layer_has_its_units_first_that_is_told() -> None:
    for patterns in (None, ["features.1.*"], ["features.3.0"]):
        with pytest.raises(UserError, match="with their units last"):
            find_layers(swin(), IMAGES, patterns)


def test_a_relu_followed_by_an_in_place_addition_is_not_the_blocks_output() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            hidden = self.relu(self.conv(images))
            hidden += images
            return hidden

    (layer,) = find_layers(nn.Sequential(Block()).eval(), IMAGES)
    assert (layer.name, layer.key, layer.activated) == ("0", "0#0", False)
