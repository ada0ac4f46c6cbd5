"""All methods by name: one signature, in every state, leaving nothing behind."""

import gc
import weakref

import pytest
import torch
from cam_oracles import close, seeded, state_of, untouched
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.ablation import ablation_cam
from camdistill.explain.attribution import gradient, integrated_gradients
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.guided import guided_backprop, guided_grad_cam
from camdistill.explain.maps import upsample
from camdistill.explain.methods import AT_PIXELS, INPUT, METHODS, find_method, image_explainer
from camdistill.explain.perturbation import occlusion, score_cam
from camdistill.explain.variants import cam, eigen_cam, hires_cam
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.students import ShallowCNN

LAYERS = ["stage1", "stage2"]
MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]
CLASSES = torch.tensor([1, 0, 3])
# Thousands of masks would say no more here.
QUICK = [method for method in METHODS if method != "rise"]


def small(seed: int = 0) -> nn.Module:
    return seeded(lambda: ShallowCNN(4, (5, 6), (1, 2)), seed).eval()


def layers_of(method: str) -> list[str]:
    return ["stage2"] if method == "cam" else LAYERS


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.rand(3, 3, 10, 8, generator=generator)


def test_every_method_gives_maps_by_layer(images: Tensor) -> None:
    network, table = small(), torch.tensor([[1, 0], [0, 2], [3, 1]])
    for method in METHODS:
        layers = layers_of(method)
        found = find_method(method)(network, images, layers, CLASSES)
        several = find_method(method)(network, images, layers, table)
        names = [INPUT] if method in AT_PIXELS else layers
        assert list(found) == names == list(several), method
        for name in names:
            fine = method in AT_PIXELS or method == "guided_grad_cam"
            size = (10, 8) if fine or name == "stage1" else (5, 4)
            assert found[name].shape == (3, *size), method
            assert several[name].shape == (3, 2, *size), method
            assert found[name].dtype == torch.float32, method
            close(several[name][:, 0], found[name], 2e-5)


def test_without_layers_it_is_the_last_and_without_classes_the_top_one(images: Tensor) -> None:
    network = small()
    top = network(images).argmax(1)
    for method in QUICK:
        found = find_method(method)(network, images)
        true = find_method(method)(network, images, ["stage2"], top)
        for name, maps in true.items():
            close(found[name], maps, 1e-5)


@pytest.mark.parametrize("method", QUICK)
def test_every_state_gives_the_same_map_and_stays_as_it_is(images: Tensor, method: str) -> None:
    reference = find_method(method)(small(), images, layers_of(method), CLASSES)
    for frozen in (False, True):
        network = small().requires_grad_(not frozen)
        for mode in MODES:
            with mode():
                given = images.clone()
                before = state_of(network)
                found = find_method(method)(network, given, layers_of(method), CLASSES)
                untouched(network, before)
                assert torch.equal(given, images)
                for name, maps in found.items():
                    assert not maps.requires_grad
                    close(maps.clone(), reference[name], 1e-5)


@pytest.mark.parametrize("method", QUICK)
def test_networks_made_under_inference_mode_are_explained(images: Tensor, method: str) -> None:
    reference = find_method(method)(small(), images, layers_of(method), CLASSES)
    with torch.inference_mode():
        network = small()
    for name, maps in find_method(method)(network, images, layers_of(method), CLASSES).items():
        close(maps, reference[name], 1e-5)


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_maps_near_the_true_ones(
    images: Tensor, method: str, dtype: torch.dtype
) -> None:
    """Against the same rounded network and images in float32, as far as rounding lets them be."""
    network = small().to(dtype)
    true = find_method(method)(
        network.float(), images.to(dtype).float(), layers_of(method), CLASSES
    )
    network = small().to(dtype)
    found = find_method(method)(network, images.to(dtype), layers_of(method), CLASSES)
    for name, maps in found.items():
        assert maps.dtype == torch.float32
        assert torch.isfinite(maps).all()
        alike = torch.corrcoef(torch.stack([maps.flatten(), true[name].flatten()]))[0, 1]
        # ReLUs that rounding switches change a gradient at pixels by a jump.
        assert alike > 0.9, (method, name, float(alike))


@pytest.mark.parametrize("method", QUICK)
def test_autocast_changes_little_and_sums_stay_float32(images: Tensor, method: str) -> None:
    network = small()
    true = find_method(method)(network, images, layers_of(method), CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        found = find_method(method)(network, images, layers_of(method), CLASSES)
    for name, maps in found.items():
        assert maps.dtype == torch.float32
        alike = torch.corrcoef(torch.stack([maps.flatten(), true[name].flatten()]))[0, 1]
        assert alike > 0.9, (method, name, float(alike))


class Breaks(nn.Module):
    """A network that fails at its n-th forward, after its first stage."""

    def __init__(self, forwards: int) -> None:
        super().__init__()
        self.network, self.left = small(), forwards
        self.stage1, self.stage2 = self.network.stage1, self.network.stage2

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        hidden = self.stage1(images)
        if self.left < 0:
            raise FloatingPointError("a network's own trouble")
        return self.network.linear(self.stage2(hidden).mean((2, 3)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("forwards", [0, 1])
def test_after_an_exception_in_the_network_all_is_as_before(
    images: Tensor, method: str, forwards: int
) -> None:
    network = Breaks(forwards)
    before = state_of(network)
    try:
        find_method(method)(network, images, layers_of(method), CLASSES)
    except FloatingPointError:
        untouched(network, before)
    else:
        assert forwards == 1  # a method of one forward
        untouched(network, before)
        network.left = 0
        with pytest.raises(FloatingPointError):
            find_method(method)(network, images, layers_of(method), CLASSES)
        untouched(network, before)


def test_no_graph_or_activation_lives_on(images: Tensor) -> None:
    network = small()
    alive: list[tuple[str, weakref.ref[Tensor]]] = []
    results = []
    for method in QUICK:
        handle = network.stage1.register_forward_hook(
            lambda _, __, output, method=method: alive.append((method, weakref.ref(output)))
        )
        results.append(find_method(method)(network, images, layers_of(method), CLASSES))
        handle.remove()
    gc.collect()
    assert {method for method, _ in alive} == set(QUICK)
    assert not {method for method, output in alive if output() is not None}


def test_gradients_that_were_there_stay(images: Tensor) -> None:
    network = small()
    network(images).sum().backward()
    before = {name: p.grad.clone() for name, p in network.named_parameters()}
    given = images.clone().requires_grad_()
    for method in QUICK:
        find_method(method)(network, given, layers_of(method), CLASSES)
    assert given.grad is None
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter.grad, before[name])


def test_permuting_the_batch_permutes_the_maps(images: Tensor) -> None:
    network, order = small().double(), [2, 0, 1]
    for method in QUICK:
        straight = find_method(method)(network, images.double(), layers_of(method), CLASSES)
        moved = find_method(method)(
            network, images.double()[order], layers_of(method), CLASSES[order]
        )
        for name, maps in straight.items():
            close(moved[name], maps[order], 1e-8)


def test_mixing_batches_are_refused(images: Tensor) -> None:
    """In train mode batch normalization mixes images; so does a contrastive head."""

    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()
            self.stage2 = self.inner.stage2

        def forward(self, images: Tensor) -> Tensor:
            logits = self.inner(images)
            return logits * logits.mean(0)

    for method in QUICK:
        with pytest.raises(UserError, match="train mode"):
            find_method(method)(small().train(), images, ["stage2"], CLASSES)
        if method in ("eigen_cam", "score_cam", "ablation_cam", "occlusion"):
            continue  # they ask for no gradient
        with pytest.raises(UserError, match=r"mixes the images of a batch|no weights for"):
            find_method(method)(Mixes(), images, ["stage2"], CLASSES)


@pytest.mark.slow
def test_a_residual_network_gives_the_same_one_by_one(generator: torch.Generator) -> None:
    network = seeded(lambda: CifarResNet(20, 10)).double().eval()
    images = torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    for method in QUICK:
        layers = ["layer3"] if method == "cam" else ["layer2.1", "layer3"]
        whole = find_method(method)(network, images, layers, [1, 2])
        for image in range(2):
            alone = find_method(method)(network, images[image : image + 1], layers, image + 1)
            for name, maps in alone.items():
                close(maps[0], whole[name][image], 1e-8)


def test_metrics_may_ask_at_the_images_resolution(images: Tensor) -> None:
    network = small()
    found = image_explainer("grad_cam", "stage2")(network, images, CLASSES)
    close(found, upsample(grad_cam(network, images, ["stage2"], CLASSES)["stage2"], (10, 8)), 0)
    pixels = image_explainer("gradient")(network, images, CLASSES)
    close(pixels, find_method("gradient")(network, images, None, CLASSES)[INPUT], 0)


def test_a_name_that_isnt_there_has_its_nearest() -> None:
    with pytest.raises(UserError, match=r"no method 'gradcam'; nearest: 'grad_cam'"):
        find_method("gradcam")


def test_networks_that_give_more_than_logits_are_explained(images: Tensor) -> None:
    class Tells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()
            self.stage1, self.stage2 = self.inner.stage1, self.inner.stage2

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(images), "images": images}

    def logits(output: dict[str, Tensor]) -> Tensor:
        return output["logits"]

    network, own = Tells(), small()
    for method in (hires_cam, eigen_cam, score_cam, ablation_cam, guided_grad_cam, cam):
        true = method(own, images, ["stage2"], CLASSES)["stage2"]
        close(method(network, images, ["stage2"], CLASSES, logits=logits)["stage2"], true, 1e-5)
    for method in (gradient, integrated_gradients, occlusion, guided_backprop):
        true = method(own, images, CLASSES)
        close(method(network, images, CLASSES, logits=logits), true, 1e-5)
        with pytest.raises(UserError, match="gives a dict, not logits"):
            method(network, images, CLASSES)
