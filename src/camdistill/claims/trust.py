"""Row 10: which of two networks that both are right deserves trust, from their maps alone."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.claims.bias import BIASED, shortcut_network
from camdistill.claims.claim import (
    ClaimMeasurement,
    ClaimResult,
    ClaimSetup,
    ShapesBatch,
    draw_batch,
    mean,
)
from camdistill.claims.failures import WEAK_EPOCHS, weak_network
from camdistill.explain.maps import normalize, relu
from camdistill.explain.methods import image_explainer
from camdistill.measure.complexity import entropy, gini, mean_size
from camdistill.measure.faithfulness import faithfulness_correlation
from camdistill.perturb.bank import BankPlan, build_bank
from camdistill.perturb.batched_forward import logits_of
from camdistill.perturb.imputers import baseline
from camdistill.types import Maps, PerImage

SEEDS = 3
RIDGE = 0.1
Statistics = Float[Tensor, "n statistics"]
JUDGES = ("probe", "faithfulness_correlation", "gini")


def run_trust(setup: ClaimSetup) -> ClaimResult:
    """Row 10: judges that see two maps, of a good and a worse network, pick the good one's."""
    patched = dataclasses.replace(setup.shapes, split="neutral", shortcut=BIASED)
    kinds: dict[str, tuple[ShapesBatch, Callable[[int], nn.Module]]] = {
        WEAK: (draw_batch(setup), lambda seed: weak_network(setup, seed)),
        SHORTCUT: (draw_batch(setup, patched), lambda seed: shortcut_network(setup, BIASED, seed)),
    }
    ours: list[ClaimMeasurement] = []
    for kind, (batch, worse) in kinds.items():
        pairs = [
            statistics_difference(setup, shortcut_network(setup, 0.0, seed), worse(seed), batch)
            for seed in range(setup.seed, setup.seed + SEEDS)
        ]
        picks = judge_pairs(pairs)
        ours += [mean(judge, values, setup, kind) for judge, values in picks.items()]
    probes = [measurement for measurement in ours if measurement.name == "probe"]
    return ClaimResult(
        number="10",
        claim="From maps alone, where both networks are right, one tells which of the two is the "
        "better network",
        paper="54 people, VGG-16 against AlexNet on a scale of -2 to 2: Guided Grad-CAM +1.27, "
        "guided backpropagation +1.00",
        ours=tuple(ours),
        criterion="a probe of the map's statistics, fitted to the pairs of other seeds, picks the "
        "better network above 0.5 (chance) for both kinds of worse ones, whole intervals",
        passed=all((measurement.low or 0) > 0.5 for measurement in probes),
        note=f"share of images in which the better network is picked (the forced choice's AUC), "
        f"where both are right; {SEEDS} pairs each, the same images for all. Worse is a network "
        f"after {WEAK_EPOCHS} epochs, and one that learned a shortcut (rho {BIASED:g}), in images "
        "with the patch",
    )


WEAK, SHORTCUT = "against a hardly trained network", "against a network with a shortcut"


def statistics_difference(
    setup: ClaimSetup, good: nn.Module, worse: nn.Module, batch: ShapesBatch
) -> Statistics:
    """Statistics of the good network's map less the worse one's; NaN where either errs."""
    right = torch.ones_like(batch.labels, dtype=torch.bool)
    sides: list[Statistics] = []
    for network in (good, worse):
        right &= logits_of(network, batch.images).argmax(1) == batch.labels
        sides.append(map_statistics(setup, network, batch))
    differences = sides[0] - sides[1]
    return torch.where(right[:, None], differences, torch.nan).cpu()


def map_statistics(setup: ClaimSetup, network: nn.Module, batch: ShapesBatch) -> Statistics:
    """What a judge sees of each map; the first two are judges themselves."""
    maps = image_explainer("grad_cam")(network, batch.images, batch.labels)
    answer_bank = build_bank(
        network,
        batch.images,
        baseline(batch.images, "blur"),
        setup.generator("trust"),
        classes=batch.labels,
        plan=BankPlan(occluders=()),
    )
    positive_maps = relu(maps)
    columns = [
        faithfulness_correlation(maps, answer_bank),
        gini(positive_maps),
        entropy(positive_maps),
        mean_size(positive_maps),
        roughness(positive_maps),
        off_center(positive_maps),
    ]
    return torch.stack([column.float() for column in columns], 1)


def roughness(maps: Maps) -> PerImage:
    """Mean step between neighbors of the map in [0, 1]."""
    share = normalize(maps)
    down, across = share.diff(dim=1).abs().mean((1, 2)), share.diff(dim=2).abs().mean((1, 2))
    return (down + across) / 2


def off_center(maps: Maps) -> PerImage:
    """Distance of the map's largest pixel from the image's middle, in halves of a side."""
    height, width = maps.shape[1:]
    position = maps.flatten(1).argmax(1)
    down = (position // width - (height - 1) / 2) / (height / 2)
    across = (position % width - (width - 1) / 2) / (width / 2)
    return (down.square() + across.square()).sqrt()


def judge_pairs(pairs: Sequence[Statistics]) -> dict[str, PerImage]:
    """Share of the pairs in which a judge picks the good network, image by image.

    The probe never saw the pair that it judges. A metric picks the larger value; a tie is a half.
    """
    choices_by_judge: dict[str, list[PerImage]] = {judge: [] for judge in JUDGES}
    for index, pair in enumerate(pairs):
        other_pairs = torch.cat([other for number, other in enumerate(pairs) if number != index])
        direction = probe(other_pairs)
        for judge, margin in zip(JUDGES, (pair @ direction, pair[:, 0], pair[:, 1]), strict=True):
            choice = (margin > 0).float() + (margin == 0).float() / 2
            choices_by_judge[judge].append(torch.where(margin.isnan(), torch.nan, choice))
    return {judge: torch.stack(values).nanmean(0) for judge, values in choices_by_judge.items()}


def probe(differences: Statistics) -> Float[Tensor, "statistics"]:
    """Fisher's direction of paired differences: their mean, by the inverse of their spread.

    Map statistics alone: the metric in the first column asks the network, and is left out.
    """
    valid = differences[~differences.isnan().any(1)]
    if not len(valid):
        return torch.zeros(differences.shape[1])
    scale = valid.square().mean(0).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    unit = valid / scale
    spread = unit.T @ unit / len(unit) + RIDGE * torch.eye(unit.shape[1])
    unit_mean = unit.mean(0)
    unit_mean[0] = 0
    spread[0, 1:] = spread[1:, 0] = 0
    direction: Tensor = torch.linalg.solve(spread, unit_mean)
    return direction / scale
