"""Maps against what the network does: occlusion, cost, resolution (rows 11, 12 and 26)."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from camdistill.claims.claim import Lab, Measured, Row, drawn, exact, gain, mean
from camdistill.claims.localization_maps import BATCH, maps_of, tops
from camdistill.claims.networks import backbones
from camdistill.explain.maps import relu
from camdistill.explain.methods import at_image
from camdistill.measure.faithfulness import occlusion_correlation
from camdistill.measure.localization import relevance_rank_accuracy
from camdistill.measure.randomization import smooth_randomisation
from camdistill.perturb.bank import Bank, Plan, bank
from camdistill.perturb.imputers import baseline
from camdistill.perturb.ranks import ranks
from camdistill.types import Explain, Images, Labels, PerImage

ORDERED = ("grad_cam", "guided_grad_cam", "guided_backprop", "gradient", "random")
SIDES = {1: "4 pixels", 2: "8 pixels"}  # of the occluder, in cells of the bank's 8 x 8
REPEATS, TIMED = 9, 16  # timings of each; images of a timing
CHEAPER = 100.0  # times: two orders of magnitude
RANDOMISED = 64  # images of the gate, which makes some hundred maps of each
GATE = 0.5  # rank correlation above which a map has hardly noticed that weights are random


def faithful(lab: Lab) -> Row:
    """Row 11: rank correlation with occlusion maps."""
    scene = drawn(lab)
    classes = tops(lab.teacher, scene.images)
    maps = maps_of(lab, lab.teacher, scene, ORDERED, classes)
    found: dict[int, dict[str, list[PerImage]]] = {
        side: {method: [] for method in ORDERED} for side in SIDES
    }
    for start in range(0, lab.count, BATCH):
        part = slice(start, start + BATCH)
        asked = _occluded(lab, scene.images[part], classes[part])
        for side in SIDES:
            for method in ORDERED:
                one = occlusion_correlation(maps[method][part], asked, side)
                found[side][method].append(one)
    by_side = {
        side: {method: torch.cat(parts) for method, parts in table.items()}
        for side, table in found.items()
    }
    return judged_faithfulness(lab, by_side)


def _occluded(lab: Lab, images: Images, classes: Labels) -> Bank:
    return bank(
        lab.teacher,
        images,
        baseline(images, "blur"),
        lab.generator("no subsets"),
        classes=classes,
        plan=Plan(subsets={}, occluders=tuple(SIDES)),
    )


def judged_faithfulness(lab: Lab, found: dict[int, dict[str, PerImage]]) -> Row:
    """Row 11 of rank correlations by the occluder's side and by method."""
    ours: list[Measured] = []
    steps: list[Measured] = []
    for side, table in found.items():
        of = f"occluder of {SIDES[side]}"
        ours += [mean(method, table[method], lab, of) for method in table]
        own, guided = table["grad_cam"], table["guided_grad_cam"]
        plain = table["guided_backprop"]
        steps += [
            gain("grad_cam - guided_backprop", own, plain, lab, f"{of}, more"),
            gain("guided_grad_cam - guided_backprop", guided, plain, lab, f"{of}, more"),
        ]
        ours.append(gain("guided_grad_cam - grad_cam", guided, own, lab, f"{of}, more"))
    return Row(
        number="11",
        claim="Grad-CAM and Guided Grad-CAM are more faithful than guided backpropagation",
        paper="rank correlation with occlusion, VOC07: 0.254 and 0.261 against 0.168 (CAM 0.208)",
        ours=(*ours, *steps),
        criterion="grad_cam - guided_backprop and guided_grad_cam - guided_backprop above 0 at "
        "both sizes of the occluder",
        passed=all(step.above for step in steps),
        note="Spearman over an occluder's positions, blur behind it, rectified maps, of the "
        "teacher; occlusion and coarse maps are both smooth, which helps them agree",
    )


class _Counted(nn.Module):
    """Counts the images that go through a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen = 0

    def forward(self, images: Images) -> torch.Tensor:
        """The network's logits."""
        self.seen += len(images)
        return self.network(images)  # type: ignore[no-any-return]


def cheap(lab: Lab) -> Row:
    """Row 12: what Grad-CAM and occlusion cost, counted and timed."""
    images = drawn(lab).images[:TIMED]
    networks = {"teacher": lab.teacher, "flattened": backbones.flattened(lab)}
    ours: list[Measured] = []
    for name, network in networks.items():
        classes = tops(network, images)
        explains = {method: at_image(method) for method in ("grad_cam", "occlusion")}
        cost = {m: _counted(one, network, images, classes) for m, one in explains.items()}
        for method, (forwards, operations) in cost.items():
            ours.append(exact(f"{method}, {name}", forwards, len(images), "forwards an image"))
            shown = f"{method}, {name}"
            ours.append(exact(shown, operations / 1e6, len(images), "MFLOP an image"))
        ours.append(
            exact(
                name,
                cost["occlusion"][1] / cost["grad_cam"][1],
                len(images),
                "operations, occlusion / grad_cam",
            )
        )
        seconds = _seconds(explains, network, images, classes)
        ratio = seconds["occlusion"] / seconds["grad_cam"]
        ours.append(mean(name, ratio, lab, "seconds, occlusion / grad_cam"))
    return judged_cost(ours)


def judged_cost(ours: Sequence[Measured]) -> Row:
    """Row 12 of what was counted and timed."""
    ratios = [one for one in ours if one.of.startswith(("operations", "seconds"))]
    return Row(
        number="12",
        claim="Grad-CAM is orders of magnitude cheaper than occlusion",
        paper="no number",
        ours=tuple(ours),
        criterion=f"occlusion takes more than {CHEAPER:.0f} times the operations, and the time "
        "(lower bound), in both networks",
        passed=all((one.value if one.low is None else one.low) > CHEAPER for one in ratios),
        note=f"occlusion by squares of 4 pixels, 2 apart; {REPEATS} timings of {TIMED} images, in "
        "the processor's seconds",
    )


def _counted(
    explain: Explain, network: nn.Module, images: Images, classes: Labels
) -> tuple[float, float]:
    """Forwards and floating-point operations an image."""
    counted = _Counted(network).eval()
    explain(counted, images, classes)  # what is looked up once is not part of the cost
    counted.seen = 0
    explain(counted, images, classes)
    explain(network, images, classes)
    with FlopCounterMode(display=False) as counter:
        explain(network, images, classes)
    return counted.seen / len(images), counter.get_total_flops() / len(images)


def _seconds(
    explains: Mapping[str, Explain], network: nn.Module, images: Images, classes: Labels
) -> dict[str, torch.Tensor]:
    """Of each repeat by method; the methods take turns, as a machine's speed changes.

    On a CPU it is the processor's time, which other programs hardly change.
    """
    now = time.perf_counter if images.is_cuda else time.process_time
    found: dict[str, list[float]] = {method: [] for method in explains}
    for _ in range(REPEATS):
        for method, explain in explains.items():
            begun = now()
            explain(network, images, classes)
            if images.is_cuda:
                torch.cuda.synchronize()
            found[method].append(now() - begun)
    return {method: torch.tensor(values) for method, values in found.items()}


def finer(lab: Lab) -> Row:
    """Row 26: Guided Grad-CAM's resolution, and whether it notices random weights."""
    scene = drawn(lab)
    classes = tops(lab.teacher, scene.images)
    maps = maps_of(lab, lab.teacher, scene, ORDERED[:3], classes)
    sharp = {
        method: relevance_rank_accuracy(ranks(one, lab.generator("ties")), scene.masks["object"])
        for method, one in maps.items()
    }
    some = slice(RANDOMISED)
    alike = {
        method: _randomised(lab, method, scene.images[some], classes[some])
        for method in ORDERED[:3]
    }
    return judged_resolution(lab, sharp, alike)


def judged_resolution(lab: Lab, sharp: dict[str, PerImage], alike: dict[str, PerImage]) -> Row:
    """Row 26 of rank accuracies, and of similarities to maps of a random network, by method."""
    more = gain(
        "guided_grad_cam - grad_cam",
        sharp["guided_grad_cam"],
        sharp["grad_cam"],
        lab,
        "rank accuracy more",
    )
    gate = [
        mean(method, one, lab, "rank correlation, random weights") for method, one in alike.items()
    ]
    highs = {one.name: one.high for one in gate}
    guided = highs["guided_grad_cam"]
    return Row(
        number="26",
        claim="Guided Grad-CAM adds resolution, and still explains the network",
        paper="figures; Adebayo 2018: guided maps hardly change where weights are random",
        ours=(
            *(mean(method, one, lab, "rank accuracy, object") for method, one in sharp.items()),
            more,
            *gate,
        ),
        criterion="guided_grad_cam - grad_cam above 0 in rank accuracy, and its rank correlation "
        f"with its own map at random weights below {GATE} (upper bound)",
        passed=more.above and guided is not None and guided < GATE,
        note="all layers drawn again; the same class; means over 4 noisy copies of each image",
    )


def _randomised(lab: Lab, method: str, images: Images, classes: Labels) -> PerImage:
    """Rank correlation of a map with that of the network whose layers are all random."""
    explain: Callable[[nn.Module, Images, Labels], torch.Tensor] = at_image(method)
    found = smooth_randomisation(
        lambda network, some, of: relu(explain(network, some, of)),
        lab.teacher,
        images,
        classes,
        lab.generator("weights"),
        samples=4,
    )
    return list(found.values())[-1]
