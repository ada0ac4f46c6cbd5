"""`refine`: a network adapted to a metric of its own maps, with controls."""

import time
from pathlib import Path
from typing import Literal

from camdistill.commands.progress import (
    callback_for_unused,
    progress_bar,
    progress_callback,
    resolve_device,
    worker_count,
)
from camdistill.data.modules import ImageData
from camdistill.distill.refinement_targets import ARMS, Objective, RefinementArm
from camdistill.experiments.refinement.refinement_config import (
    JudgingOptions,
    RefinementPlan,
    RefineRecipe,
    StartRecipe,
    StudentRecipe,
)
from camdistill.experiments.refinement.refinement_report import (
    log_refinement,
    refinement_chart,
    refinement_panels,
    refinement_results,
    refinement_text,
)
from camdistill.experiments.refinement.refinement_run import RUN_LOG, RefinementRuns, run_refinement
from camdistill.experiments.refinement.refinement_worker import RefinementWorker
from camdistill.networks.teachers import NetworkSpec
from camdistill.report.figures.pictures import save_png
from camdistill.report.results import write_results
from camdistill.report.tensorboard import tensorboard_command
from camdistill.store.atomic_files import write_atomically


def refine(
    data: ImageData,
    objective: Objective = Objective(),  # noqa: B008  (frozen)
    checkpoints: list[Path] = [],  # noqa: B006  (never changed; jsonargparse shows it)
    network: NetworkSpec | None = None,
    seeds: list[int] = [0, 1, 2, 3, 4],  # noqa: B006
    arms: list[RefinementArm] = list(ARMS),  # noqa: B006
    also: dict[str, Objective] = {},  # noqa: B006
    start: StartRecipe = StartRecipe(),  # noqa: B008
    recipe: RefineRecipe = RefineRecipe(),  # noqa: B008
    judging: JudgingOptions = JudgingOptions(),  # noqa: B008
    students: StudentRecipe | None = None,
    seed: int = 0,
    out: Path = Path("runs/refine"),
    workers: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    trust: list[str] = [],  # noqa: B006
) -> dict[str, object]:
    """Fine-tunes networks so that a metric of their own maps improves, and says what it did.

    Every start network is refined by the objective and by its controls: cross-entropy alone of the
    same length, a constant map, random targets, another image's. Each is measured on test images
    with its own map and with its start's, by metrics that it was not trained on, and with
    explainers that were not refined. Claimed is only what the map itself gained.

    Killed and started again, or with more seeds, arms or objectives, it does what is missing.

    Args:
        data: Images to refine on, to choose the epoch on and to judge on. Without labels the
            network's own answers at the start are kept.
        objective: What the maps are trained to be.
        checkpoints: Start networks, trained independently.
        network: Where there are no checkpoints: what is trained to be start networks.
        seeds: Seeds of these, one each.
        arms: Arms of the objective and its controls; ce always runs.
        also: Further objectives by name: {energy: {kind: energy}}.
        start: How start networks are trained.
        recipe: How every arm is trained.
        judging: How networks are measured.
        students: Distilled from the refined networks and from cross-entropy's: do they inherit the
            gain?
        seed: Seed of the order of training, of what is random in arms, and of which images are
            taken.
        out: Folder of the runs, the networks, results.json, table.txt and pictures.
        workers: Processes of one thread each. Default: the cores; 0 on a GPU.
        device: Where; auto takes a GPU if there is one.
        trust: Packages that class paths in checkpoints may come from.
    """
    start_time = time.monotonic()
    plan = RefinementPlan(
        data, objective, checkpoints, network, seeds, arms, also, start, recipe, judging, students,
        seed, trust, out,
    )  # fmt: skip
    torch_device = resolve_device(device)
    with progress_bar() as bar:
        refinement = run_refinement(
            plan,
            workers=worker_count(workers, torch_device),
            device=torch_device,
            on_progress=progress_callback(bar),
            on_unused=callback_for_unused(bar, out / RUN_LOG),
        )
    return _write_results(
        refinement, RefinementWorker(plan, torch_device), time.monotonic() - start_time
    )


def _write_results(
    refinement: RefinementRuns, worker: RefinementWorker, seconds: float
) -> dict[str, object]:
    """Writes and prints what was found."""
    out, summary, text = (
        refinement.plan.folder,
        refinement_results(refinement),
        refinement_text(refinement),
    )
    write_atomically(out / "table.txt", f"{text}\n".encode())
    path = write_results(out / "results.json", summary, seconds=seconds)
    parts = refinement_chart(refinement)
    picture = save_png(out / "map_parts.png", parts)
    panels = refinement_panels(refinement, worker)
    for number, panel in enumerate(panels):
        save_png(out / f"maps-{number}.png", panel)
    board = log_refinement(refinement, out, parts, panels, text)
    print(f"\n{text}\n\nResults: {path}   Runs: {out / RUN_LOG}   Chart: {picture}")
    print(f"Networks, for --checkpoint: {out / 'networks'}")
    print(tensorboard_command(board))
    return summary
