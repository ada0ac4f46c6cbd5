"""Run folders, what a run leaves in them, and going on."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback

from camdistill import tags
from camdistill.cli import main
from camdistill.distill.checkpoints import load
from camdistill.errors import UserError
from camdistill.experiments.training.checkpoint_io import LAST, AtomicCheckpointIO
from camdistill.experiments.training.lightning_cli import Experiment, read_table, save_table
from camdistill.measure.fidelity import FidelityTable
from camdistill.report.results import read_results
from camdistill.report.tensorboard import TensorBoardLogger, read_scalars
from camdistill.store.atomic_files import write_atomically

Config = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAMDISTILL_RUN_FOLDER", raising=False)


def versions(run: Path) -> list[str]:
    return sorted(folder.name for folder in run.glob("version_*"))


def test_fits_get_new_versions_and_last_goes_on_in_the_newest_with_a_checkpoint(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = config(), tmp_path / "runs" / "tiny"  # named after the config
    assert main(["fit", "-c", str(path), "--ckpt_path", "last"]) == 2
    assert "no checkpoint to go on from" in capsys.readouterr().err
    assert not run.exists()
    for _ in range(2):
        assert main(["fit", "-c", str(path)]) == 0
    assert versions(run) == ["version_0", "version_1"]
    (run / "version_7").mkdir()  # killed before its first checkpoint
    newest = torch.load(run / "version_1" / LAST, weights_only=True)
    older = (run / "version_0" / LAST).read_bytes()
    assert newest["epoch"] == 0
    more = ["--ckpt_path", "last", "--trainer.max_epochs", "2"]
    assert main(["fit", "-c", str(path), *more]) == 0
    assert torch.load(run / "version_1" / LAST, weights_only=True)["epoch"] == 1
    assert (run / "version_0" / LAST).read_bytes() == older
    assert versions(run) == ["version_0", "version_1", "version_7"]
    assert not (run / "version_7" / LAST).exists()
    assert main(["fit", "-c", str(path)]) == 0
    assert versions(run)[-1] == "version_8"


def test_saved_config_is_the_whole_one_and_says_the_run(config: Config, tmp_path: Path) -> None:
    path = config(beta=3.0)
    assert main(["fit", "-c", str(path), "--run", str(tmp_path / "here" / "a")]) == 0
    folder = tmp_path / "here" / "a" / "version_0"
    first = yaml.safe_load((folder / "config.yaml").read_text())
    assert first["model"]["init_args"]["beta"] == 3.0
    assert first["model"]["init_args"]["temperature"] == 4.0  # a default
    assert first["run"] == str(tmp_path / "here" / "a")
    assert first["seed_everything"] == 0
    # it is enough to go on, in the same folder, and stays what it was
    again = ["-c", str(folder / "config.yaml"), "--ckpt_path", "last"]
    assert main(["fit", *again]) == 0
    assert yaml.safe_load((folder / "config.yaml").read_text()) == first
    assert main(["test", *again]) == 0
    assert versions(tmp_path / "here" / "a") == ["version_0"]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == first
    assert read_results(folder / "results.json")["n"] == 20


def test_what_a_run_leaves_can_be_used(config: Config, tmp_path: Path) -> None:
    experiment = Experiment(["--config", str(config()), "--seed_everything=5"], run=False)
    results = experiment.fit_and_test()
    assert results["seeds"] == [5]
    assert float(str(results["seconds"])) > 0
    assert experiment.model.seed == experiment.datamodule.seed == 5
    folder = experiment.folder
    assert folder == Path("runs/tiny/version_0")
    found = load(folder / "student.safetensors")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found(images), experiment.model.eval().student(images))
    assert found.teacher is not None
    table = read_table(folder)
    assert len(table) == 20
    stored = read_results(folder / "results.json")
    assert stored["student"] == results["student"]
    assert {"machine", "versions", "sha256", "seeds", "seconds"} <= set(stored)


def test_no_checkpoint_and_wrong_checkpoints_are_told_and_leave_all_as_it_was(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config()
    assert main(["fit", "-c", str(path)]) == 0
    last = tmp_path / "runs" / "tiny" / "version_0" / LAST
    whole = last.read_bytes()

    def told(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "'nowhere.ckpt'" in told("fit", "-c", str(path), "--ckpt_path", "nowhere.ckpt")
    last.write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in told("fit", "-c", str(path), "--ckpt_path", "last")
    last.write_bytes(b"")
    assert "empty" in told("fit", "-c", str(path), "--ckpt_path", "last")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, last)
    assert "go on from" in told("fit", "-c", str(path), "--ckpt_path", "last")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "code": Runs()}, last)
    assert "could run code" in told("test", "-c", str(path), "--ckpt_path", "last")
    assert not (tmp_path / "ran").exists()
    last.write_bytes(whole)
    wider = ["--model.student.args", "{channels: [6, 9], strides: [2, 2]}"]
    assert "another network" in told("fit", "-c", str(path), *wider, "--ckpt_path", "last")
    assert last.read_bytes() == whole
    assert versions(last.parents[2]) == ["version_0"]


class Runs:
    """Leaves a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def test_a_checkpoint_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, path = AtomicCheckpointIO(), tmp_path / "folder" / "last.ckpt"
    files.save_checkpoint({"a": torch.ones(1000)}, path)
    before = path.read_bytes()
    stray = path.with_name(".last.ckpt.1.partial")
    stray.write_bytes(b"of a killed process")
    steps: list[str] = []

    def replaced(source: Path, target: Path) -> Path:
        steps.append(source.parent.name)
        assert path.read_bytes() == before  # until the very last moment
        assert torch.load(source, weights_only=True)["a"].sum() == 0
        return source.rename(target)

    monkeypatch.setattr(Path, "replace", replaced)
    files.save_checkpoint({"a": torch.zeros(1000)}, path)
    assert steps == ["folder"]  # a rename within one folder is atomic
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_what_was_logged_before_a_checkpoint_is_on_the_disk_before_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorBoardLogger, "log_picture", lambda *_: None)  # it flushes too
    save, found = AtomicCheckpointIO.save_checkpoint, []

    def looked(self, checkpoint, path, storage_options=None):  # type: ignore[no-untyped-def]
        curves = read_scalars(Path(path).parents[1])
        found.append([len(curves.get(tag, [])) for tag in (tags.LOSS_TRAIN, tags.SKILL)])
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", looked)
    assert main(["fit", "-c", str(config(trainer={"max_epochs": 3}))]) == 0
    assert found == [[3, 1], [6, 2], [9, 3]]


def test_a_full_disk_leaves_the_last_checkpoint(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = config(trainer={"max_epochs": 3})
    last = tmp_path / "runs" / "tiny" / "version_0" / LAST
    kept: list[bytes] = []

    def full(target: Path, content: bytes) -> None:
        if target.name == LAST.name and last.exists():
            kept.append(last.read_bytes())
            raise UserError(f"can't write {target}: No space left on device; free some space")
        write_atomically(target, content)

    monkeypatch.setattr("camdistill.experiments.training.checkpoint_io.write_atomically", full)
    assert main(["fit", "-c", str(path)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert last.read_bytes() == kept[0]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-c", str(path), "--ckpt_path", "last"]) == 0
    assert torch.load(last, weights_only=True)["epoch"] == 2


def test_a_config_may_bring_its_own_callbacks_and_no_logger(config: Config) -> None:
    path = config(
        trainer={
            "logger": False,
            "enable_checkpointing": False,
            "callbacks": [{"class_path": f"{__name__}.Counts"}],
        }
    )
    Counts.epochs = 0
    experiment = Experiment(["--config", str(path)], run=False)
    experiment.trainer.fit(experiment.model, experiment.datamodule)
    assert Counts.epochs == 1
    assert not (experiment.folder / LAST).exists()


class Counts(Callback):
    """Counts epochs."""

    epochs = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One more."""
        Counts.epochs += 1


def test_processes_of_one_run_share_its_folder_and_the_next_run_does_not(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--config", str(config())]
    first = Experiment([*arguments, "--run", str(tmp_path / "a")], run=False)
    monkeypatch.setenv("LOCAL_RANK", "1")  # what Lightning tells the processes that it starts
    same = Experiment([*arguments, "--run", str(tmp_path / "a")], run=False)
    assert same.folder == first.folder
    other = Experiment([*arguments, "--run", str(tmp_path / "b")], run=False)
    assert other.folder == tmp_path / "b" / "version_0"


def test_tables_survive_the_disk(tmp_path: Path) -> None:
    columns = {
        "student.accuracy": np.array([1, 0, np.nan], np.float32),
        "student.layers.a.pearson": np.array([0.25, -1, 1], np.float32),
    }
    table = FidelityTable(np.array([3, 5, 9]), columns, ("a",))
    save_table(tmp_path / "test_images.npz", table)
    found = read_table(tmp_path)
    assert found.layers == ("a",)
    np.testing.assert_array_equal(found.ids, table.ids)
    for name, column in columns.items():
        np.testing.assert_array_equal(found.columns[name], column)
    with pytest.raises(UserError, match="was not tested"):
        read_table(tmp_path / "nowhere")
