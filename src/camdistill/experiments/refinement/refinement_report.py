"""A refinement as text, as `results.json`, as charts and pictures, and in TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from camdistill import tags
from camdistill.distill.refinement_targets import ARMS
from camdistill.distill.training import as_images
from camdistill.experiments.refinement.refinement_analysis import (
    is_matched,
    kept,
    mean_of,
    row,
    told,
    trained,
    verdict,
)
from camdistill.experiments.refinement.refinement_config import CE, START
from camdistill.experiments.refinement.refinement_hypotheses import hypotheses
from camdistill.experiments.refinement.refinement_measurement import LOCALISATION, MAP
from camdistill.experiments.refinement.refinement_records import Job
from camdistill.experiments.refinement.refinement_run import Found
from camdistill.experiments.refinement.refinement_worker import Workshop
from camdistill.experiments.shared.seed_statistics import Gain
from camdistill.measure.intervals import Interval, seed_interval
from camdistill.report.figures.intervals import interval_chart
from camdistill.report.figures.methods import MethodMap, method_panel
from camdistill.report.figures.pictures import Picture
from camdistill.report.results import Cell, text_table
from camdistill.report.tensorboard import TensorBoardLogger

RUNS = "tensorboard"
PICTURES = 4


def refinement_text(found: Found) -> str:
    """Tables of what was kept, of every metric and of held-out explainers; then what it means."""
    parts = [_kept_table(found)]
    parts += [_metric_table(found, metric, MAP) for metric in found.metrics()]
    for explainer in found.plan.judging.held_out:
        parts += [
            _metric_table(found, metric, explainer)
            for metric in found.metrics(explainer)
            if metric in ("road", "rank_accuracy")
        ]
    lines = [f"{one.name} {one.asks}: {one.answer}. {one.says}" for one in hypotheses(found)]
    parts += ["\n".join(["Hypotheses", *lines]), "\n".join(["Verdict", *verdict(found)])]
    return "\n\n".join([*parts, _footnote(found)])


def results(found: Found) -> dict[str, object]:
    """Everything that was found, by name."""
    plan = found.plan
    explainers = (MAP, *plan.judging.held_out)
    return {
        "n": next(iter(found.records.values())).images,
        "starts": list(plan.starts),
        "seeds": [] if plan.checkpoints else list(plan.seeds),
        "trained": {
            metric: arms for metric in found.metrics() if (arms := _trained_by(found, metric))
        },
        "start": {
            explainer: {m: mean_of(found, START, m, explainer) for m in found.metrics(explainer)}
            for explainer in explainers
        },
        "arms": {arm: _arm(found, arm) for arm in found.arms},
        "hypotheses": {one.name: one._asdict() for one in hypotheses(found)},
        "verdict": verdict(found),
        "checkpoints": {
            f"{start}/{arm}": record.checkpoint for (start, arm), record in found.records.items()
        },
        "seconds_of_runs": round(sum(one.seconds for one in found.records.values()), 1),
    }


def chart(found: Found) -> Picture:
    """The map's own part of every metric, by arm, with intervals."""
    rows: dict[str, dict[str, Interval]] = {}
    for arm in found.arms:
        for metric in found.metrics():
            part = row(found, arm, metric).by_map
            if part is not None:
                arms = _trained_by(found, metric)
                title = f"{metric} ({', '.join(arms)})" if arms else metric
                rows.setdefault(arm, {})[title] = Interval(part.mean, part.low, part.high)
    zero = {title: 0.0 for titles in rows.values() for title in titles}
    starts, count = len(found.plan.starts), next(iter(found.records.values())).images
    title = (
        f"The map's own part, larger is better: {starts} starts, {count} test images, 95 % "
        "(in brackets: who was trained on it)"
    )
    return interval_chart(rows, title=title, references=zero)


def pictures(found: Found, workshop: Workshop) -> list[Picture]:
    """Some test images with the maps of the first start and of what each arm made of it."""
    start, arms = found.plan.starts[0], [START, *found.arms]
    batch = workshop.sets().test.batch(np.arange(min(PICTURES, len(workshop.sets().test))))
    images = as_images(batch.pixels).to(workshop.device)
    classes = workshop.network(start)(images).argmax(1)
    maps = {
        arm: workshop.made(Job(start, arm), found.records[start, arm], images, classes)
        for arm in arms
    }
    layer = found.plan.objective.layer or "last layer"
    return [
        method_panel(
            images[place].cpu().numpy(),
            {
                f"{found.plan.objective.cam} of the start's top class": [
                    MethodMap(arm, layer, maps[arm][place].cpu().numpy()) for arm in arms
                ]
            },
            title=f"{start}, test image {int(batch.ids[place])}",
        )
        for place in range(len(images))
    ]


def log_board(found: Found, folder: Path, parts: Picture, panels: list[Picture], text: str) -> Path:
    """Charts, pictures, tables, and a run for each start and arm: accuracy by epoch."""
    board = folder / RUNS
    for old in board.rglob("events.out.tfevents*"):
        old.unlink()  # a study that was widened is drawn anew
    for (start, arm), record in found.records.items():
        if not record.accuracies:
            continue
        logger = TensorBoardLogger(folder, name=RUNS, version=f"{start}-{arm}")
        tag = tags.ACCURACY_VAL if found.kept == "accuracy" else tags.AGREEMENT_START
        for epoch, accuracy in enumerate(record.accuracies, start=1):
            logger.log_metrics({tag: accuracy}, epoch)
        place = found.plan.starts.index(start)
        part = float(found.by_map(arm, "road")[place].mean())
        logger.log_metrics({tags.MAP_PART: part}, record.epoch)
        logger.finalize("success")
    logger = TensorBoardLogger(folder, name=RUNS, version="study")
    logger.log_picture(tags.REFINED, parts, 0)
    for number, picture in enumerate(panels):
        logger.log_picture(tags.REFINED_MAPS, picture, number)
    logger.log_text(tags.EVALUATION_TABLE, f"```\n{text}\n```")
    logger.log_text(tags.HOW_TO_READ, tags.how_to_read([tags.EVALUATION, tags.OVERVIEW, tags.MAPS]))
    logger.finalize("success")
    return board


def _kept_table(found: Found) -> str:
    rows: dict[str, dict[str, Cell]] = {}
    shares = [name for name in ("accuracy", "agreement") if found.has(name)]
    for arm in [START, *found.arms]:
        by_start = {name: found.scores(arm, name).mean(1) for name in shares}
        rows[arm] = {name: seed_interval(values) for name, values in by_start.items()}
        if arm not in (START, CE):
            rows[arm][f"{found.kept} over {CE}"] = _cell(kept(found, arm))
        if arm != START:
            epochs = [found.records[name, arm].epoch for name in found.plan.starts]
            rows[arm]["epochs"] = " ".join(map(str, epochs))
            rows[arm]["matched"] = "yes" if is_matched(found, arm) else "NO"
    return text_table(rows, corner="what was kept")


def _metric_table(found: Found, metric: str, explainer: str) -> str:
    rows: dict[str, dict[str, Cell]] = {START: {"value": mean_of(found, START, metric, explainer)}}
    for arm in found.arms:
        one = row(found, arm, metric, explainer)
        rows[arm] = {
            "value": one.value,
            "gained": _cell(one.gained),
            "by answers": _cell(one.by_answers),
            "by map": _cell(one.by_map),
            f"by map, over {CE}": _cell(one.over.get(CE)),
            "of these starts": _cell(one.here),
        }
    whose = "" if explainer == MAP else f"{explainer}: "
    arms = _trained_by(found, metric) if explainer == MAP else []
    used = f"trained by {', '.join(arms)}" if arms else "held out"
    kind = ", ground truth" if metric in LOCALISATION else ""
    return text_table(rows, corner=f"{whose}{metric} ({used}{kind})")


def _footnote(found: Found) -> str:
    plan = found.plan
    count = next(iter(found.records.values())).images
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


def _arm(found: Found, arm: str) -> dict[str, object]:
    explainers = (MAP, *found.plan.judging.held_out)
    shares = {
        name: seed_interval(found.scores(arm, name).mean(1))
        for name in ("accuracy", "agreement")
        if found.has(name)
    }
    return {
        **shares,
        f"{found.kept}_over_ce": _values(
            told(found.scores(arm, found.kept) - found.scores(CE, found.kept))
        ),
        "matched": is_matched(found, arm),
        "epochs": [found.records[name, arm].epoch for name in found.plan.starts],
        "explainers": {
            explainer: {m: _row(found, arm, m, explainer) for m in found.metrics(explainer)}
            for explainer in explainers
        },
    }


def _row(found: Found, arm: str, metric: str, explainer: str) -> Mapping[str, object]:
    one = row(found, arm, metric, explainer)
    return {
        "value": one.value,
        "gained": _values(one.gained),
        "by_answers": _values(one.by_answers),
        "by_map": _values(one.by_map),
        "by_map_over_ce_of_these_starts": _values(one.here),
        "by_map_over": {other: _values(gain) for other, gain in one.over.items()},
    }


def _trained_by(found: Found, metric: str) -> list[str]:
    """The objectives that are trained on a metric; controls are of the first."""
    own = [found.main] if found.main in found.arms else []
    return [arm for arm in (*own, *found.plan.also) if metric in trained(found, arm)]


def _cell(gain: Gain | None) -> Interval | None:
    return None if gain is None else Interval(gain.mean, gain.low, gain.high)


def _values(gain: Gain | None) -> dict[str, float] | None:
    return None if gain is None else gain._asdict()
