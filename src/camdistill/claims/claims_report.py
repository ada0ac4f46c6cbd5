"""Claims as text, as Markdown and as charts."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camdistill import tags
from camdistill.claims.claim import Measured, Row
from camdistill.claims.claims_run import Outcome
from camdistill.measure.intervals import Interval
from camdistill.report.figures.intervals import interval_chart
from camdistill.report.figures.pictures import Picture, save_png
from camdistill.report.tensorboard import TensorBoardLogger
from camdistill.store.atomic_files import write_atomically

WIDTH = 96
CHARTS: dict[str, tuple[str, ...]] = {
    tags.CLAIMS_LOCALISATION: ("3", "4", "5", "5b", "5c", "6", "7", "8"),
    tags.CLAIMS_FAITHFULNESS: ("11", "12", "22", "23", "24", "25", "26"),
    tags.CLAIMS_WORLDS: ("9", "10", "13", "14", "15", "16", "17", "18", "20"),
}
"""Rows whose charts stand below one another in one picture."""


def text(found: Mapping[str, Outcome]) -> str:
    """A block a row, then how many hold."""
    return "\n\n".join([*(block(number, one) for number, one in found.items()), verdict(found)])


def block(number: str, outcome: Outcome) -> str:
    """One row: the claim, the paper's number, ours, the criterion."""
    if outcome.row is None:
        return _wrapped(f"{number:>3}  not made  ", outcome.error)
    row = outcome.row
    lines = [_wrapped(f"{number:>3}  {_word(row.passed):<5} ", row.claim)]
    lines.append(_wrapped("     paper: ", row.paper))
    for of, measured in _by_measure(row.ours).items():
        shown = ", ".join(_number(one) for one in measured)
        lines.append(_wrapped("     ours:  ", f"{of}: {shown}" if of else shown))
    lines.append(_wrapped("     holds: ", row.criterion))
    if row.note:
        lines.append(_wrapped("     note:  ", row.note))
    return "\n".join(lines)


def verdict(found: Mapping[str, Outcome]) -> str:
    """How many claims hold, and which don't."""
    judged = {number: one.row for number, one in found.items() if one.row is not None}
    held = [number for number, row in judged.items() if row.passed]
    lines = [f"{len(held)} of {len(judged)} claims hold here; 95 % bootstrap intervals."]
    for word, numbers in (
        ("do not hold", [n for n, row in judged.items() if row.passed is False]),
        ("can't be judged here", [n for n, row in judged.items() if row.passed is None]),
        ("not made", [n for n in found if n not in judged]),
    ):
        if numbers:
            lines.append(f"{word}: {', '.join(numbers)}")
    return "\n".join(lines)


def markdown(found: Mapping[str, Outcome]) -> str:
    """A table, a row a claim."""
    lines = [
        "| row | claim | the paper | ours [95 %] | holds if | |",
        "|---|---|---|---|---|---|",
    ]
    for number, outcome in found.items():
        row = outcome.row
        if row is None:
            cells = [number, "", "", f"not made: {outcome.error}", "", ""]
        else:
            ours = "<br>".join(
                f"{of}: {', '.join(map(_number, measured))}"
                if of
                else ", ".join(map(_number, measured))
                for of, measured in _by_measure(row.ours).items()
            )
            note = f"<br>*{row.note}*" if row.note else ""
            cells = [number, row.claim, row.paper, ours + note, row.criterion, _word(row.passed)]
        lines.append("| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |")
    return "\n".join(lines)


def write_pictures(found: Mapping[str, Outcome], folder: Path) -> None:
    """Writes table.txt, a chart a group as a PNG file, and both as TensorBoard cards."""
    write_atomically(folder / "table.txt", f"{text(found)}\n".encode())
    logger = TensorBoardLogger(folder, version="tensorboard")
    for tag, numbers in CHARTS.items():
        rows = [one.row for number in numbers if (one := found.get(number)) and one.row]
        charts = [picture for row in rows if (picture := chart(row)) is not None]
        if charts:
            whole = _stacked(charts)
            save_png(folder / f"{tags.short(tag)}.png", whole)
            logger.log_picture(tag, whole, 0)
    logger.log_text(tags.CLAIMS_TABLE, f"{markdown(found)}\n\n{verdict(found)}")
    logger.finalize("success")


def chart(row: Row) -> Picture | None:
    """A dot with its interval for everything measured, one chart a measure."""
    table: dict[str, dict[str, Interval]] = {}
    for one in row.ours:
        if np.isfinite(one.value):
            table.setdefault(one.name, {})[one.of or "value"] = one.interval
    if not table:
        return None
    title = textwrap.shorten(row.claim, 80, placeholder=" ...")
    differences = {one.of or "value": 0.0 for one in row.ours if " - " in one.name}
    return interval_chart(
        table, title=f"{row.number} {_word(row.passed)}: {title}", references=differences
    )


def _stacked(charts: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """One below the other, on white."""
    width = max(one.shape[1] for one in charts)
    wide = [
        np.pad(one, ((0, 0), (0, width - one.shape[1]), (0, 0)), constant_values=255)
        for one in charts
    ]
    return np.concatenate(wide)


def _by_measure(ours: Iterable[Measured]) -> dict[str, list[Measured]]:
    found: dict[str, list[Measured]] = {}
    for one in ours:
        found.setdefault(one.of, []).append(one)
    return found


def _number(one: Measured) -> str:
    value = f"{one.name} {_digits(one.value)}"
    if one.low is not None and one.high is not None:
        value += f" [{_digits(one.low)}, {_digits(one.high)}]"
    return f"{value} (n={one.n})"


def _digits(value: float) -> str:
    small = 0 < abs(value) < 0.001
    return f"{value:.1e}" if small else (f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}")


def _word(passed: bool | None) -> str:
    return {True: "pass", False: "FAIL", None: "-"}[passed]


def _wrapped(start: str, words: str) -> str:
    return textwrap.fill(
        words, WIDTH, initial_indent=start, subsequent_indent=" " * max(len(start), 5),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
