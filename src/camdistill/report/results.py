"""Writes and reads results: values, machine and versions, as JSON and as text tables."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from camdistill.errors import UserError, nearest
from camdistill.measure.intervals import Interval
from camdistill.store.atomic_files import write_atomically

Cell = Interval | float | int | str | None
# A whole string, so that nothing in it is taken for a list; or a list of numbers, true or null.
_TEXT_OR_NUMBERS = re.compile(r'"(?:[^"\\]|\\.)*"|\[[^\[\]{}"]*\]')


def write_results(
    path: Path,
    results: Mapping[str, object],
    *,
    seconds: float | int | None = None,
    sha256: Mapping[str, str | None] | None = None,
) -> Path:
    """Writes results as JSON, whole or not at all, with machine and versions.

    Args:
        path: The file; its folder is made.
        results: Nested by name; NaN and infinity are written as null.
        seconds: How long it took, wall clock.
        sha256: SHA-256 of the files that were used, by what they are ("teacher").

    Returns:
        The path.

    Raises:
        UserError: The file can't be written; what was there is intact.
    """
    content: dict[str, object] = {**results, "machine": machine(), "versions": package_versions()}
    if seconds is not None:
        content["seconds"] = round(seconds, 1)
    if sha256 is not None:
        content["sha256"] = dict(sha256)
    text = json.dumps(_to_json(content), indent=2, ensure_ascii=False, allow_nan=False)
    # Lists of numbers (seeds, values by seed) on one line.
    text = _TEXT_OR_NUMBERS.sub(_on_one_line, text)
    write_atomically(path, f"{text}\n".encode())
    return path


def _on_one_line(match: re.Match[str]) -> str:
    return match[0] if match[0].startswith('"') else f"[{' '.join(match[0][1:-1].split())}]"


def read_results(path: Path) -> dict[str, object]:
    """Reads what `write_results` wrote.

    Raises:
        UserError: There is no such file, or it is not a results file.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = sorted(file.name for file in path.parent.glob("*.json"))
        hint = f"; {nearest(path.name, beside)}" if beside else ""
        raise UserError(f"no results file {path}{hint}. `camdistill evaluate` writes one") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}; name a results.json") from None
    except ValueError:
        raise UserError(
            f"{path} is not JSON, or was cut short; run the command that made it again"
        ) from None
    if not isinstance(results, dict):
        raise UserError(f"{path} holds no named results; name a results.json of camdistill")
    return results


def available_cores() -> int:
    """Processor cores that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def machine() -> dict[str, object]:
    """What the numbers were measured on; `gpu` is null without one."""
    return {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
    }


def package_versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    packages = {"lightning": "pytorch-lightning"}
    names = ("camdistill", "torch", "torchvision", "lightning", "numpy")
    version_by_name = {name: importlib.metadata.version(packages.get(name, name)) for name in names}
    return {**version_by_name, "torch": torch.__version__, "python": platform.python_version()}


def text_table(
    table: Mapping[str, Mapping[str, Cell]], *, corner: str = "", digits: int = 3
) -> str:
    """Rows by name, columns by name, aligned; an `Interval` reads `mean [low, high]`, or `mean`.

    Columns are those of the first row, then what later rows add; a missing cell is a dash.
    """
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    lines = [[corner, *columns]]
    for name, row in table.items():
        lines.append([name, *(_cell(row.get(column), digits) for column in columns)])
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns) + 1)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(_align_cells(line, widths) for line in lines)


def _align_cells(line: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(width) if place == 0 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()


def _cell(value: Cell, digits: int) -> str:
    if isinstance(value, Interval):
        mean, low, high = (_cell(number, digits) for number in value)
        return f"{mean} [{low}, {high}]" if math.isfinite(value.high - value.low) else mean
    if isinstance(value, float):
        return f"{value:.{digits}f}" if math.isfinite(value) else "-"
    return "-" if value is None else str(value)


def _to_json(value: object) -> object:
    """Values as JSON has them; what is none of its types as text."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _to_json(item) for name, item in value.items()}
    if isinstance(value, Interval):
        return {name: _to_json(item) for name, item in value._asdict().items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str | None) else str(value)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
