"""The formulas of the family, against plain autograd, numpy from the papers, peers and laws."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from cam_oracles import close, out_of_place, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from camdistill.errors import UserError
from camdistill.explain import variants
from camdistill.explain.gradcam import grad_cam
from camdistill.networks.students import ShallowCNN

STAGES = ["layer1", "layer2", "layer3", "layer4"]
BY_GRADIENT = ["hires_cam", "grad_cam_plus_plus", "x_grad_cam", "layer_cam"]
few = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 10_000)


def resnet() -> nn.Module:
    return seeded(lambda: torchvision.models.resnet18(num_classes=10)).double().eval()


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 3, 64, 48, generator=generator, dtype=torch.float64)


def activations_and_gradients(
    network: nn.Module, images: Tensor, layer: str, classes: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Plain autograd with a hook of this test's own, image by image."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()

    found = []
    handle = network.get_submodule(layer).register_forward_hook(keep)
    for image, number in zip(images, classes.tolist(), strict=True):
        kept.clear()
        score = network(image[None])[0, number]
        (gradient,) = torch.autograd.grad(score, kept[-1])
        found.append((kept[-1][0].detach().numpy(), gradient[0].numpy()))
    handle.remove()
    first, second = zip(*found, strict=True)
    return np.stack(first), np.stack(second)


def paper_plus_plus(a: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Eq. 19 of Grad-CAM++ as it is written, with its powers."""
    below = 2 * g**2 + a.sum((2, 3), keepdims=True) * g**3
    alpha = np.divide(g**2, below, out=np.zeros_like(g), where=below != 0)
    weights = (alpha * np.maximum(g, 0)).sum((2, 3), keepdims=True)
    return (weights * a).sum(1)


def paper_xgrad(a: np.ndarray, g: np.ndarray) -> np.ndarray:
    total = a.sum((2, 3))
    weights = np.divide((g * a).sum((2, 3)), total, out=np.zeros_like(total), where=total != 0)
    return (weights[..., None, None] * a).sum(1)


PAPERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "hires_cam": lambda a, g: (g * a).sum(1),
    "grad_cam_plus_plus": paper_plus_plus,
    "x_grad_cam": paper_xgrad,
    "layer_cam": lambda a, g: (np.maximum(g, 0) * a).sum(1),
}


@pytest.mark.parametrize("method", BY_GRADIENT)
def test_formulas_equal_numpy_at_every_stage(images: Tensor, method: str) -> None:
    network, classes = resnet(), torch.tensor([3, 0, 7])
    found = getattr(variants, method)(network, images, STAGES, classes)
    twin = out_of_place(network)
    assert list(found) == STAGES
    for layer in STAGES:
        a, g = activations_and_gradients(twin, images, layer, classes)
        close(found[layer], torch.from_numpy(PAPERS[method](a, g)), 1e-11)


@pytest.mark.parametrize("method", BY_GRADIENT)
def test_formulas_hold_before_in_place_relus(images: Tensor, method: str) -> None:
    """A and G are both those before the ReLU that overwrites the layer."""
    network, classes = resnet(), torch.tensor([3, 0, 7])
    twin, layers = out_of_place(network), ["bn1", "layer4.1.bn2"]
    for _ in range(2):
        found = getattr(variants, method)(network, images, layers, classes)
        for layer in layers:
            a, g = activations_and_gradients(twin, images, layer, classes)
            close(found[layer], torch.from_numpy(PAPERS[method](a, g)), 1e-9)


class Toy(nn.Module):
    """Two units, the image and its double; the score reads a different weight at each cell."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Conv2d(1, 2, 1, bias=False)
        self.units.weight.data = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
        self.head = nn.Linear(8, 1, bias=False)
        self.head.weight.data = torch.tensor([[1.0, -1.0, 0.0, 2.0, -1.0, 0.0, 1.0, 0.0]])

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.units(images).flatten(1))


IMAGE = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
# Units A = (1 2 3 4) and (2 4 6 8), gradients G = (1 -1 0 2) and (-1 0 1 0).


def test_maps_equal_hand_numbers() -> None:
    network = Toy()

    def maps(method: str) -> Tensor:
        return getattr(variants, method)(network, IMAGE, ["units"], 0)["units"].flatten()

    expected = [1 - 2.0, -2.0, 6.0, 8.0]
    torch.testing.assert_close(maps("hires_cam"), torch.tensor(expected))
    torch.testing.assert_close(maps("layer_cam"), torch.tensor([1.0, 0.0, 6.0, 8.0]))
    # sum A = 10 and 20; sum G A = 1 - 2 + 8 = 7 and -2 + 6 = 4; w = 0.7 and 0.2
    torch.testing.assert_close(maps("x_grad_cam"), 1.1 * IMAGE.flatten())
    # w = 1 / 12 + 2 / 22 and 1 / 22; the second unit is the image's double
    weight = 1 / 12 + 2 / 22 + 2 / 22
    torch.testing.assert_close(maps("grad_cam_plus_plus"), weight * IMAGE.flatten())
    # A is (1 2 3 4) times (1, 2): the singular vector is (1, 2) / sqrt 5
    torch.testing.assert_close(maps("eigen_cam"), 5**0.5 * IMAGE.flatten())


@few
@given(seeds)
def test_all_agree_where_the_head_is_a_mean_and_linear(seed: int) -> None:
    """There G is w / Z at every cell, so HiResCAM and CAM / Z are Grad-CAM, and XGrad-CAM too."""
    network = seeded(lambda: ShallowCNN(4, (5, 6), (1, 2)), seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 3, 10, 8, generator=generator, dtype=torch.float64)
    own = grad_cam(network, images, ["stage2"])["stage2"]
    close(variants.hires_cam(network, images, ["stage2"])["stage2"], own, 1e-11)
    close(variants.cam(network, images, ["stage2"])["stage2"] / 20, own, 1e-11)
    close(variants.x_grad_cam(network, images, ["stage2"])["stage2"], own, 1e-9)


@few
@given(seeds)
def test_xgrad_and_hires_cams_sum_to_all_of_the_score_but_its_biases(seed: int) -> None:
    """Behind the layer are ReLUs and convolutions without biases: S = sum G A (Euler)."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 5, 3),
            nn.ReLU(),
            nn.Conv2d(5, 6, 3, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.LazyLinear(4, bias=False),
        )

    network = build()
    network(torch.zeros(1, 3, 9, 8))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    network = network.double()
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 3, 9, 8, generator=generator, dtype=torch.float64)
    scores = network(images)[:, 2].detach()
    for method in (variants.hires_cam, variants.x_grad_cam):
        maps = method(network, images, ["1"], 2)["1"]
        assert (maps.sum((1, 2)) - scores).abs().max() < 1e-10


def test_xgrad_cams_unit_of_sum_zero_counts_nothing() -> None:
    network = Toy()
    network.units.weight.data[1] = 0
    image = torch.tensor([[[[1.0, -2.0], [-3.0, 4.0]]]])
    found = variants.x_grad_cam(network, image, ["units"], 0)["units"]
    assert torch.equal(found, torch.zeros(1, 2, 2))
    assert torch.isfinite(variants.grad_cam_plus_plus(network, image, ["units"], 0)["units"]).all()


def test_plus_plus_keeps_small_gradients() -> None:
    """pytorch-grad-cam adds 1e-6 to a denominator of G^2: gradients below 1e-3 lose their weight,
    so scaling the score changes its picture. w = sum relu(G) / 2 for A that sums to 0.
    """
    network = Toy()
    image = torch.tensor([[[[1.0, -1.0], [2.0, -2.0]]]])
    large = variants.grad_cam_plus_plus(network, image, ["units"], 0)["units"]
    network.head.weight.data *= 1e-5
    small = variants.grad_cam_plus_plus(network, image, ["units"], 0)["units"]
    torch.testing.assert_close(small * 1e5, large)
    # relu(G) sums to 3 and 1: w = 1.5 and 0.5, and the second unit is the image's double
    torch.testing.assert_close(large, 2.5 * image[0])


@pytest.mark.parametrize("layer", ["layer1", "layer4"])  # more cells than units, and fewer
def test_eigen_cam_is_the_first_singular_projection(images: Tensor, layer: str) -> None:
    network = resnet()
    found = variants.eigen_cam(network, images, [layer])[layer]
    a, _ = activations_and_gradients(network, images, layer, torch.zeros(3).long())
    for one, own in zip(a, found, strict=True):
        rows = one.reshape(len(one), -1).T  # cells, units
        _, _, vectors = np.linalg.svd(rows, full_matrices=False)
        true = rows @ vectors[0]
        true = torch.from_numpy(true * np.sign(true.sum())).view(own.shape)
        close(own, true, 1e-9)
        assert (own > -1e-12).all()  # the layer is rectified
    twice = variants.eigen_cam(network, images, [layer], torch.tensor([[1, 2]] * 3))[layer]
    assert twice.shape == (3, 2, *found.shape[1:])
    assert torch.equal(twice[:, 1], found)
    blank = variants.eigen_cam(nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten()),
                               torch.zeros(1, 1, 2, 2), ["0"])  # fmt: skip
    assert torch.equal(blank["0"], torch.zeros(1, 2, 2))


def test_cam_is_the_heads_weights_and_refuses_other_layers(images: Tensor) -> None:
    network = resnet()
    found = variants.cam(network, images, ["layer4"], torch.tensor([[1, 4]] * 3))["layer4"]
    a, _ = activations_and_gradients(network, images, "layer4", torch.zeros(3).long())
    weights = network.fc.weight.detach().numpy()[[1, 4]]
    close(found, torch.from_numpy(np.einsum("ck,bkhw->bchw", weights, a)))
    with pytest.raises(UserError, match="no weights for layer 'layer3' of ResNet"):
        variants.cam(network, images, ["layer4", "layer3"])


@pytest.mark.parametrize("method", [*BY_GRADIENT, "eigen_cam"])
def test_several_classes_an_image_equal_one_after_the_other(images: Tensor, method: str) -> None:
    network, classes = resnet(), torch.tensor([[3, 0], [1, 9], [2, 2]])
    call = getattr(variants, method)
    found = call(network, images, ["layer2", "layer4"], classes)
    for place in range(2):
        single = call(network, images, ["layer2", "layer4"], classes[:, place])
        for layer, maps in single.items():
            close(found[layer][:, place], maps, 1e-12)


@pytest.mark.parametrize("method", BY_GRADIENT)
def test_scores_may_be_probabilities_or_callables(images: Tensor, method: str) -> None:
    network, call = resnet(), getattr(variants, method)
    likely = call(network, images, ["layer3"], 2, score="probability")["layer3"]
    own = call(network, images, ["layer3"], score=lambda y: y.softmax(1)[:, 2])["layer3"]
    close(own, likely, 1e-12)
    assert (likely - call(network, images, ["layer3"], 2)["layer3"]).abs().max() > 0


class SwitchesOff(nn.Module):
    """A network whose trunk runs without a graph, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.stage = nn.Conv2d(4, 5, 3)
        self.head = nn.LazyLinear(3)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.stem(images).relu()
        return self.head(self.stage(hidden).relu().flatten(1))


def test_a_trunk_without_graph_is_explained_where_the_score_depends_on_it(
    generator: torch.Generator,
) -> None:
    network, images = SwitchesOff(), torch.randn(2, 3, 8, 8, generator=generator)
    network(images)
    network = seeded(lambda: network).double()
    found = variants.hires_cam(network, images.double(), ["stage"], 1)["stage"]
    a, g = activations_and_gradients(network, images.double(), "stage", torch.tensor([1, 1]))
    close(found, torch.from_numpy((a * g).sum(1)))
    with pytest.raises(UserError, match="no gradient at every one of the layers"):
        variants.hires_cam(network, images.double(), ["stem"], 1)


def test_transformers_cells_are_explained(generator: torch.Generator) -> None:
    network = seeded(
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 12, 24, num_classes=5)
    ).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.init.normal_(network.heads.head.weight)
    network = network.eval()
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    layer = "encoder.layers.encoder_layer_1.ln_1"
    found = variants.hires_cam(network, images, [layer], 3)[layer]
    a, g = activations_and_gradients(network, images, layer, torch.tensor([3, 3]))
    true = (a * g)[:, 1:].sum(2).reshape(2, 4, 4)
    close(found, torch.from_numpy(true), 1e-10)


@pytest.mark.parametrize(
    ("method", "peer"),
    [
        ("hires_cam", "HiResCAM"),
        ("layer_cam", "LayerCAM"),
        ("x_grad_cam", "XGradCAM"),
        ("grad_cam_plus_plus", "GradCAMPlusPlus"),
    ],
)
def test_pytorch_grad_cams_pictures_are_ours_by_composition(
    images: Tensor, method: str, peer: str
) -> None:
    """Grad-CAM++ on a network of large logits, where its 1e-6 beside G^2 doesn't count."""
    from camdistill.explain.maps import fuse, normalize, relu, upsample

    peers = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    network, classes = resnet(), [1, 2, 3]
    if method == "grad_cam_plus_plus":
        network.fc.weight.data *= 1e6
    twin = copy.deepcopy(network)
    with getattr(peers, peer)(twin, [twin.get_submodule(name) for name in STAGES]) as extractor:
        theirs = extractor(images, [targets.ClassifierOutputTarget(number) for number in classes])
    ours = getattr(variants, method)(network, images, STAGES, classes)
    pictures = [upsample(normalize(relu(maps), epsilon=1e-7), (64, 48)) for maps in ours.values()]
    fused = normalize(fuse(pictures), epsilon=1e-7)
    assert (fused - torch.from_numpy(theirs).double()).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("method", "peer"), [("layer_cam", "LayerCAM"), ("x_grad_cam", "XGradCAM")]
)
def test_torchcams_normalized_maps_are_ours_by_composition(
    images: Tensor, method: str, peer: str
) -> None:
    from camdistill.explain.maps import normalize, relu

    peers = pytest.importorskip("torchcam.methods")
    network, classes = resnet(), [1, 2, 3]
    ours = getattr(variants, method)(network, images, STAGES, classes)
    with getattr(peers, peer)(network, STAGES, input_shape=(3, 64, 48)) as extractor:
        theirs = extractor(classes, network(images))
    # Its XGrad-CAM adds 1e-8 to the sums of the units.
    bound = 1e-12 if method == "layer_cam" else 1e-7
    for maps, other in zip(ours.values(), theirs, strict=True):
        close(normalize(relu(maps), epsilon=1e-8), other, bound)


def test_captums_gradient_times_activation_summed_over_units_is_hires_cam(images: Tensor) -> None:
    attr = pytest.importorskip("captum.attr")
    network = resnet()
    ours = variants.hires_cam(network, images, STAGES, [1, 2, 3])
    layers = [network.get_submodule(name) for name in STAGES]
    theirs = attr.LayerGradientXActivation(network, layers).attribute(images, target=[1, 2, 3])
    for maps, other in zip(ours.values(), theirs, strict=True):
        close(maps, other.sum(1).detach(), 1e-12)


def test_torchcams_plus_plus_is_another_formula() -> None:
    """torchcam 0.5.0 divides a copy, so its alpha stays G^2 and its weights are sum relu(G)^3; ours
    is the paper's, by hand as above.
    """
    peers = pytest.importorskip("torchcam.methods")
    network = Toy()
    with peers.GradCAMpp(network, "units", input_shape=(1, 2, 2)) as extractor:
        theirs = extractor(0, network(IMAGE), normalized=False)[0]
    # sum relu(G)^3 = 1 + 8 = 9 and 1
    torch.testing.assert_close(theirs, (9 + 2) * IMAGE[0])
    weight = 1 / 12 + 2 / 22 + 2 / 22
    ours = variants.grad_cam_plus_plus(network, IMAGE, ["units"], 0)["units"]
    torch.testing.assert_close(ours, weight * IMAGE[0])


def test_all_stages_cost_a_forward_and_the_way_back_to_the_first(images: Tensor) -> None:
    """No gradient of a weight, and none before the first stage: 1.7 forwards, frozen or not."""
    for frozen in (False, True):
        network = resnet().requires_grad_(not frozen)
        variants.hires_cam(network, images, STAGES, 1)  # what is learned of a network once
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            network(images)
        with FlopCounterMode(display=False) as whole:
            variants.hires_cam(network, images, STAGES, 1)
        behind = [network.layer2, network.layer3, network.layer4, network.fc]
        kept: list[Tensor] = []
        handle = network.layer1.register_forward_hook(lambda _, __, out, k=kept: k.append(out))
        network(images)
        handle.remove()
        with FlopCounterMode(display=False) as later, torch.no_grad():
            hidden = behind[2](behind[1](behind[0](kept[0])))
            behind[3](hidden.mean((2, 3)))
        # Backward to the inputs of convolutions has the multiplications of their forward.
        assert whole.get_total_flops() == forward.get_total_flops() + later.get_total_flops()
