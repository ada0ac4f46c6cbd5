"""Attributions at the pixels: finite differences, Captum, completeness, seeds, chunks."""

import numpy as np
import pytest
import torch
from cam_oracles import close, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.attribution import (
    gradient,
    gradient_x_input,
    integrated_gradients,
    smooth_grad,
)
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Preprocessed

CLASSES = [1, 0, 3]


def small(seed: int = 0) -> nn.Module:
    return seeded(lambda: ShallowCNN(4, (5, 6), (1, 2)), seed).double().eval()


def smooth(seed: int = 0) -> nn.Module:
    network = small(seed)
    network.stage1.relu, network.stage2.relu = nn.Softplus(), nn.Softplus()
    return network


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.rand(3, 3, 10, 8, generator=generator, dtype=torch.float64)


def test_gradient_is_the_slope_of_the_score(images: Tensor) -> None:
    network = smooth()
    found = gradient(network, images, CLASSES, channels="sum")
    for image, number in enumerate(CLASSES):
        for row, column in ((0, 0), (4, 7), (9, 3)):
            scores = []
            for step in (1e-6, -1e-6):
                moved = images[image : image + 1].clone()
                moved[0, :, row, column] += step
                scores.append(network(moved)[0, number].item())
            slope = (scores[0] - scores[1]) / 2e-6
            assert float(found[image, row, column]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_captum_has_the_same_gradients(images: Tensor) -> None:
    attr = pytest.importorskip("captum.attr")
    network = small()
    inputs = images.clone().requires_grad_()
    theirs = attr.Saliency(network).attribute(inputs, target=CLASSES, abs=False)
    close(gradient(network, images, CLASSES), theirs.abs().amax(1), 1e-12)
    theirs = attr.InputXGradient(network).attribute(inputs, target=CLASSES).detach()
    close(gradient_x_input(network, images, CLASSES), theirs.sum(1), 1e-12)


def test_captum_has_the_same_integrated_gradients(images: Tensor) -> None:
    attr = pytest.importorskip("captum.attr")
    network, start = small(), torch.full_like(images, 0.3)
    theirs = attr.IntegratedGradients(network).attribute(
        images, start, target=CLASSES, n_steps=12, method="gausslegendre"
    )
    ours = integrated_gradients(network, images, CLASSES, baseline=0.3, steps=12)
    close(ours, theirs.sum(1), 1e-6)  # captum 0.9.0 has its weights in float32
    close(integrated_gradients(network, images, CLASSES, baseline=start, steps=12), ours, 1e-12)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 1.0]))
def test_integrated_gradients_are_complete(seed: int, start: float) -> None:
    """A map sums to the score minus the baseline's; a smooth network needs few steps."""
    network = smooth(seed)
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    found = integrated_gradients(network, images, 2, baseline=start, steps=24)
    with torch.no_grad():
        rise = network(images)[:, 2] - network(torch.full_like(images, start))[:, 2]
    assert (found.sum((1, 2)) - rise).abs().max() < 1e-7


def test_gradient_times_input_of_a_network_without_biases_is_the_score() -> None:
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3, bias=False)
    )
    images = torch.rand(2, 3, 6, 6, generator=generator)
    network(images)
    network = seeded(lambda: network).double()
    found = gradient_x_input(network, images.double(), 1)
    assert (found.sum((1, 2)) - network(images.double())[:, 1]).abs().max() < 1e-12


def test_smooth_grad_is_the_mean_gradient_of_noisy_copies(images: Tensor) -> None:
    network = small()
    drawn = torch.randn(6, 3, 10, 8, generator=torch.Generator().manual_seed(5)).double()
    spread = images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True)
    total = torch.zeros_like(images)
    for noise in drawn:
        inputs = (images + 0.2 * spread * noise).requires_grad_()
        score = network(inputs).gather(1, torch.tensor(CLASSES)[:, None]).sum()
        total += torch.autograd.grad(score, inputs)[0] / 6
    found = smooth_grad(network, images, CLASSES, samples=6, noise=0.2, seed=5, channels="sum")
    close(found, total.sum(1), 1e-12)
    found = smooth_grad(network, images, CLASSES, samples=6, noise=0.2, seed=5)
    close(found, total.abs().amax(1), 1e-12)


@pytest.mark.parametrize("method", [smooth_grad, integrated_gradients])
def test_neither_chunks_nor_the_batch_change_a_map(images: Tensor, method) -> None:
    network = small()
    classes = torch.tensor([[1, 0], [0, 2], [3, 3]])
    whole = method(network, images, classes)
    close(method(network, images, classes, memory=1), whole, 1e-11)
    for image in range(3):
        one = slice(image, image + 1)
        close(method(network, images[one], classes[one])[0], whole[image], 1e-11)
        close(method(network, images, classes[:, 1])[image], whole[image, 1], 1e-11)
    own = method(network, images)
    top = network(images).argmax(1)
    close(method(network, images, top), own, 1e-14)


def test_a_scores_name_or_callable_means_the_same(images: Tensor) -> None:
    network = small()
    for method in (gradient, gradient_x_input, smooth_grad, integrated_gradients):
        likely = method(network, images, 2, score="probability")
        close(method(network, images, score=lambda y: y.softmax(1)[:, 2]), likely, 1e-12)


def test_memory_bounds_what_lives(generator: torch.Generator) -> None:
    """The estimate holds for a network of convolutions: what lives stays below what was said."""
    network = seeded(lambda: ShallowCNN(4, (16, 32, 32), (1, 2, 1))).eval()
    images = torch.rand(2, 3, 32, 32, generator=generator)
    for memory in (2**21, 2**23):
        smooth_grad(network, images, 1, samples=2, memory=memory)
        with LiveBytes() as live:
            smooth_grad(network, images, 1, samples=64, memory=memory)
        drawn = 64 * 3 * 32 * 32 * 4
        assert live.most < memory + drawn
        assert live.most - drawn > memory / 8  # nor is it wasted


def test_pixels_are_those_of_a_network_that_normalizes_itself(images: Tensor) -> None:
    network = small()
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.5]
    wrapped = Preprocessed(network, mean, std).double().eval()
    inner = (images - wrapped.mean) / wrapped.std
    scale = 1 / torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)
    inputs = inner.clone().requires_grad_()
    score = network(inputs).gather(1, torch.tensor(CLASSES)[:, None]).sum()
    (slope,) = torch.autograd.grad(score, inputs)
    close(gradient(wrapped, images, CLASSES), (slope * scale).abs().amax(1), 1e-6)


def test_mistakes_are_told(images: Tensor) -> None:
    with pytest.raises(UserError, match="samples is 0: give 1 or more"):
        smooth_grad(small(), images, samples=0)
    with pytest.raises(UserError, match="steps is -1: give 1 or more"):
        integrated_gradients(small(), images, steps=-1)
    detached = nn.Sequential(nn.Flatten(), nn.Linear(240, 4))
    detached.forward = lambda x: detached[1](x.detach().flatten(1))
    with pytest.raises(UserError, match="has no gradient at the pixels"):
        gradient(detached.double(), images)


def test_quadrature_is_exact_for_polynomials() -> None:
    """S = (sum x)^5 has the attributions x_i (sum x)^4, which 3 nodes integrate exactly."""

    class Fifth(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1).sum(1, keepdim=True) ** 5

    image = torch.tensor([[[[1.0, -2.0], [3.0, 0.5]]]], dtype=torch.float64)
    found = integrated_gradients(Fifth(), image, 0, steps=3).numpy()
    np.testing.assert_allclose(found, image[0].numpy() * 2.5**4, rtol=1e-12)
