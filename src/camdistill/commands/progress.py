"""What long commands share: on which device they run, and how they tell how far they are."""

from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from camdistill.errors import UserError
from camdistill.networks.teachers import NetworkSpec
from camdistill.report.results import available_cores
from camdistill.store.digest import sha256_of

STACK = 32  # students that train as one on a GPU


def resolve_device(name: str | None) -> str:
    """What --device stands for here: nothing, or auto, is a GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch finds no GPU: leave out --device, or give cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def worker_count(workers: int | None, device: str) -> int:
    """What --workers stands for on a device: nothing is the cores, on a GPU this process alone."""
    if workers is not None and workers < 0:
        raise UserError(f"workers is {workers}; give 0 (this process alone) or more")
    if workers is not None:
        return workers
    return available_cores() if device == "cpu" else 0


def stack_size(stack: int | None, device: str) -> int:
    """What --stack stands for on a device: nothing is one student, on a GPU many."""
    if stack is not None and stack < 1:
        raise UserError(f"stack is {stack}; give 1 or more students")
    return stack or (1 if device == "cpu" else STACK)


def weights_sha256(network: NetworkSpec) -> str | None:
    """Of the file that a network's weights come from; None where there is none."""
    path = Path(network.weights or "")
    return sha256_of(path) if path.is_file() else None


def progress_bar() -> Progress:
    """A line for each thing that is done, with how many of how many."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )


def progress_callback(bar: Progress) -> Callable[[str, int, int], None]:
    """Shows what is done: one line for each thing."""
    task_by_name: dict[str, TaskID] = {}

    def show(task: str, done: int, total: int) -> None:
        if task not in task_by_name:
            task_by_name[task] = bar.add_task(task, total=total)
        bar.update(task_by_name[task], completed=done, total=total)

    return show


def callback_for_unused(bar: Progress, runs: Path) -> Callable[[int], None]:
    """Says that some of a folder's finished runs are not this study's."""

    def show(count: int) -> None:
        message = f"{count} finished run{'s' if count > 1 else ''} of other settings in {runs}"
        cure = "not used and kept; another --out keeps studies apart"
        bar.console.print(f"{message}: {cure}", highlight=False, markup=False, soft_wrap=True)

    return show
