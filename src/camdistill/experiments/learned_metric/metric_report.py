"""Reports how well a learned metric and hand-made metrics predict gains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from camdistill.experiments.learned_metric.metric_baselines import Agreement, metric_agreements
from camdistill.experiments.learned_metric.metric_training import Bag, BagSet, list_groups
from camdistill.measure.metrics import METRICS
from camdistill.report.results import Cell, text_table

LEARNED = "learned"
NestedScores = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class MetricComparison:
    """One network's arms by every metric.

    Attributes:
        network: Its ranking's name.
        unseen_kind: What the learned metric had not seen: "method", or "network" (and the method).
        all_arms: Agreement with the gains of all arms.
        method_arms: Arms of the methods alone, without controls and mixtures; empty for under four.
        learned_scores: Its mean score by arm.
        arm_counts: How many, and in how many groups.
    """

    network: str
    unseen_kind: str
    all_arms: Mapping[str, Agreement]
    method_arms: Mapping[str, Agreement]
    learned_scores: Mapping[str, float]
    arm_counts: tuple[int, int]


def compare_metrics(
    bag_sets: Mapping[str, BagSet],
    learned_scores: Mapping[str, NestedScores],
    baseline_scores: Mapping[str, NestedScores],
) -> dict[str, MetricComparison]:
    """By title.

    Args:
        bag_sets: By network.
        learned_scores: By what was unseen, then by network and arm.
        baseline_scores: By network, metric and arm.
    """
    comparisons = {}
    for unseen_kind, scores_by_network in learned_scores.items():
        for network, scores in scores_by_network.items():
            bags = bag_sets[network].bags
            comparisons[f"{network}, unseen {unseen_kind}"] = MetricComparison(
                network,
                unseen_kind,
                metric_agreements(bags, scores, baseline_scores[network]),
                _method_agreements(bags, scores, baseline_scores[network]),
                scores,
                (len(bags), len(list_groups(bag_sets[network]))),
            )
    return comparisons


def _method_agreements(
    bags: Sequence[Bag], scores: Mapping[str, float], baseline_scores: NestedScores
) -> dict[str, Agreement]:
    method_bags = [bag for bag in bags if bag.of_method]
    return metric_agreements(method_bags, scores, baseline_scores) if len(method_bags) > 3 else {}


def is_surely_best(comparisons: Mapping[str, MetricComparison]) -> bool:
    """Whether the learned metric is surely above every metric made by hand, in every answer."""
    return all(len(comparison.all_arms) > 1 for comparison in comparisons.values()) and all(
        agreement.over is not None and agreement.over.low > 0
        for comparison in comparisons.values()
        for name, agreement in comparison.all_arms.items()
        if name != LEARNED
    )


def metric_verdict(comparison: MetricComparison) -> str:
    """One line on one network."""
    baselines = {
        name: agreement for name, agreement in comparison.all_arms.items() if name != LEARNED
    }
    if not baselines:
        tau = comparison.all_arms[LEARNED].tau.mean
        return f"tau {tau:.2f}; no metric made by hand has a value for every arm: a null"
    best = max(baselines, key=lambda name: baselines[name].tau.mean)
    learned, gap = comparison.all_arms[LEARNED], baselines[best].over
    assert gap is not None, "it is another metric"
    beaten = [
        name
        for name, agreement in baselines.items()
        if agreement.over is not None and agreement.over.low > 0
    ]
    sentence = (
        f"tau {learned.tau.mean:.2f} against {baselines[best].tau.mean:.2f} of {best}, the best "
        "made by "
        f"hand: {gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]; surely above {len(beaten)} of "
        f"{len(baselines)}"
    )
    return sentence if len(beaten) == len(baselines) else f"{sentence}: a null"


def baseline_image_counts(bag_sets: Mapping[str, BagSet], images: int) -> dict[str, int]:
    """How many images metrics made by hand are asked about, by network: of the learned one's."""
    return {name: min(images, len(bag_set.halves[1])) for name, bag_set in bag_sets.items()}


def comparison_text(
    comparisons: Mapping[str, MetricComparison], bag_sets: Mapping[str, BagSet], images: int
) -> str:
    """Tables, then what follows; metrics made by hand were asked about so many images at most."""
    parts = []
    for title, comparison in comparisons.items():
        arms, groups = comparison.arm_counts
        for name, table in (("all arms", comparison.all_arms), ("methods", comparison.method_arms)):
            if table:
                parts.append(
                    f"{title}: {name}\n{text_table(_agreement_rows(table), corner='metric')}"
                )
        parts.append(f"{arms} arms in {groups} groups. {metric_verdict(comparison)}")
    parts.append(
        "Agreement of each metric's order of arms with the order of their gains. Intervals are "
        "95 %, of a bootstrap over groups of arms and seeds of students."
    )
    counts = baseline_image_counts(bag_sets, images)
    parts += [
        f"{name}: the learned metric was asked about {len(bags.halves[1])} images, metrics made by "
        f"hand about {counts[name]} of them."
        for name, bags in bag_sets.items()
    ]
    conclusion = "It beats every metric made by hand." if is_surely_best(comparisons) else (
        "It doesn't surely beat every metric made by hand: a null; it is no default."
    )  # fmt: skip
    return "\n\n".join([*parts, conclusion])


def metric_results(
    bag_sets: Mapping[str, BagSet], comparisons: Mapping[str, MetricComparison], images: int
) -> dict[str, object]:
    """Everything that was found, by name."""
    return {
        "beats": is_surely_best(comparisons),
        "n": {name: len(entry.halves[1]) for name, entry in bag_sets.items()},
        "n_by_hand": baseline_image_counts(bag_sets, images),
        "gains": {
            name: {bag.name: bag.gain for bag in entry.bags} for name, entry in bag_sets.items()
        },
        "answers": {
            title: {
                "verdict": metric_verdict(comparison),
                "all": {name: entry._asdict() for name, entry in comparison.all_arms.items()},
                "methods": {
                    name: entry._asdict() for name, entry in comparison.method_arms.items()
                },
                "learned": dict(comparison.learned_scores),
            }
            for title, comparison in comparisons.items()
        },
    }


def _agreement_rows(table: Mapping[str, Agreement]) -> dict[str, dict[str, Cell]]:
    return {
        name + (" (masks)" if name in METRICS and METRICS[name].use == "mask" else ""): {
            "Kendall": agreement.tau,
            "Spearman": agreement.rho,
            "learned minus it": agreement.over,
        }
        for name, agreement in table.items()
    }
