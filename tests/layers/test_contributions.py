import pytest
import torch
from torch import nn

from camdistill.errors import UserError
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.variants import layer_cam
from camdistill.layers.contributions import contributions
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.students import ShallowCNN


def test_both_maps_have_the_scale_of_the_explainers(generator: torch.Generator) -> None:
    """One quantity, one scale: what `analyze` draws is what `grad_cam` and `layer_cam` give."""
    network = CifarResNet(20, classes=4).double().eval().requires_grad_(False)
    images = torch.rand(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    layers = ["layer1", "layer2.0.relu#0", "layer3"]
    _, classes, found = contributions(network, images, layers)
    maps = grad_cam(network, images, layers, classes)
    published = layer_cam(network, images, layers, classes)
    for layer in layers:
        for ours, expected in ((found[layer].grad_cam, maps), (found[layer].layer_cam, published)):
            torch.testing.assert_close(ours, expected[layer].float(), rtol=1e-4, atol=1e-6)


def test_cells_of_a_pooled_layer_sum_to_the_logit_without_its_bias(
    generator: torch.Generator,
) -> None:
    """Which is why the unit is logits per cell."""
    network = ShallowCNN(3, (4, 5), (1, 2)).eval()
    images = torch.rand(2, 3, 8, 8, generator=generator)
    logits, classes, found = contributions(network, images, ["stage2"])
    expected = logits.gather(1, classes[:, None])[:, 0] - network.linear.bias.detach()[classes]
    torch.testing.assert_close(found["stage2"].grad_cam.sum((1, 2)), expected)


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
        assert torch.allclose(one.layer_cam, mean.sum(1))


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
