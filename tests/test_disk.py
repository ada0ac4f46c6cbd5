"""A disk that fails: one line with a cure, exit code 2, and no traceback of a writing thread."""

import errno
import os
import resource
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from camdistill.cli import main
from camdistill.errors import CURES, disk_mistake, mistake_of_system

STUDENT = "runs/tiny/version_0/student.safetensors"
FIT = "fit -c tiny.yaml --run disk --trainer.max_epochs 2"
ANALYZE = f"analyze --checkpoint {STUDENT} --images images/test/c0 --cards 1 --steps 2"
CAUSES = [
    *("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR"),
    *("ENAMETOOLONG", "ELOOP", "EMFILE", "ENFILE", "EIO", "ESTALE", "ENXIO", "ENOMEM", "EBUSY"),
]


@pytest.fixture(scope="module")
def here(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    copy = tmp_path_factory.mktemp("disk") / "here"
    shutil.copytree(trained, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(copy)
        yield copy


@pytest.fixture(autouse=True)
def _no_run_left(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CAMDISTILL_RUN_FOLDER", raising=False)
    yield
    shutil.rmtree(here / "runs" / "disk", ignore_errors=True)


def told(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(shlex.split(line)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("camdistill: ")
    return lines[0]


# The error of a thread is the main thread's too: pytest would count it twice.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("command", [FIT, ANALYZE])
@pytest.mark.parametrize("cause", ["ENOSPC", "EIO", "EFBIG"])
def test_events_that_cannot_be_written_give_one_line(
    cause: str,
    command: str,
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number = getattr(errno, cause)

    def fail(self: RecordWriter, data: bytes) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(RecordWriter, "write", fail)
    out = f" --out {tmp_path / 'out'}" if command == ANALYZE else ""
    line = told(command + out, capsys)
    assert os.strerror(number) in line or "no space left" in line
    assert CURES[number] in line


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("limit", [0, 1_000, 8_000, 40_000])
def test_a_limit_of_file_sizes_is_told(
    limit: int, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code = main(shlex.split(FIT))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    assert "File too large" in lines[0]
    assert CURES[errno.EFBIG] in lines[0]


@pytest.mark.parametrize("cause", CAUSES)
def test_every_error_of_a_disk_has_a_cure(
    cause: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number = getattr(errno, cause)

    def fail(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), "there/file")

    monkeypatch.setattr("camdistill.report.training_log.TrainingLog._append", fail)
    line = told(FIT, capsys)
    assert "there/file" in line
    assert "; " in line


def test_an_error_without_a_reason_keeps_its_traceback(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("strange")

    assert disk_mistake(OSError("strange")) is mistake_of_system(OSError("strange")) is None
    monkeypatch.setattr("camdistill.report.training_log.TrainingLog._append", fail)
    with pytest.raises(OSError, match="strange"):
        main(shlex.split(FIT))
