"""Transformers: tokens and channels-last grids are cells like any other."""

import pytest
import torch
import torchvision
from cam_oracles import close, head_of, reference, seeded
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.engine.tokens import cell_transform
from camdistill.explain.gradcam import grad_cam, last_layer

CLASSES = torch.tensor([1, 3])


def vit(size: int = 32) -> nn.Module:
    """torchvision's with 4 layers of 24 units; its head, all zeros at first, is drawn."""
    network = torchvision.models.VisionTransformer(size, 8, 4, 3, 24, 48, num_classes=5)
    nn.init.normal_(network.heads.head.weight)
    return network


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        [4, 4], 12, [2, 2], [2, 4], [4, 4], num_classes=5, stochastic_depth_prob=0.0
    )


def pixels(height: int = 32, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("layer", ["encoder.layers.encoder_layer_1", "encoder.ln"])
def test_vit_maps_are_those_of_its_patches(layer: str) -> None:
    network = seeded(vit).double().eval()
    images = pixels()

    def cells(tokens: Tensor) -> Tensor:  # one class token, then 4 rows of 4
        patches = tokens[:, 1:]
        rows = [patches[:, 4 * row : 4 * row + 4] for row in range(4)]
        return torch.stack(rows, 1).permute(0, 3, 1, 2)

    true = reference(network, images, [layer], CLASSES, cells=cells)[layer]
    for layout in ("auto", "tokens", cells):
        for frozen in (True, False):
            network.requires_grad_(not frozen)
            with torch.no_grad():
                found = grad_cam(network, images, [layer], CLASSES, layout=layout)[layer]
            assert found.shape == (2, 4, 4)
            if layer == "encoder.ln":  # the head reads the class token alone
                assert found.abs().max() == true.abs().max() == 0
            else:
                close(found, true)


def test_vits_default_layer_is_the_last_whose_patches_count() -> None:
    network = seeded(vit).double()
    assert last_layer(network, pixels()) == "encoder.layers.encoder_layer_3.ln_1"
    assert network.training
    found = grad_cam(network.eval(), pixels())
    assert [maps.shape for maps in found.values()] == [(2, 4, 4)]
    assert found["encoder.layers.encoder_layer_3.ln_1"].abs().max() > 0


@pytest.mark.parametrize("layer", ["features.1", "features.2", "features.3.0.mlp", "norm"])
def test_swin_maps_are_channels_last_grids(layer: str) -> None:
    network = seeded(swin).double().eval()
    images = pixels()
    true = reference(
        network, images, [layer], CLASSES, cells=lambda grid: grid.permute(0, 3, 1, 2)
    )[layer]
    table = torch.tensor([[1, 0], [3, 4]])
    for layout in ("auto", "channels_last"):
        found = grad_cam(network, images, [layer], CLASSES, layout=layout)[layer]
        close(found, true)
        several = grad_cam(network, images, [layer], table, layout=layout)[layer]
        close(several[:, 0], true)
    assert head_of(network, images, layer) == ("head" if layer == "norm" else None)


def test_swins_default_layer_has_a_closed_form() -> None:
    network = seeded(swin).double().eval()
    images = pixels()
    assert last_layer(network, images) == "permute"
    found = grad_cam(network, images, ["permute", "norm"], CLASSES)
    close(found["permute"], found["norm"])
    assert head_of(network, images, "permute") == "head"


@pytest.mark.parametrize(
    ("shape", "size", "cells"),
    [
        ((2, 197, 8), (224, 224), (14, 14)),
        ((2, 196, 8), (224, 224), (14, 14)),
        ((2, 198, 8), (224, 224), (14, 14)),  # a distillation token
        ((2, 201, 8), (224, 224), (14, 14)),  # four registers
        ((2, 1 + 14 * 10, 8), (224, 160), (14, 10)),
        ((2, 1 + 37 * 37, 8), (518, 518), (37, 37)),
        ((2, 9, 8), (32, 32), (2, 2)),  # 4 patches behind 5, as 32 isn't 3 patches
        ((2, 7, 7, 96), (224, 224), (7, 7)),
        ((2, 56, 56, 96), (224, 224), (56, 56)),
        ((2, 16, 56, 56), (224, 224), (56, 56)),
        ((2, 56, 56, 56), (224, 224), (56, 56)),
        ((2, 512, 1, 26), (32, 100), (1, 26)),
        ((2, 16, 53, 37), (224, 160), (53, 37)),
    ],
)
def test_sizes_are_inferred(
    shape: tuple[int, ...], size: tuple[int, int], cells: tuple[int, int]
) -> None:
    output = torch.zeros(shape)
    found = cell_transform("a", output, size)
    grid = output if found is None else found(output)
    assert tuple(grid.shape[2:]) == cells
    assert grid.data_ptr() != 0
    assert grid._is_view() or grid is output  # no copy


def test_layers_that_are_no_grid_are_refused_by_name_and_shape() -> None:
    network = seeded(vit).double().eval()
    with pytest.raises(UserError, match=r"'heads' gives \[2, 5\], which has no spatial size"):
        grad_cam(network, pixels(), ["heads"])
    with pytest.raises(UserError, match=r"'a' gives \[2, 14, 8\], which has no spatial size: as t"):
        cell_transform("a", torch.zeros(2, 14, 8), (224, 224))
    with pytest.raises(UserError, match=r"'a' gives \[2, 8, 4, 4\], which has no spatial size: as"):
        cell_transform("a", torch.zeros(2, 8, 4, 4), (32, 32), "tokens")
    with pytest.raises(UserError, match=r"gives \[2, 17, 24\], as cells \[2, 24\], which has no"):
        grad_cam(network, pixels(), ["encoder.layers.encoder_layer_1"], layout=lambda t: t.mean(1))


@pytest.mark.parametrize(
    ("name", "options", "layer", "prefixes"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, "blocks.1.norm1", 1),
        ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 2}, "blocks.1.norm1", 2),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2}, "blocks.1.norm1", 5),
        (
            "vit_tiny_patch16_224",
            {"img_size": 64, "depth": 2, "global_pool": "avg", "class_token": False},
            "blocks",
            0,
        ),
    ],
)
def test_timms_transformers_need_no_layer_and_no_layout(
    name: str, options: dict[str, object], layer: str, prefixes: int
) -> None:
    timm = pytest.importorskip("timm")
    network = seeded(lambda: timm.create_model(name, num_classes=5, **options)).double().eval()
    for module in network.modules():  # its heads are 0 or nearly so at first
        if isinstance(module, nn.Linear) and module.out_features == 5:
            nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
    side = int(options["img_size"])
    images = pixels(side, side)

    def cells(tokens: Tensor) -> Tensor:
        return tokens[:, prefixes:].transpose(1, 2).unflatten(2, (4, 4))

    true = reference(network, images, [layer], CLASSES, cells=cells)[layer]
    for _ in range(2):
        found = grad_cam(network, images, classes=CLASSES)
        assert list(found) == [layer]
        close(found[layer], true, 1e-10)
