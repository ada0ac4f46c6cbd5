"""`adapt`: an explainer's parameters learned from what it teaches."""

import time
from pathlib import Path
from typing import Literal

from camdistill.commands.progress import (
    callback_for_unused,
    progress_bar,
    progress_callback,
    resolve_device,
    stack_size,
    weights_sha256,
    worker_count,
)
from camdistill.data.modules import ImageData
from camdistill.experiments.adaptation.adaptation_report import (
    adaptation_chart,
    adaptation_results,
    adaptation_text,
)
from camdistill.experiments.adaptation.adaptation_rounds import Adaptation
from camdistill.experiments.adaptation.adaptation_run import ADAPTED, adapt_study
from camdistill.experiments.ranking.ranking_config import RankingStudy, Tuning
from camdistill.experiments.ranking.ranking_run import LEDGER
from camdistill.experiments.ranking.student_controls import Control
from camdistill.experiments.ranking.student_task import Recipe
from camdistill.networks.teachers import NetworkSpec
from camdistill.report.figures.pictures import save_png
from camdistill.report.results import write_results
from camdistill.store.atomic_files import write_atomically
from camdistill.store.digest import sha256_of


def adapt(
    teacher: NetworkSpec,
    data: ImageData,
    students: dict[str, NetworkSpec],
    n: list[int],
    adaptation: Adaptation = Adaptation(),  # noqa: B008  (never changed; jsonargparse shows it)
    seeds: list[int] = [0, 1, 2, 3, 4],  # noqa: B006
    methods: list[str] = [],  # noqa: B006
    controls: list[Control] = [],  # noqa: B006
    tuning: Tuning = Tuning(),  # noqa: B008
    recipe: Recipe = Recipe(),  # noqa: B008
    seed: int = 0,
    out: Path = Path("runs/adapt"),
    workers: int | None = None,
    stack: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    trust: list[str] = [],  # noqa: B006
) -> dict[str, object]:
    """Adapts an explainer to what its maps teach, and tells whether fresh students learn more.

    Grad-CAM with parameters: a gate on each unit, a slope and a power for each layer, a mix of
    layers. They go down the gradient of what a student knows after one step on their maps (SMaT).
    Then students of new seeds, and of other families, learn from the adapted explainer, from
    Grad-CAM, and from parameters that were learned in the same way on a teacher of random weights;
    all are judged on test images that were used for nothing before. No labels are used.

    Killed and started again, or with more rounds, seeds or n, it does what is missing.

    Args:
        teacher: The network that is explained.
        data: Images to learn from, to learn the parameters on (half of the validation images; the
            other half says when to stop) and to judge on; labels are not used.
        students: Families of students by name: the parameters are learned with the first.
        n: How many images students learn from.
        adaptation: How the parameters are learned.
        seeds: Seeds of the fresh students: start, order and views, the same for every arm.
        methods: What else is compared, as in `rank`.
        controls: Controls of Grad-CAM's maps, as in `rank`.
        tuning: How each arm's weight of the maps is chosen.
        recipe: How every student is trained.
        seed: Seed of which images are taken, of random weights and of what is random in controls.
        out: Folder of the explainer, the runs, results.json, table.txt and a chart.
        workers: Processes that train students, of one thread each. Default: the cores; 0 on a GPU.
        stack: Students that train as one. Default: 1, on a GPU 32.
        device: Where; auto takes a GPU if there is one.
        trust: Packages from which functions may be called.
    """
    start_time = time.monotonic()
    study = RankingStudy(
        teacher=teacher, data=data, methods=["grad_cam"], students=students, n=n, seeds=seeds,
        controls=controls, shares=(), tuning=tuning, recipe=recipe, seed=seed, trust=trust,
        folder=out,
    )  # fmt: skip
    torch_device = resolve_device(device)
    with progress_bar() as bar:
        comparison = adapt_study(
            study,
            adaptation,
            other_methods=methods,
            workers=worker_count(workers, torch_device),
            stack=stack_size(stack, torch_device),
            device=torch_device,
            on_progress=progress_callback(bar),
            on_unused=callback_for_unused(bar, out / LEDGER),
        )
    text = f"{adaptation_text(comparison)}\n"
    write_atomically(out / "table.txt", text.encode())
    results = adaptation_results(comparison)
    sha256 = {"teacher": weights_sha256(teacher), "explainer": sha256_of(out / ADAPTED)}
    seconds = time.monotonic() - start_time
    path = write_results(out / "results.json", results, seconds=seconds, sha256=sha256)
    picture = save_png(out / "gains.png", adaptation_chart(comparison))
    print(f"\n{text}\nExplainer: {out / ADAPTED}   Results: {path}   Chart: {picture}")
    return results
