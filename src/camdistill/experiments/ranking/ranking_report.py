"""Reports a ranking as text, as `results.json`, as a chart and as TensorBoard scalars."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from camdistill import tags
from camdistill.experiments.ranking.leakage import Leak
from camdistill.experiments.ranking.ranking_analysis import (
    LEVEL,
    Condition,
    Gate,
    RankingRow,
    agreements,
    area,
    conditions,
    gates,
    ladder_correlation,
    mixtures,
    orders_agree,
    pairs,
    table,
)
from camdistill.experiments.ranking.ranking_arms import Arm
from camdistill.experiments.ranking.ranking_run import RankingRuns
from camdistill.experiments.ranking.teacher_outputs import load_held_out
from camdistill.experiments.shared.seed_statistics import Gain
from camdistill.measure.intervals import Interval
from camdistill.report.figures.intervals import interval_chart
from camdistill.report.figures.pictures import Picture
from camdistill.report.results import Cell, text_table
from camdistill.report.tensorboard import TensorBoardLogger
from camdistill.store.atomic_files import folder_name

RUNS = "tensorboard"


def gate_text(runs: RankingRuns) -> str:
    """The sanity gates, a line each, in every condition where controls ran."""
    lines = []
    for condition in _conditions_with_controls(runs):
        lines += [f"Sanity gates, {_condition_name(condition)}, {seeds_of(runs)}:"]
        lines += [_gate_line(gate) for gate in gates(runs, condition)]
    return "\n".join(lines)


def ranking_text(runs: RankingRuns, leaks: Mapping[str, Leak]) -> str:
    """Tables of all conditions, then what holds across them."""
    parts = []
    for condition in conditions(runs):
        rows = table(runs, condition)
        cells = {name: _cells(row, leaks.get(name)) for name, row in rows.items()}
        parts.append(text_table(cells, corner=_condition_name(condition)))
        parts.append(_describe_pairs(runs, condition))
    parts += [_across(runs), one_seed_text(runs)]
    return "\n\n".join(part for part in parts if part)


def ranking_results(
    runs: RankingRuns, leaks: Mapping[str, Leak], blank: Mapping[str, float]
) -> dict[str, object]:
    """Everything that was found, by name."""
    study = runs.study
    records = runs.records.values()
    return {
        "n": next(iter(records)).images,
        "seeds": list(study.seeds),
        "students": {
            family: {
                f"n={n}": {name: _values(row) for name, row in table(runs, (family, n)).items()}
                for n in study.n
            }
            for family in study.students
        },
        "pairs": {
            _condition_name(condition): [
                {**pair._asdict(), "gain": pair.gain._asdict()} for pair in pairs(runs, condition)
            ]
            for condition in conditions(runs)
        },
        "gates": {
            _condition_name(condition): [gate._asdict() for gate in gates(runs, condition)]
            for condition in _conditions_with_controls(runs)
        },
        "area": {
            family: {
                arm.name: arm_area._asdict()
                for arm in _methods(runs)
                if (arm_area := area(runs, family, arm)) is not None
            }
            for family in study.students
        },
        "ladders": _ladders(runs),
        "orders": orders_agree(runs),
        "leakage": {name: pair._asdict() for name, pair in leaks.items()},
        "blank": dict(blank),
        "betas": {f"{family}: {name}": beta for (family, name), beta in runs.betas.items()},
        "runs": len(runs.records),
        "seconds_of_runs": round(sum(pair.seconds for pair in records), 1),
    }


def ranking_chart(runs: RankingRuns) -> Picture:
    """Gains over students without maps, a chart for each family and n."""
    rows: dict[str, dict[str, Interval]] = {}
    for condition in conditions(runs):
        for name, row in table(runs, condition).items():
            if row.gain is not None:
                interval = Interval(row.gain.mean, row.gain.low, row.gain.high)
                rows.setdefault(name, {})[_condition_name(condition)] = interval
    over = " over images" if len(runs.study.seeds) == 1 else ""  # short: it stands on one chart
    title = f"Simulatability gain, 95 % intervals{over}, {seeds_of(runs)}"
    zero = {_condition_name(condition): 0.0 for condition in conditions(runs)}
    return interval_chart(rows, title=title, references=zero)


def log_scalars(runs: RankingRuns, folder: Path) -> Path:
    """Agreement and gain as TensorBoard scalars: a run for each arm, n as the step."""
    for old in (folder / RUNS).glob("*/events.out.tfevents*"):
        old.unlink()  # a study of other arms is drawn anew
        if not any(old.parent.iterdir()):
            old.parent.rmdir()
    by_arm: dict[str, dict[int, dict[str, float]]] = {}
    for family, n in conditions(runs):
        for name, row in table(runs, (family, n)).items():
            values = {tags.on_test(tags.AGREEMENT): row.agreement.mean}
            if row.gain is not None:
                values[tags.GAIN] = row.gain.mean
            run = folder_name(f"{family}.{name}")
            by_arm.setdefault(run, {})[n] = values
    for run, values_by_n in by_arm.items():
        logger = TensorBoardLogger(folder, name=RUNS, version=run)
        for n, values in sorted(values_by_n.items()):
            logger.log_metrics(values, n)
        logger.finalize("success")
    return folder / RUNS


def seeds_of(runs: RankingRuns) -> str:
    """How many students each number is of: "1 seed"."""
    count = len(runs.study.seeds)
    return f"{count} seed{'s' if count > 1 else ''}"


def one_class_text(runs: RankingRuns) -> str:
    """What must be said of a teacher that names one class for all; empty for others."""
    _, logits = load_held_out(runs.arm_trainer.cached_answers, "test")
    named = torch.unique(logits.argmax(1))
    if len(named) > 1:
        return ""
    return (
        f"The teacher names class {int(named)} for all {len(logits)} test images: to agree with it "
        "says nothing. Are its weights, mean and std those of these images?"
    )


def one_seed_text(runs: RankingRuns) -> str:
    """What a study of one seed must say; empty for several."""
    note = "One seed: intervals and p are over test images alone and say nothing of other students."
    return note if len(runs.study.seeds) == 1 else ""


def _describe_pairs(runs: RankingRuns, condition: Condition) -> str:
    method_pairs = pairs(runs, condition)
    if not method_pairs:
        return ""
    apart = [f"{pair.better} > {pair.worse}" for pair in method_pairs if pair.p_holm < LEVEL]
    differences = "; ".join(apart) or "none"
    return f"Told apart, of {len(method_pairs)} pairs of methods (p < {LEVEL}, Holm): {differences}"


def _across(runs: RankingRuns) -> str:
    lines = []
    for name, tau in orders_agree(runs).items():
        if not np.isnan(tau):
            lines.append(f"Kendall's tau of the methods' orders, {name}: {tau:.2f}")
    for name, rho in _ladders(runs).items():
        if not np.isnan(rho):
            lines.append(f"Spearman of share and agreement, {name}: {rho:.2f}")
    edges = {min(runs.study.tuning.betas), max(runs.study.tuning.betas)}
    if len(runs.study.tuning.betas) > 2:
        several = len(runs.study.students) > 1
        names = [
            f"{name}{f' of {family}' if several else ''} ({beta:g})"
            for (family, name), beta in runs.betas.items()
            if beta in edges
        ]
        if names:
            lines.append(f"Beta at the edge of what was tried: {', '.join(names)}")
    return "\n".join(lines)


def _ladders(runs: RankingRuns) -> dict[str, float]:
    ladders = {}
    for condition in _conditions_with_controls(runs):
        for method in runs.study.with_controls:
            steps = mixtures(runs, condition, Arm(method))
            if len(steps) > 2:
                rho = ladder_correlation(list(steps), agreements(runs, condition, steps))
                ladders[f"{method}, {_condition_name(condition)}"] = rho
    return ladders


def _conditions_with_controls(runs: RankingRuns) -> list[Condition]:
    return [condition for condition in conditions(runs) if condition[1] in runs.study.n_of_controls]


def _methods(runs: RankingRuns) -> list[Arm]:
    return [arm for arm in runs.arms if arm.of_method]


def _condition_name(condition: Condition) -> str:
    return f"{condition[0]} n={condition[1]}"


def _gate_line(gate: Gate) -> str:
    verdict = {True: "holds", False: "FAILS", None: "not run"}[gate.holds]
    return f"  {verdict:<8}{gate.name}: {gate.says}"


def _cells(row: RankingRow, leaked: Leak | None) -> dict[str, Cell]:
    return {
        "agreement": row.agreement,
        "beta": f"{row.beta:g}",
        "gain": _interval(row.gain),
        "p (Holm)": row.p_holm,
        "detectable": row.gain.mde if row.gain else None,
        "over best control": _interval(row.specific),
        "leak": leaked.accuracy.mean if leaked else None,
    }


def _interval(gain: Gain | None) -> Interval | None:
    return None if gain is None else Interval(gain.mean, gain.low, gain.high)


def _values(row: RankingRow) -> dict[str, object]:
    return {
        "agreement": row.agreement,
        "kl": row.kl,
        "beta": row.beta,
        "gain": row.gain._asdict() if row.gain else None,
        "p_holm": row.p_holm,
        "p_sign_flip": row.p_sign_flip,
        "error_reduction": row.error_reduction,
        "specific_gain": row.specific._asdict() if row.specific else None,
        "over": {name: gain._asdict() for name, gain in (row.over or {}).items()},
    }
