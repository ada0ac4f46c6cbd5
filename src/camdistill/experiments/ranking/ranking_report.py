"""A ranking as text, as `results.json`, as a chart's table and as TensorBoard scalars."""

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
    Row,
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
from camdistill.experiments.ranking.ranking_run import Found
from camdistill.experiments.ranking.teacher_outputs import held_out
from camdistill.experiments.shared.seed_statistics import Gain
from camdistill.measure.intervals import Interval
from camdistill.report.figures.intervals import interval_chart
from camdistill.report.figures.pictures import Picture
from camdistill.report.results import Cell, text_table
from camdistill.report.tensorboard import TensorBoardLogger
from camdistill.store.atomic_files import folder_name

RUNS = "tensorboard"


def gate_text(found: Found) -> str:
    """The sanity gates, a line each, in every condition where controls ran."""
    lines = []
    for condition in _controlled(found):
        lines += [f"Sanity gates, {_named(condition)}, {seeds_of(found)}:"]
        lines += [_gate_line(gate) for gate in gates(found, condition)]
    return "\n".join(lines)


def ranking_text(found: Found, leaks: Mapping[str, Leak]) -> str:
    """Tables of all conditions, then what holds across them."""
    parts = []
    for condition in conditions(found):
        rows = table(found, condition)
        cells = {name: _cells(row, leaks.get(name)) for name, row in rows.items()}
        parts.append(text_table(cells, corner=_named(condition)))
        parts.append(_told_apart(found, condition))
    parts += [_across(found), one_seed_text(found)]
    return "\n\n".join(part for part in parts if part)


def results(
    found: Found, leaks: Mapping[str, Leak], blank: Mapping[str, float]
) -> dict[str, object]:
    """Everything that was found, by name."""
    study = found.study
    records = found.records.values()
    return {
        "n": next(iter(records)).images,
        "seeds": list(study.seeds),
        "students": {
            family: {
                f"n={n}": {name: _values(row) for name, row in table(found, (family, n)).items()}
                for n in study.n
            }
            for family in study.students
        },
        "pairs": {
            _named(condition): [
                {**one._asdict(), "gain": one.gain._asdict()} for one in pairs(found, condition)
            ]
            for condition in conditions(found)
        },
        "gates": {
            _named(condition): [gate._asdict() for gate in gates(found, condition)]
            for condition in _controlled(found)
        },
        "area": {
            family: {
                arm.name: whole._asdict()
                for arm in _methods(found)
                if (whole := area(found, family, arm)) is not None
            }
            for family in study.students
        },
        "ladders": _ladders(found),
        "orders": orders_agree(found),
        "leakage": {name: one._asdict() for name, one in leaks.items()},
        "blank": dict(blank),
        "betas": {f"{family}: {name}": beta for (family, name), beta in found.betas.items()},
        "runs": len(found.records),
        "seconds_of_runs": round(sum(one.seconds for one in records), 1),
    }


def chart(found: Found) -> Picture:
    """Gains over students without maps, a chart for each family and n."""
    rows: dict[str, dict[str, Interval]] = {}
    for condition in conditions(found):
        for name, row in table(found, condition).items():
            if row.gain is not None:
                interval = Interval(row.gain.mean, row.gain.low, row.gain.high)
                rows.setdefault(name, {})[_named(condition)] = interval
    over = " over images" if len(found.study.seeds) == 1 else ""  # short: it stands on one chart
    title = f"Simulatability gain, 95 % intervals{over}, {seeds_of(found)}"
    zero = {_named(condition): 0.0 for condition in conditions(found)}
    return interval_chart(rows, title=title, references=zero)


def log_scalars(found: Found, folder: Path) -> Path:
    """Agreement and gain as TensorBoard scalars: a run for each arm, n as the step."""
    for old in (folder / RUNS).glob("*/events.out.tfevents*"):
        old.unlink()  # a study of other arms is drawn anew
        if not any(old.parent.iterdir()):
            old.parent.rmdir()
    by_arm: dict[str, dict[int, dict[str, float]]] = {}
    for family, n in conditions(found):
        for name, row in table(found, (family, n)).items():
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


def seeds_of(found: Found) -> str:
    """How many students each number is of: "1 seed"."""
    count = len(found.study.seeds)
    return f"{count} seed{'s' if count > 1 else ''}"


def one_class_text(found: Found) -> str:
    """What must be said of a teacher that names one class for all; empty for others."""
    _, logits = held_out(found.classroom.known, "test")
    named = torch.unique(logits.argmax(1))
    if len(named) > 1:
        return ""
    return (
        f"The teacher names class {int(named)} for all {len(logits)} test images: to agree with it "
        "says nothing. Are its weights, mean and std those of these images?"
    )


def one_seed_text(found: Found) -> str:
    """What a study of one seed must say; empty for several."""
    said = "One seed: intervals and p are over test images alone and say nothing of other students."
    return said if len(found.study.seeds) == 1 else ""


def _told_apart(found: Found, condition: Condition) -> str:
    known = pairs(found, condition)
    if not known:
        return ""
    apart = [f"{one.better} > {one.worse}" for one in known if one.p_holm < LEVEL]
    said = "; ".join(apart) or "none"
    return f"Told apart, of {len(known)} pairs of methods (p < {LEVEL}, Holm): {said}"


def _across(found: Found) -> str:
    lines = []
    for name, tau in orders_agree(found).items():
        if not np.isnan(tau):
            lines.append(f"Kendall's tau of the methods' orders, {name}: {tau:.2f}")
    for name, rho in _ladders(found).items():
        if not np.isnan(rho):
            lines.append(f"Spearman of share and agreement, {name}: {rho:.2f}")
    edges = {min(found.study.tuning.betas), max(found.study.tuning.betas)}
    if len(found.study.tuning.betas) > 2:
        several = len(found.study.students) > 1
        names = [
            f"{name}{f' of {family}' if several else ''} ({beta:g})"
            for (family, name), beta in found.betas.items()
            if beta in edges
        ]
        if names:
            lines.append(f"Beta at the edge of what was tried: {', '.join(names)}")
    return "\n".join(lines)


def _ladders(found: Found) -> dict[str, float]:
    ladders = {}
    for condition in _controlled(found):
        for method in found.study.with_controls:
            steps = mixtures(found, condition, Arm(method))
            if len(steps) > 2:
                rho = ladder_correlation(list(steps), agreements(found, condition, steps))
                ladders[f"{method}, {_named(condition)}"] = rho
    return ladders


def _controlled(found: Found) -> list[Condition]:
    return [one for one in conditions(found) if one[1] in found.study.n_of_controls]


def _methods(found: Found) -> list[Arm]:
    return [arm for arm in found.arms if arm.of_method]


def _named(condition: Condition) -> str:
    return f"{condition[0]} n={condition[1]}"


def _gate_line(gate: Gate) -> str:
    verdict = {True: "holds", False: "FAILS", None: "not run"}[gate.holds]
    return f"  {verdict:<8}{gate.name}: {gate.says}"


def _cells(row: Row, leaked: Leak | None) -> dict[str, Cell]:
    return {
        "agreement": row.agreement,
        "beta": f"{row.beta:g}",
        "gain": _interval(row.gain),
        "p (Holm)": row.p_holm,
        "detectable": row.gain.mde if row.gain else None,
        "over best control": _interval(row.specific),
        "leak": leaked.accuracy.mean if leaked else None,
    }


def _interval(found: Gain | None) -> Interval | None:
    return None if found is None else Interval(found.mean, found.low, found.high)


def _values(row: Row) -> dict[str, object]:
    return {
        "agreement": row.agreement,
        "kl": row.kl,
        "beta": row.beta,
        "gain": row.gain._asdict() if row.gain else None,
        "p_holm": row.p_holm,
        "p_sign_flip": row.p_sign_flip,
        "error_reduction": row.error_reduction,
        "specific_gain": row.specific._asdict() if row.specific else None,
        "over": {name: one._asdict() for name, one in (row.over or {}).items()},
    }
