"""What a refinement may claim: the map's own part, against every control, and the hypotheses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from camdistill.studies.refinement import Found, Scores, signed
from camdistill.studies.refinement_judging import LOCALISATION, MAP, trained_metrics
from camdistill.studies.refinement_plan import CE, STUDENT
from camdistill.studies.statistics import Bootstrap, Gain, holm

LEVEL = 0.05
SHARE = 0.2  # of the gain, which random targets should stay below (H5), and other explainers (H6)
ROAD, RANK = "road", "rank_accuracy"
TARGETS = ("fidelity", "view_cosine", "learned")  # what was wanted, which is no faithfulness
GRADIENT = "gradient"
Answer = Literal["yes", "no", "undecided", "not asked"]


@dataclass(frozen=True)
class Row:
    """An arm by one metric; larger is better in all of it.

    Attributes:
        value: Mean of the arm's maps on its networks, in the metric's own direction.
        gained: Over the starts' maps on the starts.
        by_answers: What the starts' maps gained on the arm's networks; None where it isn't known.
        by_map: The rest.
        over: The map's part less that of another arm, by arm.
        here: The map's part less cross-entropy's, of these very starts: over images alone.
    """

    value: float
    gained: Gain
    by_answers: Gain | None
    by_map: Gain | None
    over: Mapping[str, Gain]
    here: Gain | None = None


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


def told(values: Scores) -> Gain:
    """The mean of paired differences [starts, images], with its two-level interval."""
    known = values[:, ~np.isnan(values).any(0)]
    if not known.shape[1]:
        nothing = float("nan")
        return Gain(nothing, nothing, nothing, nothing, nothing, nothing)
    return Bootstrap({"values": known, "zero": np.zeros_like(known)}).gain("values", "zero")


def of_these_starts(values: Scores) -> Gain:
    """The same for these very starts: over images alone, so that it says nothing of others."""
    return told(values.mean(0, keepdims=True))


def row(found: Found, arm: str, metric: str, explainer: str = MAP) -> Row:
    """One arm by one metric."""
    parts = found.has_parts(metric, explainer)
    over, here = {}, None
    if parts and arm != CE:
        own = found.by_map(arm, metric, explainer)
        here = of_these_starts(own - found.by_map(CE, metric, explainer))
        over = {
            other: told(own - found.by_map(other, metric, explainer))
            for other in controls(found)
            if other != arm
        }
    return Row(
        value=mean_of(found, arm, metric, explainer),
        gained=told(found.gained(arm, metric, explainer)),
        by_answers=told(found.by_answers(arm, metric, explainer)) if parts else None,
        by_map=told(found.by_map(arm, metric, explainer)) if parts else None,
        over=over,
        here=here,
    )


def controls(found: Found) -> list[str]:
    """The arms that the objective is held against."""
    return [arm for arm in found.arms if arm in (CE, "detached", "random", "shuffled")]


def trained(found: Found, arm: str) -> tuple[str, ...]:
    """The metrics that an arm was trained on."""
    return trained_metrics(found.plan.refined[arm][0])


def held_out(found: Found, arm: str) -> list[str]:
    """The faithfulness metrics that an arm was not trained on, ROAD first."""
    known = [m for m in found.metrics() if m not in trained(found, arm) and found.has_parts(m)]
    known = [m for m in known if m not in (*LOCALISATION, *TARGETS)]
    return sorted(known, key=lambda metric: metric != ROAD)


def kept(found: Found, arm: str) -> Gain:
    """Accuracy (without labels agreement with the start) less that of cross-entropy alone."""
    return told(found.scores(arm, found.kept) - found.scores(CE, found.kept))


def is_matched(found: Found, arm: str) -> bool:
    """Whether every start's arm was as accurate as cross-entropy alone, on validation images."""
    return all(found.records[name, arm].matched for name in found.plan.starts)


def verdict(found: Found) -> list[str]:
    """What may be claimed of every objective, a line each; nulls are said."""
    names = [found.main] if found.main in found.arms else []
    lines = []
    for arm in [*names, *found.plan.also]:
        matched = "" if is_matched(found, arm) else " (not matched: nothing is claimed)"
        difference = _interval(kept(found, arm))
        lines.append(f"{arm}: {found.kept} over {CE} {difference}{matched}")
        rows = {metric: row(found, arm, metric) for metric in held_out(found, arm)}
        parts = {metric: one.by_map for metric, one in rows.items() if one.by_map is not None}
        corrected = holm({metric: part.p for metric, part in parts.items()})
        for metric in parts:
            said = _said(found, arm, rows[metric], corrected[metric])
            lines.append(f"  the map's own part of {metric} (held out): {said}")
    return lines


def _said(found: Found, arm: str, one: Row, p: float) -> str:
    """Claimed only where the map's part is above zero and above every control."""
    part = one.by_map
    assert part is not None, "only metrics with parts are judged"
    said = _interval(part)
    if part.high < 0:
        return f"{said}. Worse"
    if not (part.low > 0 and p < LEVEL):
        return f"{said}. A null; a true {part.mde:.3f} would have been found in 80 of 100"
    against = one.over if arm == found.main else {CE: one.over[CE]}
    if short := [other for other, gain in against.items() if not gain.low > 0]:
        return f"{said}. Above zero, but not shown above {', '.join(short)}: not claimed"
    if arm != found.main:
        return f"{said}. Above {CE}; its own controls did not run: make it the objective"
    if not is_matched(found, arm):
        return f"{said}. Above {', '.join(against)}, at a lower accuracy: not claimed"
    return f"{said}. Claimed: above {', '.join(against)}"


def hypotheses(found: Found) -> list[Hypothesis]:
    """H1 to H6, as far as this refinement asked them."""
    return [
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


def _h2(found: Found) -> Hypothesis:
    asks = "the map's own part of held-out ROAD rises at matched accuracy"
    arm = found.main
    if arm not in found.arms or ROAD in trained(found, arm):
        return Hypothesis("H2", asks, "not asked", "the objective's arm did not run")
    one = row(found, arm, ROAD)
    assert one.by_map is not None, "ROAD is measured of both maps"
    over = one.over[CE]
    matched = is_matched(found, arm)
    says = (
        f"{_interval(one.by_map)}, over {CE} {_interval(over)}; {found.kept} against {CE} "
        f"{_interval(kept(found, arm))}{'' if matched else ', not matched'}; of these starts alone "
        f"{_interval(of_these_starts(found.by_map(arm, ROAD)))}"
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
        f"{_interval(part)}; each on its own network {_interval(whole)}; {found.kept} "
        f"{_interval(alike)}"
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
    place, faith = (
        told(found.by_map(arm, metric) - found.by_map(CE, metric)) for metric in (RANK, ROAD)
    )
    says = f"map's part over {CE}: {RANK} {_interval(place)}, {ROAD} {_interval(faith)}"
    if place.low > 0 and faith.low > 0:
        return Hypothesis("H4", asks, "no", f"{says}: both rise")
    if place.high < 0:
        return Hypothesis("H4", asks, "no", says)
    if place.low > 0:
        return Hypothesis("H4", asks, "yes", f"{says} (detectable {faith.mde:.3f})")
    return Hypothesis("H4", asks, "undecided", says)


def _is_energy(kind: str, arm: str) -> bool:
    return kind == "energy" and arm == "objective"


def _h5(found: Found) -> Hypothesis:
    asks = f"random targets give less than {SHARE:.0%} of the gain"
    if found.main not in found.arms or "random" not in found.arms:
        return Hypothesis("H5", asks, "not asked", "the random arm did not run")
    gains = {
        arm: found.by_map(arm, ROAD) - found.by_map(CE, ROAD) for arm in (found.main, "random")
    }
    whole, share = told(gains[found.main]), told(gains["random"])
    excess = told(gains["random"] - SHARE * gains[found.main])
    says = (
        f"map's part of {ROAD} over {CE}: random {_interval(share)}, objective {_interval(whole)}; "
        f"random less {SHARE:.0%} of it {_interval(excess)}"
    )
    if not whole.low > 0:
        return Hypothesis("H5", asks, "undecided", f"{says}: no gain to have a share of")
    return Hypothesis("H5", asks, _below(excess), says)


def _h6(found: Found) -> Hypothesis:
    asks = "the gain does not transfer to |gradient|"
    if found.main not in found.arms or GRADIENT not in found.plan.judging.held_out:
        return Hypothesis("H6", asks, "not asked", f"--judging.held_out has no {GRADIENT}")
    own, other = (
        found.by_map(found.main, ROAD, explainer) - found.by_map(CE, ROAD, explainer)
        for explainer in (MAP, GRADIENT)
    )
    whole, moved = told(own), told(other)
    excess = told(other - SHARE * own)
    says = (
        f"map's part of {ROAD} over {CE}: |gradient| {_interval(moved)}, refined explainer "
        f"{_interval(whole)}; the former less {SHARE:.0%} of the latter {_interval(excess)}"
    )
    if not whole.low > 0:
        return Hypothesis("H6", asks, "undecided", f"{says}: no gain to transfer")
    return Hypothesis("H6", asks, "no" if moved.low > 0 else _below(excess), says)


def _below(excess: Gain) -> Answer:
    if excess.high < 0:
        return "yes"
    return "no" if excess.low > 0 else "undecided"


def _interval(gain: Gain) -> str:
    return f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def mean_of(found: Found, arm: str, metric: str, explainer: str = MAP) -> float:
    """A metric of an arm's maps on its networks, in the metric's own direction."""
    return float(np.nanmean(found.maps(arm, metric, explainer))) * signed(metric)
