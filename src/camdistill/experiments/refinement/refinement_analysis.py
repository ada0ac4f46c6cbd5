"""What a refinement may claim: the map's own part, against every control."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from camdistill.experiments.refinement.refinement_config import CE
from camdistill.experiments.refinement.refinement_measurement import (
    LOCALISATION,
    MAP,
    trained_metrics,
)
from camdistill.experiments.refinement.refinement_run import Found, Scores, signed
from camdistill.experiments.shared.seed_statistics import Bootstrap, Gain, holm

LEVEL = 0.05
ROAD = "road"
TARGETS = ("fidelity", "view_cosine", "learned")  # what was wanted, which is no faithfulness


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
    """The metrics that an arm was trained on, whatever stood where its images were changed."""
    shown = found.plan.objective.replacement  # where they are measured
    return trained_metrics(replace(found.plan.refined[arm][0], replacement=shown))


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
        difference = interval(kept(found, arm))
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
    said = interval(part)
    if part.high < 0:
        return f"{said}. Worse"
    if not (part.low > 0 and p < LEVEL):
        detectable = f"a true {part.mde:.3f} would have been found in 80 of 100, uncorrected"
        return f"{said}. A null; {detectable}"
    against = one.over if arm == found.main else {CE: one.over[CE]}
    if short := [other for other, gain in against.items() if not gain.low > 0]:
        return f"{said}. Above zero, but not shown above {', '.join(short)}: not claimed"
    above = ", ".join(_named(found, other) for other in against)
    if arm != found.main:
        return f"{said}. Above {above}; its own controls did not run: make it the objective"
    if missing := [one for one in found.plan.objective.arms if one not in (*against, "objective")]:
        return f"{said}. Above {above}; {', '.join(missing)} did not run: not claimed"
    if not is_matched(found, arm):
        return f"{said}. Above {above}, at a lower accuracy: not claimed"
    if len(found.plan.starts) == 1:
        return f"{said}. Above {above}, from one start, which says nothing of others: not claimed"
    return f"{said}. Claimed: above {above}"


def _named(found: Found, arm: str) -> str:
    return arm if is_matched(found, arm) else f"{arm} (not matched)"


def interval(gain: Gain) -> str:
    """A gain as text."""
    return f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def mean_of(found: Found, arm: str, metric: str, explainer: str = MAP) -> float:
    """A metric of an arm's maps on its networks, in the metric's own direction."""
    return float(np.nanmean(found.maps(arm, metric, explainer))) * signed(metric)
