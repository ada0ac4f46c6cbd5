"""Exit codes of what was stopped: 130 after Ctrl-C, 143 after SIGTERM, and how to go on."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from camdistill.cli import main


@pytest.fixture(autouse=True)
def _in_a_copy(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in trained.iterdir():
        if file.name not in ("runs", "cache"):
            (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAMDISTILL_RUN_FOLDER", "")


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts() -> Iterator[None]:
    """A suite that was started in the background of a shell inherits a Ctrl-C that is ignored."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


def sends(number: int) -> Callable[..., None]:
    """What stands in a function's place and sends this process a signal."""

    def send(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        threading.Event().wait(5)  # where the signal is heeded

    return send


SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
GO_ON = "the same command with `--ckpt_path last` goes on from the last whole epoch"
AGAIN = "start the same command again"
STUDENT = "--checkpoint {run}/student.safetensors --images images/test"
PLACES = [
    (
        "fit -c tiny.yaml",
        "camdistill.distill.distilled_explainer.DistilledExplainer.training_step",
        GO_ON,
    ),
    (
        "fit -c tiny.yaml",
        "camdistill.distill.distilled_explainer.DistilledExplainer.validation_step",
        GO_ON,
    ),
    ("fit -c tiny.yaml", "camdistill.data.modules.FolderData.prepare_data", GO_ON),
    (
        "test -c tiny.yaml --ckpt_path {run}/checkpoints/last.ckpt",
        "camdistill.distill.distilled_explainer.DistilledExplainer.test_step",
        AGAIN,
    ),
    (
        f"evaluate {STUDENT}",
        "camdistill.experiments.evaluation.evaluation_run._measure_batch",
        AGAIN,
    ),
    (f"analyze {STUDENT}", "camdistill.layers.sweep.layer_sweep.LayerSweep.update", AGAIN),
    (f"explain {STUDENT}", "camdistill.commands.command_parser.check_writable", AGAIN),
    (
        'study --base tiny.yaml --arms {{"a":{{}}}} --seeds 0',
        "camdistill.distill.distilled_explainer.DistilledExplainer.training_step",
        AGAIN,
    ),
]


@pytest.mark.parametrize(("number", "code", "how"), SIGNALS, ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize(("words", "where", "cure"), PLACES)
def test_a_signal_has_its_exit_code_and_one_line_that_says_how_to_go_on(
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    where: str,
    cure: str,
    number: int,
    code: int,
    how: str,
) -> None:
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    given = words.format(run=trained / "runs/tiny/version_0").split()
    with monkeypatch.context() as patch:
        patch.setattr(where, sends(number))
        assert main(given) == code
    assert capsys.readouterr().err.splitlines()[-1] == f"camdistill: {how}; {cure}"
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_start_that_was_stopped_leaves_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("camdistill.data.modules.FolderData.prepare_data", sends(signal.SIGTERM))
    assert main(["fit", "-c", "tiny.yaml"]) == 143
    assert not Path("runs").exists()


def test_sigterm_of_slurm_ends_a_fit_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"JOB_ID": "7", "JOB_NAME": "fit", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
    for name, value in (known | {"NODEID": "0", "NODELIST": "localhost"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    step = "camdistill.distill.distilled_explainer.DistilledExplainer.training_step"
    monkeypatch.setattr(step, sends(signal.SIGTERM))
    assert main(["fit", "-c", "tiny.yaml", "--trainer.devices", "1"]) == 143
    assert GO_ON in capsys.readouterr().err
