"""A run's folder is its own: claimed, found again by what the run is, and never taken over."""

import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning import Trainer

from camdistill import tags
from camdistill.cli import main
from camdistill.data.modules import ShapesData
from camdistill.errors import UserError
from camdistill.experiments.training.arms_and_seeds import TrainingStudy, run_study
from camdistill.experiments.training.checkpoint_io import LAST
from camdistill.experiments.training.lightning_cli import Experiment
from camdistill.experiments.training.run_folders import claim_folder
from camdistill.networks.students import ShallowCNN
from camdistill.networks.weights import save_safetensors
from camdistill.report.results import read_results
from camdistill.report.tensorboard import read_scalars
from camdistill.store.atomic_files import lock_folder

Config = Callable[..., Path]
RUN = Path("runs/tiny")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAMDISTILL_RUN_FOLDER", raising=False)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, by the digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def folders(run: Path = RUN) -> list[str]:
    return sorted(folder.name for folder in run.glob("version_*"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that is refused and changes nothing."""
    before = tree(Path())
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert tree(Path()) == before, error
    return error


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--model.beta", "7", "model.beta 20.0 (here 7.0)"),
        ("--seed_everything", "3", "seed_everything 0 (here 3)"),
        ("--data.batch_size", "8", "data.batch_size 16 (here 8)"),
        ("--data.split_seed", "1", "data.split_seed 0 (here 1)"),
        ("--model.ema", "0.5", "model.ema None (here 0.5)"),
        ("--model.optimization.lr", "0.1", "model.optimization.lr 0.05 (here 0.1)"),
    ],
)
def test_last_and_files_never_go_on_in_another_run(
    config: Config, capsys: pytest.CaptureFixture[str], option: str, value: str, named: str
) -> None:
    path = str(config())
    assert main(["fit", "-c", path]) == 0
    given = ["fit", "-c", path, option, value, "--ckpt_path"]
    assert f"version_0 has {named}" in refused(capsys, *given, "last")
    assert f"version_0 has {named}" in refused(capsys, *given, str(RUN / "version_0" / LAST))
    # elsewhere no config says whose it is, but the checkpoint itself does
    shutil.copy(RUN / "version_0" / LAST, "elsewhere.ckpt")
    assert "the checkpoint was trained with" in refused(capsys, *given, "elsewhere.ckpt")
    assert folders() == ["version_0"]


def test_last_finds_the_run_of_the_config_behind_newer_ones(config: Config) -> None:
    path = str(config())
    for beta in ("1", "2"):
        assert main(["fit", "-c", path, "--model.beta", beta]) == 0
    newer = tree(RUN / "version_1")
    more = ["--ckpt_path", "last", "--trainer.max_epochs", "2"]
    assert main(["fit", "-c", path, "--model.beta", "1", *more]) == 0
    assert torch.load(RUN / "version_0" / LAST, weights_only=True)["epoch"] == 1
    assert tree(RUN / "version_1") == newer


class KilledError(Exception):
    """Stands for SIGKILL."""


def killed(*_: object, **__: object) -> None:
    raise KilledError


def test_a_run_killed_before_its_first_checkpoint_starts_again_in_its_own_folder(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(config())
    assert main(["fit", "-c", path]) == 0
    finished = tree(RUN / "version_0")
    longer = ["fit", "-c", path, "--trainer.max_epochs", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "camdistill.experiments.training.checkpoint_io.AtomicCheckpointIO.save_checkpoint",
            killed,
        )
        with pytest.raises(KilledError):
            main(longer)
    assert folders() == ["version_0", "version_1"]
    assert main([*longer, "--ckpt_path", "last"]) == 0
    assert tree(RUN / "version_0") == finished
    assert torch.load(RUN / "version_1" / LAST, weights_only=True)["epoch"] == 1
    # its lines are those of a run that was not killed: no step twice
    assert main([*longer, "--run", "whole"]) == 0
    curves = [read_scalars(folder) for folder in (RUN / "version_1", Path("runs/whole/version_0"))]
    for curve in curves:
        curve.pop(tags.IMAGES_PER_SECOND, None)
    assert curves[0] == curves[1]


def image_folder(root: Path, seed: int) -> Path:
    for split in ("train", "val"):
        for number in range(16):
            path = root / split / f"c{number % 8}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([seed, number]).integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(path)
    return root


def test_images_may_move_but_not_change_between_a_kill_and_going_on(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config()
    whole = yaml.safe_load(path.read_text())
    root = image_folder(Path("images"), 0)
    whole["data"] = {
        "class_path": "camdistill.data.modules.FolderData",
        "init_args": {"root": str(root), "batch_size": 8},
    }
    whole["model"]["init_args"]["cached"] = False
    path.write_text(yaml.safe_dump(whole))
    assert main(["fit", "-c", str(path)]) == 0
    root.rename("moved")
    more = ["--ckpt_path", "last", "--trainer.max_epochs", "2", "--data.root", "moved"]
    assert main(["fit", "-c", str(path), *more]) == 0
    assert folders() == ["version_0"]
    image_folder(Path("moved"), 1)
    more[3] = "3"
    error = refused(capsys, "fit", "-c", str(path), *more)
    assert "the checkpoint was trained with train images" in error
    # a test of other images is no result of the run
    before = tree(RUN / "version_0")
    assert main(["test", "-c", str(path), "--ckpt_path", "last", "--data.root", "moved"]) == 0
    assert tree(RUN / "version_0") == before | tree(RUN / "version_0")
    image_folder(Path("third"), 2)
    assert main(["test", "-c", str(path), "--ckpt_path", "last", "--data.root", "third"]) == 0
    assert read_results(RUN / "version_1" / "results.json")["n"] == 16


def test_an_empty_config_is_told_and_never_trains_again_in_silence(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config()
    study = TrainingStudy(path, {"a": {}}, [0], Path("study"))
    run_study(study)
    Path("study/results.json").unlink()
    folder = Path("study/a/seed_0/version_0")
    (folder / "config.yaml").write_bytes(b"")
    before = tree(folder)
    with pytest.raises(UserError, match=r"version_0 has a checkpoint, but its config.yaml is"):
        run_study(study)
    assert tree(folder) == before
    assert folders(folder.parent) == ["version_0"]
    given = ["fit", "-c", str(path), "--run", "study/a/seed_0", "--ckpt_path"]
    assert "its config.yaml is missing, empty or damaged" in refused(capsys, *given, "last")
    assert main([*given, str(folder / LAST)]) == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["run"] == "study/a/seed_0"


def test_a_kill_while_the_config_is_written_leaves_the_one_that_was_there(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(config())
    assert main(["fit", "-c", path]) == 0
    file = RUN / "version_0" / "config.yaml"
    before, replace = file.read_bytes(), Path.replace
    more = ["--ckpt_path", "last", "--trainer.max_epochs", "2"]

    def replaced(source: Path, target: Path) -> Path:
        if target.name == file.name:
            raise KilledError
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replaced)
        with pytest.raises(KilledError):
            main(["fit", "-c", path, *more])
    assert file.read_bytes() == before
    assert main(["fit", "-c", path, *more]) == 0
    assert yaml.safe_load(file.read_text())["trainer"]["max_epochs"] == 2


def test_config_is_in_the_run_s_folder_whoever_logs(config: Config) -> None:
    logger = {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": "csv"}}
    path = str(config(trainer={"logger": logger}))
    assert main(["fit", "-c", path]) == 0
    assert main(["fit", "-c", path, "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    assert folders() == ["version_0"]


def _claimed(runs: Path) -> str:
    return claim_folder(runs).path.name


def test_runs_that_start_at_once_get_a_folder_each(config: Config, tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        names = pool.map(_claimed, [tmp_path / "runs" / "new"] * 40, chunksize=1)
    assert sorted(names) == sorted(f"version_{number}" for number in range(40))
    arguments = ["--config", str(config())]
    first, second = (Experiment(arguments, run=False) for _ in range(2))
    assert (first.folder.name, second.folder.name) == ("version_0", "version_1")
    assert first.folder.is_dir()


@pytest.mark.parametrize(
    "mistake",
    [
        ["--model.teacher.weights", "nowhere.safetensors"],
        ["--model.student.args", "{channels: [6, 8], strides: [64, 2]}"],
        ["--trainer.max_epochs=-1"],
    ],
)
def test_a_start_that_fails_leaves_no_folder(config: Config, mistake: list[str]) -> None:
    path = str(config())
    before = sorted(Path().rglob("*"))
    assert main(["fit", "-c", path, *mistake]) == 2
    assert sorted(Path().rglob("*")) == before


def test_a_refused_study_and_a_refused_test_leave_no_folder(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config()
    whole = yaml.safe_load(path.read_text())
    network = {"name": "shallow_cnn", "args": {"channels": [6, 8], "strides": [2, 2]}}
    whole["model"] = {
        "class_path": "camdistill.distill.classifier.Classifier",
        "init_args": {"network": network},
    }
    other = path.with_name("classifier.yaml")
    other.write_text(yaml.safe_dump(whole))
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match="a study compares students"):
        run_study(TrainingStudy(other, {"a": {}}, [0], Path("study")))
    given = ["test", "-c", str(path), "--ckpt_path", "student.safetensors"]
    save_safetensors(Path("student.safetensors"), ShallowCNN(3, (4, 6), (2, 2)).state_dict(), {})
    assert main(given) == 2
    Path("student.safetensors").unlink()
    assert sorted(Path().rglob("*")) == before


def test_a_study_whose_test_set_is_refused_leaves_no_folder_and_no_lock(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config()

    def refuse(self: ShapesData) -> None:
        raise UserError("no test images")

    monkeypatch.setattr(ShapesData, "check_test_set", refuse)
    released, release = [], Experiment.release

    def counted(self: Experiment, *, keep: bool = False) -> None:
        released.append(self.folder)
        release(self, keep=keep)

    monkeypatch.setattr(Experiment, "release", counted)
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match="no test images"):
        run_study(TrainingStudy(path, {"x": {}}, [0], Path("out")))
    assert released == [Path("out/x/seed_0/version_0")]
    assert sorted(Path().rglob("*")) == before


RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK", "GROUP_RANK")


@pytest.mark.parametrize(
    ("told", "first"),
    [
        ({}, True),
        ({"NODE_RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"NODE_RANK": "1"}, False),
        ({"GROUP_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"RANK": "0", "LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "SLURM_PROCID": "4"}, False),
        # torchrun ranks the nodes itself, whatever the cluster calls them
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "SLURM_PROCID": "1"}, True),
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "8", "SLURM_PROCID": "0"}, False),
    ],
)
def test_only_the_first_process_of_all_nodes_claims_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, str], first: bool
) -> None:
    for name in (*RANKS, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    found = claim_folder(tmp_path / "runs")
    assert found.path == tmp_path / "runs" / "version_0"
    assert found.path.is_dir() == first


def test_a_folder_that_another_than_rank_0_claimed_goes(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(config(cached=False))
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    assert main(["fit", "-c", path]) == 0
    assert folders() == []


def test_two_processes_never_train_in_one_folder(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(config())
    assert main(["fit", "-c", path]) == 0
    with lock_folder(RUN / "version_0"):  # as the process that trains there does
        error = refused(capsys, "fit", "-c", path, "--ckpt_path", "last")
        assert "another process works in runs/tiny/version_0; wait for it" in error
        assert main(["fit", "-c", path]) == 0
    assert folders() == ["version_0", "version_1"]
    assert main(["fit", "-c", path, "--ckpt_path", "last"]) == 0


@pytest.mark.parametrize("command", ["evaluate", "analyze", "explain"])
def test_two_commands_in_one_out_are_told(
    config: Config, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    given = [command, "--teacher", "resnet20", "--data", "shapes", "--out", "out/here"]
    if command == "explain":
        given[3:5] = ["--images", str(image_folder(Path("images"), 0))]
    with lock_folder(Path("out/here")):
        error = refused(capsys, *given)
        assert "another process works in out/here; wait for it, or name another --out" in error
    assert not Path("out").exists()
    assert main([*given, "--weights", "nowhere.safetensors"]) == 2
    assert not Path("out").exists()  # one that failed leaves none either


def test_a_forked_process_doesnt_hold_the_lock_of_one_that_was_killed(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    here, there = os.pipe()
    child = os.fork()
    if not child:
        with lock_folder(folder):
            if not os.fork():
                os.write(there, str(os.getpid()).encode())
                time.sleep(60)
                os._exit(0)
            time.sleep(60)
        os._exit(0)
    grandchild = int(os.read(here, 20))
    try:
        with pytest.raises(UserError, match="another process works in"), lock_folder(folder):
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with lock_folder(folder):
            os.kill(grandchild, 0)  # it lives
    finally:
        os.kill(grandchild, signal.SIGKILL)
