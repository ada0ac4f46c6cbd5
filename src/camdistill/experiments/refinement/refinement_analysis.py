"""Analyzes a refinement: which part of a gain is the map's, against every control."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from camdistill.experiments.refinement.refinement_config import CE
from camdistill.experiments.refinement.refinement_measurement import (
    LOCALIZATION,
    MAP,
    objective_metrics,
)
from camdistill.experiments.refinement.refinement_run import RefinementRuns, Scores, metric_sign
from camdistill.experiments.shared.seed_statistics import Bootstrap, Gain, holm

LEVEL = 0.05
ROAD = "road"
TARGET_METRICS = ("fidelity", "view_cosine", "learned")  # what was wanted, which is no faithfulness


@dataclass(frozen=True)
class ArmComparison:
    """An arm by one metric; larger is better in all of it.

    Attributes:
        value: Mean of the arm's maps on its networks, in the metric's own direction.
        total_gain: Over the starts' maps on the starts.
        by_answers: What the starts' maps gained on the arm's networks; None where it isn't known.
        by_map: The rest.
        by_map_over: The map's part less that of another arm, by arm.
        within_starts: The map's part less cross-entropy's, of these very starts: over images alone.
    """

    value: float
    total_gain: Gain
    by_answers: Gain | None
    by_map: Gain | None
    by_map_over: Mapping[str, Gain]
    within_starts: Gain | None = None


def estimate_gain(values: Scores) -> Gain:
    """The mean of paired differences [starts, images], with its two-level interval."""
    complete = values[:, ~np.isnan(values).any(0)]
    if not complete.shape[1]:
        nan = float("nan")
        return Gain(nan, nan, nan, nan, nan, nan)
    return Bootstrap({"values": complete, "zero": np.zeros_like(complete)}).gain("values", "zero")


def gain_within_starts(values: Scores) -> Gain:
    """The same for these very starts: over images alone, so that it says nothing of others."""
    return estimate_gain(values.mean(0, keepdims=True))


def compare_arm(runs: RefinementRuns, arm: str, metric: str, explainer: str = MAP) -> ArmComparison:
    """One arm by one metric."""
    has_parts = runs.has_parts(metric, explainer)
    by_map_over, within_starts = {}, None
    if has_parts and arm != CE:
        map_gain = runs.by_map(arm, metric, explainer)
        within_starts = gain_within_starts(map_gain - runs.by_map(CE, metric, explainer))
        by_map_over = {
            other: estimate_gain(map_gain - runs.by_map(other, metric, explainer))
            for other in control_arms(runs)
            if other != arm
        }
    return ArmComparison(
        value=mean_score(runs, arm, metric, explainer),
        total_gain=estimate_gain(runs.total_gain(arm, metric, explainer)),
        by_answers=estimate_gain(runs.by_answers(arm, metric, explainer)) if has_parts else None,
        by_map=estimate_gain(runs.by_map(arm, metric, explainer)) if has_parts else None,
        by_map_over=by_map_over,
        within_starts=within_starts,
    )


def control_arms(runs: RefinementRuns) -> list[str]:
    """The arms that the objective is held against."""
    return [arm for arm in runs.arms if arm in (CE, "detached", "random", "shuffled")]


def training_metrics(runs: RefinementRuns, arm: str) -> tuple[str, ...]:
    """The metrics that an arm was trained on, whatever stood where its images were changed."""
    replacement = runs.plan.objective.replacement  # where they are measured
    return objective_metrics(replace(runs.plan.objectives_by_arm[arm][0], replacement=replacement))


def independent_metrics(runs: RefinementRuns, arm: str) -> list[str]:
    """The faithfulness metrics that an arm was not trained on, ROAD first."""
    metrics = [
        m for m in runs.metrics() if m not in training_metrics(runs, arm) and runs.has_parts(m)
    ]
    metrics = [m for m in metrics if m not in (*LOCALIZATION, *TARGET_METRICS)]
    return sorted(metrics, key=lambda metric: metric != ROAD)


def retention_gain(runs: RefinementRuns, arm: str) -> Gain:
    """Accuracy (without labels agreement with the start) less that of cross-entropy alone."""
    return estimate_gain(
        runs.scores(arm, runs.retention_metric) - runs.scores(CE, runs.retention_metric)
    )


def is_matched(runs: RefinementRuns, arm: str) -> bool:
    """Whether every start's arm was as accurate as cross-entropy alone, on validation images."""
    return all(runs.records[name, arm].matched for name in runs.plan.starts)


def refinement_verdict(runs: RefinementRuns) -> list[str]:
    """What may be claimed of every objective, a line each; nulls are said."""
    names = [runs.main_arm] if runs.main_arm in runs.arms else []
    lines = []
    for arm in [*names, *runs.plan.also]:
        matched = "" if is_matched(runs, arm) else " (not matched: nothing is claimed)"
        difference = format_gain(retention_gain(runs, arm))
        lines.append(f"{arm}: {runs.retention_metric} over {CE} {difference}{matched}")
        rows = {metric: compare_arm(runs, arm, metric) for metric in independent_metrics(runs, arm)}
        map_gains = {
            metric: comparison.by_map
            for metric, comparison in rows.items()
            if comparison.by_map is not None
        }
        corrected = holm({metric: gain.p for metric, gain in map_gains.items()})
        for metric in map_gains:
            claim = _describe_claim(runs, arm, rows[metric], corrected[metric])
            lines.append(f"  the map's own part of {metric} (held out): {claim}")
    return lines


def _describe_claim(runs: RefinementRuns, arm: str, entry: ArmComparison, p: float) -> str:
    """Claimed only where the map's part is above zero and above every control."""
    map_gain = entry.by_map
    assert map_gain is not None, "only metrics with parts are judged"
    numbers = format_gain(map_gain)
    if map_gain.high < 0:
        return f"{numbers}. Worse"
    if not (map_gain.low > 0 and p < LEVEL):
        detectable = f"a true {map_gain.mde:.3f} would have been found in 80 of 100, uncorrected"
        return f"{numbers}. A null; {detectable}"
    gain_by_control = entry.by_map_over if arm == runs.main_arm else {CE: entry.by_map_over[CE]}
    if not_beaten := [other for other, gain in gain_by_control.items() if not gain.low > 0]:
        return f"{numbers}. Above zero, but not shown above {', '.join(not_beaten)}: not claimed"
    beaten = ", ".join(_arm_words(runs, other) for other in gain_by_control)
    if arm != runs.main_arm:
        return f"{numbers}. Above {beaten}; its own controls did not run: make it the objective"
    if missing := [
        entry for entry in runs.plan.objective.arms if entry not in (*gain_by_control, "objective")
    ]:
        return f"{numbers}. Above {beaten}; {', '.join(missing)} did not run: not claimed"
    if not is_matched(runs, arm):
        return f"{numbers}. Above {beaten}, at a lower accuracy: not claimed"
    if len(runs.plan.starts) == 1:
        return (
            f"{numbers}. Above {beaten}, from one start, which says nothing of others: not claimed"
        )
    return f"{numbers}. Claimed: above {beaten}"


def _arm_words(runs: RefinementRuns, arm: str) -> str:
    return arm if is_matched(runs, arm) else f"{arm} (not matched)"


def format_gain(gain: Gain) -> str:
    """A gain as text."""
    return f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def mean_score(runs: RefinementRuns, arm: str, metric: str, explainer: str = MAP) -> float:
    """A metric of an arm's maps on its networks, in the metric's own direction."""
    return float(np.nanmean(runs.maps(arm, metric, explainer))) * metric_sign(metric)
