"""What was asked of refinements before any was run, H1 to H6, as far as one answers it."""

from typing import Literal, NamedTuple

from camdistill.experiments.refinement.refinement_analysis import (
    ROAD,
    interval,
    is_matched,
    kept,
    of_these_starts,
    row,
    told,
    trained,
)
from camdistill.experiments.refinement.refinement_config import CE, STUDENT
from camdistill.experiments.refinement.refinement_measurement import MAP
from camdistill.experiments.refinement.refinement_run import Found, Scores
from camdistill.experiments.shared.seed_statistics import Gain

SHARE = 0.2  # of the gain, which random targets should stay below (H5), and other explainers (H6)
NO_RISE = 0.01  # of ROAD: a rise that is shown to be smaller is none (H4); insertion's was 0.020
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


def hypotheses(found: Found) -> list[Hypothesis]:
    """H1 to H6, as far as this refinement asked them; one start answers nothing of others."""
    asked = [
        Hypothesis(
            "H1",
            "faithfulness correlation agrees best with re-rendered truth",
            "not asked",
            "camdistill evaluate asks it",
        ),
        _h2(found),
        _h3(found),
        _h4(found),
        _h5(found),
        _h6(found),
    ]
    if len(found.plan.starts) > 1:
        return asked
    return [_of_one_start(one) for one in asked]


def _of_one_start(one: Hypothesis) -> Hypothesis:
    if one.answer == "not asked":
        return one
    return one._replace(answer="undecided", says=f"{one.says}; one start says nothing of others")


def _h2(found: Found) -> Hypothesis:
    asks = "the map's own part of held-out ROAD rises at matched accuracy"
    arm = found.main
    if arm not in found.arms or ROAD in trained(found, arm):
        return Hypothesis("H2", asks, "not asked", "the objective's arm did not run")
    one = row(found, arm, ROAD)
    assert one.by_map is not None, "ROAD is measured of both maps"
    over = one.over[CE]
    matched = is_matched(found, arm)
    raw = told(found.maps(arm, ROAD) - found.maps(CE, ROAD))
    says = (
        f"{interval(one.by_map)}, over {CE} {interval(over)}; with the answers' part "
        f"{interval(one.gained)}, over {CE} {interval(raw)}; {found.kept} against {CE} "
        f"{interval(kept(found, arm))}{_unmatched(found, arm)}; the map's part of these starts "
        f"alone {interval(of_these_starts(found.by_map(arm, ROAD)))}"
    )
    if one.by_map.low > 0 and over.low > 0 and matched:
        return Hypothesis("H2", asks, "yes", says)
    worse = one.by_map.high < 0 or over.high < 0
    return Hypothesis("H2", asks, "no" if worse else "undecided", says)


def _h3(found: Found) -> Hypothesis:
    asks = "students of a refined network's maps inherit the gain"
    arm = STUDENT + found.main
    if (found.plan.starts[0], arm) not in found.records:
        return Hypothesis("H3", asks, "not asked", "--students.network.name shallow_cnn asks it")
    part = told(found.by_map(arm, ROAD))
    whole = told(found.maps(arm, ROAD) - found.maps(STUDENT + CE, ROAD))
    alike = told(found.scores(arm, found.kept) - found.scores(STUDENT + CE, found.kept))
    says = (
        f"{ROAD} of a student's map, less that of the map of {CE}'s student on the same network: "
        f"{interval(part)}; each on its own network {interval(whole)}; {found.kept} "
        f"{interval(alike)}"
    )
    if found.kept == "agreement":
        says = says.rpartition("; ")[0]
    answer: Answer = "yes" if part.low > 0 else "no" if part.high < 0 else "undecided"
    return Hypothesis("H3", asks, answer, says)


def _h4(found: Found) -> Hypothesis:
    asks = "energy in masks raises localisation, not faithfulness"
    arms = [arm for arm, (one, which) in found.plan.refined.items() if _is_energy(one.kind, which)]
    if not arms or RANK not in found.metrics():
        return Hypothesis("H4", asks, "not asked", "--also '{energy: {kind: energy}}' asks it")
    arm = arms[0]
    place, faith = (told(_over_ce(found, arm, metric)) for metric in (RANK, ROAD))
    says = (
        f"map's part over {CE}: {RANK} {interval(place)}, {ROAD} {interval(faith)}"
        f"{_unmatched(found, arm)}"
    )
    if place.low > 0 and faith.low > 0:
        return Hypothesis("H4", asks, "no", f"{says}: both rise")
    if place.high < 0:
        return Hypothesis("H4", asks, "no", says)
    if place.low > 0 and faith.high < NO_RISE:
        return Hypothesis("H4", asks, "yes", f"{says}, which is below {NO_RISE}")
    return Hypothesis("H4", asks, "undecided", f"{says} (detectable {faith.mde:.3f})")


def _is_energy(kind: str, arm: str) -> bool:
    return kind == "energy" and arm == "objective"


def _h5(found: Found) -> Hypothesis:
    asks = f"random targets give less than {SHARE:.0%} of the gain"
    if found.main not in found.arms or "random" not in found.arms:
        return Hypothesis("H5", asks, "not asked", "the random arm did not run")
    part = _part(_over_ce(found, found.main), _over_ce(found, "random"))
    says = (
        f"map's part of {ROAD} over {CE}: random {interval(part.other)}"
        f"{_unmatched(found, 'random')}, objective {interval(part.whole)}"
        f"{_unmatched(found, found.main)}; random less {SHARE:.0%} of it {interval(part.excess)}"
    )
    if not part.whole.low > 0:
        return Hypothesis("H5", asks, "undecided", f"{says}: no gain to have a share of")
    return Hypothesis("H5", asks, _below(part.excess), says)


def _h6(found: Found) -> Hypothesis:
    asks = "the gain does not transfer to |gradient|"
    if found.main not in found.arms or GRADIENT not in found.plan.judging.held_out:
        return Hypothesis("H6", asks, "not asked", f"--judging.held_out has no {GRADIENT}")
    part = _part(_over_ce(found, found.main), _over_ce(found, found.main, explainer=GRADIENT))
    says = (
        f"map's part of {ROAD} over {CE}: |gradient| {interval(part.other)}, refined explainer "
        f"{interval(part.whole)}{_unmatched(found, found.main)}; the former less {SHARE:.0%} of "
        f"the latter {interval(part.excess)}"
    )
    if not part.whole.low > 0:
        return Hypothesis("H6", asks, "undecided", f"{says}: no gain to transfer")
    return Hypothesis("H6", asks, "no" if part.other.low > 0 else _below(part.excess), says)


def _over_ce(found: Found, arm: str, metric: str = ROAD, explainer: str = MAP) -> Scores:
    """The map's own part of an arm, less that of cross-entropy's."""
    over: Scores = found.by_map(arm, metric, explainer) - found.by_map(CE, metric, explainer)
    return over


class _Part(NamedTuple):
    whole: Gain
    other: Gain
    excess: Gain


def _part(whole: Scores, other: Scores) -> _Part:
    """A gain, another, and what the other is above `SHARE` of it."""
    return _Part(told(whole), told(other), told(other - SHARE * whole))


def _unmatched(found: Found, arm: str) -> str:
    return "" if is_matched(found, arm) else ", not matched"


def _below(excess: Gain) -> Answer:
    if excess.high < 0:
        return "yes"
    return "no" if excess.low > 0 else "undecided"
