"""What long commands share: on which device they run, and how they tell how far they are."""

from collections.abc import Callable

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

STACK = 32  # students that train as one on a GPU


def chosen_device(name: str | None) -> str:
    """What --device stands for here: nothing, or auto, is a GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch finds no GPU: leave out --device, or give cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def progress_bar() -> Progress:
    """A line for each thing that is done, with how many of how many."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )


def teller(bar: Progress) -> Callable[[str, int, int], None]:
    """Shows what is done: one line for each thing."""
    lines: dict[str, TaskID] = {}

    def tell(what: str, done: int, total: int) -> None:
        if what not in lines:
            lines[what] = bar.add_task(what, total=total)
        bar.update(lines[what], completed=done, total=total)

    return tell
