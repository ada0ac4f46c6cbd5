"""Maps against what the network does: occlusion, cost, resolution (rows 11, 12 and 26)."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from camdistill.claims.claim import (
    ClaimMeasurement,
    ClaimResult,
    ClaimSetup,
    draw_batch,
    exact_number,
    gain,
    mean,
)
from camdistill.claims.localization_maps import BATCH, relu_maps, top_classes
from camdistill.claims.networks import backbones
from camdistill.explain.maps import relu
from camdistill.explain.methods import image_explainer
from camdistill.measure.faithfulness import occlusion_correlation
from camdistill.measure.localization import relevance_rank_accuracy
from camdistill.measure.randomization import smooth_randomization
from camdistill.perturb.bank import Bank, BankPlan, build_bank
from camdistill.perturb.imputers import baseline
from camdistill.perturb.ranks import ranks
from camdistill.types import Explain, Images, Labels, PerImage

ORDERED = ("grad_cam", "guided_grad_cam", "guided_backprop", "gradient", "random")
OCCLUDER_SIDES = {1: "4 pixels", 2: "8 pixels"}  # of the occluder, in cells of the bank's 8 x 8
REPEATS, TIMED = 9, 16  # timings of each; images of a timing
CHEAPER = 100.0  # times: two orders of magnitude
RANDOMIZED = 64  # images of the gate, which makes some hundred maps of each
GATE = 0.5  # rank correlation above which a map has hardly noticed that weights are random


def run_faithfulness(setup: ClaimSetup) -> ClaimResult:
    """Row 11: rank correlation with occlusion maps."""
    batch = draw_batch(setup)
    classes = top_classes(setup.teacher, batch.images)
    maps = relu_maps(setup, setup.teacher, batch, ORDERED, classes)
    parts_by_side: dict[int, dict[str, list[PerImage]]] = {
        side: {method: [] for method in ORDERED} for side in OCCLUDER_SIDES
    }
    for start in range(0, setup.count, BATCH):
        part = slice(start, start + BATCH)
        answer_bank = _occlusion_bank(setup, batch.images[part], classes[part])
        for side in OCCLUDER_SIDES:
            for method in ORDERED:
                correlation = occlusion_correlation(maps[method][part], answer_bank, side)
                parts_by_side[side][method].append(correlation)
    correlations_by_side = {
        side: {method: torch.cat(parts) for method, parts in table.items()}
        for side, table in parts_by_side.items()
    }
    return judge_faithfulness(setup, correlations_by_side)


def _occlusion_bank(setup: ClaimSetup, images: Images, classes: Labels) -> Bank:
    return build_bank(
        setup.teacher,
        images,
        baseline(images, "blur"),
        setup.generator("no subsets"),
        classes=classes,
        plan=BankPlan(subsets={}, occluders=tuple(OCCLUDER_SIDES)),
    )


def judge_faithfulness(
    setup: ClaimSetup, correlations_by_side: dict[int, dict[str, PerImage]]
) -> ClaimResult:
    """Row 11 of rank correlations by the occluder's side and by method."""
    ours: list[ClaimMeasurement] = []
    differences: list[ClaimMeasurement] = []
    for side, table in correlations_by_side.items():
        measure = f"occluder of {OCCLUDER_SIDES[side]}"
        ours += [mean(method, table[method], setup, measure) for method in table]
        grad_cam, guided_grad_cam = table["grad_cam"], table["guided_grad_cam"]
        guided_backprop = table["guided_backprop"]
        differences += [
            gain(
                "grad_cam - guided_backprop", grad_cam, guided_backprop, setup, f"{measure}, more"
            ),
            gain(
                "guided_grad_cam - guided_backprop",
                guided_grad_cam,
                guided_backprop,
                setup,
                f"{measure}, more",
            ),
        ]
        ours.append(
            gain("guided_grad_cam - grad_cam", guided_grad_cam, grad_cam, setup, f"{measure}, more")
        )
    return ClaimResult(
        number="11",
        claim="Grad-CAM and Guided Grad-CAM are more faithful than guided backpropagation",
        paper="rank correlation with occlusion, VOC07: 0.254 and 0.261 against 0.168 (CAM 0.208)",
        ours=(*ours, *differences),
        criterion="grad_cam - guided_backprop and guided_grad_cam - guided_backprop above 0 at "
        "both sizes of the occluder",
        passed=all(difference.above_zero for difference in differences),
        note="Spearman over an occluder's positions, blur behind it, rectified maps, of the "
        "teacher; occlusion and coarse maps are both smooth, which helps them agree",
    )


class _ImageCounter(nn.Module):
    """Counts the images that go through a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.image_count = 0

    def forward(self, images: Images) -> torch.Tensor:
        """The network's logits."""
        self.image_count += len(images)
        return self.network(images)  # type: ignore[no-any-return]


def run_cost(setup: ClaimSetup) -> ClaimResult:
    """Row 12: what Grad-CAM and occlusion cost, counted and timed."""
    images = draw_batch(setup).images[:TIMED]
    networks = {"teacher": setup.teacher, "flattened": backbones.fully_connected_network(setup)}
    ours: list[ClaimMeasurement] = []
    for name, network in networks.items():
        classes = top_classes(network, images)
        explains = {method: image_explainer(method) for method in ("grad_cam", "occlusion")}
        cost_by_method = {
            m: _count_cost(explain, network, images, classes) for m, explain in explains.items()
        }
        for method, (forwards, operations) in cost_by_method.items():
            ours.append(
                exact_number(f"{method}, {name}", forwards, len(images), "forwards an image")
            )
            label = f"{method}, {name}"
            ours.append(exact_number(label, operations / 1e6, len(images), "MFLOP an image"))
        ours.append(
            exact_number(
                name,
                cost_by_method["occlusion"][1] / cost_by_method["grad_cam"][1],
                len(images),
                "operations, occlusion / grad_cam",
            )
        )
        seconds = _time_methods(explains, network, images, classes)
        ratio = seconds["occlusion"] / seconds["grad_cam"]
        ours.append(mean(name, ratio, setup, "seconds, occlusion / grad_cam"))
    return judge_occlusion_cost(ours)


def judge_occlusion_cost(ours: Sequence[ClaimMeasurement]) -> ClaimResult:
    """Row 12 of what was counted and timed."""
    ratios = [
        measurement
        for measurement in ours
        if measurement.measure.startswith(("operations", "seconds"))
    ]
    return ClaimResult(
        number="12",
        claim="Grad-CAM is orders of magnitude cheaper than occlusion",
        paper="no number",
        ours=tuple(ours),
        criterion=f"occlusion takes more than {CHEAPER:.0f} times the operations, and the time "
        "(lower bound), in both networks",
        passed=all(
            (measurement.value if measurement.low is None else measurement.low) > CHEAPER
            for measurement in ratios
        ),
        note=f"occlusion by squares of 4 pixels, 2 apart; {REPEATS} timings of {TIMED} images, in "
        "the processor's seconds",
    )


def _count_cost(
    explain: Explain, network: nn.Module, images: Images, classes: Labels
) -> tuple[float, float]:
    """Forwards and floating-point operations an image."""
    counting_network = _ImageCounter(network).eval()
    explain(counting_network, images, classes)  # what is looked up once is not part of the cost
    counting_network.image_count = 0
    explain(counting_network, images, classes)
    explain(network, images, classes)
    with FlopCounterMode(display=False) as counter:
        explain(network, images, classes)
    return counting_network.image_count / len(images), counter.get_total_flops() / len(images)


def _time_methods(
    explains: Mapping[str, Explain], network: nn.Module, images: Images, classes: Labels
) -> dict[str, torch.Tensor]:
    """Of each repeat by method; the methods take turns, as a machine's speed changes.

    On a CPU it is the processor's time, which other programs hardly change.
    """
    now = time.perf_counter if images.is_cuda else time.process_time
    seconds_by_method: dict[str, list[float]] = {method: [] for method in explains}
    for _ in range(REPEATS):
        for method, explain in explains.items():
            start_time = now()
            explain(network, images, classes)
            if images.is_cuda:
                torch.cuda.synchronize()
            seconds_by_method[method].append(now() - start_time)
    return {method: torch.tensor(values) for method, values in seconds_by_method.items()}


def run_resolution(setup: ClaimSetup) -> ClaimResult:
    """Row 26: Guided Grad-CAM's resolution, and whether it notices random weights."""
    batch = draw_batch(setup)
    classes = top_classes(setup.teacher, batch.images)
    maps = relu_maps(setup, setup.teacher, batch, ORDERED[:3], classes)
    rank_accuracies = {
        method: relevance_rank_accuracy(
            ranks(method_maps, setup.generator("ties")), batch.masks["object"]
        )
        for method, method_maps in maps.items()
    }
    first_images = slice(RANDOMIZED)
    similarities = {
        method: _similarity_to_random(
            setup, method, batch.images[first_images], classes[first_images]
        )
        for method in ORDERED[:3]
    }
    return judge_resolution(setup, rank_accuracies, similarities)


def judge_resolution(
    setup: ClaimSetup, rank_accuracies: dict[str, PerImage], similarities: dict[str, PerImage]
) -> ClaimResult:
    """Row 26 of rank accuracies, and of similarities to maps of a random network, by method."""
    difference = gain(
        "guided_grad_cam - grad_cam",
        rank_accuracies["guided_grad_cam"],
        rank_accuracies["grad_cam"],
        setup,
        "rank accuracy more",
    )
    gate = [
        mean(method, entry, setup, "rank correlation, random weights")
        for method, entry in similarities.items()
    ]
    upper_bounds = {entry.name: entry.high for entry in gate}
    guided_bound = upper_bounds["guided_grad_cam"]
    return ClaimResult(
        number="26",
        claim="Guided Grad-CAM adds resolution, and still explains the network",
        paper="figures; Adebayo 2018: guided maps hardly change where weights are random",
        ours=(
            *(
                mean(method, entry, setup, "rank accuracy, object")
                for method, entry in rank_accuracies.items()
            ),
            difference,
            *gate,
        ),
        criterion="guided_grad_cam - grad_cam above 0 in rank accuracy, and its rank correlation "
        f"with its own map at random weights below {GATE} (upper bound)",
        passed=difference.above_zero and guided_bound is not None and guided_bound < GATE,
        note="all layers drawn again; the same class; means over 4 noisy copies of each image",
    )


def _similarity_to_random(
    setup: ClaimSetup, method: str, images: Images, classes: Labels
) -> PerImage:
    """Rank correlation of a map with that of the network whose layers are all random."""
    explain: Callable[[nn.Module, Images, Labels], torch.Tensor] = image_explainer(method)
    similarity_by_layer = smooth_randomization(
        lambda network, inputs, targets: relu(explain(network, inputs, targets)),
        setup.teacher,
        images,
        classes,
        setup.generator("weights"),
        samples=4,
    )
    return list(similarity_by_layer.values())[-1]
