"""What stands out is true: faults planted at random layers and doses are named, health isn't.

    python tests/layers/test_findings.py 100 110

prints what the thresholds of `layers.findings` were set on; the tests use other seeds.
"""

import copy
import itertools
import random
import sys
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from camdistill.data.datasets import shapes_set
from camdistill.data.shapes import Shapes
from camdistill.layers.findings import Finding, findings
from camdistill.layers.sweep.layer_sweep import LayerSweep
from camdistill.layers.sweep.sweep_summary import SweepResult
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.students import ShallowCNN

IMAGES = 320


@cache
def shapes(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """At 16 pixels, so that 60 networks train in a minute."""
    batch = shapes_set(Shapes(split, count, seed=7)).batch(np.arange(count))
    return (F.avg_pool2d(batch.pixels.float(), 2) / 255 - 0.5) * 4, batch.labels


def trained(network: nn.Module, steps: int, seed: int, rate: float = 0.05) -> nn.Module:
    images, labels = shapes("train", 1024)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    network.train()
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (48,), generator=generator)
        loss = F.cross_entropy(network(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def fresh(seed: int) -> nn.Module:
    """A residual network for odd seeds, a plain one for even ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if seed % 2:
            return CifarResNet(8, 8)
        return ShallowCNN(8, (16, 24, 32, 32), (1, 2, 2, 1))


@cache
def teacher(seed: int) -> nn.Module:
    return trained(fresh(seed), 40, seed)


@cache
def student(seed: int) -> nn.Module:
    """A copy that was trained on, so that it isn't the teacher to the last bit."""
    return trained(copy.deepcopy(teacher(seed)), 8, seed + 5000, 0.01)


def swept(first: nn.Module, second: nn.Module, *, default: bool = False) -> SweepResult:
    """At every ReLU and stage, or where a report looks by default."""
    images, _ = shapes("test", IMAGES)
    layers = {
        name: ["*relu*"] if isinstance(network, CifarResNet) else ["stage?"]
        for name, network in (("teacher", first), ("student", second))
    }
    state = LayerSweep(
        {"teacher": first, "student": second}, images, layers=None if default else layers
    )
    for start in range(0, IMAGES, 64):
        part = images[start : start + 64]
        state.update(part, torch.arange(start, start + len(part)))
    return state.result()


Place = tuple[str, nn.Conv2d, nn.BatchNorm2d, nn.Module]


def places(network: nn.Module) -> list[Place]:
    """Layers whose units are one convolution's: (layer, convolution, norm, what reads them)."""
    if isinstance(network, ShallowCNN):
        stages = [getattr(network, f"stage{n + 1}") for n in range(network.stages)]
        readers = [*(stage.conv for stage in stages[1:]), network.linear]
        return [
            (f"stage{n + 1}", stage.conv, stage.bn, reader)
            for n, (stage, reader) in enumerate(zip(stages, readers, strict=True))
        ]
    blocks = [(f"layer{n}.0", getattr(network, f"layer{n}")[0]) for n in (1, 2, 3)]
    return [(f"{name}.relu#0", block.conv1, block.bn1, block.conv2) for name, block in blocks]


def stem(network: nn.Module) -> Place:
    return "relu", network.conv1, network.bn1, network.layer1[0].conv1


def block_ends(network: nn.Module) -> list[Place]:
    """Blocks, whose units are the sum of a convolution's and the shortcut's."""
    blocks = [(f"layer{n}.0", getattr(network, f"layer{n}")[0]) for n in (1, 2, 3)]
    return [(name, block.conv2, block.bn2, block.conv2) for name, block in blocks]


def chosen_units(place: Place, share: float, draw: random.Random, fewest: int = 1) -> list[int]:
    count = len(place[2].weight)
    return draw.sample(range(count), min(max(round(share * count), fewest), count))


def dead(place: Place, draw: random.Random) -> str:
    for unit in chosen_units(place, draw.uniform(0.01, 0.5), draw):
        place[2].weight[unit] = 0
        place[2].bias[unit] = -draw.uniform(0.01, 3)
    return "dead"


def duplicated(place: Place, draw: random.Random) -> str:
    one, two = chosen_units(place, 0, draw, 2)
    scale = draw.uniform(0.2, 3)
    _, conv, norm, _ = place
    conv.weight[two] = conv.weight[one]
    for name in ("running_mean", "running_var"):
        getattr(norm, name)[two] = getattr(norm, name)[one]
    for name in ("weight", "bias"):
        getattr(norm, name)[two] = scale * getattr(norm, name)[one]
    return "duplicates"


def silenced(place: Place, draw: random.Random) -> str:
    """Whatever the shortcut adds."""
    for unit in chosen_units(place, draw.uniform(0.01, 0.5), draw):
        place[2].bias[unit] = -1e3
    return "dead"


def saturated(place: Place, draw: random.Random) -> str:
    for unit in chosen_units(place, draw.uniform(0.3, 1), draw):
        place[2].bias[unit] = draw.uniform(8, 20) * place[2].weight[unit].abs() + 0.1
    return "always on"


def permuted(place: Place, draw: random.Random) -> str:
    _, conv, norm, reader = place
    units = chosen_units(place, draw.uniform(0.1, 1), draw, 2)
    order = torch.arange(len(norm.weight))
    order[units] = order[[*units[1:], units[0]]]  # a cycle: every one of them moves
    for values in (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        values.copy_(values[order].clone())
    if draw.random() < 0.5:  # what follows knows of it, or doesn't
        reader.weight.copy_(reader.weight[:, order].clone())
    return "permuted"


FAULTS: list[Callable[[Place, random.Random], str]] = [dead, duplicated, saturated, permuted]


@torch.no_grad()
def planted(
    fault: Callable[[Place, random.Random], str],
    seed: int,
    where: Callable[[nn.Module], list[Place]] = places,
) -> bool:
    """Whether a fault of the student is named at its layer."""
    draw = random.Random(1000 * (FAULTS.index(fault) if fault in FAULTS else 9) + seed)
    with torch.enable_grad():
        ill = copy.deepcopy(student(seed))
    place = draw.choice(where(ill))
    kind = fault(place, draw)
    named = findings(swept(teacher(seed), ill, default=where is not places))
    return (kind, "student", place[0]) in {(one.kind, one.network, one.layer) for one in named}


@pytest.mark.slow
def test_faults_at_random_layers_and_doses_are_named() -> None:
    """20 networks with each of four faults, 80 in all: at least 95 % are named at their layer."""
    hits = {fault.__name__: [planted(fault, seed) for seed in range(20)] for fault in FAULTS}
    assert sum(map(sum, hits.values())) >= 0.95 * 80, hits
    assert all(sum(named) >= 18 for named in hits.values()), hits


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, silenced], ids=lambda fault: fault.__name__)
def test_faults_of_residual_networks_are_named_where_a_report_looks(
    fault: Callable[[Place, random.Random], str],
) -> None:
    """At the stem, or at a block's end for faults that a shortcut can't undo."""
    where = block_ends if fault in (silenced, saturated) else lambda network: [stem(network)]
    named = [planted(fault, seed, where) for seed in range(1, 20, 2)]
    assert sum(named) >= 9, named


@pytest.mark.slow
@pytest.mark.parametrize("kin", [True, False], ids=["a copy", "an independent network"])
def test_healthy_networks_have_at_most_one_false_name(kin: bool) -> None:
    false: dict[int, tuple[Finding, ...]] = {}
    for seed in range(20):
        second = student(seed) if kin else trained(fresh(seed + 40), 40, seed + 1)
        false[seed] = findings(swept(teacher(seed), second))
    assert all(len(found) <= 1 for found in false.values()), false
    assert sum(map(len, false.values())) <= 2, false


def test_the_sentence_tells_units_images_and_the_bound() -> None:
    network = fresh(0)
    with torch.no_grad():
        place = places(network)[1]
        for unit in (3, 5):
            place[2].weight[unit] = 0
            place[2].bias[unit] = -1
    network.eval()
    (found,) = [one for one in findings(swept(network, network)) if one.network == "student"]
    assert found.text == (
        "student stage2: 2 of 24 units dead on 320 images (active in at most 0.94 % of images, "
        "95 % confidence): 3, 5"
    )
    assert (found.kind, found.layer, found.units, found.value) == ("dead", "stage2", (3, 5), 2)


@pytest.mark.parametrize(("images", "named"), [(3, False), (4, True)])
def test_three_images_call_no_unit_dead(images: int, named: bool) -> None:
    network = fresh(0)
    place = places(network)[1]
    with torch.no_grad():
        place[2].weight[3] = 0
        place[2].bias[3] = -1
    looking = LayerSweep({"network": network.eval()}, shapes("val", IMAGES)[0][:1])
    looking.update(shapes("val", IMAGES)[0][:images], torch.arange(images))
    layers = {one.layer for one in findings(looking.result()) if one.kind == "dead"}
    assert ("stage2" in layers) == named


def test_values_that_are_not_finite_and_a_collapsed_rank_are_named() -> None:
    network = fresh(0).eval()
    with torch.no_grad():
        conv, norm = places(network)[2][1:3]
        conv.weight.copy_(conv.weight[:1].expand_as(conv.weight))
        norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
        images = shapes("test", IMAGES)[0].clone()
    images[7, 0, 3, 3] = torch.nan
    state = LayerSweep({"teacher": network}, images)
    state.update(images, torch.arange(IMAGES))
    kinds = {(one.kind, one.layer) for one in findings(state.result())}
    assert ("not finite", "stage1") in kinds
    assert ("collapsed rank", "stage3") in kinds


def at(network: nn.Module, images: torch.Tensor, layers: list[str]) -> tuple[Finding, ...]:
    state = LayerSweep({"net": network.eval()}, images, layers=layers)
    state.update(images, torch.arange(len(images)))
    return findings(state.result())


@pytest.mark.parametrize("bias", [1.0, 0.0])
def test_a_layer_that_is_the_same_for_every_image_has_collapsed(bias: float) -> None:
    """A bias alone is what is left of the second convolution; without one it is dead instead."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Conv2d(16, 16, 3), nn.Tanh()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
        )
    with torch.no_grad():
        network[2].weight.zero_()
        network[2].bias.copy_(bias * torch.linspace(0.1, 0.9, 16))
    images = torch.rand(40, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    found = at(network, images, ["1", "3"])
    told = [(one.layer, one.value, one.text) for one in found if one.kind == "collapsed rank"]
    text = "net 3: effective rank 0 of 16 possible: the same for every image"
    assert told == ([("3", 0.0, text)] if bias else [])
    assert bool(bias) != ("dead" in {one.kind for one in found if one.layer == "3"})


GATES = [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0.0, 50.0)]
OTHERS = [nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid(), nn.AdaptiveAvgPool2d(2), nn.Softmax2d()]


@pytest.mark.parametrize("module", [*GATES, *OTHERS], ids=lambda module: type(module).__name__)
def test_only_what_cuts_at_0_can_be_always_on(module: nn.Module) -> None:
    """A sigmoid is above 0 everywhere, as is a mean of what a ReLU6 let through."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1), module)
    with torch.no_grad():
        network[2].bias.fill_(4.0)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        network[2] = nn.Identity()
    images = torch.rand(30, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert float(network(images).detach().min()) >= 0
    named = [(one.kind, one.units) for one in at(network, images, ["3"]) if one.kind == "always on"]
    assert named == ([("always on", tuple(range(8)))] if module in GATES else [])


def test_units_that_hardly_ever_act_are_named_at_what_cuts_at_0() -> None:
    """Unit 2 acts in 1 of 1,200 images, unit 1 in 2: 1 in 600, often enough; unit 0 in all."""
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    with torch.no_grad():
        network[0].weight.fill_(1.0)
        network[0].bias.copy_(torch.tensor([1.0, -2.0, -4.0]))
    images = torch.rand(1200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images[400, 0, 1, 2], images[700, 0, 3, 3] = 5.0, 3.0
    named = [one for one in at(network, images, ["1", "2"]) if one.kind == "nearly dead"]
    assert [(one.layer, one.units, one.value) for one in named] == [("1", (2,), 1.0)]
    assert named[0].text == (
        "net 1: 1 of 3 units active in fewer than one of 1,000 images (1,200 seen): 2"
    )


@pytest.mark.parametrize("module", [nn.Sigmoid(), nn.Tanh(), nn.ReLU6(), nn.ReLU()])
@pytest.mark.parametrize("steep", [True, False])
def test_a_layer_at_its_bound_is_named_with_the_units_that_are_there(
    module: nn.Module, steep: bool
) -> None:
    """Values 2 x - 1 for x in [0, 1]: at a slope of 40 most of a unit's are beyond the knee."""
    network = nn.Sequential(nn.Conv2d(1, 4, 1), module)
    slopes = torch.tensor([40.0, 40.0, 40.0, 0.1] if steep else [0.1] * 4)
    with torch.no_grad():
        network[0].weight.copy_(2 * slopes[:, None, None, None])
        network[0].bias.copy_(slopes * torch.tensor([-0.2, -0.2, -0.2, -1.0]))
    images = torch.rand(20, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    bound = {nn.ReLU6: 6.0, nn.ReLU: np.inf}.get(type(module), 1.0)
    values = abs(network(images).detach().numpy()) >= 0.99 * bound
    shares = values.mean((0, 2, 3))
    named = [one for one in at(network, images, ["1"]) if one.kind == "saturated"]
    if not steep or bound == np.inf:
        assert named == []
        return
    (found,) = named
    assert found.units == tuple(np.flatnonzero(shares > 0.5)) == (0, 1, 2)
    assert found.value == pytest.approx(shares.mean())
    assert f"{100 * shares.mean():.0f} % of the values" in found.text


class Kin(nn.Module):
    """A stage of its own beside a head that every network of the same task has."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU())
        self.head = nn.Linear(3, 10)
        for module, number in ((self.stage[0], seed), (self.head, 0)):
            generator = torch.Generator().manual_seed(number)
            nn.init.normal_(module.weight, generator=generator)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = 0 * self.stage(images).mean()
        return self.head(images.mean((2, 3))) + hidden


def test_heads_of_one_task_make_no_copies_of_independent_networks() -> None:
    images = torch.rand(320, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    networks = {"teacher": Kin(1).eval(), "student": Kin(2).eval()}
    state = LayerSweep(networks, images, layers=["stage.1", "head"])
    state.update(images, torch.arange(320))
    result = state.result()
    heads = next(one for one in result.matches if one.teacher == one.student == "head")
    assert float(heads.same.median()) > 0.99
    own = float(result.similarity.between("teacher", "student")[0, 0])
    assert 0.15 < own < 0.8, "as far as a copy that parts from its teacher"
    assert findings(result) == ()


def test_where_a_copy_parts_from_its_teacher_is_named() -> None:
    first = teacher(2)
    second = copy.deepcopy(first)
    with torch.no_grad():
        conv = places(second)[2][1]
        shuffled = torch.randperm(conv.weight.numel(), generator=torch.Generator().manual_seed(0))
        conv.weight.copy_(conv.weight.flatten()[shuffled].view_as(conv.weight))
    named = [one for one in findings(swept(first, second)) if one.kind == "unlike"]
    assert [one.layer for one in named] == ["stage3"]
    assert "here the student parts from the teacher" in named[0].text


def main(first: int, last: int) -> None:
    """Prints the extremes of healthy networks, and what faults are named."""
    rows: dict[str, list[float]] = {}
    for seed in range(first, last):
        for kind, second in (
            ("copy", student(seed)),
            ("other", trained(fresh(seed + 40), 40, seed + 1)),
        ):
            result = swept(teacher(seed), second)
            layers = [layer for network in result.networks.values() for layer in network]
            rows.setdefault("dead, nearly, always on", []).append(
                sum(
                    len(one)
                    for layer in layers
                    for one in (layer.units.dead, layer.units.nearly_dead, layer.units.always_on)
                )
            )
            rows.setdefault("duplicates", []).append(
                sum(len(layer.units.duplicates) for layer in layers)
            )
            rows.setdefault("rank share", []).append(
                min(layer.rank.effective / layer.rank.possible for layer in layers)
            )
            twins = [m for m in result.matches if m.teacher == m.student]
            rows.setdefault(f"{kind}: median same", []).extend(
                float(m.same.median()) for m in twins
            )
            rows.setdefault(f"{kind}: median partner", []).extend(
                float(m.partner_correlation.median()) for m in twins
            )
            own = [1.0, *result.similarity.between("teacher", "student").diagonal().tolist()]
            rows.setdefault(f"{kind}: fall of CKA", []).extend(
                a - b for a, b in itertools.pairwise(own)
            )
            best = result.similarity.between("teacher", "student").amax(0)
            rows.setdefault(f"{kind}: best CKA", []).extend(best.tolist())
            for one in findings(result):
                print(seed, kind, one.text)
    for name, values in rows.items():
        print(f"{name:28s} {min(values):.3f} to {max(values):.3f}, median {np.median(values):.3f}")
    for fault in FAULTS:
        hits = [planted(fault, seed) for seed in range(first, last)]
        print(
            fault.__name__,
            f"{sum(hits)} of {len(hits)}",
            [first + place for place, hit in enumerate(hits) if not hit],
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
