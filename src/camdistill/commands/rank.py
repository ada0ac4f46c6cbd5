"""`rank`: explanation methods by how much they teach a student."""

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
from camdistill.experiments.ranking.ranking_analysis import blanks, leaks
from camdistill.experiments.ranking.ranking_config import RankingStudy, Tuning
from camdistill.experiments.ranking.ranking_report import (
    gate_text,
    log_scalars,
    one_class_text,
    ranking_chart,
    ranking_results,
    ranking_text,
)
from camdistill.experiments.ranking.ranking_run import LEDGER, RankingRuns, run_ranking
from camdistill.experiments.ranking.student_controls import CONTROLS, Control
from camdistill.experiments.ranking.student_task import Recipe
from camdistill.networks.teachers import NetworkSpec
from camdistill.report.figures.pictures import save_png
from camdistill.report.results import write_results
from camdistill.report.tensorboard import tensorboard_command
from camdistill.store.atomic_files import write_atomically

SHARES = [0.25, 0.5, 0.75]


def rank(
    teacher: NetworkSpec,
    data: ImageData,
    methods: list[str],
    students: dict[str, NetworkSpec],
    n: list[int],
    seeds: list[int] = [0, 1, 2, 3, 4],  # noqa: B006  (never changed; jsonargparse shows it)
    controls: list[Control] = list(CONTROLS),  # noqa: B006
    controls_of: list[str] = [],  # noqa: B006
    controls_n: list[int] = [],  # noqa: B006
    shares: list[float] = SHARES,
    tuning: Tuning = Tuning(),  # noqa: B008
    recipe: Recipe = Recipe(),  # noqa: B008
    seed: int = 0,
    out: Path = Path("runs/rank"),
    workers: int | None = None,
    stack: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    trust: list[str] = [],  # noqa: B006
) -> dict[str, object]:
    """Ranks explanation methods by how much they teach a student.

    Students learn from images without labels to answer like the teacher and to have its maps; a
    method's gain is what they agree with the teacher on unseen images more than students without
    maps do. No explanation is given there. Sanity gates run first and are printed.

    Killed and started again, or with more seeds, methods or n, it does what is missing.

    Args:
        teacher: The network whose explanations are ranked.
        data: Images to learn from, to choose beta on and to judge on; labels are not used.
        methods: What is ranked: grad_cam@layer3, or another method and a layer of the teacher;
            maps.npz with maps [N, h, w] of the training images; an adapted explainer.safetensors;
            package.module.function of
            (network, images, classes);
            mask:parts of Shapes, mask:object or mask:box of image folders that have them.
        students: Families of students by name; their last layer's maps are taught.
        n: How many images students learn from.
        seeds: Seeds of students: start, order and views, the same for every arm.
        controls: What methods have to beat.
        controls_of: Methods whose own maps are made into controls. Default: the first.
        controls_n: At which n controls run. Default: at all.
        shares: Shares of the method's maps in mixtures with shuffled ones, for the ladder.
        tuning: How each arm's weight of the maps is chosen.
        recipe: How every student is trained.
        seed: Seed of which images are taken and of what is random in controls.
        out: Folder of the runs, results.json, table.txt and a chart.
        workers: Processes that train students, of one thread each. Default: the cores; 0 on a GPU.
        stack: Students that train as one. Default: 1, on a GPU 32.
        device: Where; auto takes a GPU if there is one.
        trust: Packages from which functions may be called.
    """
    start_time = time.monotonic()
    study = RankingStudy(
        teacher, data, methods, students, n, seeds, controls, controls_of, controls_n, shares,
        tuning, recipe, seed, trust, out,
    )  # fmt: skip
    torch_device = resolve_device(device)
    with progress_bar() as bar:
        ranking = run_ranking(
            study,
            workers=worker_count(workers, torch_device),
            stack=stack_size(stack, torch_device),
            device=torch_device,
            on_progress=progress_callback(bar),
            on_unused=callback_for_unused(bar, out / LEDGER),
            on_gates=lambda partial: bar.console.print(
                f"\n{gate_text(partial)}\n", highlight=False, markup=False, soft_wrap=True
            ),
        )
    return _write_results(ranking, time.monotonic() - start_time)


def _write_results(ranking: RankingRuns, seconds: float) -> dict[str, object]:
    """Writes and prints what was found."""
    out, leakage = ranking.study.folder, leaks(ranking)
    summary = ranking_results(ranking, leakage, blanks(ranking))
    parts = [gate_text(ranking), ranking_text(ranking, leakage), one_class_text(ranking)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_atomically(out / "table.txt", text.encode())
    sha256 = {"teacher": weights_sha256(ranking.study.teacher)}
    path = write_results(out / "results.json", summary, seconds=seconds, sha256=sha256)
    picture = save_png(out / "gains.png", ranking_chart(ranking))
    board = log_scalars(ranking, out)
    print(f"\n{text}\nResults: {path}   Runs: {out / LEDGER}   Chart: {picture}")
    print(tensorboard_command(board))
    return summary
