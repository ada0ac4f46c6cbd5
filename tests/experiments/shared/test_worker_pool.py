"""Processes do every job once, and one that is killed costs its own job alone."""

import signal
from pathlib import Path

import pytest

from camdistill.errors import UserError
from camdistill.experiments.shared.worker_pool import WorkerPool


def test_without_processes_jobs_are_done_here_in_order() -> None:
    with WorkerPool(eval, 0) as crew:
        assert list(crew.results(["1 + 1", "2 + 2"])) == [("1 + 1", 2), ("2 + 2", 4)]


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_its_job_done_again(tmp_path: Path) -> None:
    note = tmp_path / "killed"
    deadly = (
        f"1 if __import__('pathlib').Path({str(note)!r}).exists() else "
        f"(__import__('pathlib').Path({str(note)!r}).touch(), __import__('os').kill("
        "__import__('os').getpid(), 9))"
    )
    with WorkerPool(eval, 2) as crew:
        found = dict(crew.results([deadly, *(f"{number} * 10" for number in range(6))]))
        assert found == {deadly: 1} | {f"{number} * 10": number * 10 for number in range(6)}
        # the same processes do more
        assert list(crew.results(["7"])) == [("7", 7)]
    assert note.exists()


@pytest.mark.slow
def test_what_others_had_begun_is_done_when_a_job_fails(tmp_path: Path) -> None:
    begun, failing = (f"__import__('pathlib').Path({str(tmp_path / name)!r})" for name in "bf")
    wait = "[__import__('time').sleep(0.05) for _ in iter({}.exists, True)]"
    slow = f"({begun}.touch(), {wait.format(failing)}, __import__('time').sleep(1), 'done')[-1]"
    error = "__import__('camdistill.errors').errors.UserError('wrong')"
    wrong = f"({wait.format(begun)}, {failing}.touch(), (_ for _ in ()).throw({error}))"
    found = []
    with WorkerPool(eval, 2) as crew:
        with pytest.raises(UserError, match="wrong"):
            found.extend(crew.results([slow, wrong, "3"]))
        assert found == [(slow, "done")], "what nobody had begun isn't"
        assert list(crew.results(["7"])) == [("7", 7)]


@pytest.mark.slow
def test_processes_that_start_do_not_hear_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGINT)
    asks = "__import__('signal').getsignal(2) == __import__('signal').SIG_IGN"
    with WorkerPool(eval, 1) as crew:
        assert list(crew.results([asks])) == [(asks, True)]
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.slow
def test_a_job_that_kills_twice_and_one_that_fails_are_told(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with (
        WorkerPool(eval, 1) as crew,
        pytest.raises(UserError, match=r"killed 2 times \(exit code -9\).*--workers"),
    ):
        list(crew.results(["__import__('os').kill(__import__('os').getpid(), 9)"]))
    with WorkerPool(eval, 1) as crew:
        with pytest.raises(RuntimeError, match="its traceback stands above"):
            list(crew.results(["1 / 0"]))
        assert "ZeroDivisionError" in capfd.readouterr().err
    with WorkerPool(eval, 1) as crew, pytest.raises(UserError, match="no network 'resnte20'"):
        list(
            crew.results(
                [
                    "(lambda t: t.build(t.NetworkSpec('resnte20')))"
                    "(__import__('importlib').import_module('camdistill.networks.teachers'))"
                ]
            )
        )
