"""How well a learned metric foretells gains, beside metrics made by hand: text and results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from camdistill.experiments.learned_metric.metric_baselines import Agreement, agreements
from camdistill.experiments.learned_metric.metric_training import Bag, Lessons, groups_of
from camdistill.measure.metrics import METRICS
from camdistill.report.results import Cell, text_table

LEARNED = "learned"
Scores = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class Answer:
    """One network's arms by every metric.

    Attributes:
        network: Its ranking's name.
        unseen: What the learned metric had not seen: "method", or "network" (and the method).
        everyone: Agreement with the gains of all arms.
        methods: Of the methods alone, without controls and mixtures; empty for under four.
        learned: Its mean score by arm.
        arms: How many, and in how many groups.
    """

    network: str
    unseen: str
    everyone: Mapping[str, Agreement]
    methods: Mapping[str, Agreement]
    learned: Mapping[str, float]
    arms: tuple[int, int]


def answers(
    lessons: Mapping[str, Lessons], learned: Mapping[str, Scores], others: Mapping[str, Scores]
) -> dict[str, Answer]:
    """By title.

    Args:
        lessons: By network.
        learned: By what was unseen, then by network and arm.
        others: By network, metric and arm.
    """
    found = {}
    for unseen, by_network in learned.items():
        for network, scores in by_network.items():
            bags = lessons[network].bags
            found[f"{network}, unseen {unseen}"] = Answer(
                network,
                unseen,
                agreements(bags, scores, others[network]),
                _of_methods(bags, scores, others[network]),
                scores,
                (len(bags), len(groups_of(lessons[network]))),
            )
    return found


def _of_methods(
    bags: Sequence[Bag], scores: Mapping[str, float], others: Scores
) -> dict[str, Agreement]:
    own = [bag for bag in bags if bag.of_method]
    return agreements(own, scores, others) if len(own) > 3 else {}


def beats(whole: Mapping[str, Answer]) -> bool:
    """Whether the learned metric is surely above every metric made by hand, in every answer."""
    return all(len(answer.everyone) > 1 for answer in whole.values()) and all(
        one.over is not None and one.over.low > 0
        for answer in whole.values()
        for name, one in answer.everyone.items()
        if name != LEARNED
    )


def verdict(answer: Answer) -> str:
    """One line on one network."""
    others = {name: one for name, one in answer.everyone.items() if name != LEARNED}
    if not others:
        tau = answer.everyone[LEARNED].tau.mean
        return f"tau {tau:.2f}; no metric made by hand has a value for every arm: a null"
    best = max(others, key=lambda name: others[name].tau.mean)
    own, gap = answer.everyone[LEARNED], others[best].over
    assert gap is not None, "it is another metric"
    sure = [name for name, one in others.items() if one.over is not None and one.over.low > 0]
    said = (
        f"tau {own.tau.mean:.2f} against {others[best].tau.mean:.2f} of {best}, the best made by "
        f"hand: {gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]; surely above {len(sure)} of "
        f"{len(others)}"
    )
    return said if len(sure) == len(others) else f"{said}: a null"


def asked_of(lessons: Mapping[str, Lessons], images: int) -> dict[str, int]:
    """How many images metrics made by hand are asked about, by network: of the learned one's."""
    return {name: min(images, len(one.halves[1])) for name, one in lessons.items()}


def answer_text(whole: Mapping[str, Answer], lessons: Mapping[str, Lessons], images: int) -> str:
    """Tables, then what follows; metrics made by hand were asked about so many images at most."""
    parts = []
    for title, answer in whole.items():
        arms, groups = answer.arms
        for name, table in (("all arms", answer.everyone), ("methods", answer.methods)):
            if table:
                parts.append(f"{title}: {name}\n{text_table(_rows(table), corner='metric')}")
        parts.append(f"{arms} arms in {groups} groups. {verdict(answer)}")
    parts.append(
        "Agreement of each metric's order of arms with the order of their gains. Intervals are "
        "95 %, of a bootstrap over groups of arms and seeds of students."
    )
    counts = asked_of(lessons, images)
    parts += [
        f"{name}: the learned metric was asked about {len(one.halves[1])} images, metrics made by "
        f"hand about {counts[name]} of them."
        for name, one in lessons.items()
    ]
    said = "It beats every metric made by hand." if beats(whole) else (
        "It doesn't surely beat every metric made by hand: a null; it is no default."
    )  # fmt: skip
    return "\n\n".join([*parts, said])


def results(
    lessons: Mapping[str, Lessons], whole: Mapping[str, Answer], images: int
) -> dict[str, object]:
    """Everything that was found, by name."""
    return {
        "beats": beats(whole),
        "n": {name: len(one.halves[1]) for name, one in lessons.items()},
        "n_by_hand": asked_of(lessons, images),
        "gains": {name: {bag.name: bag.gain for bag in one.bags} for name, one in lessons.items()},
        "answers": {
            title: {
                "verdict": verdict(answer),
                "all": {name: one._asdict() for name, one in answer.everyone.items()},
                "methods": {name: one._asdict() for name, one in answer.methods.items()},
                "learned": dict(answer.learned),
            }
            for title, answer in whole.items()
        },
    }


def _rows(table: Mapping[str, Agreement]) -> dict[str, dict[str, Cell]]:
    return {
        name + (" (masks)" if name in METRICS and METRICS[name].use == "mask" else ""): {
            "Kendall": one.tau,
            "Spearman": one.rho,
            "learned minus it": one.over,
        }
        for name, one in table.items()
    }
