"""Reports a refinement as text, as `results.json`, as charts and in TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from camdistill import tags
from camdistill.distill.refinement_targets import ARMS
from camdistill.distill.training import as_images
from camdistill.experiments.refinement.refinement_analysis import (
    compare_arm,
    estimate_gain,
    is_matched,
    mean_score,
    refinement_verdict,
    retention_gain,
    training_metrics,
)
from camdistill.experiments.refinement.refinement_config import CE, START
from camdistill.experiments.refinement.refinement_hypotheses import answer_hypotheses
from camdistill.experiments.refinement.refinement_measurement import LOCALIZATION, MAP
from camdistill.experiments.refinement.refinement_records import Job
from camdistill.experiments.refinement.refinement_run import RefinementRuns
from camdistill.experiments.refinement.refinement_worker import RefinementWorker
from camdistill.experiments.shared.seed_statistics import Gain
from camdistill.measure.intervals import Interval, seed_interval
from camdistill.report.figures.intervals import interval_chart
from camdistill.report.figures.methods import MethodMap, method_panel
from camdistill.report.figures.pictures import Picture
from camdistill.report.results import Cell, text_table
from camdistill.report.tensorboard import TensorBoardLogger

BOARD_FOLDER = "tensorboard"
PICTURES = 4


def refinement_text(runs: RefinementRuns) -> str:
    """Tables of what was kept, of every metric and of held-out explainers; then what it means."""
    parts = [_retention_table(runs)]
    parts += [_metric_table(runs, metric, MAP) for metric in runs.metrics()]
    for explainer in runs.plan.judging.held_out:
        parts += [
            _metric_table(runs, metric, explainer)
            for metric in runs.metrics(explainer)
            if metric in ("road", "rank_accuracy")
        ]
    lines = [
        f"{hypothesis.name} {hypothesis.asks}: {hypothesis.answer}. {hypothesis.says}"
        for hypothesis in answer_hypotheses(runs)
    ]
    parts += ["\n".join(["Hypotheses", *lines]), "\n".join(["Verdict", *refinement_verdict(runs)])]
    return "\n\n".join([*parts, _footnote(runs)])


def refinement_results(runs: RefinementRuns) -> dict[str, object]:
    """Everything that was found, by name."""
    plan = runs.plan
    explainers = (MAP, *plan.judging.held_out)
    return {
        "n": next(iter(runs.records.values())).images,
        "starts": list(plan.starts),
        "seeds": [] if plan.checkpoints else list(plan.seeds),
        "trained": {
            metric: arms for metric in runs.metrics() if (arms := _arms_trained_on(runs, metric))
        },
        "start": {
            explainer: {m: mean_score(runs, START, m, explainer) for m in runs.metrics(explainer)}
            for explainer in explainers
        },
        "arms": {arm: _arm_results(runs, arm) for arm in runs.arms},
        "hypotheses": {entry.name: entry._asdict() for entry in answer_hypotheses(runs)},
        "verdict": refinement_verdict(runs),
        "checkpoints": {
            f"{start}/{arm}": record.checkpoint for (start, arm), record in runs.records.items()
        },
        "seconds_of_runs": round(sum(entry.seconds for entry in runs.records.values()), 1),
    }


def refinement_chart(runs: RefinementRuns) -> Picture:
    """The map's own part of every metric, by arm, with intervals."""
    rows: dict[str, dict[str, Interval]] = {}
    for arm in runs.arms:
        for metric in runs.metrics():
            part = compare_arm(runs, arm, metric).by_map
            if part is not None:
                arms = _arms_trained_on(runs, metric)
                title = f"{metric} ({', '.join(arms)})" if arms else metric
                rows.setdefault(arm, {})[title] = Interval(part.mean, part.low, part.high)
    zero = {title: 0.0 for titles in rows.values() for title in titles}
    starts, count = len(runs.plan.starts), next(iter(runs.records.values())).images
    title = (
        f"The map's own part, larger is better: {starts} starts, {count} test images, 95 % "
        "(in brackets: who was trained on it)"
    )
    return interval_chart(rows, title=title, references=zero)


def refinement_panels(runs: RefinementRuns, worker: RefinementWorker) -> list[Picture]:
    """Some test images with the maps of the first start and of what each arm made of it."""
    start, arms = runs.plan.starts[0], [START, *runs.arms]
    batch = worker.image_sets().test.batch(np.arange(min(PICTURES, len(worker.image_sets().test))))
    images = as_images(batch.pixels).to(worker.device)
    classes = worker.network(start)(images).argmax(1)
    maps = {
        arm: worker.explain_job(Job(start, arm), runs.records[start, arm], images, classes)
        for arm in arms
    }
    layer = runs.plan.objective.layer or "last layer"
    return [
        method_panel(
            images[index].cpu().numpy(),
            {
                f"{runs.plan.objective.cam} of the start's top class": [
                    MethodMap(arm, layer, maps[arm][index].cpu().numpy()) for arm in arms
                ]
            },
            title=f"{start}, test image {int(batch.ids[index])}",
        )
        for index in range(len(images))
    ]


def log_refinement(
    runs: RefinementRuns, folder: Path, gain_chart: Picture, panels: list[Picture], text: str
) -> Path:
    """Charts, pictures, tables, and a run for each start and arm: accuracy by epoch."""
    board = folder / BOARD_FOLDER
    for event_file in board.rglob("events.out.tfevents*"):
        event_file.unlink()  # a study that was widened is drawn anew
    for (start, arm), record in runs.records.items():
        if not record.accuracies:
            continue
        logger = TensorBoardLogger(folder, name=BOARD_FOLDER, version=f"{start}-{arm}")
        tag = tags.ACCURACY_VAL if runs.retention_metric == "accuracy" else tags.AGREEMENT_START
        for epoch, accuracy in enumerate(record.accuracies, start=1):
            logger.log_metrics({tag: accuracy}, epoch)
        start_index = runs.plan.starts.index(start)
        map_gain = float(runs.by_map(arm, "road")[start_index].mean())
        logger.log_metrics({tags.MAP_PART: map_gain}, record.epoch)
        logger.finalize("success")
    logger = TensorBoardLogger(folder, name=BOARD_FOLDER, version="study")
    logger.log_picture(tags.REFINED, gain_chart, 0)
    for number, picture in enumerate(panels):
        logger.log_picture(tags.REFINED_MAPS, picture, number)
    logger.log_text(tags.EVALUATION_TABLE, f"```\n{text}\n```")
    logger.log_text(tags.HOW_TO_READ, tags.how_to_read([tags.EVALUATION, tags.OVERVIEW, tags.MAPS]))
    logger.finalize("success")
    return board


def _retention_table(runs: RefinementRuns) -> str:
    rows: dict[str, dict[str, Cell]] = {}
    shares = [name for name in ("accuracy", "agreement") if runs.has(name)]
    for arm in [START, *runs.arms]:
        by_start = {name: runs.scores(arm, name).mean(1) for name in shares}
        rows[arm] = {name: seed_interval(values) for name, values in by_start.items()}
        if arm not in (START, CE):
            rows[arm][f"{runs.retention_metric} over {CE}"] = _to_interval(
                retention_gain(runs, arm)
            )
        if arm != START:
            epochs = [runs.records[name, arm].epoch for name in runs.plan.starts]
            rows[arm]["epochs"] = " ".join(map(str, epochs))
            rows[arm]["matched"] = "yes" if is_matched(runs, arm) else "NO"
    return text_table(rows, corner="what was kept")


def _metric_table(runs: RefinementRuns, metric: str, explainer: str) -> str:
    rows: dict[str, dict[str, Cell]] = {
        START: {"value": mean_score(runs, START, metric, explainer)}
    }
    for arm in runs.arms:
        comparison = compare_arm(runs, arm, metric, explainer)
        rows[arm] = {
            "value": comparison.value,
            "gained": _to_interval(comparison.total_gain),
            "by answers": _to_interval(comparison.by_answers),
            "by map": _to_interval(comparison.by_map),
            f"by map, over {CE}": _to_interval(comparison.by_map_over.get(CE)),
            "of these starts": _to_interval(comparison.within_starts),
        }
    prefix = "" if explainer == MAP else f"{explainer}: "
    arms = _arms_trained_on(runs, metric) if explainer == MAP else []
    role = f"trained by {', '.join(arms)}" if arms else "held out"
    kind = ", ground truth" if metric in LOCALIZATION else ""
    return text_table(rows, corner=f"{prefix}{metric} ({role}{kind})")


def _footnote(runs: RefinementRuns) -> str:
    plan = runs.plan
    count = next(iter(runs.records.values())).images
    starts = len(plan.starts)
    lines = [
        f"{count} test images, {starts} start{'s' * (starts > 1)} ({', '.join(plan.starts)}); 95 % "
        f"intervals over {'starts and images at once' if starts > 1 else 'images alone'}. Gains "
        "are signed so that larger is better.",
        "by answers: the start's map on the new network, less the same on the start. by map: the "
        "new network's map less the start's, both on the new network; only this is the map's.",
        f"of these starts: by map, over {CE}, with an interval over images alone: it says nothing "
        "of other starts.",
    ]
    if starts == 1:
        lines.append("1 start: nothing is claimed of others, and no hypothesis answered.")
    elif starts < 5:
        lines.append(
            f"{starts} starts are few: intervals are wide (Student's t of {starts - 1} "
            "degrees of freedom), and a null says little."
        )
    if missing := [arm for arm in ARMS if arm not in plan.objective.arms]:
        lines.append(
            f"No {' and no '.join(missing)} arm: there {plan.objective.kind} has no gradient, "
            f"which is {CE}."
        )
    return "\n".join(lines)


def _arm_results(runs: RefinementRuns, arm: str) -> dict[str, object]:
    explainers = (MAP, *runs.plan.judging.held_out)
    shares = {
        name: seed_interval(runs.scores(arm, name).mean(1))
        for name in ("accuracy", "agreement")
        if runs.has(name)
    }
    return {
        **shares,
        f"{runs.retention_metric}_over_ce": _to_dict(
            estimate_gain(
                runs.scores(arm, runs.retention_metric) - runs.scores(CE, runs.retention_metric)
            )
        ),
        "matched": is_matched(runs, arm),
        "epochs": [runs.records[name, arm].epoch for name in runs.plan.starts],
        "explainers": {
            explainer: {
                m: _comparison_results(runs, arm, m, explainer) for m in runs.metrics(explainer)
            }
            for explainer in explainers
        },
    }


def _comparison_results(
    runs: RefinementRuns, arm: str, metric: str, explainer: str
) -> Mapping[str, object]:
    comparison = compare_arm(runs, arm, metric, explainer)
    return {
        "value": comparison.value,
        "gained": _to_dict(comparison.total_gain),
        "by_answers": _to_dict(comparison.by_answers),
        "by_map": _to_dict(comparison.by_map),
        "by_map_over_ce_of_these_starts": _to_dict(comparison.within_starts),
        "by_map_over": {other: _to_dict(gain) for other, gain in comparison.by_map_over.items()},
    }


def _arms_trained_on(runs: RefinementRuns, metric: str) -> list[str]:
    """The objectives that are trained on a metric; controls are of the first."""
    main_arms = [runs.main_arm] if runs.main_arm in runs.arms else []
    return [arm for arm in (*main_arms, *runs.plan.also) if metric in training_metrics(runs, arm)]


def _to_interval(gain: Gain | None) -> Interval | None:
    return None if gain is None else Interval(gain.mean, gain.low, gain.high)


def _to_dict(gain: Gain | None) -> dict[str, float] | None:
    return None if gain is None else gain._asdict()
