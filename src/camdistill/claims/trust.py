"""Row 10: which of two networks that both are right deserves trust, from their maps alone."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.claims.bias import BIASED, shortcut_network
from camdistill.claims.claim import Drawn, Lab, Measured, Row, drawn, mean
from camdistill.claims.failures import WEAK_EPOCHS, weak_network
from camdistill.explain.maps import normalise, relu
from camdistill.explain.methods import at_image
from camdistill.measure.complexity import entropy, gini, mean_size
from camdistill.measure.faithfulness import faithfulness_correlation
from camdistill.perturb.bank import Plan, bank
from camdistill.perturb.batched_forward import logits_of
from camdistill.perturb.imputers import baseline
from camdistill.types import Maps, PerImage

SEEDS = 3
RIDGE = 0.1
Statistics = Float[Tensor, "n statistics"]
JUDGES = ("probe", "faithfulness_correlation", "gini")


def trust(lab: Lab) -> Row:
    """Row 10: judges that see two maps, of a good and a worse network, pick the good one's."""
    patched = dataclasses.replace(lab.shapes, split="neutral", shortcut=BIASED)
    kinds: dict[str, tuple[Drawn, Callable[[int], nn.Module]]] = {
        WEAK: (drawn(lab), lambda seed: weak_network(lab, seed)),
        SHORTCUT: (drawn(lab, patched), lambda seed: shortcut_network(lab, BIASED, seed)),
    }
    ours: list[Measured] = []
    for kind, (found, worse) in kinds.items():
        pairs = [
            compared(lab, shortcut_network(lab, 0.0, seed), worse(seed), found)
            for seed in range(lab.seed, lab.seed + SEEDS)
        ]
        picks = picked(pairs)
        ours += [mean(judge, values, lab, kind) for judge, values in picks.items()]
    probes = [one for one in ours if one.name == "probe"]
    return Row(
        number="10",
        claim="From maps alone, where both networks are right, one tells which of the two is the "
        "better network",
        paper="54 people, VGG-16 against AlexNet on a scale of -2 to 2: Guided Grad-CAM +1.27, "
        "guided backpropagation +1.00",
        ours=tuple(ours),
        criterion="a probe of the map's statistics, fitted to the pairs of other seeds, picks the "
        "better network above 0.5 (chance) for both kinds of worse ones, whole intervals",
        passed=all((one.low or 0) > 0.5 for one in probes),
        note=f"share of images in which the better network is picked (the forced choice's AUC), "
        f"where both are right; {SEEDS} pairs each, the same images for all. Worse is a network "
        f"after {WEAK_EPOCHS} epochs, and one that learnt a shortcut (rho {BIASED:g}), in images "
        "with the patch",
    )


WEAK, SHORTCUT = "against a hardly trained network", "against a network with a shortcut"


def compared(lab: Lab, good: nn.Module, worse: nn.Module, found: Drawn) -> Statistics:
    """Statistics of the good network's map less the worse one's; NaN where either errs."""
    right = torch.ones_like(found.labels, dtype=torch.bool)
    sides: list[Statistics] = []
    for network in (good, worse):
        right &= logits_of(network, found.images).argmax(1) == found.labels
        sides.append(statistics(lab, network, found))
    differences = sides[0] - sides[1]
    return torch.where(right[:, None], differences, torch.nan).cpu()


def statistics(lab: Lab, network: nn.Module, found: Drawn) -> Statistics:
    """What a judge sees of each map; the first two are judges themselves."""
    maps = at_image("grad_cam")(network, found.images, found.labels)
    asked = bank(
        network,
        found.images,
        baseline(found.images, "blur"),
        lab.generator("trust"),
        classes=found.labels,
        plan=Plan(occluders=()),
    )
    shown = relu(maps)
    columns = [
        faithfulness_correlation(maps, asked),
        gini(shown),
        entropy(shown),
        mean_size(shown),
        roughness(shown),
        off_centre(shown),
    ]
    return torch.stack([column.float() for column in columns], 1)


def roughness(maps: Maps) -> PerImage:
    """Mean step between neighbours of the map in [0, 1]."""
    share = normalise(maps)
    down, across = share.diff(dim=1).abs().mean((1, 2)), share.diff(dim=2).abs().mean((1, 2))
    return (down + across) / 2


def off_centre(maps: Maps) -> PerImage:
    """Distance of the map's largest pixel from the image's middle, in halves of a side."""
    height, width = maps.shape[1:]
    place = maps.flatten(1).argmax(1)
    down = (place // width - (height - 1) / 2) / (height / 2)
    across = (place % width - (width - 1) / 2) / (width / 2)
    return (down.square() + across.square()).sqrt()


def picked(pairs: Sequence[Statistics]) -> dict[str, PerImage]:
    """Share of the pairs in which a judge picks the good network, image by image.

    The probe never saw the pair that it judges. A metric picks the larger value; a tie is a half.
    """
    by_judge: dict[str, list[PerImage]] = {judge: [] for judge in JUDGES}
    for place, pair in enumerate(pairs):
        others = torch.cat([one for number, one in enumerate(pairs) if number != place])
        direction = probe(others)
        for judge, margin in zip(JUDGES, (pair @ direction, pair[:, 0], pair[:, 1]), strict=True):
            choice = (margin > 0).float() + (margin == 0).float() / 2
            by_judge[judge].append(torch.where(margin.isnan(), torch.nan, choice))
    return {judge: torch.stack(values).nanmean(0) for judge, values in by_judge.items()}


def probe(differences: Statistics) -> Float[Tensor, "statistics"]:
    """Fisher's direction of paired differences: their mean, by the inverse of their spread.

    Map statistics alone: the metric in the first column asks the network, and is left out.
    """
    known = differences[~differences.isnan().any(1)]
    if not len(known):
        return torch.zeros(differences.shape[1])
    scale = known.square().mean(0).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    unit = known / scale
    spread = unit.T @ unit / len(unit) + RIDGE * torch.eye(unit.shape[1])
    unit_mean = unit.mean(0)
    unit_mean[0] = 0
    spread[0, 1:] = spread[1:, 0] = 0
    direction: Tensor = torch.linalg.solve(spread, unit_mean)
    return direction / scale
