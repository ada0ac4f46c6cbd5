"""Reports an adaptation as text, as `results.json` and as a chart."""

import numpy as np
import torch

from camdistill.experiments.adaptation.adaptation_rounds import AdaptedExplainer
from camdistill.experiments.adaptation.adaptation_run import AdaptationOutcome
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

COMPARISONS = {
    "adapted - grad_cam": ("adapted", "grad_cam"),
    "adapted - randomized": ("adapted", "randomized"),
    "adapted - none": ("adapted", "none"),
    "grad_cam - none": ("grad_cam", "none"),
    "randomized - none": ("randomized", "none"),
}
"""Agreement of students on unseen images: randomized is the adapted explainer of a teacher of
random weights, with as many parameters learned in the same way."""


def agreement_gains(outcome: AdaptationOutcome, condition: Condition) -> dict[str, Gain]:
    """Paired differences of agreement between arms."""
    boot = bootstrap(outcome.ranking, condition)
    names = {**outcome.names, "none": "none"}
    return {comparison: boot.gain(names[a], names[b]) for comparison, (a, b) in COMPARISONS.items()}


def adaptation_verdict(outcome: AdaptationOutcome) -> str:
    """Whether adapting was worth it, in a line for each condition; Holm over the conditions."""
    main_comparison = "adapted - grad_cam"
    gains = {
        _condition_name(condition): agreement_gains(outcome, condition)
        for condition in conditions(outcome.ranking)
    }
    corrected = holm(
        {name: gain_by_comparison[main_comparison].p for name, gain_by_comparison in gains.items()}
    )
    lines = []
    for name, gain_by_comparison in gains.items():
        gain, control = (
            gain_by_comparison[main_comparison],
            gain_by_comparison["adapted - randomized"],
        )
        numbers = (
            f"{gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}], p {corrected[name]:.3f} (Holm)"
        )
        if corrected[name] >= LEVEL:
            conclusion = (
                f"no difference from Grad-CAM found: {numbers}; {gain.mde:.3f} is detectable"
            )
        elif gain.mean < 0:
            conclusion = f"worse than Grad-CAM: {numbers}"
        elif control.low <= 0:
            conclusion = (
                f"better than Grad-CAM, not than parameters learned on random weights: {numbers}"
            )
        else:
            conclusion = f"better than Grad-CAM: {numbers}"
        lines.append(f"{name}: {conclusion}")
    if outcome.adapted.best == 0:
        lines.append(
            "no round was better than round 0: the adapted explainer is Grad-CAM itself, and what "
            "lies between them is rounding that training made larger"
        )
    return "\n".join(lines)


def adaptation_text(outcome: AdaptationOutcome) -> str:
    """Rounds, parameters, agreement of fresh students, and what follows."""
    explainers = {"teacher": outcome.adapted, "random weights": outcome.control}
    parts = [
        "Rounds: divergence and agreement of the judging students\n"
        + "\n\n".join(
            text_table(_round_rows(entry), corner=name) for name, entry in explainers.items()
        ),
        "Parameters\n"
        + "\n\n".join(
            text_table(explainer_parameters(entry.explainer), corner=name)
            for name, entry in explainers.items()
        ),
    ]
    for condition in conditions(outcome.ranking):
        rows: dict[str, dict[str, Cell]] = {
            outcome.short_name(name): {
                "agreement": arm_row.agreement,
                "KL": arm_row.kl,
                "beta": arm_row.beta,
            }
            for name, arm_row in table(outcome.ranking, condition).items()
        }
        parts.append(
            text_table(rows, corner=f"{_condition_name(condition)}, {seeds_of(outcome.ranking)}")
        )
        gains = agreement_gains(outcome, condition)
        gain_rows: dict[str, dict[str, Cell]] = {
            comparison: {"agreement": _to_interval(entry), "p": entry.p, "detectable": entry.mde}
            for comparison, entry in gains.items()
        }
        parts.append(text_table(gain_rows, corner="difference"))
    parts += [adaptation_verdict(outcome), one_seed_text(outcome.ranking)]
    return "\n\n".join(part for part in parts if part)


def adaptation_results(outcome: AdaptationOutcome) -> dict[str, object]:
    """Everything that was found, by name."""
    study = outcome.ranking.study
    return {
        "n": next(iter(outcome.ranking.records.values())).images,
        "seeds": list(study.seeds),
        "explainers": {
            name: {
                "best_round": entry.best,
                "rounds": [round_scores._asdict() for round_scores in entry.rounds],
                "layers": explainer_parameters(entry.explainer),
            }
            for name, entry in (("teacher", outcome.adapted), ("randomized", outcome.control))
        },
        "students": {
            _condition_name(condition): {
                outcome.short_name(name): {
                    "agreement": row.agreement,
                    "kl": row.kl,
                    "beta": row.beta,
                }
                for name, row in table(outcome.ranking, condition).items()
            }
            for condition in conditions(outcome.ranking)
        },
        "differences": {
            _condition_name(condition): {
                comparison: entry._asdict()
                for comparison, entry in agreement_gains(outcome, condition).items()
            }
            for condition in conditions(outcome.ranking)
        },
        "arms": dict(outcome.names),
        "verdict": adaptation_verdict(outcome).splitlines(),
    }


def adaptation_chart(outcome: AdaptationOutcome) -> Picture:
    """Differences of agreement by question, a chart for each condition."""
    rows = {
        comparison: {
            _condition_name(condition): _to_interval(
                agreement_gains(outcome, condition)[comparison]
            )
            for condition in conditions(outcome.ranking)
        }
        for comparison in COMPARISONS
    }
    title = f"Difference of agreement, 95 % intervals, {seeds_of(outcome.ranking)}"
    zero = {_condition_name(condition): 0.0 for condition in conditions(outcome.ranking)}
    return interval_chart(rows, title=title, references=zero)


def explainer_parameters(explainer: LearnableCAM) -> dict[str, dict[str, Cell]]:
    """What was learned, a row a layer."""
    with torch.no_grad():
        mix = sparsemax(explainer.mix)
        return {
            name: {
                "mix": float(mix[index]),
                "power": float(explainer.power[index]),
                "slope": float(explainer.slope[index]),
                "gates": _describe_gates(explainer.gates[index].cpu().numpy()),
            }
            for index, name in enumerate(explainer.units)
        }


def _describe_gates(gates: np.ndarray) -> str:
    low, middle, high = np.percentile(gates, [0, 50, 100])
    closed = int((gates == 0).sum())
    return f"{low:.2f} {middle:.2f} {high:.2f}" + (
        f", {closed} of {len(gates)} shut" * (closed > 0)
    )


def _round_rows(adapted: AdaptedExplainer) -> dict[str, dict[str, Cell]]:
    return {
        f"round {entry.number}" + (" *" if entry.number == adapted.best else ""): {
            "KL": entry.kl,
            "agreement": entry.agreement,
        }
        for entry in adapted.rounds
    }


def _to_interval(gain: Gain) -> Interval:
    return Interval(gain.mean, gain.low, gain.high)


def _condition_name(condition: Condition) -> str:
    return f"{condition[0]} n={condition[1]}"
