"""The hypotheses H1 to H6, stated before any refinement ran, and their verdicts."""

from typing import Literal, NamedTuple

from camdistill.experiments.refinement.refinement_analysis import (
    ROAD,
    compare_arm,
    estimate_gain,
    format_gain,
    gain_within_starts,
    is_matched,
    retention_gain,
    training_metrics,
)
from camdistill.experiments.refinement.refinement_config import CE, STUDENT
from camdistill.experiments.refinement.refinement_measurement import MAP
from camdistill.experiments.refinement.refinement_run import RefinementRuns, Scores
from camdistill.experiments.shared.seed_statistics import Gain

SHARE = 0.2  # of the gain, which random targets should stay below (H5), and other explainers (H6)
MAX_RISE = 0.01  # of ROAD: a rise that is shown to be smaller is none (H4); insertion's was 0.020
RANK = "rank_accuracy"
GRADIENT = "gradient"
Answer = Literal["yes", "no", "undecided", "not asked"]


class Hypothesis(NamedTuple):
    """One question, answered.

    Attributes:
        name: H2 and so on.
        asks: In words.
        answer: "undecided" is a null: nothing was shown either way.
        says: With numbers.
    """

    name: str
    asks: str
    answer: Answer
    says: str


def answer_hypotheses(runs: RefinementRuns) -> list[Hypothesis]:
    """H1 to H6, as far as this refinement asked them; one start answers nothing of others."""
    answered = [
        Hypothesis(
            "H1",
            "faithfulness correlation agrees best with re-rendered truth",
            "not asked",
            "camdistill evaluate asks it",
        ),
        _h2(runs),
        _h3(runs),
        _h4(runs),
        _h5(runs),
        _h6(runs),
    ]
    if len(runs.plan.starts) > 1:
        return answered
    return [_withhold_answer(hypothesis) for hypothesis in answered]


def _withhold_answer(hypothesis: Hypothesis) -> Hypothesis:
    if hypothesis.answer == "not asked":
        return hypothesis
    return hypothesis._replace(
        answer="undecided", says=f"{hypothesis.says}; one start says nothing of others"
    )


def _h2(runs: RefinementRuns) -> Hypothesis:
    asks = "the map's own part of held-out ROAD rises at matched accuracy"
    arm = runs.main_arm
    if arm not in runs.arms or ROAD in training_metrics(runs, arm):
        return Hypothesis("H2", asks, "not asked", "the objective's arm did not run")
    comparison = compare_arm(runs, arm, ROAD)
    assert comparison.by_map is not None, "ROAD is measured of both maps"
    over = comparison.by_map_over[CE]
    matched = is_matched(runs, arm)
    total_over_ce = estimate_gain(runs.maps(arm, ROAD) - runs.maps(CE, ROAD))
    says = (
        f"{format_gain(comparison.by_map)}, over {CE} {format_gain(over)}; with the answers' part "
        f"{format_gain(comparison.total_gain)}, over {CE} {format_gain(total_over_ce)}; "
        f"{runs.retention_metric} against {CE} "
        f"{format_gain(retention_gain(runs, arm))}{_note_unmatched(runs, arm)}; the map's part "
        "of these starts "
        f"alone {format_gain(gain_within_starts(runs.by_map(arm, ROAD)))}"
    )
    if comparison.by_map.low > 0 and over.low > 0 and matched:
        return Hypothesis("H2", asks, "yes", says)
    is_worse = comparison.by_map.high < 0 or over.high < 0
    return Hypothesis("H2", asks, "no" if is_worse else "undecided", says)


def _h3(runs: RefinementRuns) -> Hypothesis:
    asks = "students of a refined network's maps inherit the gain"
    arm = STUDENT + runs.main_arm
    if (runs.plan.starts[0], arm) not in runs.records:
        return Hypothesis("H3", asks, "not asked", "--students.network.name shallow_cnn asks it")
    map_gain = estimate_gain(runs.by_map(arm, ROAD))
    total_gain = estimate_gain(runs.maps(arm, ROAD) - runs.maps(STUDENT + CE, ROAD))
    retention = estimate_gain(
        runs.scores(arm, runs.retention_metric) - runs.scores(STUDENT + CE, runs.retention_metric)
    )
    says = (
        f"{ROAD} of a student's map, less that of the map of {CE}'s student on the same network: "
        f"{format_gain(map_gain)}; each on its own network {format_gain(total_gain)}; "
        f"{runs.retention_metric} "
        f"{format_gain(retention)}"
    )
    if runs.retention_metric == "agreement":
        says = says.rpartition("; ")[0]
    answer: Answer = "yes" if map_gain.low > 0 else "no" if map_gain.high < 0 else "undecided"
    return Hypothesis("H3", asks, answer, says)


def _h4(runs: RefinementRuns) -> Hypothesis:
    asks = "energy in masks raises localization, not faithfulness"
    arms = [
        arm
        for arm, (objective, arm_kind) in runs.plan.objectives_by_arm.items()
        if _is_energy(objective.kind, arm_kind)
    ]
    if not arms or RANK not in runs.metrics():
        return Hypothesis("H4", asks, "not asked", "--also '{energy: {kind: energy}}' asks it")
    arm = arms[0]
    rank_gain, road_gain = (
        estimate_gain(_map_gain_over_ce(runs, arm, metric)) for metric in (RANK, ROAD)
    )
    says = (
        f"map's part over {CE}: {RANK} {format_gain(rank_gain)}, {ROAD} {format_gain(road_gain)}"
        f"{_note_unmatched(runs, arm)}"
    )
    if rank_gain.low > 0 and road_gain.low > 0:
        return Hypothesis("H4", asks, "no", f"{says}: both rise")
    if rank_gain.high < 0:
        return Hypothesis("H4", asks, "no", says)
    if rank_gain.low > 0 and road_gain.high < MAX_RISE:
        return Hypothesis("H4", asks, "yes", f"{says}, which is below {MAX_RISE}")
    return Hypothesis("H4", asks, "undecided", f"{says} (detectable {road_gain.mde:.3f})")


def _is_energy(kind: str, arm: str) -> bool:
    return kind == "energy" and arm == "objective"


def _h5(runs: RefinementRuns) -> Hypothesis:
    asks = f"random targets give less than {SHARE:.0%} of the gain"
    if runs.main_arm not in runs.arms or "random" not in runs.arms:
        return Hypothesis("H5", asks, "not asked", "the random arm did not run")
    share = _gain_share(_map_gain_over_ce(runs, runs.main_arm), _map_gain_over_ce(runs, "random"))
    says = (
        f"map's part of {ROAD} over {CE}: random {format_gain(share.other)}"
        f"{_note_unmatched(runs, 'random')}, objective {format_gain(share.gain)}"
        f"{_note_unmatched(runs, runs.main_arm)}; random less {SHARE:.0%} of it "
        f"{format_gain(share.excess)}"
    )
    if not share.gain.low > 0:
        return Hypothesis("H5", asks, "undecided", f"{says}: no gain to have a share of")
    return Hypothesis("H5", asks, _answer_below(share.excess), says)


def _h6(runs: RefinementRuns) -> Hypothesis:
    asks = "the gain does not transfer to |gradient|"
    if runs.main_arm not in runs.arms or GRADIENT not in runs.plan.judging.held_out:
        return Hypothesis("H6", asks, "not asked", f"--judging.held_out has no {GRADIENT}")
    share = _gain_share(
        _map_gain_over_ce(runs, runs.main_arm),
        _map_gain_over_ce(runs, runs.main_arm, explainer=GRADIENT),
    )
    says = (
        f"map's part of {ROAD} over {CE}: |gradient| {format_gain(share.other)}, refined explainer "
        f"{format_gain(share.gain)}{_note_unmatched(runs, runs.main_arm)}; the former less "
        f"{SHARE:.0%} of "
        f"the latter {format_gain(share.excess)}"
    )
    if not share.gain.low > 0:
        return Hypothesis("H6", asks, "undecided", f"{says}: no gain to transfer")
    return Hypothesis(
        "H6", asks, "no" if share.other.low > 0 else _answer_below(share.excess), says
    )


def _map_gain_over_ce(
    runs: RefinementRuns, arm: str, metric: str = ROAD, explainer: str = MAP
) -> Scores:
    """The map's own part of an arm, less that of cross-entropy's."""
    gain: Scores = runs.by_map(arm, metric, explainer) - runs.by_map(CE, metric, explainer)
    return gain


class _GainShare(NamedTuple):
    gain: Gain
    other: Gain
    excess: Gain


def _gain_share(gains: Scores, other_gains: Scores) -> _GainShare:
    """A gain, another, and what the other is above `SHARE` of it."""
    return _GainShare(
        estimate_gain(gains), estimate_gain(other_gains), estimate_gain(other_gains - SHARE * gains)
    )


def _note_unmatched(runs: RefinementRuns, arm: str) -> str:
    return "" if is_matched(runs, arm) else ", not matched"


def _answer_below(excess: Gain) -> Answer:
    if excess.high < 0:
        return "yes"
    return "no" if excess.low > 0 else "undecided"
