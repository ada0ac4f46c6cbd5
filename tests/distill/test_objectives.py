"""Objectives against numpy from the papers' equations, and their gradients with respect to the
weights, through the map, against finite differences in float64."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy.optimize import brentq
from torch import Tensor, nn

from camdistill.distill.losses import map_distance
from camdistill.distill.objectives import (
    contrastive_consistency,
    energy_outside,
    insertion_deletion,
    soft_masks,
    unfaithfulness,
)
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.maps import upsample
from camdistill.measure.localization import energy_pointing_game
from camdistill.networks.students import ShallowCNN
from camdistill.perturb.bank import BankPlan, build_bank
from camdistill.perturb.imputers import baseline

REFUSED = (ValueError, TypeCheckError)
SIDE = 8


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pictures(count: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)


class Smooth(nn.Module):
    """No closed form and no kink: alpha depends on the input, so second derivatives count."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Softplus())
        self.deep = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1, stride=2), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.deep(self.body(images)).mean((2, 3)))  # type: ignore[no-any-return]


def network_of(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = Smooth() if kind == "smooth" else ShallowCNN(4, [4, 5], [1, 2])
    network = network.double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    return network


# Soft masks


def masks_by_numpy(values: np.ndarray, share: float, temperature: float) -> np.ndarray:
    """sigmoid((m - t) / (temperature sd)), t found by a root finder."""
    scaled = (values - values.mean()) / values.std() / temperature

    def excess(limit: float) -> float:
        return float((1 / (1 + np.exp(-(scaled - limit)))).mean() - share)

    limit = brentq(excess, scaled.min() - 50, scaled.max() + 50, xtol=1e-13)
    return np.asarray(1 / (1 + np.exp(-(scaled - limit))))


@pytest.mark.parametrize("temperature", [0.05, 0.3, 2.0])
def test_soft_masks_equal_those_of_a_root_finder(temperature: float) -> None:
    maps = drawn(3, 5, 6)
    found = soft_masks(maps, [0.1, 0.5, 0.9], temperature)
    for image in range(3):
        for place, share in enumerate([0.1, 0.5, 0.9]):
            expected = masks_by_numpy(maps[image].numpy(), share, temperature)
            np.testing.assert_allclose(found[image, place], expected, atol=1e-10)


def test_soft_masks_of_a_low_temperature_are_the_largest_values() -> None:
    maps = drawn(2, 6, 6)
    found = soft_masks(maps, [0.25], 1e-3)[:, 0]
    largest = maps.flatten(1).argsort(1, descending=True).argsort(1).view(2, 6, 6) < 9
    torch.testing.assert_close(found, largest.double(), atol=1e-6, rtol=0)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0.02, 0.98),
    st.floats(0.02, 3),
    st.floats(-5, 5),
    st.floats(-6, 6),
)
def test_a_level_shows_its_share_whatever_the_maps_level_and_scale(
    seed: int, share: float, temperature: float, shift: float, power: float
) -> None:
    maps = drawn(2, 4, 5, seed=seed).exp()  # skewed, as evidence is
    found = soft_masks(maps, [share], temperature)
    torch.testing.assert_close(found.mean((2, 3)), torch.full((2, 1), share).double())
    moved = soft_masks(10.0**power * (maps + shift), [share], temperature)
    torch.testing.assert_close(moved, found, atol=1e-6, rtol=0)


def test_a_constant_map_shows_the_share_everywhere_and_has_no_gradient() -> None:
    maps = torch.full((1, 4, 4), 0.3, requires_grad=True)
    found = soft_masks(maps, [0.3])
    torch.testing.assert_close(found, torch.full((1, 1, 4, 4), 0.3))
    (gradient,) = torch.autograd.grad((found * drawn(4, 4).float()).sum(), maps)
    assert gradient.count_nonzero() == 0


def test_gradient_of_soft_masks_counts_how_the_limit_moves() -> None:
    maps = drawn(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: soft_masks(m, [0.2, 0.6], 0.4), (maps,))


def test_shares_and_temperatures_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        soft_masks(drawn(1, 2, 2), [0.5, 1.0])
    with pytest.raises(ValueError, match="above 0"):
        soft_masks(drawn(1, 2, 2), [0.5], 0.0)


# Insertion and deletion


@pytest.mark.parametrize("form", ["log", "probability"])
@pytest.mark.parametrize("weight", [0.0, 1.0, 0.5])
def test_insertion_deletion_equals_numpy_image_by_image(form: str, weight: float) -> None:
    network, images, maps = network_of("smooth"), pictures(), drawn(3, SIDE, SIDE, seed=1)
    shown, classes = baseline(images, "blur"), torch.tensor([0, 3, 1])
    shares = [0.25, 0.75]
    with torch.no_grad():
        found = insertion_deletion(
            network, images, classes, maps, shown,
            shares=shares, temperature=0.3, form=form, deletion=weight,  # type: ignore[arg-type]
        )  # fmt: skip

    def score(image: np.ndarray, target: int) -> float:
        with torch.no_grad():
            logits = network(torch.from_numpy(image)[None])[0].numpy()
        likely = np.exp(logits[target]) / np.exp(logits).sum()
        return float(np.log(likely) if form == "log" else likely)

    for place in range(3):
        image, other = images[place].numpy(), shown[place].numpy()
        target = int(classes[place])
        inserted, removed = [], []
        for share in shares:
            mask = masks_by_numpy(maps[place].numpy(), share, 0.3)
            inserted.append(score(mask * image + (1 - mask) * other, target))
            removed.append(score((1 - mask) * image + mask * other, target))
        expected = -np.mean(inserted) + weight * np.mean(removed)
        if form == "log":
            expected -= weight * score(image, target)
        np.testing.assert_allclose(float(found[place]), expected, rtol=1e-8)


def test_a_map_of_the_evidence_is_better_than_its_opposite() -> None:
    """A network that counts the left half: the map of the left half has the lower loss."""

    def left(images: Tensor) -> Tensor:
        told = 20 * images[:, :, :, : SIDE // 2].mean((1, 2, 3))
        return torch.stack([told, torch.full_like(told, 10.0)], 1)

    images = torch.zeros(1, 3, SIDE, SIDE)
    images[..., : SIDE // 2] = 1
    maps = drawn(1, SIDE, SIDE, dtype=torch.float32) * 0.01
    maps[..., : SIDE // 2] += 1
    classes, shown = torch.zeros(1, dtype=torch.long), torch.zeros_like(images)
    loss, opposite = (
        insertion_deletion(left, images, classes, which, shown) for which in (maps, -maps)
    )
    assert float(loss) < float(opposite)


# The others


def test_unfaithfulness_is_one_minus_numpys_correlation() -> None:
    network, images, maps = network_of("smooth"), pictures(), drawn(3, SIDE, SIDE, seed=2)
    plan = BankPlan(cells=4, subsets={0.25: 12}, occluders=())
    asked = build_bank(network, images, 0.5 * torch.ones_like(images), torch.Generator(), plan=plan)
    found = unfaithfulness(maps, asked)
    probe = asked.subsets[0.25]
    for place in range(3):
        sums = []
        for cells in probe.cells[place].numpy():
            on_pixels = np.kron(cells, np.ones((SIDE // 4, SIDE // 4)))
            sums.append((maps[place].numpy() * on_pixels).sum())
        expected = 1 - np.corrcoef(sums, probe.logit_drops[place].numpy())[0, 1]
        np.testing.assert_allclose(float(found[place]), expected, rtol=1e-9)


def test_contrastive_consistency_equals_numpy_from_the_paper() -> None:
    maps, moved = drawn(4, 3, 3), drawn(4, 3, 3, seed=1)
    found = contrastive_consistency(maps, moved, 0.5)
    rows, columns = (np.maximum(one.numpy(), 0).reshape(4, -1) for one in (maps, moved))
    for i in range(4):
        terms = [
            np.exp(
                rows[i] @ columns[j] / np.linalg.norm(rows[i]) / np.linalg.norm(columns[j]) / 0.5
            )
            for j in range(4)
        ]
        np.testing.assert_allclose(float(found[i]), -np.log(terms[i] / sum(terms)), rtol=1e-10)


def test_consistency_of_a_blank_map_has_no_gradient() -> None:
    maps = -torch.ones(2, 3, 3).double()
    maps.requires_grad_()
    loss = contrastive_consistency(maps, drawn(2, 3, 3)).sum()
    (gradient,) = torch.autograd.grad(loss, maps)
    assert gradient.count_nonzero() == 0
    with pytest.raises(ValueError, match="above 0"):
        contrastive_consistency(maps, maps, 0.0)


def test_energy_outside_is_one_minus_the_metric_and_zero_without_mask_or_evidence() -> None:
    maps = drawn(4, 5, 5)
    masks = drawn(4, 5, 5, seed=1) > 0.5
    masks[2] = False
    maps[3] = -maps[3].abs()
    found = energy_outside(maps, masks)
    torch.testing.assert_close(found[:2], 1 - energy_pointing_game(maps, masks)[:2].double())
    assert found[2:].tolist() == [0, 0]
    expected = np.maximum(maps[0].numpy(), 0)
    share = (expected * ~masks[0].numpy()).sum() / expected.sum()
    np.testing.assert_allclose(float(found[0]), share, rtol=1e-12)


# Gradients with respect to the weights, through the map


Objective = Callable[[nn.Module, nn.Module], Tensor]
"""Of the network, and of a copy of it whose weights stay."""


def _maps(network: nn.Module, images: Tensor) -> Tensor:
    layer = "deep" if isinstance(network, Smooth) else "stage2"
    classes = torch.tensor([0, 1, 2])
    (maps,) = grad_cam(network, images, [layer], classes, grad="full").values()
    return upsample(maps, (SIDE, SIDE))


def _insertion(form: str, own: bool) -> Objective:
    def loss(network: nn.Module, critic: nn.Module) -> Tensor:
        images = pictures()
        return insertion_deletion(
            network if own else critic, images, torch.tensor([0, 1, 2]), _maps(network, images),
            baseline(images, "blur"), shares=[0.3, 0.6], temperature=0.4,
            form=form,  # type: ignore[arg-type]
        )  # fmt: skip

    return loss


def _unfaithful(network: nn.Module, critic: nn.Module) -> Tensor:
    images = pictures()
    plan = BankPlan(cells=4, subsets={0.25: 12}, occluders=())
    asked = build_bank(critic, images, 0.5 * torch.ones_like(images), torch.Generator(), plan=plan)
    return unfaithfulness(_maps(network, images), asked)


def _consistent(network: nn.Module, critic: nn.Module) -> Tensor:
    images = pictures()
    return contrastive_consistency(_maps(network, images.flip(-1)), _maps(network, images).flip(-1))


def _energetic(network: nn.Module, critic: nn.Module) -> Tensor:
    return energy_outside(_maps(network, pictures()), drawn(3, SIDE, SIDE, seed=9) > 0.5)


def _faithful_to_teacher(network: nn.Module, critic: nn.Module) -> Tensor:
    return map_distance(_maps(network, pictures()), drawn(3, 6, 6, seed=9))


OBJECTIVES: dict[str, Objective] = {
    "insertion_deletion, log": _insertion("log", True),
    "insertion_deletion, probability": _insertion("probability", True),
    "insertion_deletion, constant answers": _insertion("log", False),
    "faithfulness": _unfaithful,
    "consistency": _consistent,
    "energy": _energetic,
    "fidelity": _faithful_to_teacher,
}


@pytest.mark.parametrize("kind", ["smooth", "closed form"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_through_the_map_equals_finite_differences_in_the_weights(
    name: str, kind: str
) -> None:
    objective, network = OBJECTIVES[name], network_of(kind)
    critic = copy.deepcopy(network)
    weights = list(network.parameters())
    loss = objective(network, critic).sum()
    found = torch.autograd.grad(loss, weights, materialize_grads=True, allow_unused=True)
    assert any(gradient.abs().max() > 1e-6 for gradient in found)
    step = 1e-6
    for seed in range(4):
        direction = [drawn(*one.shape, seed=seed + 10) for one in weights]

        def moved(by: float, direction: list[Tensor] = direction) -> float:
            with torch.no_grad():
                for weight, towards in zip(weights, direction, strict=True):
                    weight += by * towards
            return float(objective(network, critic).detach().sum())

        slope = (moved(step) - moved(-2 * step)) / (2 * step)
        moved(step)
        expected = sum(float((g * d).sum()) for g, d in zip(found, direction, strict=True))
        assert slope == pytest.approx(expected, rel=2e-5, abs=1e-7)


def test_detached_maps_leave_the_weights_of_a_constant_critic_without_gradient() -> None:
    network = network_of("smooth")
    critic = copy.deepcopy(network).requires_grad_(False)
    images = pictures()
    (maps,) = grad_cam(network, images, ["deep"], 0, grad="full").values()

    loss = insertion_deletion(
        critic, images, torch.zeros(3, dtype=torch.long),
        upsample(maps.detach(), (SIDE, SIDE)), baseline(images, "blur"),
    )  # fmt: skip
    assert not loss.requires_grad


def test_half_precision_maps_are_measured_in_float32() -> None:
    maps = drawn(2, 6, 6, dtype=torch.float32)
    coarse = maps.to(torch.bfloat16)
    torch.testing.assert_close(soft_masks(coarse, [0.5]), soft_masks(coarse.float(), [0.5]))
    masks = maps > 0.2
    assert energy_outside(coarse, masks).dtype == torch.float32
    assert contrastive_consistency(coarse, coarse).dtype == torch.float32
