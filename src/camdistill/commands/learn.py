"""`learn`: a metric of maps, learned from what rankings found they teach."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from camdistill.commands.progress import (
    callback_for_unused,
    progress_bar,
    progress_callback,
    resolve_device,
    stack_size,
    worker_count,
)
from camdistill.errors import UserError, check_folder_name
from camdistill.experiments.learned_metric.metric_baselines import measure_baselines
from camdistill.experiments.learned_metric.metric_report import (
    MetricComparison,
    compare_metrics,
    comparison_text,
    is_surely_best,
    metric_results,
)
from camdistill.experiments.learned_metric.metric_training import (
    BagSet,
    MetricRecipe,
    build_bag_set,
    check_arm_kinds,
    fit_metric,
    ranking_image_ids,
    score_unseen_methods,
    score_unseen_networks,
    split_images,
)
from camdistill.experiments.ranking.ranking_config import RankingStudy
from camdistill.experiments.ranking.ranking_run import LEDGER, run_ranking
from camdistill.networks.teachers import Teacher
from camdistill.report.results import write_results
from camdistill.store.atomic_files import write_atomically

METRIC = "metric.safetensors"
ProgressCallback = Callable[[str, int, int], None]


def learn(
    studies: dict[str, RankingStudy],
    fit: MetricRecipe = MetricRecipe(),  # noqa: B008  (never changed; jsonargparse shows it)
    images: int = 64,
    out: Path = Path("runs/learn"),
    workers: int | None = None,
    stack: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> dict[str, object]:
    """Learns a metric of maps from rankings: how much a map teaches, without teaching anyone.

    Each ranking is run first (or gone on with: they are those of `rank`, in the folders OUT/NAME).
    A small differentiable network then learns to tell an arm's gain from its maps, their images and
    the explained network. It is tested on methods and networks that it never saw, beside every
    metric made by hand. No labels are used, but by metrics that need masks.

    Args:
        studies: Rankings by name, one for each network, each with the options of `rank`.
        fit: How the metric is trained.
        images: On how many images metrics made by hand are asked, of those (half of a ranking's)
            that the learned one is.
        out: Folder of the rankings, the metric, results.json and table.txt.
        workers: Processes that train students, of one thread each. Default: the cores; 0 on a GPU.
        stack: Students that train as one. Default: 1, on a GPU 32.
        device: Where; auto takes a GPU if there is one.
    """
    start_time = time.monotonic()
    if not studies or images < 2:
        raise UserError(
            f"there are {len(studies)} studies and {images} images; give at least one ranking "
            "(studies) and 2 images"
        )
    for name, study in studies.items():
        check_folder_name("the ranking", name)
        check_arm_kinds(name, study)
    torch_device = resolve_device(device)
    with progress_bar() as bar:
        on_progress = progress_callback(bar)
        rankings = {
            name: run_ranking(
                replace(study, folder=out / name),
                workers=worker_count(workers, torch_device),
                stack=stack_size(stack, torch_device),
                device=torch_device,
                on_progress=_with_prefix(name, on_progress),
                on_unused=callback_for_unused(bar, out / name / LEDGER),
            )
            for name, study in studies.items()
        }
        teachers = {name: Teacher(study.teacher) for name, study in studies.items()}
        halves = split_images(
            {name: ranking_image_ids(rankings[name]) for name in studies}, fit.seed
        )
        lessons = {
            name: build_bag_set(rankings[name], teachers[name], halves[name]) for name in studies
        }
        methods = score_unseen_methods(
            lessons, fit, lambda *done: on_progress("unseen methods", *done)
        )
        networks = score_unseen_networks(
            lessons, fit, lambda *done: on_progress("unseen networks", *done)
        )
        hand_made_metrics = {
            name: measure_baselines(
                rankings[name],
                teachers[name],
                network_lessons,
                images,
                _step(on_progress, f"{name}: metrics by hand"),
            )
            for name, network_lessons in lessons.items()
        }
    answers_by_title = compare_metrics(
        lessons, {"method": methods, "network": networks}, hand_made_metrics
    )
    return _write_results(
        out, lessons, fit, answers_by_title, images, time.monotonic() - start_time
    )


def _write_results(
    out: Path,
    lessons: Mapping[str, BagSet],
    fit: MetricRecipe,
    answers_by_title: Mapping[str, MetricComparison],
    images: int,
    seconds: float,
) -> dict[str, object]:
    metric = fit_metric(lessons, lambda _name, _bag: True, fit)
    metadata = {
        "fit": asdict(fit),
        "networks": list(lessons),
        "beats": is_surely_best(answers_by_title),
    }
    sha256 = metric.save(out / METRIC, metadata)
    text = f"{comparison_text(answers_by_title, lessons, images)}\n"
    write_atomically(out / "table.txt", text.encode())
    summary = metric_results(lessons, answers_by_title, images)
    path = write_results(out / "results.json", summary, seconds=seconds, sha256={"metric": sha256})
    print(f"\n{text}\nMetric: {out / METRIC}   Results: {path}")
    return summary


def _with_prefix(name: str, on_progress: ProgressCallback) -> ProgressCallback:
    def show(task: str, done: int, total: int) -> None:
        on_progress(f"{name}: {task}", done, total)

    return show


def _step(on_progress: ProgressCallback, task: str) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        on_progress(task, done, total)

    return show
