"""A learned metric: differentiable, blind to scale, and the planes it reads are what they say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from camdistill.errors import UserError
from camdistill.explain.gradcam import explain_images
from camdistill.measure.learned import (
    PLANES,
    LearnedMetric,
    holds_metric,
    image_context,
    load_metric,
)
from camdistill.networks.students import ShallowCNN
from camdistill.networks.weights import read_weights, save_safetensors


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return ShallowCNN(4, (5, 6), (1, 2)).eval()


@pytest.fixture
def images(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=generator)


@pytest.fixture
def metric() -> LearnedMetric:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return LearnedMetric(members=3, units=5)


CLASSES = torch.tensor([0, 3, 1])


def test_context_is_what_it_says(network: nn.Module, images: torch.Tensor) -> None:
    """Every plane against NumPy, from a layer of 16 x 16."""
    found = image_context(network, images, CLASSES).numpy()
    assert found.shape == (3, len(PLANES), 8, 8)
    seen = explain_images(network, images, ["stage2"], CLASSES)
    activations = seen.activations["stage2"].numpy().astype(np.float64)

    def cells(plane: np.ndarray, side: int) -> np.ndarray:
        return plane.reshape(len(plane), 8, side, 8, side).mean((2, 4))

    def standard(plane: np.ndarray) -> np.ndarray:
        plane = plane - plane.mean((1, 2), keepdims=True)
        return plane / plane.std((1, 2), keepdims=True)

    evidence = cells(seen.maps["stage2"].numpy(), 2)
    evidence = evidence / np.sqrt((evidence**2).mean((1, 2), keepdims=True))
    length = np.sqrt((activations**2).sum(1))
    mean = activations.mean((2, 3), keepdims=True)
    cosine = (activations * mean).sum(1) / (length * np.sqrt((mean**2).sum(1))).clip(1e-8)
    gray = images.numpy().astype(np.float64).mean(1)
    light = cells(gray, 4)
    contrast = np.sqrt(cells(gray**2, 4) - light**2)
    y, x = np.meshgrid(np.linspace(-1, 1, 8), np.linspace(-1, 1, 8))
    radius = np.broadcast_to(np.hypot(x, y), (3, 8, 8))
    others = [cells(length, 2), cells(cosine, 2), light, contrast, radius]
    wanted = np.stack([evidence, *map(standard, others)], 1)
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-4)


def test_context_carries_no_graph(network: nn.Module, images: torch.Tensor) -> None:
    assert not image_context(network, images, CLASSES).requires_grad


def test_scale_size_and_negative_evidence_of_a_map_change_nothing(
    network: nn.Module, images: torch.Tensor, metric: LearnedMetric, generator: torch.Generator
) -> None:
    known = image_context(network, images, CLASSES)
    maps = torch.randn(3, 8, 8, generator=generator)
    score = metric(maps, known)
    torch.testing.assert_close(metric(37 * maps, known), score, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metric(maps.relu(), known), score)
    grown = maps.relu().repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(metric(grown, known), score, rtol=1e-4, atol=1e-5)
    assert float(score.detach().std()) > 0


def test_images_are_scored_one_by_one(
    network: nn.Module, images: torch.Tensor, metric: LearnedMetric, generator: torch.Generator
) -> None:
    known = image_context(network, images, CLASSES)
    maps = torch.rand(3, 8, 8, generator=generator)
    alone = torch.cat([metric(maps[[n]], known[[n]]) for n in range(3)])
    torch.testing.assert_close(metric(maps, known), alone, rtol=1e-4, atol=1e-5)


def test_gradient_by_the_map_is_the_finite_difference(
    network: nn.Module, images: torch.Tensor, metric: LearnedMetric, generator: torch.Generator
) -> None:
    known = image_context(network, images, CLASSES).double()
    exact = metric.double()
    maps = (0.1 + torch.rand(3, 8, 8, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: exact(one, known), maps)


def test_a_map_rises_in_score_when_it_follows_the_gradient(
    network: nn.Module, images: torch.Tensor, metric: LearnedMetric
) -> None:
    """As a loss: through the map, down to the network that made it, with nothing changed in it."""
    known = image_context(network, images, CLASSES)
    before = {name: value.clone() for name, value in metric.state_dict().items()}
    found = explain_images(network, images, ["stage2"], CLASSES, grad="full").maps["stage2"]
    loss = -metric(found, known).mean()
    gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    moved = [one for one in gradients if one is not None and one.count_nonzero()]
    assert moved
    with torch.no_grad():
        size = sum(float(one.square().sum()) for one in gradients if one is not None) ** 0.5
        for weight, one in zip(network.parameters(), gradients, strict=True):
            if one is not None:
                weight -= 1e-3 * one / size
        after = explain_images(network, images, ["stage2"], CLASSES).maps["stage2"]
        assert float(metric(after, known).mean()) > float(-loss.detach())
    assert all(torch.equal(before[name], value) for name, value in metric.state_dict().items())


def test_a_blank_map_has_a_score_and_a_finite_gradient(
    network: nn.Module, images: torch.Tensor, metric: LearnedMetric
) -> None:
    maps = torch.zeros(3, 8, 8, requires_grad=True)
    score = metric(maps, image_context(network, images, CLASSES))
    (gradient,) = torch.autograd.grad(score.sum(), maps)
    assert bool(torch.isfinite(score).all())
    assert bool(torch.isfinite(gradient).all())


def test_saved_it_comes_back_the_same(
    network: nn.Module, images: torch.Tensor, metric: LearnedMetric, tmp_path: Path
) -> None:
    path = tmp_path / "metric.safetensors"
    sha256 = metric.save(path, {"networks": ["one"]})
    found = load_metric(path)
    known = image_context(network, images, CLASSES)
    maps = torch.linspace(0, 1, 192).view(3, 8, 8)
    assert torch.equal(found(maps, known), metric(maps, known))
    assert not any(own.requires_grad for own in found.parameters())
    assert read_weights(path).sha256 == sha256
    assert holds_metric(read_weights(path))


def test_mistakes_are_one_line(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="members 0 and units 3; give 1 or more"):
        LearnedMetric(0, 3)
    save_safetensors(tmp_path / "net.safetensors", network.state_dict())
    with pytest.raises(UserError, match="holds no metric; give a file that"):
        load_metric(tmp_path / "net.safetensors")
    note = {"camdistill_metric": '{"members": 1}'}
    save_safetensors(tmp_path / "bad.safetensors", {"a": torch.ones(1)}, note)
    with pytest.raises(UserError, match=r"can't be read \(KeyError\); write it again"):
        load_metric(tmp_path / "bad.safetensors")
