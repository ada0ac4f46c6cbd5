"""Every method on a network that is known by heart: what it looks at is a mask."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from camdistill.data.shapes import Shapes
from camdistill.explain.attribution import integrated_gradients
from camdistill.explain.methods import AT_PIXELS, METHODS, image_explainer
from camdistill.networks.analytic import ColorReader

COUNT, GAIN = 12, 1000.0
SHAPES = Shapes("test", COUNT, shortcut=1.0, shortcut_cells=2.0)
# At an exact match the gradient is 0 on both sides of a kink.
BLIND = {"gradient", "gradient_x_input", "guided_backprop", "guided_grad_cam", "deconvnet"}
BLIND |= {"smooth_grad", "counterfactual"}  # noise leaves the color; nothing speaks against it
SLOW = {"rise", "integrated_gradients"}  # asked differently below, or too seldom right at once
EXACT = {"grad_cam", "cam", "hires_cam", "x_grad_cam", "layer_cam", "grad_cam_plus_plus"}


@pytest.fixture(scope="module")
def known() -> tuple[ColorReader, Tensor, Tensor, Tensor]:
    rendered = SHAPES.render(np.arange(COUNT))
    return (
        ColorReader(SHAPES.patch_colors, GAIN).eval(),
        torch.from_numpy(rendered.pixels) / 255,
        torch.from_numpy(rendered.labels),
        torch.from_numpy(rendered.masks["shortcut"]),
    )


@pytest.mark.parametrize("method", sorted(set(METHODS) - BLIND - SLOW))
def test_map_lies_on_the_patch_and_nowhere_else(method: str, known: tuple) -> None:
    network, images, labels, patch = known
    layer = None if method in AT_PIXELS else "match"
    maps = image_explainer(method, layer)(network, images, labels).clamp(min=0)
    inside = (maps * patch).sum((1, 2)) / maps.sum((1, 2))
    if method == "occlusion":  # a window that touches the patch reaches beyond it
        share = patch.float().mean((1, 2))
        assert (inside > 4 * share).all()
    else:
        torch.testing.assert_close(inside, torch.ones(COUNT), rtol=1e-4, atol=0)
    assert patch.flatten(1).gather(1, maps.flatten(1).argmax(1)[:, None]).all()


@pytest.mark.parametrize("method", sorted(EXACT))
def test_cams_of_a_mean_and_a_line_have_the_known_height(method: str, known: tuple) -> None:
    network, images, labels, patch = known
    maps = image_explainer(method, "match")(network, images, labels)
    shape = maps / maps.amax((1, 2), keepdim=True)
    torch.testing.assert_close(shape, patch.float(), rtol=1e-3, atol=1e-4)
    if method not in ("x_grad_cam", "grad_cam_plus_plus"):
        height = GAIN if method == "cam" else GAIN / math.prod(patch.shape[1:])
        assert maps.amax() == pytest.approx(height, rel=1e-3)


def test_other_classes_have_nothing(known: tuple) -> None:
    network, images, labels, _ = known
    for method in sorted(EXACT):
        assert (image_explainer(method, "match")(network, images, (labels + 1) % 8) == 0).all(), (
            method
        )


@pytest.mark.parametrize("method", sorted(BLIND - {"smooth_grad", "deconvnet"}))
def test_what_stands_on_the_gradient_is_blind_here(method: str, known: tuple) -> None:
    network, images, labels, _ = known
    layer = None if method in AT_PIXELS else "match"
    assert image_explainer(method, layer)(network, images, labels).clamp(min=0).abs().max() == 0


@pytest.mark.slow
def test_integrated_gradients_add_up_to_the_logit(known: tuple) -> None:
    network, images, labels, patch = known
    found = integrated_gradients(network, images[:2], labels[:2], steps=4000)
    expected = network(images[:2]).gather(1, labels[:2, None])[:, 0]
    torch.testing.assert_close(found.sum((1, 2)), expected, rtol=0.05, atol=0)
    torch.testing.assert_close((found * patch[:2]).sum((1, 2)), expected, rtol=0.05, atol=0)


@pytest.mark.slow
def test_rise_is_brightest_near_the_patch(known: tuple) -> None:
    network, images, labels, patch = known
    maps = image_explainer("rise")(network, images, labels)
    inside = (maps * patch).sum((1, 2)) / patch.sum((1, 2))
    outside = (maps * ~patch).sum((1, 2)) / (~patch).sum((1, 2))
    assert (inside > outside).all()
