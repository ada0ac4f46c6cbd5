"""Occlusion, RISE, Score-CAM and Ablation-CAM against loops written from the papers, and peers."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from cam_oracles import close, seeded
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from camdistill.errors import UserError
from camdistill.explain.ablation import ablation_cam
from camdistill.explain.gradcam import explain_images
from camdistill.explain.maps import fuse, normalize, relu, upsample
from camdistill.explain.perturbation import occlusion, rise, score_cam
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Preprocessed
from camdistill.perturb.imputers import baseline

CLASSES = [1, 0, 3]
LAYERS = ["stage1", "stage2"]


def small(seed: int = 0) -> nn.Module:
    return seeded(lambda: ShallowCNN(4, (5, 6), (1, 2)), seed).double().eval()


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.rand(3, 3, 12, 8, generator=generator, dtype=torch.float64)


class Linear(nn.Module):
    """S = the sum of weights times pixels."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, images: Tensor) -> Tensor:
        score = (images.sum(1) * self.weights).sum((1, 2))
        return torch.stack([score, -score], 1)


def test_occlusion_by_a_pixel_of_a_linear_network_is_gradient_times_input(images: Tensor) -> None:
    weights = torch.randn(12, 8, generator=torch.Generator().manual_seed(1)).double()
    network = Linear(weights)
    found = occlusion(network, images, 0, patch=1, stride=1)
    close(found, images.sum(1) * weights, 1e-12)
    close(occlusion(network, images, 1, patch=1, stride=1), -found, 1e-12)


@pytest.mark.parametrize(("patch", "stride"), [(4, 2), (3, 2), (5, 3), (8, 8), (1, 1)])
def test_occlusion_is_the_mean_drop_over_the_squares_that_cover(
    images: Tensor, patch: int, stride: int
) -> None:
    network, shown = small(), baseline(images, "blur")
    total, count = torch.zeros(3, 12, 8).double(), torch.zeros(12, 8)
    scores = network(images).detach()
    places = [sorted({*range(0, side - patch + 1, stride), side - patch}) for side in (12, 8)]
    for top in places[0]:
        for left in places[1]:
            square = (slice(top, top + patch), slice(left, left + patch))
            changed = images.clone()
            changed[:, :, *square] = shown[:, :, *square]
            answer = network(changed).detach()
            for image, number in enumerate(CLASSES):
                total[image][square] += scores[image, number] - answer[image, number]
            count[square] += 1
    found = occlusion(network, images, CLASSES, patch=patch, stride=stride, fill="blur")
    close(found, total / count.clamp(min=1), 1e-11)


def test_captum_has_the_same_occlusion_where_squares_fit(images: Tensor) -> None:
    attr = pytest.importorskip("captum.attr")
    network = small()
    theirs = attr.Occlusion(network).attribute(
        images, (3, 4, 4), (3, 2, 2), target=CLASSES, perturbations_per_eval=5
    )
    # Each channel has the drop of all three.
    close(occlusion(network, images, CLASSES, patch=4, stride=2), theirs[:, 0], 1e-6)


def test_zero_is_the_mean_color_of_a_network_that_normalizes(images: Tensor) -> None:
    network = small()
    mean = [0.4, 0.5, 0.6]
    wrapped = Preprocessed(network, mean, [0.25, 0.25, 0.5]).double().eval()
    inner = (images - wrapped.mean) / wrapped.std
    for method in (occlusion, rise):
        close(method(wrapped, images, 1), method(network, inner, 1), 1e-6)


def masks_by_numpy(count: int, cells: int, keep: float, size: tuple[int, int]) -> np.ndarray:
    """The recipe of Petsiuk et al., section 3.2, pixel by pixel; only the draws are shared."""
    generator = torch.Generator().manual_seed(4)
    cell = [-(-side // cells) for side in size]
    grids = (torch.rand(count, 1, cells, cells, generator=generator) < keep).double()[:, 0].numpy()
    places = [torch.randint(side, (count,), generator=generator).numpy() for side in cell]
    found = np.empty((count, *size))
    for number in range(count):
        for row in range(size[0]):
            for column in range(size[1]):
                value = grids[number]
                for shift, pixel, side in (
                    (places[0][number], row, cell[0]),
                    (places[1][number], column, cell[1]),
                ):
                    place = (shift + pixel + 0.5) * cells / ((cells + 1) * side) - 0.5
                    place = min(max(place, 0), cells - 1)
                    low = min(int(place), cells - 1)
                    high, share = min(low + 1, cells - 1), place - low
                    value = (1 - share) * value[low] + share * value[high]
                found[number, row, column] = value
    return found


def test_rise_is_the_papers_sum(images: Tensor) -> None:
    network = small()
    masks = torch.from_numpy(masks_by_numpy(30, 3, 0.4, (12, 8)))
    total = torch.zeros(3, 12, 8).double()
    with torch.no_grad():
        for mask in masks:
            likely = network(images * mask).softmax(1)
            total += likely[torch.arange(3), CLASSES][:, None, None] * mask
    found = rise(network, images, CLASSES, masks=30, cells=3, keep=0.4, seed=4)
    close(found, total / (30 * 0.4), 1e-6)  # masks are in float32
    assert (found - rise(network, images, CLASSES, masks=30, cells=3, keep=0.4)).abs().max() > 0


def test_rise_finds_what_a_score_reads() -> None:
    """S reads one corner; the expected map there exceeds the rest by its covariance."""
    weights = torch.zeros(16, 16).double()
    weights[:4, :4] = 1
    image = torch.ones(1, 1, 16, 16).double()
    found = rise(Linear(weights), image, 0, masks=2000, cells=4, score="logit")[0]
    assert found[:4, :4].min() > 1.2 * found[8:, 8:].max()


def test_score_cam_is_algorithm_one(images: Tensor) -> None:
    network = small()
    found = score_cam(network, images, LAYERS, CLASSES)
    likely = score_cam(network, images, LAYERS, CLASSES, score="probability")
    activations = explain_images(network, images, LAYERS, maps=False).activations
    with torch.no_grad():
        for layer in LAYERS:
            for image, number in enumerate(CLASSES):
                units = activations[layer][image]
                grown = F.interpolate(units[None], (12, 8), mode="bilinear", align_corners=False)[0]
                logits = []
                for unit in grown:
                    span = unit.max() - unit.min()
                    if span == 0:  # it shows nothing, and gets no weight
                        logits.append((torch.full((4,), -torch.inf).double(), torch.zeros(4)))
                        continue
                    seen = images[image] * ((unit - unit.min()) / span)
                    black = network(torch.zeros_like(images[:1]))[0]
                    logits.append((network(seen[None])[0], black))
                rises = torch.stack([seen[number] - black[number] for seen, black in logits])
                true = (rises.softmax(0)[:, None, None] * units).sum(0)
                close(found[layer][image], true, 1e-11)
                rises = torch.stack(
                    [
                        seen[number] if seen.isinf().all() else seen.softmax(0)[number]
                        for seen, _ in logits
                    ]
                )
                true = (rises.softmax(0)[:, None, None] * units).sum(0)
                close(likely[layer][image], true, 1e-11)


def test_a_unit_that_is_constant_has_no_say_in_score_cam(images: Tensor) -> None:
    network = small()
    network.stage2.bn.weight.data[2] = 0
    network.stage2.bn.bias.data[2] = 5.0
    found = score_cam(network, images, ["stage2"], 1)["stage2"]
    network.linear.weight.data[:, 2] = 0  # what it adds to the score is the same for all masks
    network.stage2.bn.bias.data[2] = 0.0
    assert (found - score_cam(network, images, ["stage2"], 1)["stage2"]).abs().max() < 1e-10
    network.stage2.bn.weight.data[:] = 0
    assert torch.equal(score_cam(network, images, ["stage2"], 1)["stage2"], torch.zeros(3, 6, 4))


def resnet() -> nn.Module:
    return seeded(lambda: torchvision.models.resnet18(num_classes=10)).double().eval()


@pytest.mark.slow
def test_pytorch_grad_cams_score_cam_is_ours_by_composition(generator: torch.Generator) -> None:
    """At a layer without constant units; those it lets vote with the score of a black image. Its
    upsampling has align_corners=True, which at equal sizes doesn't matter.
    """
    peers = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    images = torch.rand(2, 3, 12, 8, generator=generator, dtype=torch.float64)
    network = small()
    twin = copy.deepcopy(network)
    with peers.ScoreCAM(twin, [twin.stage1]) as extractor:
        theirs = extractor(images, [targets.ClassifierOutputTarget(number) for number in (1, 2)])
    ours = score_cam(network, images, ["stage1"], [1, 2])["stage1"]
    picture = upsample(normalize(relu(ours), epsilon=1e-7), (12, 8))
    fused = normalize(fuse([picture]), epsilon=1e-7)
    assert (fused - torch.from_numpy(theirs).double()).abs().max() < 1e-5


def ablated(network: nn.Module, images: Tensor, layer: str, classes: list[int]) -> Tensor:
    """Desai and Ramaswamy, with a hook of this test's own, one unit and one image at a time."""
    module, found = network.get_submodule(layer), []
    for image, number in zip(images, classes, strict=True):
        kept: list[Tensor] = []
        handle = module.register_forward_hook(lambda _, __, out, k=kept: k.append(out.clone()))
        score = network(image[None])[0, number].detach()
        handle.remove()
        total = torch.zeros_like(kept[0][0, 0])
        for unit in range(kept[0].shape[1]):
            mask = torch.ones_like(kept[0])
            mask[:, unit] = 0
            handle = module.register_forward_hook(lambda _, __, out, m=mask: out * m)
            without = network(image[None])[0, number].detach()
            handle.remove()
            total += (score - without) / score.abs() * kept[0][0, unit]
        found.append(total.detach())
    return torch.stack(found)


@pytest.mark.parametrize("memory", [1, 2**28])
def test_ablation_cam_is_the_papers_at_both_stages(images: Tensor, memory: int) -> None:
    network = small()
    found = ablation_cam(network, images, LAYERS, CLASSES, memory=memory)
    for layer in LAYERS:
        close(found[layer], ablated(network, images, layer, CLASSES), 1e-11)


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param("layer2.0.conv1", marks=pytest.mark.slow),
        "layer2.0.downsample",
        pytest.param("layer2.1.bn2", marks=pytest.mark.slow),
        pytest.param("layer3", marks=pytest.mark.slow),
        "layer3.1.relu#1",
    ],
)
def test_ablation_cam_holds_beside_skips(layer: str, generator: torch.Generator) -> None:
    """What follows reads the skip too, which has one row where the trunk runs once."""
    network = seeded(
        lambda: torchvision.models.ResNet(
            torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=4
        )
    )
    network = network.double().eval()
    for name, module in network.named_modules():  # few units, so that the loop is short
        if hasattr(module, "inplace") and not name.startswith("layer4"):
            module.inplace = True
    images = torch.rand(1, 3, 32, 32, generator=generator, dtype=torch.float64)
    found = ablation_cam(network, images, [layer], 2)[layer][0]
    base = layer.partition("#")[0]
    kept: list[Tensor] = []
    module = network.get_submodule(base)
    handle = module.register_forward_hook(lambda _, __, out: kept.append(out.clone()))
    score = network(images)[0, 2].detach()
    handle.remove()
    units, calls = kept[-1], len(kept)
    weights = torch.zeros(units.shape[1]).double()
    for unit in range(0, units.shape[1], 37):
        seen: list[int] = []

        def off(_: nn.Module, __: object, out: Tensor, unit: int = unit, s: list = seen) -> Tensor:
            s.append(1)
            changed = out.clone()
            changed[:, unit] = 0
            return changed if len(s) == calls else out

        handle = module.register_forward_hook(off)
        weights[unit] = (score - network(images)[0, 2].detach()) / score.abs()
        handle.remove()
    whole = ablation_weights(network, images, layer)
    close(whole[::37], weights[::37], 1e-9)
    close(found, (whole[:, None, None] * units[0].detach()).sum(0), 1e-11)


def ablation_weights(network: nn.Module, images: Tensor, layer: str) -> Tensor:
    from camdistill.explain.ablation import _scores_without_units
    from camdistill.explain.masked_forward import make_scorer

    with torch.no_grad():
        asked = make_scorer(network, images, 2, score="logit", logits=None, memory=2**28)
        units = explain_images(network, images, [layer], maps=False).activations[layer].shape[1]
        scores = _scores_without_units(asked, layer, "auto", units)
    return (asked.scores[0, 0] - scores[0, 0]) / asked.scores[0, 0].abs()


def test_ablation_cam_holds_where_rows_are_joined(generator: torch.Generator) -> None:
    """A concatenation with what came before the layer can't have two numbers of rows."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.stage = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, padding=1)
            self.head = nn.LazyLinear(3)

        def forward(self, images: Tensor) -> Tensor:
            first = self.stem(images).relu()
            both = torch.cat([first, self.stage(first).relu()], 1)
            return self.head(both.square().mean((2, 3)))

    network = Joined()
    images = torch.rand(3, 3, 8, 8, generator=generator)
    network(images)
    network = seeded(lambda: network).double()
    found = ablation_cam(network, images.double(), ["stage", "stem"], [0, 1, 2])
    for layer in ("stage", "stem"):
        close(found[layer], ablated(network, images.double(), layer, [0, 1, 2]), 1e-11)


def test_ablation_cam_switches_a_transformers_unit_off_in_all_tokens(
    generator: torch.Generator,
) -> None:
    network = seeded(
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 12, 24, num_classes=5)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.init.normal_(network.heads.head.weight)
    network = network.double().eval()
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    layer = "encoder.layers.encoder_layer_0"
    found = ablation_cam(network, images, [layer], 3)[layer]
    tokens: list[Tensor] = []
    module = network.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, __, out: tokens.append(out.detach()))
    scores = network(images)[:, 3].detach()
    handle.remove()
    true = torch.zeros(2, 4, 4).double()
    for unit in range(12):
        mask = torch.ones(12).double()
        mask[unit] = 0
        handle = module.register_forward_hook(lambda _, __, out, m=mask: out * m)
        drop = (scores - network(images)[:, 3].detach()) / scores.abs()
        handle.remove()
        true += drop[:, None, None] * tokens[0][:, 1:, unit].reshape(2, 4, 4)
    close(found, true, 1e-10)


def test_ablation_cams_trunk_runs_once(generator: torch.Generator) -> None:
    """Of a ResNet-18 at its last stage, all 512 units: four forwards and a little, not 512."""
    network = resnet().float()
    images = torch.rand(2, 3, 64, 64, generator=generator)
    ablation_cam(network, images, ["layer4"], 1)  # what is learned of a network once
    with FlopCounterMode(display=False) as one:
        network(images)
    with FlopCounterMode(display=False) as all_units:
        ablation_cam(network, images, ["layer4"], 1)
    # Classes, each image alone, activations, one that counts calls, trunks; 512 linear heads.
    assert all_units.get_total_flops() < 4.6 * one.get_total_flops()


@pytest.mark.slow
def test_pytorch_grad_cams_ablation_cam_is_ours_by_composition(
    generator: torch.Generator,
) -> None:
    """Where scores are positive; it divides by a negative score, which turns the map around."""
    peers = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    images = torch.rand(2, 3, 12, 8, generator=generator, dtype=torch.float64)
    network = small()
    network.linear.bias.data += 10
    twin = copy.deepcopy(network)
    with peers.AblationCAM(twin, [twin.stage2], batch_size=3) as extractor:
        theirs = extractor(images, [targets.ClassifierOutputTarget(number) for number in (1, 2)])
    ours = ablation_cam(network, images, ["stage2"], [1, 2])["stage2"]
    picture = upsample(normalize(relu(ours), epsilon=1e-7), (12, 8))
    fused = normalize(fuse([picture]), epsilon=1e-7)
    assert (fused - torch.from_numpy(theirs).double()).abs().max() < 1e-4


def asked(method: str, network: nn.Module, images: Tensor, classes, **more) -> list[Tensor]:
    if method in ("score_cam", "ablation_cam"):
        call = {"score_cam": score_cam, "ablation_cam": ablation_cam}[method]
        return list(call(network, images, LAYERS, classes, **more).values())
    extra = {"masks": 40} if method == "rise" else {}
    call = {"occlusion": occlusion, "rise": rise}[method]
    return [call(network, images, classes, **extra, **more)]


ASKING = ["occlusion", "rise", "score_cam", "ablation_cam"]


@pytest.mark.parametrize("method", ASKING)
def test_neither_chunks_nor_the_batch_nor_other_classes_change_a_map(
    images: Tensor, method: str
) -> None:
    network = small()
    classes = torch.tensor([[1, 0], [0, 2], [3, 3]])
    whole = asked(method, network, images, classes)
    chunked = asked(method, network, images, classes, memory=1)
    single = asked(method, network, images, classes[:, 1])
    top = asked(method, network, images, None)
    own = asked(method, network, images, network(images).argmax(1))
    alone = asked(method, network, images[1:2], classes[1:2])
    for place in range(len(whole)):
        close(chunked[place], whole[place], 1e-9)
        close(single[place], whole[place][:, 1], 1e-9)
        close(top[place], own[place], 1e-9)
        close(alone[place][0], whole[place][1], 1e-9)


@pytest.mark.parametrize("method", ASKING)
def test_a_scores_name_or_callable_means_the_same(images: Tensor, method: str) -> None:
    named = asked(method, small(), images, 2, score="probability")
    called = asked(method, small(), images, None, score=lambda y: y.softmax(1)[:, 2])
    with torch.inference_mode():
        inside = asked(method, small(), images.clone(), None, score=lambda y: y.softmax(1)[:, 2])
    for first, second, third in zip(named, called, inside, strict=True):
        close(second, first, 1e-9)
        close(third.clone(), first, 1e-9)


@pytest.mark.parametrize("method", ASKING)
def test_networks_that_answer_by_chance_are_refused(images: Tensor, method: str) -> None:
    with pytest.raises(UserError, match="is in train mode"):
        asked(method, small().train(), images, 1)


def test_memory_bounds_what_lives(generator: torch.Generator) -> None:
    network = seeded(lambda: ShallowCNN(4, (16, 32, 32), (1, 2, 1))).eval()
    images = torch.rand(1, 3, 32, 32, generator=generator)
    for memory in (2**21, 2**23):
        occlusion(network, images, 1, patch=8, memory=memory)
        with LiveBytes() as live:
            occlusion(network, images, 1, patch=4, stride=1, memory=memory)
        assert memory / 8 < live.most < 1.25 * memory


def test_mistakes_are_told(images: Tensor) -> None:
    network = small()
    with pytest.raises(UserError, match="patch is 9 and stride 4 for images of 12x8"):
        occlusion(network, images, patch=9)
    with pytest.raises(UserError, match="masks is 0, cells 7, keep"):
        rise(network, images, masks=0)
    with pytest.raises(UserError, match="can't find units by a callable layout"):
        ablation_cam(network, images, LAYERS, layout=lambda x: x)
