"""Claims as text, as Markdown and as charts."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camdistill import tags
from camdistill.claims.claim import ClaimMeasurement, ClaimResult
from camdistill.claims.claims_run import Outcome
from camdistill.measure.intervals import Interval
from camdistill.report.figures.intervals import interval_chart
from camdistill.report.figures.pictures import Picture, save_png
from camdistill.report.tensorboard import TensorBoardLogger
from camdistill.store.atomic_files import write_atomically

WIDTH = 96
CHARTS: dict[str, tuple[str, ...]] = {
    tags.CLAIMS_LOCALIZATION: ("3", "4", "5", "5b", "5c", "6", "7", "8"),
    tags.CLAIMS_FAITHFULNESS: ("11", "12", "22", "23", "24", "25", "26"),
    tags.CLAIMS_WORLDS: ("9", "10", "13", "14", "15", "16", "17", "18", "20"),
}
"""Rows whose charts stand below one another in one picture."""


def claims_text(outcomes: Mapping[str, Outcome]) -> str:
    """A block a row, then how many hold."""
    return "\n\n".join(
        [
            *(claim_text(number, outcome) for number, outcome in outcomes.items()),
            claims_verdict(outcomes),
        ]
    )


def claim_text(number: str, outcome: Outcome) -> str:
    """One row: the claim, the paper's number, ours, the criterion."""
    if outcome.row is None:
        return _wrap_line(f"{number:>3}  not made  ", outcome.error)
    row = outcome.row
    lines = [_wrap_line(f"{number:>3}  {_verdict_word(row.passed):<5} ", row.claim)]
    lines.append(_wrap_line("     paper: ", row.paper))
    for measure, measurements in _by_measure(row.ours).items():
        numbers = ", ".join(_format_measurement(measurement) for measurement in measurements)
        lines.append(_wrap_line("     ours:  ", f"{measure}: {numbers}" if measure else numbers))
    lines.append(_wrap_line("     holds: ", row.criterion))
    if row.note:
        lines.append(_wrap_line("     note:  ", row.note))
    return "\n".join(lines)


def claims_verdict(outcomes: Mapping[str, Outcome]) -> str:
    """How many claims hold, and which don't."""
    result_by_number = {
        number: outcome.row for number, outcome in outcomes.items() if outcome.row is not None
    }
    holding = [number for number, row in result_by_number.items() if row.passed]
    lines = [
        f"{len(holding)} of {len(result_by_number)} claims hold here; 95 % bootstrap intervals."
    ]
    for word, numbers in (
        ("do not hold", [n for n, row in result_by_number.items() if row.passed is False]),
        ("can't be judged here", [n for n, row in result_by_number.items() if row.passed is None]),
        ("not made", [n for n in outcomes if n not in result_by_number]),
    ):
        if numbers:
            lines.append(f"{word}: {', '.join(numbers)}")
    return "\n".join(lines)


def claims_markdown(outcomes: Mapping[str, Outcome]) -> str:
    """A table, a row a claim."""
    lines = [
        "| row | claim | the paper | ours [95 %] | holds if | |",
        "|---|---|---|---|---|---|",
    ]
    for number, outcome in outcomes.items():
        row = outcome.row
        if row is None:
            cells = [number, "", "", f"not made: {outcome.error}", "", ""]
        else:
            ours = "<br>".join(
                f"{measure}: {', '.join(map(_format_measurement, measurements))}"
                if measure
                else ", ".join(map(_format_measurement, measurements))
                for measure, measurements in _by_measure(row.ours).items()
            )
            note = f"<br>*{row.note}*" if row.note else ""
            cells = [
                number,
                row.claim,
                row.paper,
                ours + note,
                row.criterion,
                _verdict_word(row.passed),
            ]
        lines.append("| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |")
    return "\n".join(lines)


def write_claim_pictures(outcomes: Mapping[str, Outcome], folder: Path) -> None:
    """Writes table.txt, a chart a group as a PNG file, and both as TensorBoard cards."""
    write_atomically(folder / "table.txt", f"{claims_text(outcomes)}\n".encode())
    logger = TensorBoardLogger(folder, version="tensorboard")
    for tag, numbers in CHARTS.items():
        rows = [
            outcome.row for number in numbers if (outcome := outcomes.get(number)) and outcome.row
        ]
        charts = [picture for row in rows if (picture := claim_chart(row)) is not None]
        if charts:
            combined = _stack_charts(charts)
            save_png(folder / f"{tags.short(tag)}.png", combined)
            logger.log_picture(tag, combined, 0)
    logger.log_text(tags.CLAIMS_TABLE, f"{claims_markdown(outcomes)}\n\n{claims_verdict(outcomes)}")
    logger.finalize("success")


def claim_chart(row: ClaimResult) -> Picture | None:
    """A dot with its interval for everything measured, one chart a measure."""
    table: dict[str, dict[str, Interval]] = {}
    for measurement in row.ours:
        if np.isfinite(measurement.value):
            table.setdefault(measurement.name, {})[measurement.measure or "value"] = (
                measurement.interval
            )
    if not table:
        return None
    title = textwrap.shorten(row.claim, 80, placeholder=" ...")
    references = {
        measurement.measure or "value": 0.0 for measurement in row.ours if " - " in measurement.name
    }
    return interval_chart(
        table, title=f"{row.number} {_verdict_word(row.passed)}: {title}", references=references
    )


def _stack_charts(charts: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """One below the other, on white."""
    width = max(picture.shape[1] for picture in charts)
    padded = [
        np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)
        for picture in charts
    ]
    return np.concatenate(padded)


def _by_measure(ours: Iterable[ClaimMeasurement]) -> dict[str, list[ClaimMeasurement]]:
    groups: dict[str, list[ClaimMeasurement]] = {}
    for measurement in ours:
        groups.setdefault(measurement.measure, []).append(measurement)
    return groups


def _format_measurement(measurement: ClaimMeasurement) -> str:
    value = f"{measurement.name} {_format_number(measurement.value)}"
    if measurement.low is not None and measurement.high is not None:
        value += f" [{_format_number(measurement.low)}, {_format_number(measurement.high)}]"
    return f"{value} (n={measurement.n})"


def _format_number(value: float) -> str:
    small = 0 < abs(value) < 0.001
    return f"{value:.1e}" if small else (f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}")


def _verdict_word(passed: bool | None) -> str:
    return {True: "pass", False: "FAIL", None: "-"}[passed]


def _wrap_line(start: str, words: str) -> str:
    return textwrap.fill(
        words, WIDTH, initial_indent=start, subsequent_indent=" " * max(len(start), 5),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
