"""An explainer with parameters: Grad-CAM to begin with, and what each parameter does by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from camdistill.errors import UserError
from camdistill.explain.gradcam import explain_images, grad_cam
from camdistill.explain.learnable import (
    LearnableCAM,
    holds_explainer,
    load_explainer,
    sparsemax,
    unit_contributions,
)
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.students import ShallowCNN
from camdistill.networks.weights import read_weights, save_safetensors

LAYERS = ["stage1", "stage2", "stage3"]


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return ShallowCNN(5, (4, 6, 7), (1, 2, 2)).double().eval()


@pytest.fixture
def images(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)


CLASSES = torch.tensor([1, 4, 0])


def test_units_contributions_sum_to_grad_cam(network: nn.Module, images: torch.Tensor) -> None:
    found = unit_contributions(network, images, LAYERS, CLASSES)
    wanted = grad_cam(network, images, LAYERS, CLASSES)
    for name in LAYERS:
        torch.testing.assert_close(found[name].sum(1), wanted[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("layers", [None, ["stage2"], LAYERS], ids=["last", "one", "three"])
def test_untouched_it_is_grad_cam_of_its_last_layer(
    network: nn.Module, images: torch.Tensor, layers: list[str] | None
) -> None:
    last = layers[-1] if layers else "stage3"
    explainer = LearnableCAM.of(network, images, layers)
    wanted = grad_cam(network, images, [last], CLASSES)[last]
    for graph in (False, True):  # with a graph, layers without weight take part too
        with torch.set_grad_enabled(graph):
            found = explainer(network, images, CLASSES)
        assert found.requires_grad == graph
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-15)


def test_untouched_it_is_grad_cam_of_a_resnet_in_float32(generator: torch.Generator) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        resnet = CifarResNet(depth=20, classes=6).eval()
    images = torch.randn(4, 3, 32, 32, generator=generator)
    classes = torch.tensor([0, 1, 2, 5])
    explainer = LearnableCAM.of(resnet, images, ["layer1", "layer2", "layer3"])
    with torch.inference_mode():
        found = explainer(resnet, images, classes)
    wanted = grad_cam(resnet, images, ["layer3"], classes)["layer3"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_map_is_the_formulas(network: nn.Module, images: torch.Tensor) -> None:
    """Against NumPy, written from the module's three lines, for two layers of other grids."""
    explainer = LearnableCAM({"stage1": 4, "stage3": 7})
    draw = np.random.default_rng(0)
    gates = [draw.uniform(0, 2, 4), draw.uniform(0, 2, 7)]
    mix, power, slope = [0.3, 0.7], [0.6, 2.5], [0.2, 0.9]
    with torch.no_grad():
        explainer.double()
        for own, value in zip(
            [explainer.mix, explainer.power, explainer.slope, *explainer.gates],
            [mix, power, slope, *gates],
            strict=True,
        ):
            own.copy_(torch.tensor(np.asarray(value)))
    found = explainer(network, images, CLASSES).detach().numpy()
    seen = explain_images(network, images, ["stage1", "stage3"], CLASSES, grad="full")
    scores = seen.logits.gather(1, CLASSES[:, None]).sum()
    shape, size = 0.0, 0.0
    for place, name in enumerate(("stage1", "stage3")):
        activations = seen.activations[name]
        (gradient,) = torch.autograd.grad(scores, activations, retain_graph=True)
        alpha = gradient.numpy().mean((2, 3))
        raw = np.einsum("k,bk,bkij->bij", gates[place], alpha, activations.detach().numpy())
        bent = np.where(raw > 0, raw, slope[place] * raw)
        own = np.sqrt((bent**2).mean((1, 2), keepdims=True))
        unit = bent / own
        unit = np.sign(unit) * np.abs(unit) * (np.abs(unit) + 1e-3) ** (power[place] - 1)
        unit = unit / np.sqrt((unit**2).mean((1, 2), keepdims=True))
        if name == "stage1":  # 16 x 16 to 4 x 4: means of 4 x 4 cells
            unit = unit.reshape(3, 4, 4, 4, 4).mean((2, 4))
        shape, size = shape + mix[place] * unit, size + mix[place] * own
    np.testing.assert_allclose(found, shape * size, rtol=1e-9)


def test_gradients_by_all_parameters_are_finite_differences(
    network: nn.Module, images: torch.Tensor
) -> None:
    explainer = LearnableCAM({"stage1": 4, "stage3": 7}).double()
    parts = unit_contributions(network, images, ["stage1", "stage3"], CLASSES)
    weight = torch.linspace(-1, 1, 48, dtype=torch.float64).view(3, 4, 4)
    with torch.no_grad():
        explainer.mix.copy_(torch.tensor([0.4, 0.6]))
        explainer.power.copy_(torch.tensor([0.7, 1.8]))
        explainer.slope.copy_(torch.tensor([0.3, 0.8]))
    whole = list(explainer.parameters())
    found = torch.autograd.grad((explainer.maps(parts) * weight).sum(), whole)
    for own, gradient in zip(whole, found, strict=True):
        for place in range(own.numel()):
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    own[place] += step
                    values.append(float((explainer.maps(parts) * weight).sum()))
                    own[place] -= step
            assert float(gradient[place]) == pytest.approx(
                (values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-9
            )


def test_blank_maps_stay_blank_and_have_finite_gradients(
    network: nn.Module, images: torch.Tensor
) -> None:
    explainer = LearnableCAM({"stage1": 4, "stage3": 7}).double()
    with torch.no_grad():
        explainer.power.fill_(0.25)
        explainer.mix.fill_(0.5)
    parts = unit_contributions(network, images, ["stage1", "stage3"], CLASSES)
    parts = {name: torch.zeros_like(part) for name, part in parts.items()}
    maps = explainer.maps(parts)
    assert maps.count_nonzero() == 0
    found = torch.autograd.grad(maps.sum(), list(explainer.parameters()))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_sparsemax_is_the_closest_point_of_the_simplex(scores: list[float]) -> None:
    given_scores = torch.tensor(scores, dtype=torch.float64)
    found = sparsemax(given_scores)
    assert float(found.sum()) == pytest.approx(1)
    assert float(found.min()) >= -1e-6
    # The condition of the closest point: all others lie on the far side of it.
    corners = torch.eye(len(scores), dtype=torch.float64)
    assert float(((corners - found) @ (given_scores - found)).max()) <= 1e-6
    torch.testing.assert_close(sparsemax(found), found, rtol=0, atol=1e-6)


def test_a_layer_without_weight_can_rise(network: nn.Module, images: torch.Tensor) -> None:
    """At the start the whole mix is the last layer's, and each layer has its gradient."""
    explainer = LearnableCAM.of(network, images, LAYERS).double()
    step = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((sparsemax(explainer.mix) * step).sum(), explainer.mix)
    assert gradient.tolist() == [1.0, 0.0, -1.0]
    with torch.no_grad():
        explainer.mix -= torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64)
    explainer.settle()
    assert explainer.mix.tolist() == [0.0, 0.0, 1.0]
    (gradient,) = torch.autograd.grad((sparsemax(explainer.mix) * step).sum(), explainer.mix)
    assert gradient.tolist() == [1.0, 0.0, -1.0]


def test_parameters_settle_in_their_ranges(network: nn.Module, images: torch.Tensor) -> None:
    explainer = LearnableCAM.of(network, images, LAYERS)
    with torch.no_grad():
        explainer.power.copy_(torch.tensor([-1.0, 1.5, 9.0]))
        explainer.slope.copy_(torch.tensor([-1.0, 0.5, 9.0]))
        explainer.gates[0].copy_(torch.tensor([-1.0, 0.0, 1.0, 9.0]))
        explainer.mix.copy_(torch.tensor([3.0, 0.0, 3.0]))
    explainer.settle()
    assert explainer.power.tolist() == [0.25, 1.5, 4.0]
    assert explainer.slope.tolist() == [0.0, 0.5, 1.0]
    assert explainer.gates[0].tolist() == [0.0, 0.0, 1.0, 9.0]
    assert explainer.mix.tolist() == [0.5, 0.0, 0.5]


def test_a_layer_without_weight_is_not_asked_for(network: nn.Module, images: torch.Tensor) -> None:
    """Nothing is paid for it: the network may even lack it."""
    explainer = LearnableCAM({"nowhere": 4, "stage3": 7})
    with torch.no_grad():
        explainer(network, images, CLASSES)
        explainer.mix.fill_(0.5)
        with pytest.raises(UserError, match="no layer 'nowhere'"):
            explainer(network, images, CLASSES)


def test_saved_it_comes_back_the_same(
    network: nn.Module, images: torch.Tensor, tmp_path: Path
) -> None:
    explainer = LearnableCAM.of(network, images, LAYERS)
    with torch.no_grad():
        explainer.mix.copy_(torch.tensor([0.25, 0.0, 0.75]))
        explainer.gates[2].uniform_(0, 2, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "sub" / "one.safetensors"
    sha256 = explainer.save(path, {"rounds": 3})
    found = load_explainer(path)
    weights = read_weights(path)
    assert weights.sha256 == sha256
    assert holds_explainer(weights)
    assert '"rounds": 3' in weights.metadata["camdistill_explainer"]
    assert found.units == explainer.units
    assert not any(own.requires_grad for own in found.parameters())
    assert torch.equal(found(network, images, CLASSES), explainer(network, images, CLASSES))


def test_mistakes_are_one_line(network: nn.Module, images: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give one or more"):
        LearnableCAM({})
    with pytest.raises(UserError, match=r"9 gates for layer 'stage3', where the network has 7"):
        LearnableCAM({"stage3": 9})(network, images, CLASSES)
    save_safetensors(tmp_path / "net.safetensors", network.state_dict())
    with pytest.raises(UserError, match="holds no explainer; give a file that"):
        load_explainer(tmp_path / "net.safetensors")
    note = {"camdistill_explainer": '{"units": {"stage3": 3}}'}
    save_safetensors(tmp_path / "bad.safetensors", {"mix": torch.ones(1)}, note)
    with pytest.raises(UserError, match=r"can't be read \(RuntimeError\); write it again"):
        load_explainer(tmp_path / "bad.safetensors")
