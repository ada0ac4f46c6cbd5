"""Counterfactual maps and contrasts: Grad-CAM is linear in the score."""

import pytest
import torch
from cam_oracles import close, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.contrast import contrast, counterfactual
from camdistill.explain.gradcam import grad_cam
from camdistill.networks.students import ShallowCNN

LAYERS = ["stage1", "stage2"]


def small(seed: int = 0) -> nn.Module:
    return seeded(lambda: ShallowCNN(4, (5, 6), (1, 2)), seed).double().eval()


def images_of(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, 10, 8, generator=generator, dtype=torch.float64)


def test_counterfactuals_are_grad_cam_with_the_gradient_negated() -> None:
    network, images, classes = small(), images_of(), torch.tensor([0, 2, 3])
    true = grad_cam(network, images, LAYERS, score=lambda y: -y.gather(1, classes[:, None])[:, 0])
    found = counterfactual(network, images, LAYERS, classes)
    for layer in LAYERS:
        close(found[layer], true[layer], 1e-12)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 2))
def test_a_contrast_is_the_difference_of_two_maps(seed: int, gamma: float) -> None:
    network, images = small(seed), images_of(seed)
    pairs = torch.tensor([[0, 2], [3, 1], [2, 3]])
    maps = grad_cam(network, images, LAYERS, pairs)
    for _ in range(2):
        found = contrast(network, images, LAYERS, pairs[:, 0], pairs[:, 1], gamma=gamma)
        for layer in LAYERS:
            true = maps[layer][:, 0] - gamma * maps[layer][:, 1]
            assert (found[layer] - true).abs().max() < 1e-12 * maps[layer].abs().max()


def test_without_classes_it_is_the_two_likeliest() -> None:
    network, images = small(), images_of()
    top = network(images).topk(2, 1).indices
    found = contrast(network, images, LAYERS)
    same = contrast(network, images, LAYERS, top[:, 0], top[:, 1])
    for layer in LAYERS:
        close(found[layer], same[layer], 1e-14)
    other = contrast(network, images, LAYERS, top[:, 1])
    for layer in LAYERS:
        close(other[layer], -found[layer], 1e-12)


def test_mistakes_are_told() -> None:
    network, images = small(), images_of()
    with pytest.raises(UserError, match="contrasted with itself"):
        contrast(network, images, LAYERS, 1, 1)
    with pytest.raises(UserError, match=r"the shape \[2\] for 3 images"):
        contrast(network, images, LAYERS, [0, 1], 2)
    with pytest.raises(UserError, match="class 4 does not exist"):
        contrast(network, images, LAYERS, 4, 1)


def test_classes_made_under_inference_mode_are_contrasted(generator: torch.Generator) -> None:
    """The backward couldn't keep them."""
    network = small()
    images = torch.rand(2, 3, 12, 12, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        classes = torch.tensor([1, 2])
    maps = contrast(network, images, ["stage1"], classes)["stage1"]
    torch.testing.assert_close(maps, contrast(network, images, ["stage1"], [1, 2])["stage1"])
