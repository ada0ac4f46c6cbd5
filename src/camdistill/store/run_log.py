"""The runs of a study in one file, a line each: killed or widened, it goes on from there."""

import json
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Generic, Protocol, TypeVar, runtime_checkable

from camdistill.errors import UserError


@runtime_checkable
class Keyed(Protocol):
    """A finished run: a dataclass of values that JSON has."""

    @property
    def key(self) -> str:
        """Of everything that decides the run: equal keys, equal runs."""


RunT = TypeVar("RunT", bound=Keyed)


class RunLog(Generic[RunT]):
    """Finished runs by key, and the file that they are added to as they finish.

    A line that a killed process left unfinished is dropped.

    Args:
        path: The file.
        kind: What its lines are.
    """

    def __init__(self, path: Path, kind: Callable[..., RunT]) -> None:
        self._path, self._kind = path, kind
        self.records: dict[str, RunT] = {}
        if not path.exists():
            return
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"can't read {path}: {error.strerror}; name another --out") from None
        whole = content.rpartition(b"\n")[0]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = kind(**json.loads(line))
            except (ValueError, TypeError):
                raise UserError(
                    f"line {number} of {path} is no run of this study; mend or remove it"
                ) from None
            self.records[record.key] = record
        if len(whole) + 1 < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole) + 1 if whole else 0)

    def count_unused(self, keys: Collection[str]) -> int:
        """How many finished runs are none of these: they were made with other settings."""
        return len(self.records.keys() - set(keys))

    def add(self, records: Iterable[RunT]) -> None:
        """Writes down finished runs; they are on the disk when this returns."""
        lines = "".join(json.dumps(_as_json(record)) + "\n" for record in records)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        for line in lines.splitlines():
            record = self._kind(**json.loads(line))
            self.records[record.key] = record


def _as_json(record: Keyed) -> dict[str, object]:
    return {one.name: getattr(record, one.name) for one in fields(record)}  # type: ignore[arg-type]
