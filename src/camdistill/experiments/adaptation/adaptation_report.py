"""What adapting an explainer was worth, as text, as `results.json` and as a chart's table."""

import numpy as np
import torch

from camdistill.experiments.adaptation.adaptation_rounds import Learnt
from camdistill.experiments.adaptation.adaptation_run import Adapted
from camdistill.experiments.ranking.ranking_analysis import (
    LEVEL,
    Condition,
    bootstrap,
    conditions,
    table,
)
from camdistill.experiments.ranking.ranking_report import one_seed_text, seeds_of
from camdistill.experiments.shared.seed_statistics import Gain, holm
from camdistill.explain.learnable import LearnableCAM, sparsemax
from camdistill.measure.intervals import Interval
from camdistill.report.figures.intervals import interval_chart
from camdistill.report.figures.pictures import Picture
from camdistill.report.results import Cell, text_table

QUESTIONS = {
    "adapted - grad_cam": ("adapted", "grad_cam"),
    "adapted - randomised": ("adapted", "randomised"),
    "adapted - none": ("adapted", "none"),
    "grad_cam - none": ("grad_cam", "none"),
    "randomised - none": ("randomised", "none"),
}
"""Agreement of students on unseen images: randomised is the adapted explainer of a teacher of
random weights, with as many parameters learnt in the same way."""


def differences(adapted: Adapted, condition: Condition) -> dict[str, Gain]:
    """Paired differences of agreement between arms."""
    boot = bootstrap(adapted.found, condition)
    names = {**adapted.names, "none": "none"}
    return {what: boot.gain(names[a], names[b]) for what, (a, b) in QUESTIONS.items()}


def verdict(adapted: Adapted) -> str:
    """Whether adapting was worth it, in a line for each condition; Holm over the conditions."""
    first = "adapted - grad_cam"
    gains = {_named(one): differences(adapted, one) for one in conditions(adapted.found)}
    corrected = holm({name: found[first].p for name, found in gains.items()})
    lines = []
    for name, found in gains.items():
        own, control = found[first], found["adapted - randomised"]
        told = f"{own.mean:+.4f} [{own.low:+.4f}, {own.high:+.4f}], p {corrected[name]:.3f} (Holm)"
        if corrected[name] >= LEVEL:
            said = f"no difference from Grad-CAM found: {told}; {own.mde:.3f} is detectable"
        elif own.mean < 0:
            said = f"worse than Grad-CAM: {told}"
        elif control.low <= 0:
            said = f"better than Grad-CAM, not than parameters learnt on random weights: {told}"
        else:
            said = f"better than Grad-CAM: {told}"
        lines.append(f"{name}: {said}")
    if adapted.of_teacher.best == 0:
        lines.append(
            "no round was better than round 0: the adapted explainer is Grad-CAM itself, and what "
            "lies between them is rounding that training made larger"
        )
    return "\n".join(lines)


def adaptation_text(adapted: Adapted) -> str:
    """Rounds, parameters, agreement of fresh students, and what follows."""
    known = {"teacher": adapted.of_teacher, "random weights": adapted.of_random}
    parts = [
        "Rounds: divergence and agreement of the judging students\n"
        + "\n\n".join(text_table(_rounds(one), corner=name) for name, one in known.items()),
        "Parameters\n"
        + "\n\n".join(
            text_table(parameters(one.explainer), corner=name) for name, one in known.items()
        ),
    ]
    for condition in conditions(adapted.found):
        rows: dict[str, dict[str, Cell]] = {
            adapted.name_of(name): {"agreement": row.agreement, "KL": row.kl, "beta": row.beta}
            for name, row in table(adapted.found, condition).items()
        }
        parts.append(text_table(rows, corner=f"{_named(condition)}, {seeds_of(adapted.found)}"))
        gains = differences(adapted, condition)
        shown: dict[str, dict[str, Cell]] = {
            what: {"agreement": _interval(one), "p": one.p, "detectable": one.mde}
            for what, one in gains.items()
        }
        parts.append(text_table(shown, corner="difference"))
    parts += [verdict(adapted), one_seed_text(adapted.found)]
    return "\n\n".join(part for part in parts if part)


def adaptation_results(adapted: Adapted) -> dict[str, object]:
    """Everything that was found, by name."""
    study = adapted.found.study
    return {
        "n": next(iter(adapted.found.records.values())).images,
        "seeds": list(study.seeds),
        "explainers": {
            name: {
                "best_round": one.best,
                "rounds": [each._asdict() for each in one.rounds],
                "layers": parameters(one.explainer),
            }
            for name, one in (("teacher", adapted.of_teacher), ("randomised", adapted.of_random))
        },
        "students": {
            _named(condition): {
                adapted.name_of(name): {"agreement": row.agreement, "kl": row.kl, "beta": row.beta}
                for name, row in table(adapted.found, condition).items()
            }
            for condition in conditions(adapted.found)
        },
        "differences": {
            _named(condition): {
                what: one._asdict() for what, one in differences(adapted, condition).items()
            }
            for condition in conditions(adapted.found)
        },
        "arms": dict(adapted.names),
        "verdict": verdict(adapted).splitlines(),
    }


def chart(adapted: Adapted) -> Picture:
    """Differences of agreement by question, a chart for each condition."""
    rows = {
        what: {
            _named(condition): _interval(differences(adapted, condition)[what])
            for condition in conditions(adapted.found)
        }
        for what in QUESTIONS
    }
    title = f"Difference of agreement, 95 % intervals, {seeds_of(adapted.found)}"
    zero = {_named(condition): 0.0 for condition in conditions(adapted.found)}
    return interval_chart(rows, title=title, references=zero)


def parameters(explainer: LearnableCAM) -> dict[str, dict[str, Cell]]:
    """What was learnt, a row a layer."""
    with torch.no_grad():
        mix = sparsemax(explainer.mix)
        return {
            name: {
                "mix": float(mix[place]),
                "power": float(explainer.power[place]),
                "slope": float(explainer.slope[place]),
                "gates": _spread(explainer.gates[place].cpu().numpy()),
            }
            for place, name in enumerate(explainer.units)
        }


def _spread(gates: np.ndarray) -> str:
    low, middle, high = np.percentile(gates, [0, 50, 100])
    closed = int((gates == 0).sum())
    return f"{low:.2f} {middle:.2f} {high:.2f}" + (
        f", {closed} of {len(gates)} shut" * (closed > 0)
    )


def _rounds(learnt: Learnt) -> dict[str, dict[str, Cell]]:
    return {
        f"round {one.number}" + (" *" if one.number == learnt.best else ""): {
            "KL": one.kl,
            "agreement": one.agreement,
        }
        for one in learnt.rounds
    }


def _interval(gain: Gain) -> Interval:
    return Interval(gain.mean, gain.low, gain.high)


def _named(condition: Condition) -> str:
    return f"{condition[0]} n={condition[1]}"
