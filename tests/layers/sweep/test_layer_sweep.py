import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from camdistill.errors import UserError
from camdistill.explain.gradcam import grad_cam
from camdistill.layers.profiles import profiles
from camdistill.layers.sweep import layer_sweep as sweep_module
from camdistill.layers.sweep.layer_sweep import LayerSweep, sweep_layers
from camdistill.layers.sweep.statistics.histograms import HistogramCounts
from camdistill.layers.sweep.statistics.linear_probes import MAX_HELD_OUT
from camdistill.layers.sweep.sweep_plan import SweepOptions
from camdistill.layers.sweep.sweep_state import load_sweep_state, save_sweep_state
from camdistill.layers.sweep.sweep_summary import SweepResult
from camdistill.layers.through_depth import spread_layers, through_depth
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.students import ShallowCNN
from camdistill.types import Batch

IMAGES = 24
EVERYTHING = SweepOptions(top=3, probes=3, cam_share=0.5)


class Shared(nn.Module):
    """A residual block whose ReLU works in place and is called twice, as torchvision's."""

    def __init__(self, channels: int, inplace: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = self.relu(self.bn1(self.conv1(given)))
        return self.relu(self.conv2(hidden) + given)


class Net(nn.Module):
    """Two such blocks."""

    def __init__(self, inplace: bool, channels: int = 3, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 3, padding=1)
        self.blocks = nn.Sequential(Shared(4, inplace), Shared(4, inplace))
        self.head = nn.Linear(4, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def net(inplace: bool = True, seed: int = 0, **options: int) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Net(inplace, **options)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0, 0.2)
    return network.eval()


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        student = ShallowCNN(3, (5, 6), (1, 2)).eval()
    return {"teacher": net(), "student": student}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(0))


LABELS = torch.arange(IMAGES) % 3


def swept(
    networks: dict[str, nn.Module],
    images: torch.Tensor,
    parts: list[list[int]],
    options: SweepOptions = EVERYTHING,
) -> LayerSweep:
    state = LayerSweep(networks, images[:4], options=options)
    for part in parts:
        state.update(images[part], torch.tensor(part), LABELS[part])
    return state


def demand_same(one: SweepResult, two: SweepResult, *, cka: bool = True) -> None:
    """Counts bit for bit, sums of floats to float64's rounding."""
    assert one.images == two.images
    for network, layers in one.networks.items():
        for mine, its in zip(layers, two.networks[network], strict=True):
            assert torch.equal(mine.post.counts, its.post.counts)
            assert mine.pre is None or torch.equal(mine.pre.counts, its.pre.counts)
            for name in ("mean", "variance", "largest", "active", "image_active"):
                # float32 sums of one image may differ with the batch it is in.
                torch.testing.assert_close(
                    getattr(mine.units, name), getattr(its.units, name), rtol=1e-5, atol=1e-6
                )
            assert torch.equal(mine.top.images, its.top.images)
            assert torch.equal(mine.top.rows, its.top.rows)
            assert mine.rank.effective == pytest.approx(its.rank.effective, rel=1e-4)
            assert mine.sparsity.population == pytest.approx(its.sparsity.population, rel=1e-5)
            assert mine.probe == its.probe
            assert mine.cams.images == its.cams.images
            assert mine.cams.scale == pytest.approx(its.cams.scale, rel=1e-5)
    for mine, its in zip(one.matches, two.matches, strict=True):
        torch.testing.assert_close(mine.correlation, its.correlation, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        one.cam_similarity.cosine, two.cam_similarity.cosine, rtol=1e-4, atol=1e-5
    )
    if cka:
        torch.testing.assert_close(
            one.similarity.cka, two.similarity.cka, rtol=1e-4, atol=1e-5, equal_nan=True
        )


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(1, IMAGES - 1), max_size=4), st.permutations(range(IMAGES)))
def test_any_split_into_batches_tells_the_same(
    networks: dict[str, nn.Module], images: torch.Tensor, cuts: list[int], order: list[int]
) -> None:
    parts = [part.tolist() for part in np.split(np.array(order), sorted(cuts)) if len(part)]
    whole = swept(networks, images, [list(range(IMAGES))])
    demand_same(swept(networks, images, parts).result(), whole.result(), cka=False)


def test_two_processes_and_an_interrupted_sweep_tell_what_one_does(
    networks: dict[str, nn.Module], images: torch.Tensor, tmp_path: Path
) -> None:
    parts = [list(range(start, start + 6)) for start in range(0, IMAGES, 6)]
    whole = swept(networks, images, parts).result()
    first, second = swept(networks, images, parts[::2]), swept(networks, images, parts[1::2])
    demand_same(second.merge(first).result(), whole)
    file = save_sweep_state(tmp_path / "deep" / "half.safetensors", first.state_dict())
    resumed = LayerSweep(networks, images[:4], options=EVERYTHING).load_state_dict(
        load_sweep_state(file)
    )
    assert resumed.images == 12
    for part in parts[1::2]:
        resumed.update(images[part], torch.tensor(part), LABELS[part])
    demand_same(resumed.result(), whole)


def test_merging_is_associative(networks: dict[str, nn.Module], images: torch.Tensor) -> None:
    def one(start: int) -> LayerSweep:
        return swept(networks, images, [list(range(start, start + 8))])

    left = one(0).merge(one(8)).merge(one(16)).state_dict()
    right = one(0).merge(one(8).merge(one(16))).state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, right[name], rtol=1e-13, atol=1e-13)
        else:
            assert torch.equal(value, right[name]), name


def test_a_state_of_other_layers_or_options_is_refused(
    networks: dict[str, nn.Module], images: torch.Tensor
) -> None:
    state = swept(networks, images, [[0, 1, 2, 3]])
    other = LayerSweep(networks, images, options=SweepOptions(top=4))
    with pytest.raises(UserError, match="other options"):
        other.load_state_dict(state.state_dict())
    layers = LayerSweep(networks, images, layers={"teacher": ["stem"]}, options=EVERYTHING)
    with pytest.raises(UserError, match="other layers"):
        layers.merge(state)


def test_an_error_inside_a_batch_leaves_whole_batches(
    networks: dict[str, nn.Module], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = swept(networks, images, [list(range(12))])
    before = state.state_dict()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_module.MatchSums, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        state.update(images[12:], torch.arange(12, IMAGES), LABELS[12:])
    after = state.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in networks["teacher"].modules()]
    assert not any(hooks)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_relu_in_place_and_called_twice_is_read_right_before_and_after(
    inplace: bool, images: torch.Tensor
) -> None:
    network = net(inplace)
    result = sweep_all(network, images, ["blocks.1.relu"])
    block = network.blocks[1]
    with torch.no_grad():
        given = network.blocks[0](network.stem(images))
        first = block.bn1(block.conv1(given))
        second = block.conv2(first.relu()) + given
    for name, tensor in (("blocks.1.relu#0", first), ("blocks.1.relu#1", second)):
        layer = result.layer("net", name)
        assert layer.pre is not None
        point = layer.pre.point
        assert torch.equal(layer.pre.counts, HistogramCounts.of(tensor).histogram(point).counts)
        assert torch.equal(
            layer.post.counts, HistogramCounts.of(tensor.relu()).histogram(point).counts
        )
        assert layer.pre.negatives > 0
        expected = tensor.relu().double().mean((0, 2, 3))
        torch.testing.assert_close(layer.units.mean, expected, rtol=1e-6, atol=1e-7)
    assert str(result.layer("net", "blocks.1.relu#0").post.point) == "net/blocks.1.relu#0/post"


def sweep_all(
    network: nn.Module, images: torch.Tensor, layers: list[str] | None = None
) -> SweepResult:
    state = LayerSweep({"net": network}, images, layers=layers, options=SweepOptions(top=2))
    for start in range(0, len(images), 10):
        part = images[start : start + 10]
        state.update(part, torch.arange(start, start + len(part)))
    return state.result()


def test_numbers_equal_torchvisions_extractor_where_that_is_right() -> None:
    """Outputs of blocks; it gives `bn1` as the in-place ReLU left it, and so isn't asked there."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = resnet18(weights=None, num_classes=4).eval()
    images = torch.randn(10, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    names = ["layer1.1", "layer3.0"]
    nodes = {f"{name}.relu_1": name for name in names}
    with torch.no_grad():
        stored = create_feature_extractor(network, nodes)(images)
        nodes = ["layer1.0.bn1", "layer1.0.relu"]
        overwritten = create_feature_extractor(network, nodes)(images)["layer1.0.bn1"]
    result = sweep_all(network, images)
    for name in names:
        units, values = result.layer("net", name).units, stored[name].double()
        torch.testing.assert_close(units.mean, values.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
        assert torch.equal(units.largest, values.amax((0, 2, 3)))
        active = (values > 0).double().mean((0, 2, 3))
        torch.testing.assert_close(units.active, active, rtol=1e-12, atol=0)
    assert overwritten.min() == 0
    before = sweep_all(network, images, ["layer1.0.bn1"]).layer("net", "layer1.0.bn1")
    assert before.post.negatives > 0


def test_cams_are_those_of_grad_cam(networks: dict[str, nn.Module], images: torch.Tensor) -> None:
    options = SweepOptions(cam_share=1.0)
    result = swept(networks, images, [list(range(13)), list(range(13, IMAGES))], options).result()
    layers = ["blocks.0.relu#1", "blocks.1.relu#1"]
    maps = grad_cam(networks["teacher"], images, layers)
    classes = networks["teacher"](images).argmax(1)
    theirs = grad_cam(networks["student"], images, ["stage1", "stage2"], classes)
    for name, key in zip(("blocks.0", "blocks.1"), layers, strict=True):
        peaks = maps[key].flatten(1).amax(1).clamp_min(0)
        cams = result.layer("teacher", name).cams
        assert cams.images == IMAGES
        assert cams.zero_share == pytest.approx(float((peaks == 0).double().mean()))
        median = float(peaks.sort().values[int(0.5 * (IMAGES - 1))])
        assert cams.scale == pytest.approx(median, rel=0.125, abs=1e-9)
    one, two = maps[layers[0]].clamp_min(0), theirs["stage1"].clamp_min(0)
    expected = torch.cosine_similarity(one.flatten(1), two.flatten(1)).double().mean()
    assert float(result.cam_similarity.cosine[0, 0]) == pytest.approx(float(expected), rel=1e-5)
    small = torch.nn.functional.avg_pool2d(maps[layers[1]].clamp_min(0)[:, None], 2).flatten(1)
    expected = torch.cosine_similarity(small, theirs["stage2"].clamp_min(0).flatten(1))
    assert float(result.cam_similarity.cosine[1, 1]) == pytest.approx(
        float(expected.double().mean()), rel=1e-5
    )


def test_nan_in_one_batch_is_counted_and_everything_else_is_intact(
    networks: dict[str, nn.Module], images: torch.Tensor
) -> None:
    broken = images.clone()
    broken[5, 0, 2, 2] = torch.nan
    sound = [place for place in range(IMAGES) if place != 5]
    parts = [list(range(12)), list(range(12, IMAGES))]
    found = swept(networks, broken, parts).result()
    clean = swept(networks, images, [[p for p in part if p in sound] for part in parts]).result()
    assert found.images == IMAGES
    assert clean.images == IMAGES - 1
    for network, layers in found.networks.items():
        for layer, expected in zip(layers, clean.networks[network], strict=True):
            assert layer.post.nan > 0
            assert expected.post.nan == 0
            assert layer.units.images == IMAGES - 1
            torch.testing.assert_close(
                layer.units.variance, expected.units.variance, rtol=1e-5, atol=1e-7
            )
            assert torch.equal(layer.top.images, expected.top.images)
            assert layer.rank.effective == pytest.approx(expected.rank.effective, rel=1e-5)
            assert layer.probe == expected.probe
            assert 0 < layer.cams.images <= IMAGES - 1
    torch.testing.assert_close(found.similarity.cka, clean.similarity.cka, rtol=1e-4, atol=1e-5)
    assert found.similarity.images == IMAGES - 1
    assert any("1 of 24 images have values that are not finite" in note for note in found.notes)


def test_the_state_does_not_grow_with_images(networks: dict[str, nn.Module]) -> None:
    options = SweepOptions(top=3)
    sizes = []
    for count in (8, 80):
        images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        state = LayerSweep(networks, images, options=options)
        state.update(images, torch.arange(count))
        sizes.append(state.bytes)
    assert sizes[0] == sizes[1]


def test_the_largest_state_of_resnet_56_and_a_student_is_below_32_mib() -> None:
    networks = {"teacher": CifarResNet(56).eval(), "student": ShallowCNN().eval()}
    options = SweepOptions(probes=10, cam_share=0.05)
    state = LayerSweep(networks, torch.rand(4, 3, 32, 32), options=options)
    channels = sum(layer.shape[0] for layers in state.plan.layers.values() for layer in layers)
    assert channels == 1024 + 544
    held_out = 2 * MAX_HELD_OUT * (4 * channels + 2 * 8 * len(networks))
    assert state.bytes + held_out < 32 * 2**20


def test_networks_are_left_as_they_were(images: torch.Tensor) -> None:
    network = net().train()
    network.blocks[0].eval()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    random = torch.get_rng_state()
    swept({"net": network}, images, [list(range(IMAGES))])
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(weight.grad is None for weight in network.parameters())


class Curves(nn.Module):
    """Non-linearities other than ReLU, one of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.six, self.gelu, self.tanh = nn.ReLU6(inplace=True), nn.GELU(), nn.Tanh()
        self.gate = nn.Sigmoid()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.gelu(3 * self.six(8 * self.conv(images)) - 4)
        return self.gate(4 * self.tanh(hidden - 2)).mean((2, 3))


def test_other_non_linearities_are_read_on_both_sides_with_their_bounds(
    images: torch.Tensor,
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Curves().eval()
    result = sweep_all(network, images)
    with torch.no_grad():
        first = 8 * network.conv(images)
        second = 3 * first.clamp(0, 6) - 4
        third = nn.functional.gelu(second) - 2
        fourth = 4 * third.tanh()
    known = {
        "six": (first, first.clamp(0, 6), 6),
        "gelu": (second, nn.functional.gelu(second), None),
        "tanh": (third, third.tanh(), 1),
        "gate": (fourth, fourth.sigmoid(), 1),
    }
    assert [layer.name for layer in result.networks["net"]] == list(known)
    for name, (before, after, bound) in known.items():
        layer = result.layer("net", name)
        for found, values in ((layer.pre, before), (layer.post, after)):
            assert torch.equal(
                found.counts, HistogramCounts.of(values).histogram(found.point).counts
            )
        assert layer.rectified == (name in ("six", "gate"))
        torch.testing.assert_close(
            layer.units.active, (after > 0).double().mean((0, 2, 3)), rtol=1e-12, atol=0
        )
        if bound is None:
            assert layer.units.saturated is None
        else:
            share = (after.abs() >= 0.99 * bound).double().mean((0, 2, 3))
            torch.testing.assert_close(layer.units.saturated, share, rtol=1e-12, atol=0)
        if name in ("gelu", "tanh"):
            magnitude, square = after.double().abs().sum(), after.double().square().sum()
            n = after.numel()
            hoyer = (n**0.5 - magnitude / square.sqrt()) / (n**0.5 - 1)
            assert layer.sparsity.hoyer == pytest.approx(float(hoyer), rel=1e-5)


def test_half_precision_is_summed_in_float32(images: torch.Tensor) -> None:
    network, wide = net().bfloat16(), net()
    halves = sweep_all(network, images.bfloat16()).layer("net", "blocks.1")
    floats = sweep_all(wide, images).layer("net", "blocks.1")
    torch.testing.assert_close(halves.units.mean, floats.units.mean, rtol=0.05, atol=0.02)
    assert halves.post.total == floats.post.total


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from camdistill.layers.sweep.sweep_plan import SweepOptions
from camdistill.layers.sweep.sweep_state import save_sweep_state
from camdistill.layers.sweep.layer_sweep import LayerSweep
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.students import ShallowCNN

rank, world, file = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
torch.manual_seed(0)
networks = {
    "teacher": CifarResNet(8).eval(),
    "student": ShallowCNN(channels=(6, 8), strides=(1, 2)).eval(),
}
images = torch.randn(128, 3, 16, 16)
state = LayerSweep(networks, images[:16], options=SweepOptions(probes=4, cam_share=0.3))
for start in range(16 * rank, 128, 16 * world):
    ids = torch.arange(start, start + 16)
    state.update(images[ids], ids, ids % 4)
save_sweep_state(file, state.state_dict())
"""


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    """Integers bit for bit, sums of floats to the rounding of their order."""
    files = {(rank, world): tmp_path / f"{rank}{world}" for rank, world in ((0, 1), (0, 2), (1, 2))}
    running = [
        subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(rank), str(world), str(file)])
        for (rank, world), file in files.items()
    ]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    whole, *halves = (load_sweep_state(file) for file in files.values())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = {
            "teacher": CifarResNet(8).eval(),
            "student": ShallowCNN(channels=(6, 8), strides=(1, 2)).eval(),
        }
        images = torch.randn(16, 3, 16, 16)
    options = SweepOptions(probes=4, cam_share=0.3)
    one, two = (
        LayerSweep(networks, images, options=options).load_state_dict(half) for half in halves
    )
    merged = one.merge(two).state_dict()
    assert merged.keys() == whole.keys()
    for name, value in whole.items():
        if value.is_floating_point():
            torch.testing.assert_close(merged[name], value, rtol=1e-12, atol=1e-10)
        else:
            assert torch.equal(merged[name], value), name


def test_one_network_with_one_channel_and_vectors_works() -> None:
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network = net(channels=1)
    state = LayerSweep({"net": network}, images, layers=["blocks.1", "head"], options=EVERYTHING)
    state.update(images, torch.arange(12), torch.arange(12) % 3)
    result = state.result()
    head = result.layer("net", "head")
    assert head.shape == (3, 1, 1)
    assert head.cams is None
    assert result.matches == ()
    assert result.cam_similarity is None
    torch.testing.assert_close(
        head.units.mean, network(images).detach().double().mean(0), rtol=1e-5, atol=1e-6
    )


def test_batches_of_a_loader_are_swept_without_what_only_fills_a_shard(
    networks: dict[str, nn.Module],
) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (10, 3, 8, 8), generator=generator, dtype=torch.uint8)
    counted = torch.arange(10) < 8
    batch = Batch(pixels, torch.zeros(10, dtype=torch.int64), torch.arange(10), counted)
    calls: list[int] = []
    result = sweep_layers(
        networks,
        [batch, batch._replace(ids=torch.arange(10, 20))],
        on_batch=lambda s: calls.append(s.images),
    )
    assert result.images == 16
    assert calls == [8, 16]
    direct = LayerSweep(networks, pixels / 255)
    direct.update(pixels[:8] / 255, torch.arange(8))
    assert (
        result.layer("teacher", "blocks.0").post.total
        == 2 * direct.result().layer("teacher", "blocks.0").post.total
    )


def test_mistakes_are_told(networks: dict[str, nn.Module], images: torch.Tensor) -> None:
    with pytest.raises(UserError, match="no batch"):
        sweep_layers(networks, [])
    with pytest.raises(UserError, match="takes one or two"):
        LayerSweep({}, images)
    with pytest.raises(UserError, match="no layer 'stage9'"):
        LayerSweep(networks, images, layers=["stage9", "blocks.*"])
    with pytest.raises(UserError, match="none of the layers"):
        LayerSweep(networks, images, layers=["stage1"])
    with pytest.raises(UserError, match="2 or more"):
        SweepOptions(probes=1)


def test_a_damaged_state_is_told(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    with pytest.raises(UserError, match="no sweep at"):
        load_sweep_state(file)
    file.write_bytes(b"short")
    with pytest.raises(UserError, match="cut short"):
        load_sweep_state(file)


@pytest.mark.parametrize("broken", ["an image", "weights"])
def test_where_no_map_is_finite_the_sweep_goes_on(
    networks: dict[str, nn.Module], images: torch.Tensor, broken: str
) -> None:
    """One image with NaN, alone among those explained in its batch; or a network of NaN."""
    shown, ill = images.clone(), copy.deepcopy(networks)
    if broken == "an image":
        shown[5] = torch.nan
    else:
        with torch.no_grad():
            ill["student"].stage2.conv.weight.fill_(torch.nan)
    parts = [[5], [place for place in range(IMAGES) if place != 5]]
    result = swept(ill, shown, parts, SweepOptions(cam_share=1.0)).result()
    lost = 1 if broken == "an image" else 0
    cams = {layer.name: layer.cams for layer in result.networks["student"]}
    assert result.layer("teacher", "blocks.1").cams.images == IMAGES - lost
    assert cams["stage2"].images == (IMAGES - 1 if lost else 0)
    assert np.isnan(cams["stage2"].scale) == (not lost)
    assert result.cam_similarity.images in (IMAGES - lost, 0)


def test_where_the_teacher_has_no_top_class_neither_network_is_explained(
    networks: dict[str, nn.Module], images: torch.Tensor
) -> None:
    """Of logits that are NaN `argmax` would make class 0 of them, and a map of the student's."""
    ill = copy.deepcopy(networks)
    with torch.no_grad():
        ill["teacher"].head.weight.fill_(torch.nan)
    result = swept(ill, images, [list(range(IMAGES))], SweepOptions(cam_share=1.0)).result()
    for layers in result.networks.values():
        assert all(layer.cams is None or layer.cams.images == 0 for layer in layers)
        assert all(layer.units.images == IMAGES for layer in layers)
    assert result.cam_similarity.images == 0


def test_network_that_is_never_finite_has_no_profile(
    networks: dict[str, nn.Module], images: torch.Tensor
) -> None:
    """Neither 0 % dead units, nor an empty chart of how alike the two are."""
    ill = copy.deepcopy(networks)
    with torch.no_grad():
        ill["student"].stage1.conv.weight.fill_(torch.nan)
    table = profiles(
        swept(ill, images, [list(range(IMAGES))], SweepOptions(cam_share=1.0)).result()
    )
    assert {name for name, lines in table.items() if "student" in lines} == {"nonfinite"}
    assert {"active", "dead", "cam_scale", "zeros"} <= set(table)
    assert not {"best_cka", "matched"} & set(table)


def test_a_layer_that_is_never_finite_takes_nothing_from_the_others(
    networks: dict[str, nn.Module], images: torch.Tensor
) -> None:
    ill = copy.deepcopy(networks)
    with torch.no_grad():
        ill["student"].stage2.conv.weight.fill_(torch.nan)
    parts = [list(range(12)), list(range(12, IMAGES))]
    options = SweepOptions(probes=3)
    found, sound = (swept(nets, images, parts, options).result() for nets in (ill, networks))
    for name in ("teacher", "student"):
        for mine, its in zip(found.networks[name], sound.networks[name], strict=True):
            if mine.name == "stage2":
                assert np.isnan(mine.probe.accuracy)
                assert mine.probe.images == 0
            else:
                assert mine.probe == its.probe
    whole = found.similarity.layers
    assert whole[-1] == ("student", "stage2")
    torch.testing.assert_close(
        found.similarity.cka[:-1, :-1], sound.similarity.cka[:-1, :-1], rtol=1e-12, atol=1e-12
    )
    assert found.similarity.cka[-1].isnan().all()
    assert {column for _, column in found.similarity.reasons} == {len(whole) - 1}
    assert all("student stage2" in reason for reason in found.similarity.reasons.values())
    assert found.similarity.images == IMAGES
    kept = [match for match in sound.matches if match.student != "stage2"]
    assert len(found.matches) == len(kept) < len(sound.matches)
    for mine, its in zip(found.matches, kept, strict=True):
        torch.testing.assert_close(mine.correlation, its.correlation, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vectors", [("teacher", "student"), ("teacher",), ("student",)])
def test_layers_without_cells_have_no_maps_and_do_no_harm(
    networks: dict[str, nn.Module], images: torch.Tensor, vectors: tuple[str, ...]
) -> None:
    layers = {"teacher": ["blocks.*"], "student": ["stage?"]}
    layers |= {name: [{"teacher": "head", "student": "linear"}[name]] for name in vectors}
    state = LayerSweep(networks, images, layers=layers, options=SweepOptions(cam_share=1.0))
    state.update(images, torch.arange(IMAGES))
    state.merge(LayerSweep(networks, images, layers=layers, options=SweepOptions(cam_share=1.0)))
    result = state.result()
    assert result.cam_similarity is None
    for name, found in result.networks.items():
        assert all((layer.cams is None) == (name in vectors) for layer in found)
        assert any(f"{name}: no Grad-CAM at" in note for note in result.notes) == (name in vectors)
    names = {name: spread_layers(found, 4) for name, found in result.networks.items()}
    assert [not names[name] for name in networks] == [name in vectors for name in networks]
    shown = through_depth(networks, images[:2], ["a", "b"], names)
    assert len(shown) == (0 if len(vectors) == 2 else 2)
    for one in shown:
        assert {name: list(views) for name, views in one.views.items()} == names


def test_layers_with_their_units_last_are_left_out_with_a_note(images: torch.Tensor) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.mix = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Linear(4, 5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            hidden = self.relu(self.conv(images))
            return self.mix(hidden.permute(0, 2, 3, 1)).mean((1, 2))

    result = sweep_all(Mixed().eval(), images, ["*"])
    assert [layer.name for layer in result.networks["net"]] == ["conv", "relu"]
    assert result.notes[0] == "net: left out, as they give their units last ([B, h, w, C]): mix"
