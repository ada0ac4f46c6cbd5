"""Every kind of network in every state it may be in: right, and left as it was."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from cam_oracles import (
    close,
    head_of,
    out_of_place,
    pooled_layers,
    reference,
    same,
    seeded,
    state_of,
    untouched,
)
from live_bytes import LiveBytes
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vgg import VGG, make_layers
from torchvision.models.vision_transformer import VisionTransformer

from camdistill.explain.gradcam import explain_images, grad_cam
from camdistill.networks.cifar_resnet import CifarResNet, WideResNet
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Preprocessed, Teacher

SIZE, CLASSES = 64, torch.tensor([1, 3])


def vgg() -> nn.Module:
    features = make_layers([8, "M", 12, "M", 16, "M"], batch_norm=False)
    with torch.device("meta"):  # its own head has 100 M weights
        network = VGG(features, init_weights=False)
    hidden = [nn.Linear(16 * 7 * 7, 20), nn.ReLU(True), nn.Dropout(), nn.Linear(20, 5)]
    network.classifier = nn.Sequential(*hidden)
    return network


def mobilenet() -> nn.Module:
    block = partial(InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [
        block(16, 3, 16, 16, True, "RE", stride=2),
        block(16, 3, 32, 24, False, "RE", stride=2),
        block(24, 5, 48, 24, True, "HS", stride=1),
    ]
    return MobileNetV3(blocks, 32, num_classes=5)


def efficientnet() -> nn.Module:
    block = partial(MBConvConfig, width_mult=1.0, depth_mult=1.0)
    blocks = [block(1, 3, 2, 16, 16, num_layers=1), block(4, 5, 2, 16, 24, num_layers=2)]
    return EfficientNet(blocks, dropout=0.2, num_classes=5, last_channel=40)


def convnext() -> nn.Module:
    blocks = [CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 2)]
    return ConvNeXt(blocks, layer_scale=1.0, num_classes=5)


def regnet() -> nn.Module:
    sizes = {"depth": 4, "w_0": 16, "w_a": 16.0, "w_m": 2.0, "group_width": 8}
    return RegNet(BlockParams.from_init_params(**sizes, se_ratio=0.25), num_classes=5)


def vit() -> nn.Module:
    network = VisionTransformer(SIZE, 16, 3, 3, 24, 48, num_classes=5)
    nn.init.normal_(network.heads.head.weight)  # zeros at first
    return network


def swin() -> nn.Module:
    sizes = ([4, 4], 12, [2, 2], [2, 4], [4, 4])
    return SwinTransformer(*sizes, num_classes=5, stochastic_depth_prob=0.0)


def patches(tokens: Tensor) -> Tensor:
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))


def channels_first(grid: Tensor) -> Tensor:
    return grid.permute(0, 3, 1, 2)


STAGES = ["layer1", "layer2", "layer3", "layer4"]
resnet = partial(ResNet, layers=[1, 1, 1, 1], num_classes=5)
ROWS: dict[str, tuple[Callable[[], nn.Module], list[str], Callable[[Tensor], Tensor]]] = {
    "resnet18": (lambda: ResNet(BasicBlock, [2, 2, 2, 2], num_classes=5), STAGES, same),
    "resnet50": (lambda: resnet(Bottleneck), STAGES, same),
    "resnext": (lambda: resnet(Bottleneck, groups=4, width_per_group=4), STAGES, same),
    "wide_resnet": (lambda: resnet(Bottleneck, width_per_group=128), STAGES, same),
    "densenet": (
        lambda: DenseNet(8, (2, 2, 2), 16, num_classes=5),
        ["features.denseblock1", "features.transition1", "features.norm5", "features"],
        same,
    ),
    "vgg": (vgg, ["features.2", "features.5", "features"], same),
    "mobilenet_v3": (mobilenet, ["features.1", "features.2", "features"], same),
    "efficientnet": (efficientnet, ["features.1", "features.2", "features"], same),
    "convnext": (convnext, ["features.1", "features.3", "features"], same),
    "regnet": (regnet, ["trunk_output.block1", "trunk_output"], same),
    "vit": (vit, [f"encoder.layers.encoder_layer_{n}" for n in (0, 1)], patches),
    "swin": (swin, ["features.1", "features.3", "norm"], channels_first),
    "cifar_resnet": (lambda: CifarResNet(8, 5), STAGES[:3], same),
    "cifar_wide": (lambda: WideResNet(10, 1, 5), ["layer1", "layer3", "relu"], same),
    "student": (lambda: ShallowCNN(5, (8, 12, 16), (2, 2, 1)), ["stage1", "stage3"], same),
}
# In half precision both sides round, ours sums in float32.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 0.02}
CLOSED = ["resnet18", "resnet50", "resnext", "wide_resnet", "efficientnet", "regnet", "swin"]
CLOSED += ["cifar_resnet", "cifar_wide", "student"]
POOLED = ["mobilenet_v3", "convnext"]
LONG = {"resnet18", "resnet50", "wide_resnet"}  # in float16, which CPUs are slow at


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            id=f"{name}-{dtype}",
            marks=[pytest.mark.slow] if dtype == torch.float16 and name in LONG else [],
        )
        for name in ROWS
        for dtype in BOUNDS
    ],
)
def test_maps_are_autograds_in_every_state_and_leave_none(name: str, dtype: torch.dtype) -> None:
    build, layers, cells = ROWS[name]
    network = seeded(build).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, SIZE, SIZE, generator=generator).to(dtype)
    # float16 has no gradients below 6e-8, so the reference needs larger ones.
    scale = 1024.0 if dtype == torch.float16 else 1.0
    true = reference(
        out_of_place(network), images, layers, CLASSES, lambda y: y * scale, cells=cells
    )
    modes = (torch.enable_grad, torch.no_grad, torch.inference_mode)
    for frozen, mode in product((False, True), modes):
        network.requires_grad_(not frozen)
        for asked in (layers[-1:], layers):
            with mode():
                given = images.clone()
                before = state_of(network)
                found = explain_images(network, given, asked, CLASSES)
                untouched(network, before)
            assert list(found.maps) == asked
            assert found.logits.grad_fn is None
            for layer, maps in found.maps.items():
                assert maps.dtype == torch.float32
                assert maps.grad_fn is None
                assert not maps.is_inference()
                close(maps, true[layer] / scale, BOUNDS[dtype])
    assert (head_of(network, images, layers[-1]) is not None) == (name in CLOSED)
    if name not in CLOSED:
        pooled = pooled_layers(network, images, layers[-1:])
        assert pooled == (layers[-1:] if name in POOLED else [])


@pytest.mark.parametrize("name", ROWS)
def test_no_graph_stays_alive_and_channels_last_and_several_classes_agree(name: str) -> None:
    build, layers, cells = ROWS[name]
    network = seeded(build).double().eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    table = torch.tensor([[1, 0, 4], [3, 3, 2]])
    true = reference(out_of_place(network), images, layers, CLASSES, cells=cells)
    moved = copy.deepcopy(network).to(memory_format=torch.channels_last)
    for one in (network, moved):
        for _ in range(2):
            with LiveBytes() as live:
                found = grad_cam(one, images, layers, table)
                for layer in layers:
                    close(found[layer][:, 0], true[layer], 1e-10)
                kept = sum(maps.untyped_storage().nbytes() for maps in found.values())
                assert live.now <= kept + 3 * images.nbytes  # comparisons' leftovers
                del found
    assert head_of(moved, images, layers[-1]) == head_of(network, images, layers[-1])


class Broken(nn.Module):
    """Takes the place of a head."""

    def forward(self, _: Tensor) -> Tensor:
        raise ZeroDivisionError


@pytest.mark.parametrize("name", ROWS)
def test_an_exception_in_any_network_leaves_it_as_it_was(name: str) -> None:
    build, layers, _ = ROWS[name]
    network = seeded(build).eval()
    last = [n for n, part in network.named_modules() if isinstance(part, nn.Linear)][-1]
    network.set_submodule(last, Broken())
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    before = state_of(network)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for grad in ("none", "full"):
            with mode(), pytest.raises(ZeroDivisionError):
                grad_cam(network, images.clone(), layers, 1, grad=grad)
    untouched(network, before)


def test_wrappers_of_ours_give_the_maps_of_the_network_on_normalized_images() -> None:
    network = seeded(ROWS["student"][0]).eval()
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    wrapped = Preprocessed(network, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    true = reference(network, wrapped.normalize(images), ["stage1"], CLASSES)["stage1"]
    close(grad_cam(wrapped, images, ["stage1"], CLASSES)["stage1"], true, 1e-5)
    teacher = Teacher.from_network(copy.deepcopy(network), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    close(grad_cam(teacher, images, ["stage1"], CLASSES)["stage1"], true, 1e-5)
