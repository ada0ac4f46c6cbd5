"""Claims one after the other: what is done is kept, whatever ends the run."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from camdistill.claims.claim import ClaimExperiment, ClaimMeasurement, ClaimResult, ClaimSetup
from camdistill.errors import UserError
from camdistill.report.results import read_results, write_results


@dataclass(frozen=True)
class Outcome:
    """What became of one row.

    Attributes:
        row: None where the experiment could not be made.
        seconds: It took, wall clock.
        error: Why it could not be made; empty where it was.
    """

    row: ClaimResult | None
    seconds: float
    error: str = ""


def run_claims(
    setup: ClaimSetup,
    rows: Sequence[tuple[str, ClaimExperiment]],
    path: Path,
    settings: Mapping[str, object],
    sha256: Mapping[str, str | None],
    on_row: Callable[[str, Outcome], None] = lambda number, outcome: None,
) -> dict[str, Outcome]:
    """Makes the experiments that the results file lacks.

    A row that can't be made (a `UserError`) is told as such, made again at the next start, and
    stops no other.

    Args:
        setup: What experiments use.
        rows: Number and experiment.
        path: `results.json`: read at the start, written after each row.
        settings: What tells these results from others; None is not known.
        sha256: SHA-256 of the files that were used.
        on_row: Told each row as it is there, from the file or new.

    Returns:
        By number, in the order of `rows`.

    Raises:
        UserError: The file holds results of other settings.
    """
    stored, settings = _load_outcomes(path, settings)
    outcome_by_number: dict[str, Outcome] = {}
    for number, experiment in rows:
        if number not in stored or stored[number].row is None:
            setup.announce(f"row {number}")
            stored[number] = _run_experiment(setup, experiment)
            _write(path, stored, setup, settings, sha256)
        outcome_by_number[number] = stored[number]
        on_row(number, outcome_by_number[number])
    return outcome_by_number


def _run_experiment(setup: ClaimSetup, experiment: ClaimExperiment) -> Outcome:
    start_time = time.perf_counter()
    try:
        row = experiment(setup)
    except UserError as error:
        return Outcome(None, time.perf_counter() - start_time, " ".join(str(error).split()))
    return Outcome(row, time.perf_counter() - start_time)


def _write(
    path: Path,
    outcome_by_number: Mapping[str, Outcome],
    setup: ClaimSetup,
    settings: Mapping[str, object],
    sha256: Mapping[str, str | None],
) -> None:
    ordered = sorted(
        outcome_by_number, key=lambda number: (int("".join(filter(str.isdigit, number))), number)
    )
    write_results(
        path,
        {
            "n": setup.count,
            "seeds": [setup.seed],
            "rows": {number: asdict(outcome_by_number[number]) for number in ordered},
            "settings": dict(settings),
        },
        seconds=sum(outcome.seconds for outcome in outcome_by_number.values()),
        sha256=sha256,
    )


def _load_outcomes(
    path: Path, settings: Mapping[str, object]
) -> tuple[dict[str, Outcome], dict[str, object]]:
    """The rows that are there, and the settings with what was known before."""
    if not path.exists():
        return {}, dict(settings)
    stored: dict[str, Any] = read_results(path)
    stored_settings = stored.get("settings")
    if not isinstance(stored_settings, dict) or not isinstance(stored.get("rows"), dict):
        raise UserError(
            f"{path} was not written by `camdistill claims`: name another folder with --out"
        )
    # What was left out, then or now, contradicts nothing.
    conflicts = [
        f"{name} {stored_settings[name]}, now {value}"
        for name, value in json.loads(json.dumps(settings)).items()
        if value is not None and stored_settings.get(name) not in (None, value)
    ]
    if conflicts:
        raise UserError(
            f"{path} holds results of other settings ({', '.join(conflicts)}): name another "
            "folder with "
            "--out, or remove the file"
        )
    known_settings = {name: value for name, value in settings.items() if value is not None}
    return read_outcomes(path), {**stored_settings, **known_settings}


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """All rows of a results file."""
    stored: dict[str, Any] = read_results(path)
    return {number: _parse_outcome(entry) for number, entry in stored["rows"].items()}


def _parse_outcome(entry: Mapping[str, Any]) -> Outcome:
    row = entry["row"]
    if row is not None:
        # JSON has no NaN.
        ours = [
            {**measurement, "value": float("nan")} if measurement["value"] is None else measurement
            for measurement in row["ours"]
        ]
        row = ClaimResult(
            **{**row, "ours": tuple(ClaimMeasurement(**measurement) for measurement in ours)}
        )
    return Outcome(row, float(entry["seconds"]), entry["error"])
