"""Analyzes a ranking: gains with intervals, sanity gates, mixtures and agreement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from camdistill.experiments.ranking.leakage import Leak, leak
from camdistill.experiments.ranking.ranking_arms import NONE, Arm
from camdistill.experiments.ranking.ranking_run import RankingRuns
from camdistill.experiments.ranking.teacher_outputs import pool_of
from camdistill.experiments.shared.seed_statistics import (
    Bootstrap,
    Gain,
    holm,
    rank_agreement,
    sign_flip_p,
)
from camdistill.measure.intervals import Interval, bootstrap_interval, seed_interval

LEVEL = 0.05


@dataclass(frozen=True)
class RankingRow:
    """One arm of one family at one n.

    Attributes:
        agreement: With the teacher on test images; the interval is Student's t over seeds.
        kl: From the teacher's probabilities, in nats.
        beta: The chosen weight of its maps.
        gain: SG, over the students without maps; None of those.
        p_holm: p value of the gain, corrected for the number of methods; None of controls.
        p_sign_flip: p value of the gain, exact, from the signs by seed alone.
        error_reduction: The gain's share of what students without maps get wrong.
        specific: SSG, over the best control of each seed; None where no control ran.
        over: The gain over each control.
    """

    agreement: Interval
    kl: float
    beta: float
    gain: Gain | None = None
    p_holm: float | None = None
    p_sign_flip: float | None = None
    error_reduction: float | None = None
    specific: Gain | None = None
    over: Mapping[str, Gain] | None = None


class Gate(NamedTuple):
    """A condition without which no ranking should be believed.

    Attributes:
        name: What must hold.
        holds: None where the study has not what it takes.
        says: The numbers.
    """

    name: str
    holds: bool | None
    says: str


Condition = tuple[str, int]
Scores = NDArray[np.float64]


def scores_of(runs: RankingRuns, condition: Condition, arm: Arm) -> Scores | None:
    """Agreement by seed and test image; None where the arm did not run."""
    family, n = condition
    keys = [(family, n, arm.name, seed) for seed in runs.study.seeds]
    if any(key not in runs.records for key in keys):
        return None
    return np.array([runs.records[key].scores() for key in keys], np.float64)


def conditions(runs: RankingRuns) -> list[Condition]:
    """Every family at every n."""
    return [(family, n) for family in runs.study.students for n in runs.study.n]


def competing_arms(runs: RankingRuns, method: Arm) -> list[Arm]:
    """The controls that a method has to beat: its own, and those that need no method."""
    return [
        arm for arm in runs.arms if arm.control is not None and arm.method in (None, method.method)
    ]


@lru_cache(maxsize=64)
def bootstrap(runs: RankingRuns, condition: Condition) -> Bootstrap:
    """Every arm that ran in a condition, resampled together."""
    scores = {arm.name: scores_of(runs, condition, arm) for arm in runs.arms}
    return Bootstrap(
        {name: arm_scores for name, arm_scores in scores.items() if arm_scores is not None}
    )


@lru_cache(maxsize=64)
def table(runs: RankingRuns, condition: Condition) -> dict[str, RankingRow]:
    """The rows of one family at one n, methods first, by their gain."""
    rows = {arm: _row(runs, condition, arm) for arm in runs.arms if _was_run(runs, condition, arm)}
    methods = [arm for arm in rows if arm.of_method]
    gains = {arm.name: row.gain for arm, row in rows.items() if row.gain is not None}
    corrected = holm({arm.name: gains[arm.name].p for arm in methods})
    order = sorted(rows, key=lambda arm: (not arm.of_method, -rows[arm].agreement.mean))
    return {arm.name: replace(rows[arm], p_holm=corrected.get(arm.name)) for arm in order}


class MethodPair(NamedTuple):
    """Two methods of one condition, the better one first.

    Attributes:
        better: Its name.
        worse: The other's.
        gain: Gain of the better over the worse.
        p_holm: Corrected for the number of pairs.
    """

    better: str
    worse: str
    gain: Gain
    p_holm: float


def pairs(runs: RankingRuns, condition: Condition) -> list[MethodPair]:
    """Every two methods against each other: whether the data tell them apart."""
    boot = bootstrap(runs, condition)
    names = [name for name, row in table(runs, condition).items() if row.p_holm is not None]
    gains = {two: boot.gain(*two) for two in combinations(names, 2)}
    corrected = holm({" ".join(two): gain.p for two, gain in gains.items()})
    return [MethodPair(*two, gain, corrected[" ".join(two)]) for two, gain in gains.items()]


def gates(runs: RankingRuns, condition: Condition) -> list[Gate]:
    """The sanity gates, those of a method's maps for each method that has controls."""
    boot = bootstrap(runs, condition)
    checked_gates = [_random_gate(boot)]
    for method in runs.study.with_controls:
        steps = mixtures(runs, condition, Arm(method))
        checked_gates.append(_random_teacher_gate(method, boot))
        checked_gates.append(_mixing_gate(runs, condition, method, steps))
        checked_gates.append(_self_gate(method, boot))
    return checked_gates


def mixtures(runs: RankingRuns, condition: Condition, method: Arm) -> dict[float, Arm]:
    """Arms that ran, by the share of the method's maps: 0 is shuffled, 1 the method itself."""
    steps = {0.0: Arm(method.method, "shuffled"), 1.0: method}
    steps |= {share: Arm(method.method, share=share) for share in runs.study.shares}
    return {share: arm for share, arm in sorted(steps.items()) if _was_run(runs, condition, arm)}


def agreements(runs: RankingRuns, condition: Condition, steps: Mapping[float, Arm]) -> list[float]:
    """Mean agreement of each step of a ladder."""
    rows = table(runs, condition)
    return [rows[arm.name].agreement.mean for arm in steps.values()]


def ladder_correlation(shares: Sequence[float], agreements: Sequence[float]) -> float:
    """Spearman's correlation of share and mean agreement; NaN for under three, or one value."""
    if len(shares) < 3 or len(set(agreements)) < 2:
        return float("nan")
    return float(spearmanr(shares, agreements).statistic)


def area(runs: RankingRuns, family: str, arm: Arm) -> Gain | None:
    """ASG: the gain averaged over all n of the study; None if one is missing."""
    both = []
    for which in (arm, NONE):
        scores = [scores_of(runs, (family, n), which) for n in runs.study.n]
        known_scores = [arm_scores for arm_scores in scores if arm_scores is not None]
        if len(known_scores) < len(scores):
            return None
        both.append(np.mean(known_scores, axis=0))
    return Bootstrap({"arm": both[0], "none": both[1]}).gain("arm", "none")


def leaks(runs: RankingRuns) -> dict[str, Leak]:
    """How well a small CNN tells the teacher's class from each method's maps alone."""
    family, n = next(iter(runs.study.students)), max(runs.study.n)
    classes = pool_of(runs.arm_trainer.cached_answers, n).logits[:, 0].argmax(1)
    leak_by_name = {}
    for arm in runs.arms:
        kinds = ("class_mean", "shuffled_in_class")
        if arm.of_method or arm.control in kinds:
            maps = runs.arm_trainer.maps(arm, family, n)
            assert maps is not None, "only 'none' has no maps"
            leak_by_name[arm.name] = leak(maps[:, 0], classes)
    return leak_by_name


def blanks(runs: RankingRuns) -> dict[str, float]:
    """Share of images of which a method's map says nothing: it is nowhere above zero."""
    family, n = next(iter(runs.study.students)), max(runs.study.n)
    shares = {}
    for arm in runs.arms:
        if arm.of_method:
            maps = runs.arm_trainer.maps(arm, family, n)
            assert maps is not None, "only 'none' has no maps"
            shares[arm.name] = float((maps.amax((2, 3)) == 0).double().mean())
    return shares


def orders_agree(runs: RankingRuns) -> dict[str, float]:
    """Kendall's tau between the methods' orders in every two conditions."""
    gains: dict[str, dict[str, float]] = {}
    for family, n in conditions(runs):
        base = scores_of(runs, (family, n), NONE)
        assert base is not None, "the arm without maps always runs"
        methods = [arm for arm in runs.arms if arm.of_method]
        scored = {arm.name: scores_of(runs, (family, n), arm) for arm in methods}
        gains[f"{family} n={n}"] = {
            name: float((arm_scores - base).mean())
            for name, arm_scores in scored.items()
            if arm_scores is not None
        }
    return rank_agreement(gains)


def _was_run(runs: RankingRuns, condition: Condition, arm: Arm) -> bool:
    return arm.name in bootstrap(runs, condition)


def _row(runs: RankingRuns, condition: Condition, arm: Arm) -> RankingRow:
    scores, base = (scores_of(runs, condition, scored_arm) for scored_arm in (arm, NONE))
    assert scores is not None, "the arm ran"
    assert base is not None, "the arm without maps always runs"
    family, n = condition
    records = [runs.records[family, n, arm.name, seed] for seed in runs.study.seeds]
    row = RankingRow(
        agreement=_over_seeds(scores),
        kl=float(np.mean([scored_arm.kl for scored_arm in records])),
        beta=records[0].beta,
    )
    if arm == NONE:
        return row
    boot = bootstrap(runs, condition)
    over_none = boot.gain(arm.name, NONE.name)
    row = replace(
        row,
        gain=over_none,
        p_sign_flip=sign_flip_p((scores - base).mean(1)),
        error_reduction=over_none.mean / (1 - base.mean()) if base.mean() < 1 else None,
    )
    others = [
        scored_arm.name for scored_arm in competing_arms(runs, arm) if scored_arm.name in boot
    ]
    if not arm.of_method or not others:
        return row
    return replace(
        row,
        specific=boot.specific_gain(arm.name, others),
        over={name: boot.gain(arm.name, name) for name in others},
    )


def _over_seeds(scores: Scores) -> Interval:
    return seed_interval(scores.mean(1)) if len(scores) > 1 else bootstrap_interval(scores[0])


def _random_gate(boot: Bootstrap) -> Gate:
    name, control = "random maps teach nothing", Arm(control="random").name
    if control not in boot:
        return Gate(name, None, "needs the control 'random'")
    gain = boot.gain(control, NONE.name)
    return Gate(
        name, gain.low <= 0, f"gain {_describe_gain(gain)}; its lower bound must be 0 or less"
    )


def _random_teacher_gate(method: str, boot: Bootstrap) -> Gate:
    name = f"{method}: a teacher of random weights teaches no more than the mean map"
    randomized, mean = Arm(method, "randomized").name, Arm(method, "mean").name
    if randomized not in boot or mean not in boot:
        return Gate(name, None, "needs the controls 'mean' and 'randomized' (of a teacher's maps)")
    gain = boot.gain(randomized, mean)
    says = f"difference {_describe_gain(gain)}; its lower bound must be 0 or less"
    return Gate(name, gain.low <= 0, says)


def _mixing_gate(
    runs: RankingRuns, condition: Condition, method: str, steps: Mapping[float, Arm]
) -> Gate:
    name = f"{method}: the more of its maps among shuffled ones, the better"
    if len(steps) < 3:
        return Gate(name, None, "needs the control 'shuffled' and mixtures (shares)")
    boot, arms = bootstrap(runs, condition), [arm.name for arm in steps.values()]
    rises = [boot.gain(after, before) for before, after in [*pairwise(arms), (arms[0], arms[-1])]]
    holds = all(rise.high >= 0 for rise in rises)
    means = agreements(runs, condition, steps)
    levels = ", ".join(f"{share:g}: {mean:.3f}" for share, mean in zip(steps, means, strict=True))
    rho = ladder_correlation(list(steps), means)
    order = "" if np.isnan(rho) else f"; Spearman {rho:.2f}"
    return Gate(name, holds, f"agreement by share {levels}{order}; none may fall for sure")


def _self_gate(method: str, boot: Bootstrap) -> Gate:
    name = f"{method}: no gain over itself"
    if method not in boot:
        return Gate(name, None, "needs the method's own runs")
    gain = boot.specific_gain(method, [method])
    return Gate(name, gain.mean == 0, f"specific gain {gain.mean:g}")


def _describe_gain(gain: Gain) -> str:
    return f"{gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
