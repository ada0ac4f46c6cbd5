"""What happens only when training ends happens also where a checkpoint is its end already."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from safetensors import safe_open

from camdistill.cli import main
from camdistill.experiments.training.checkpoint_io import LAST, AtomicCheckpointIO
from camdistill.report.results import read_results

Config = Callable[..., Path]
Settings = dict[str, object]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAMDISTILL_RUN_FOLDER", raising=False)


class KilledError(Exception):
    """Stands for SIGKILL."""


def killed_after(epochs: int, patch: pytest.MonkeyPatch) -> None:
    """From now on a process dies when the checkpoint of that epoch is on the disk."""
    save = AtomicCheckpointIO.save_checkpoint

    def saved(self, checkpoint, path, storage_options=None):  # type: ignore[no-untyped-def]
        save(self, checkpoint, path, storage_options)
        if checkpoint["epoch"] + 1 == epochs:
            raise KilledError

    patch.setattr(AtomicCheckpointIO, "save_checkpoint", saved)


def measured(path: Path, run: str) -> tuple[bytes, str]:
    """The student's file, and what its test gives."""
    folder = Path(run, "version_0")
    file = next(folder.glob("*.safetensors"))
    given = ["test", "-c", str(path), "--run", run, "--ckpt_path", str(file)]
    assert main(given) == 0
    results = read_results(folder / "results.json")
    return file.read_bytes(), json.dumps([results.get("student"), results.get("network")])


class Doubles(Callback):
    """Changes the weights when training ends, as averages and pruning do."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Twice the head."""
        with torch.no_grad():
            for weight in pl_module.fitted.network.parameters():
                weight *= 2


DOUBLES = {"callbacks": [{"class_path": f"{__name__}.Doubles"}]}
CLASSIFIER = {
    "class_path": "camdistill.distill.classifier.Classifier",
    "init_args": {
        "network": {"name": "shallow_cnn", "args": {"channels": [6, 8], "strides": [2, 2]}},
        "ema": 0.9,
    },
}


@pytest.mark.parametrize(
    ("model", "trainer"),
    [({"ema": 0.9}, {}), ({}, DOUBLES), ({"ema": 0.5}, DOUBLES), (CLASSIFIER, {})],
    ids=["ema", "callback", "ema and callback", "classifier with ema"],
)
def test_a_run_killed_after_its_last_checkpoint_ends_as_one_that_was_not(
    config: Config, monkeypatch: pytest.MonkeyPatch, model: Settings, trainer: Settings
) -> None:
    path = config(
        trainer={"max_epochs": 2} | dict(trainer), **({} if model is CLASSIFIER else model)
    )
    if model is CLASSIFIER:
        whole = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(whole | {"model": model}))
    assert main(["fit", "-c", str(path), "--run", "runs/whole"]) == 0
    whole_run = measured(path, "runs/whole")
    given = ["fit", "-c", str(path), "--run", "runs/broken"]
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(KilledError):
            main(given)
    for _ in range(2):  # the second is of a run that is finished
        assert main([*given, "--ckpt_path", "last"]) == 0
        assert measured(path, "runs/broken") == whole_run
    checkpoint = torch.load(Path("runs/broken/version_0", LAST), weights_only=True)
    assert checkpoint["epoch"] == 1


def test_a_run_with_ema_killed_between_epochs_ends_as_one_that_was_not(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(trainer={"max_epochs": 4}, ema=0.9)
    assert main(["fit", "-c", str(path), "--run", "runs/whole"]) == 0
    whole_run = measured(path, "runs/whole")
    # what normalizes the images is no weight: its average is itself, not nearly so
    with safe_open("runs/whole/version_0/student.safetensors", "pt") as file:
        assert json.loads(file.metadata()["std"]) == torch.tensor([0.229, 0.224, 0.225]).tolist()
    given = ["fit", "-c", str(path), "--run", "runs/broken"]
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(KilledError):
            main(given)
    assert main([*given, "--ckpt_path", "last"]) == 0
    assert measured(path, "runs/broken") == whole_run


def test_a_training_that_stopped_early_stays_stopped_but_may_be_made_longer(
    config: Config,
) -> None:
    stopping = {
        "class_path": "pytorch_lightning.callbacks.EarlyStopping",
        # no epoch is better by that much: it stops after the second
        "init_args": {"monitor": "1_overview/loss_train", "patience": 1, "min_delta": 1e6},
    }
    path = config(trainer={"max_epochs": 6, "callbacks": [stopping]})
    given = ["fit", "-c", str(path), "--run", "runs/early"]
    assert main(given) == 0
    last = Path("runs/early/version_0", LAST)
    epochs = torch.load(last, weights_only=True)["epoch"] + 1
    assert epochs < 6
    once = measured(path, "runs/early")
    assert main([*given, "--ckpt_path", "last"]) == 0
    assert torch.load(last, weights_only=True)["epoch"] + 1 == epochs
    assert measured(path, "runs/early") == once
    assert main([*given, "--ckpt_path", "last", "--trainer.max_epochs", "7"]) == 0
    assert torch.load(last, weights_only=True)["epoch"] + 1 > epochs


MEASURED = ("results.json", "test_images.npz", "predictions.npz")


def test_another_student_in_the_folder_removes_what_was_measured_of_the_earlier_one(
    offline_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAMDISTILL_RUN_FOLDER", "")
    run = Path("runs/tiny/version_0")
    last = ["-c", "tiny.yaml", "--ckpt_path", "last"]
    for command in ("test", "predict", "validate"):
        assert main([command, *last]) == 0
    assert all((run / name).is_file() for name in MEASURED)
    student = (run / "student.safetensors").read_bytes()
    assert main(["fit", *last]) == 0  # it is finished: the same student
    assert (run / "student.safetensors").read_bytes() == student
    assert all((run / name).is_file() for name in MEASURED)
    assert (run / "test").is_dir()
    assert "Removed" not in capsys.readouterr().out
    assert main(["fit", *last, "--trainer.max_epochs", "3"]) == 0
    assert (run / "student.safetensors").read_bytes() != student
    assert not any((run / name).exists() for name in (*MEASURED, "test", "validate"))
    said = next(one for one in capsys.readouterr().out.splitlines() if "Removed" in one)
    assert all(name in said for name in (*MEASURED, str(run)))
