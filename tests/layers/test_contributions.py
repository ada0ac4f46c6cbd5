import pytest
import torch
from torch import nn

from camdistill.errors import UserError
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.variants import layer_cam
from camdistill.layers.contributions import contributions
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.students import ShallowCNN


def test_grad_cam_in_logits_is_the_map_times_its_cells(generator: torch.Generator) -> None:
    network = CifarResNet(20, classes=4).double().eval().requires_grad_(False)
    images = torch.rand(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    layers = ["layer1", "layer2.0.relu#0", "layer3"]
    _, classes, found = contributions(network, images, layers)
    maps = grad_cam(network, images, layers, classes)
    for layer in layers:
        cells = maps[layer][0].numel()
        expected = maps[layer].float() * cells
        assert torch.allclose(found[layer].grad_cam, expected, atol=1e-4), layer


def test_layer_cam_in_logits_is_the_published_map_times_its_cells(
    generator: torch.Generator,
) -> None:
    network = CifarResNet(20, classes=4).double().eval().requires_grad_(False)
    images = torch.rand(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    _, classes, found = contributions(network, images, ["layer2"])
    (published,) = layer_cam(network, images, ["layer2"], classes).values()
    expected = published.float() * published[0].numel()
    assert torch.allclose(found["layer2"].layer_cam, expected, atol=1e-4)


def test_bias_free_relu_network_gives_its_logit_at_every_layer(generator: torch.Generator) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(5, 4, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 3, bias=False),
    ).eval()
    images = torch.rand(2, 3, 8, 8, generator=generator)
    logits, _, found = contributions(network, images, ["1", "3"], torch.tensor([2, 0]))
    expected = torch.stack([logits[0, 2], logits[1, 0]])
    for one in found.values():
        total = (one.gradients * one.activations).sum((1, 2, 3))
        assert torch.allclose(total, expected, atol=1e-5)
        mean = one.gradients.clamp_min(0) * one.activations
        cells = one.activations[0, 0].numel()
        assert torch.allclose(one.layer_cam, mean.sum(1) * cells)


def test_frozen_network_keeps_no_graph_and_no_gradient(generator: torch.Generator) -> None:
    network = ShallowCNN(3, (4, 5), (1, 2)).eval().requires_grad_(False)
    with torch.no_grad():
        logits, _, found = contributions(
            network, torch.rand(2, 3, 8, 8, generator=generator), ["stage1"]
        )
    assert not logits.requires_grad
    assert not found["stage1"].activations.requires_grad
    strongest = found["stage1"].strongest(1, 2)
    alphas = found["stage1"].gradients[1].mean((1, 2)).abs()
    assert sorted(alphas[strongest].tolist()) == sorted(alphas.tolist())[-2:]


def test_layer_that_the_logits_don_t_depend_on_is_a_users_mistake() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.aside = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)

        def forward(self, images):
            self.aside(images)
            return self.used(images).mean((2, 3))

    with pytest.raises(UserError, match="don't depend on layer 'aside'"):
        contributions(Aside().eval(), torch.rand(1, 3, 8, 8), ["aside"])
