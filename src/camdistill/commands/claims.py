"""`claims`: the Grad-CAM paper's claims, measured here, with pass and fail."""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from camdistill.claims.claim import ClaimSetup
from camdistill.claims.claims_index import PHOTOGRAPHS, select_claims
from camdistill.claims.claims_report import claim_text, claims_verdict, write_claim_pictures
from camdistill.claims.claims_run import Outcome, read_outcomes, run_claims
from camdistill.commands.progress import resolve_device
from camdistill.data.shapes import Shapes
from camdistill.distill.checkpoints import TrainedExplainer, load
from camdistill.errors import UserError
from camdistill.networks.heads import head_size
from camdistill.networks.teachers import Preprocessed
from camdistill.report.tensorboard import tensorboard_command

MIN_IMAGES = 16  # images: fewer and an interval says nothing


def claims(
    rows: list[str] = [],  # noqa: B006  (never changed; jsonargparse shows it)
    teacher: Path = Path("checkpoints/shapes-resnet20.safetensors"),
    student: Path = Path("checkpoints/shapes-student.safetensors"),
    boxes: Path | None = None,
    count: int = 256,
    seed: int = 0,
    device: Literal["cpu", "cuda"] | None = None,
    out: Path = Path("runs/claims"),
) -> dict[str, object]:
    """Measures the claims of the Grad-CAM paper (Selvaraju et al. 2017) on Shapes.

    Each row is a claim, the paper's number, ours with a 95 % bootstrap interval over images, the
    criterion, and whether it holds. Little networks that rows need are trained once and kept in the
    folder. Killed and started again, or with more rows, it does what is missing.

    Args:
        rows: Their numbers. Default: all.
        teacher: A network of Shapes that most rows explain.
        student: A shallow one beside it.
        boxes: An image folder with a boxes.csv, for localization in photographs too (row 5c).
        count: Images of each row.
        seed: Seed of the images and of every random choice.
        device: cpu or cuda. Default: a GPU where there is one.
        out: Folder for results.json, table.txt, charts and the little networks.
    """
    check_photographs(rows, boxes)
    experiments = select_claims(rows, photographs=boxes is not None)
    setup, sha256 = _build_setup(teacher, student, boxes, count, seed, device, out)
    settings = {
        "count": count, "seed": seed, "boxes": str(boxes) if boxes else None, **sha256,
    }  # fmt: skip
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("claims", total=None)

        def announce(description: str) -> None:
            progress.update(task, description=description)

        def on_row(number: str, outcome: Outcome) -> None:
            text = f"{claim_text(number, outcome)}\n"
            progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

        announcing_setup = dataclasses.replace(setup, announce=announce)
        outcome_by_number = run_claims(
            announcing_setup, experiments, out / "results.json", settings, sha256, on_row
        )
    write_claim_pictures(read_outcomes(out / "results.json"), out)
    print(claims_verdict(outcome_by_number))
    print(f"{out / 'results.json'}; table.txt and charts of all its rows beside it")
    print(tensorboard_command(out))
    return {number: outcome.row for number, outcome in outcome_by_number.items()}


def check_photographs(rows: list[str], boxes: Path | None) -> None:
    """Checks what row 5c needs, before the other rows are made.

    Raises:
        UserError: The row was asked for without a folder, or the folder has no boxes.
    """
    if boxes is None:
        if PHOTOGRAPHS in rows:
            raise UserError(
                f"row {PHOTOGRAPHS} is about photographs: name an image folder that has a "
                "boxes.csv with --boxes FOLDER"
            )
        return
    if not boxes.is_dir():
        raise UserError(f"no folder '{boxes}' for --boxes; give an image folder with a boxes.csv")
    if not any(boxes.rglob("boxes.csv")):
        raise UserError(f"no boxes.csv in '{boxes}'; it names each image's box beside the folders")


def _build_setup(
    teacher: Path,
    student: Path,
    boxes: Path | None,
    count: int,
    seed: int,
    device: Literal["cpu", "cuda"] | None,
    out: Path,
) -> tuple[ClaimSetup, dict[str, str | None]]:
    if count < MIN_IMAGES:
        raise UserError(f"count is {count}; give {MIN_IMAGES} or more images")
    if seed < 0:
        raise UserError(f"seed is {seed}; give 0 or more")
    torch_device = resolve_device(device)
    shapes = Shapes("test", count, seed=seed)
    explainers = {
        "teacher": _load_network(teacher, shapes),
        "student": _load_network(student, shapes),
    }
    setup = ClaimSetup(
        teacher=_freeze(explainers["teacher"], torch_device),
        student=_freeze(explainers["student"], torch_device),
        shapes=shapes,
        ids=np.arange(count, dtype=np.int64),
        seed=seed,
        device=torch_device,
        folder=out / "networks",
        boxes=boxes,
    )
    return setup, {name: explainer.sha256 for name, explainer in explainers.items()}


def _load_network(path: Path, shapes: Shapes) -> TrainedExplainer:
    if not path.exists():
        raise UserError(
            f"no file '{path}': start the command where the project's checkpoints/ is, or name the "
            "networks with --teacher FILE and --student FILE"
        )
    explainer = load(path)
    classes = head_size(explainer.network.network)
    if classes != shapes.classes:
        raise UserError(
            f"'{path}' tells {classes} classes apart, Shapes has {shapes.classes}: give a network "
            "of Shapes, such as checkpoints/shapes-resnet20.safetensors"
        )
    return explainer


def _freeze(explainer: TrainedExplainer, device: str) -> Preprocessed:
    return explainer.network.eval().requires_grad_(False).to(device)
