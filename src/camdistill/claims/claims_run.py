"""Claims one after the other: what is done is kept, whatever ends the run."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from camdistill.claims.claim import Claim, Lab, Measured, Row
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

    row: Row | None
    seconds: float
    error: str = ""


def run_claims(
    lab: Lab,
    rows: Sequence[tuple[str, Claim]],
    path: Path,
    settings: Mapping[str, object],
    sha256: Mapping[str, str | None],
    on_row: Callable[[str, Outcome], None] = lambda number, outcome: None,
) -> dict[str, Outcome]:
    """Makes the experiments that the results file lacks.

    A row that can't be made (a `UserError`) is told as such, made again at the next start, and
    stops no other.

    Args:
        lab: What experiments use.
        rows: Number and experiment.
        path: `results.json`: read at the start, written after each row.
        settings: What tells these results from others; None is not known.
        sha256: Of the files that were used.
        on_row: Told each row as it is there, from the file or new.

    Returns:
        By number, in the order of `rows`.

    Raises:
        UserError: The file holds results of other settings.
    """
    kept, settings = _kept(path, settings)
    found: dict[str, Outcome] = {}
    for number, claim in rows:
        if number not in kept or kept[number].row is None:
            lab.tell(f"row {number}")
            kept[number] = _made(lab, claim)
            _write(path, kept, lab, settings, sha256)
        found[number] = kept[number]
        on_row(number, found[number])
    return found


def _made(lab: Lab, claim: Claim) -> Outcome:
    begun = time.perf_counter()
    try:
        row = claim(lab)
    except UserError as error:
        return Outcome(None, time.perf_counter() - begun, " ".join(str(error).split()))
    return Outcome(row, time.perf_counter() - begun)


def _write(
    path: Path,
    kept: Mapping[str, Outcome],
    lab: Lab,
    settings: Mapping[str, object],
    sha256: Mapping[str, str | None],
) -> None:
    ordered = sorted(kept, key=lambda number: (int("".join(filter(str.isdigit, number))), number))
    write_results(
        path,
        {
            "n": lab.count,
            "seeds": [lab.seed],
            "rows": {number: asdict(kept[number]) for number in ordered},
            "settings": dict(settings),
        },
        seconds=sum(outcome.seconds for outcome in kept.values()),
        sha256=sha256,
    )


def _kept(
    path: Path, settings: Mapping[str, object]
) -> tuple[dict[str, Outcome], dict[str, object]]:
    """The rows that are there, and the settings with what was known before."""
    if not path.exists():
        return {}, dict(settings)
    found: dict[str, Any] = read_results(path)
    before = found.get("settings")
    if not isinstance(before, dict) or not isinstance(found.get("rows"), dict):
        raise UserError(
            f"{path} was not written by `camdistill claims`: name another folder with --out"
        )
    # What was left out, then or now, contradicts nothing.
    odd = [
        f"{name} {before[name]}, now {value}"
        for name, value in json.loads(json.dumps(settings)).items()
        if value is not None and before.get(name) not in (None, value)
    ]
    if odd:
        raise UserError(
            f"{path} holds results of other settings ({', '.join(odd)}): name another folder with "
            "--out, or remove the file"
        )
    known = {name: value for name, value in settings.items() if value is not None}
    return outcomes(path), {**before, **known}


def outcomes(path: Path) -> dict[str, Outcome]:
    """All rows of a results file."""
    found: dict[str, Any] = read_results(path)
    return {number: _outcome(entry) for number, entry in found["rows"].items()}


def _outcome(entry: Mapping[str, Any]) -> Outcome:
    row = entry["row"]
    if row is not None:
        # JSON has no NaN.
        ours = [
            {**one, "value": float("nan")} if one["value"] is None else one for one in row["ours"]
        ]
        row = Row(**{**row, "ours": tuple(Measured(**one) for one in ours)})
    return Outcome(row, float(entry["seconds"]), entry["error"])
