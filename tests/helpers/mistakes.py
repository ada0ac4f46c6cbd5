"""A user's mistake as a row of a test: the command line, and what its one line of error says."""

import dataclasses
import hashlib
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from camdistill.cli import main


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A command line in a prepared folder, and what the line on stderr must say."""

    line: str | Sequence[str]
    says: str
    prepare: Callable[[Path], object] = lambda folder: None


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def config(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:  # type: ignore[type-arg]
    """A config that differs from the good one."""

    def prepare(folder: Path) -> None:
        content = yaml.safe_load((folder / "tiny.yaml").read_text())
        change(content)
        (folder / name).write_text(yaml.safe_dump(content))

    return prepare


def change_config(change: Callable[[dict], object]) -> Callable[[Path], object]:  # type: ignore[type-arg]
    """Changes `tiny.yaml` itself."""
    return config("tiny.yaml", change)


def cut(name: str) -> Callable[[Path], object]:
    """The first two thirds of a file."""

    def prepare(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 2 // 3])

    return prepare


def digests(folder: Path) -> dict[Path, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def mistaken_line(
    line: str | Sequence[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    """The one line that a mistaken command line gives; nothing that was there has changed."""
    before = digests(folder)
    capsys.readouterr()
    assert main(shlex.split(line) if isinstance(line, str) else line) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("camdistill: ")
    assert len(lines[0]) < 500
    assert not {"Traceback", "class '", "Namespace", "jsonargparse"} & set(lines[0].split())
    after = digests(folder)
    assert {path: after.get(path) for path in before} == before
    assert not (folder / "exploded").exists()
    return lines[0]


def check_mistake(mistake: Mistake, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Makes the mistake; its line says what it must, in the words of the pattern."""
    mistake.prepare(folder)
    line = mistaken_line(mistake.line, folder, capsys)
    assert re.search(mistake.says, line), line
