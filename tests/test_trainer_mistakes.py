"""Mistakes in the options of Lightning's trainer: one line with a cure, exit code 2, no run."""

import inspect
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import CellType, FunctionType

import pytest
import pytorch_lightning
import torch
import yaml
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, Dataset

from camdistill.cli import main
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.experiments.training import training_checks
from camdistill.experiments.training.lightning_cli import Experiment
from camdistill.experiments.training.trainer_errors import is_from_lightning, mistake_of_options
from camdistill.networks.teachers import NetworkSpec

FIT = "fit -c tiny.yaml"
CALLBACK = f"{FIT} --trainer.callbacks+="

# Of every option: values of a wrong type, and values out of its range.
FLAGS: dict[str, tuple[str, ...]] = {
    "accelerator": ("warp", "cuda", "tpu"),
    "strategy": ("ddpp", "fsdp", "deepspeed"),
    "devices": ("0", "abc", "[]"),
    "num_nodes": ("0", "x"),
    "precision": ("7", "true", "16-true", "transformer-engine"),
    "logger": ("x", "CSVLogger", "WandbLogger"),
    "callbacks": ("x", "EarlyStopping"),
    "fast_dev_run": ("-1", "x"),
    "max_epochs": ("-2", "1.5", "1e3", "true"),
    "min_epochs": ("-1", "x"),
    "max_steps": ("-2", "x"),
    "min_steps": ("-1", "x"),
    "max_time": ("x", "00:00", "{foo: 3}"),
    "limit_train_batches": ("-1", "1.5", "x"),
    "limit_val_batches": ("-1", "x"),
    "limit_test_batches": ("1.5", "x"),
    "limit_predict_batches": ("-0.5", "x"),
    "overfit_batches": ("1.5", "x"),
    "val_check_interval": ("0", "1000", "x"),
    "check_val_every_n_epoch": ("0", "-1", "1.5"),
    "num_sanity_val_steps": ("-2", "x"),
    "log_every_n_steps": ("-1", "x"),
    "enable_checkpointing": ("x",),
    "enable_progress_bar": ("x",),
    "enable_model_summary": ("x",),
    "accumulate_grad_batches": ("0", "-1", "1.5"),
    "gradient_clip_val": ("-1", "x"),
    "gradient_clip_algorithm": ("x",),
    "deterministic": ("x",),
    "benchmark": ("x",),
    "inference_mode": ("x",),
    "use_distributed_sampler": ("x",),
    "profiler": ("x", "xla"),
    "detect_anomaly": ("x",),
    "barebones": ("x", "true"),
    "plugins": ("x",),
    "sync_batchnorm": ("x",),
    "reload_dataloaders_every_n_epochs": ("-1", "x"),
    "default_root_dir": ("teacher.safetensors",),
    "enable_autolog_hparams": ("x",),
    "model_registry": ("x",),
}
OTHERS = {
    "seed below 0": (f"{FIT} --seed_everything -3", r"seed_everything is -3; give .* 0 to 42949"),
    "random seed": (f"{FIT} --seed_everything true", r"seed_everything is true; give a whole"),
    "no seed": (
        f"{FIT} --seed_everything null",
        r"everything is null; .*, or give a whole number$",
    ),
    "whole number with an exponent": (
        f"{FIT} --trainer.max_epochs 1e3",
        r"max_epochs is '1000\.0'; it takes a whole number or null; write 1000$",
    ),
    "switch for a number": (
        f"{FIT} --trainer.max_epochs true",
        r"max_epochs is 'true'; it takes a whole number or null$",
    ),
    "mistyped logger": (
        f"{FIT} --trainer.logger CSVLoger --trainer.logger.save_dir x",
        r"trainer\.logger names the class 'CSVLoger', which is not there; nearest: 'CSVLogger'",
    ),
    "mistyped callback": (f"{CALLBACK}EarlyStoping", r"'EarlyStoping', .*nearest: 'EarlyStopping'"),
    "class that is no callback": (
        f"{CALLBACK}pathlib.Path",
        r"'pathlib\.Path', which is no Callback; name one, such as '\w+'",
    ),
    "word for an epoch": (
        f"{CALLBACK}GradientAccumulationScheduler --trainer.callbacks.scheduling '{{a: 2}}'",
        r"scheduling has the name 'a', but its names are whole numbers; write .*\{0: 1, 4: 2\}",
    ),
    "seed above numpy's": (f"{FIT} --seed_everything 4294967296", r"is 4294967296; give .* 0 to"),
    "strategy by nearest name": (f"{FIT} --trainer.strategy ddpp", r"'ddpp'; nearest: 'ddp'"),
    "interval longer than an epoch": (
        f"{FIT} --trainer.val_check_interval 1000",
        r"val_check_interval is 1000, but an epoch has 6 batches; give 6 or less",
    ),
    "logger without its package": (
        f"{FIT} --trainer.logger CometLogger",
        r"the package 'comet-ml', which .* is not installed; pip install comet-ml",
    ),
    "loggers in a list without their package": (
        f"{FIT} --trainer.logger '[MLFlowLogger]'",
        r"the package 'mlflow', which .* is not installed; pip install mlflow",
    ),
    "callback without its package": (
        f"{CALLBACK}DeviceStatsMonitor",
        r"the package 'psutil', which .* is not installed; pip install psutil",
    ),
    "monitor that is not logged": (
        f"{CALLBACK}EarlyStopping --trainer.callbacks.monitor=pearson",
        r"a callback monitors 'pearson', which is not logged; nearest: '2_maps/pearson",
    ),
    "monitor of a checkpoint": (
        f"{CALLBACK}ModelCheckpoint --trainer.callbacks.monitor=agrement",
        r"a callback monitors 'agrement', which is not logged; nearest: '1_overview/agreement",
    ),
    "monitor of no validation": (
        f"{CALLBACK}EarlyStopping --trainer.callbacks.monitor=2_maps/pearson "
        "--trainer.limit_val_batches 0",
        r"'2_maps/pearson', which is not logged without a validation; leave out --trainer\.lim",
    ),
    "patience below 0": (
        f"{CALLBACK}EarlyStopping --trainer.callbacks.monitor=2_maps/pearson "
        "--trainer.callbacks.patience=-1",
        r"EarlyStopping: patience is -1; give 0 validations or more",
    ),
    "a thousand processes": (
        f"{FIT} --trainer.devices 1000",
        r"devices is 1000, each a process, but this machine has (\d+) CPU cores; give \1 or less",
    ),
    "time below 0": (
        f"{FIT} --trainer.max_time '{{seconds: -5}}'",
        r"max_time is -5 seconds; give .* above 0",
    ),
    "no time": (f"{FIT} --trainer.max_time 00:00:00:00", r"max_time is '00:00:00:00', no time"),
    "less than a batch": (
        f"{FIT} --trainer.limit_train_batches 0.0001",
        r"limit_train_batches is 0\.0001, less than one of 6 batches; .*a share of 0\.167 or more",
    ),
    "less than a batch to test": (
        "test -c tiny.yaml --ckpt_path last --trainer.limit_test_batches 0.0001",
        r"--trainer\.limit_test_batches is 0\.0001, less than one of 6 batches; give 1",
    ),
    "more epochs at least than at most": (
        f"{FIT} --trainer.min_epochs 3",
        r"min_epochs is 3, but max_epochs is 1, .*max_epochs 3 or m",
    ),
    "fewer epochs than were trained": (
        f"{FIT} --ckpt_path last --trainer.max_epochs 0",
        r"max_epochs is 0, but the checkpoint has been trained for 1 epoch; give 1 or more",
    ),
    "fewer steps than were trained": (
        f"{FIT} --ckpt_path last --trainer.max_steps 2",
        r"max_steps is 2, but the checkpoint has been trained for 6 steps; give 6 or more",
    ),
    "accumulation over more than an epoch": (
        f"{FIT} --trainer.accumulate_grad_batches 100000",
        r"accumulate_grad_batches is 100000, but an epoch has 6 batches, .*give 6 or less",
    ),
    "profiler of other machines": (
        f"{FIT} --trainer.profiler XLAProfiler",
        r"profiler xla is for TPUs, .*give simple, advanced or pytorch",
    ),
    "learning rate finder": (f"{CALLBACK}LearningRateFinder", r"model\.optimization\.lr .*leave"),
    "pruning": (
        f"{CALLBACK}ModelPruning --trainer.callbacks.pruning_fn=l1_unstructured",
        r"ModelPruning replaces the weights .*leave it out",
    ),
    "checkpoints of nothing": (
        f"{CALLBACK}ModelCheckpoint --trainer.callbacks.save_top_k=3",
        r"ModelCheckpoint.*save_top_k=3.*change that option of the trainer",
    ),
    "mode of stopping": (
        f"{CALLBACK}EarlyStopping --trainer.callbacks.monitor=a --trainer.callbacks.mode=up",
        r"EarlyStopping.*got up; change that option",
    ),
    "backbone that is not there": (
        f"{CALLBACK}BackboneFinetuning",
        r"BackboneFinetuning: .* no attribute 'backbone'; change",
    ),
    "strategy that lacks an argument": (
        f"{FIT} --trainer.strategy single_xla",
        r"missing 1 required positional argument: 'device'; change that option",
    ),
    "own checkpoints and none": (
        f"{CALLBACK}ModelCheckpoint --trainer.enable_checkpointing=false",
        r"enable_checkpointing=False.*; change that option",
    ),
    "prediction in two processes": (
        "predict -c tiny.yaml --ckpt_path last --trainer.devices 2",
        r"predict writes one file, in one process: --trainer\.devices 1",
    ),
}
CASES = {
    **{
        f"{name} {value}": (f"{FIT} '--trainer.{name}={value}'", "package|" + name)
        for name, values in FLAGS.items()
        for value in values
    },
    **OTHERS,
}


@pytest.fixture(scope="module")
def here(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the trained folder, which no mistake changes."""
    copy = tmp_path_factory.mktemp("mistakes") / "here"
    shutil.copytree(trained, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(copy)
        yield copy


@pytest.fixture(autouse=True)
def _own_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAMDISTILL_RUN_FOLDER", raising=False)


def test_every_option_of_the_trainer_has_wrong_values() -> None:
    known = set(inspect.signature(pytorch_lightning.Trainer.__init__).parameters) - {"self"}
    assert set(FLAGS) == known
    assert all(FLAGS.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_mistake_in_an_option_is_told_in_one_line(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, says = CASES[name]
    capsys.readouterr()
    assert main(shlex.split(line)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("camdistill: ")
    assert re.search(says, lines[0]), lines[0]
    assert re.search(r"; |: --|\bgive\b|\bpip install\b|nearest", lines[0])  # what to do
    assert len(lines[0]) < 500
    assert " - Expected" not in lines[0]  # jsonargparse's own text
    assert not {"Traceback", "class '", "Namespace", "jsonargparse"} & set(lines[0].split())
    left = here / "runs" / "tiny" / "version_1"
    assert not left.exists()  # told before the training


class Broken(Callback):
    """A user's callback with a mistake in its code."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.zeros(2).view(3)


class Logs(Callback):
    """A user's callback that calls Lightning wrongly."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("a", {"b": torch.zeros(2)})  # type: ignore[arg-type]


class Unbuilt(Callback):
    """A user's callback that can't be built."""

    def __init__(self) -> None:
        raise RuntimeError("not today")


@pytest.mark.parametrize("name", ["Broken", "Unbuilt"])
def test_a_mistake_in_the_users_code_keeps_its_traceback(name: str, here: Path) -> None:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        main([*FIT.split(), f"--trainer.callbacks+={__name__}.{name}", "--run", name])
    assert mistake_of_options(caught.value) is None  # type: ignore[arg-type]


def test_a_mistake_in_our_code_keeps_its_traceback(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: DistilledExplainer, *args: object) -> torch.Tensor:
        return torch.zeros(2).view(3)

    monkeypatch.setattr(DistilledExplainer, "targets", wrong)
    with pytest.raises(RuntimeError, match="shape"):
        main([*FIT.split(), "--run", "wrong"])


def test_a_loss_without_a_graph_keeps_its_traceback(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: DistilledExplainer, *args: object) -> torch.Tensor:
        return torch.zeros(())

    monkeypatch.setattr(DistilledExplainer, "training_step", wrong)
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        main([*FIT.split(), "--run", "detached"])
    assert not is_from_lightning(caught.value)


class Unreadable(Dataset[torch.Tensor]):
    """A user's data set with a mistake in it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        raise ValueError("no such image")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_a_users_data_set_is_no_trainer_option(workers: int, tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    ours = {
        "__name__": "camdistill.experiments.training.lightning_cli"
    }  # where commands call the trainer
    fit = FunctionType(
        (lambda *given: trainer.fit(*given)).__code__, ours, closure=(CellType(trainer),)
    )
    with pytest.raises(ValueError, match="no such image") as caught:
        fit(BoringModel(), DataLoader(Unreadable(), num_workers=workers))
    assert mistake_of_options(caught.value) is None


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_is_not_cut_to_fewer_epochs(
    epochs: int, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*FIT.split(), "--run", f"cut{epochs}", "--trainer.max_epochs"]
    assert main([*words, "3"]) == 0
    config = here / "runs" / f"cut{epochs}" / "version_0" / "config.yaml"
    before = config.read_text()
    assert main([*words, str(epochs), "--ckpt_path", "last"]) == 2
    line = capsys.readouterr().err
    assert re.search(rf"max_epochs is {epochs}, .*trained for 3 epochs; give 3 or more", line)
    assert config.read_text() == before


def test_a_training_of_no_epoch_has_an_end(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT.split(), "--trainer.max_epochs", "0", "--run", "untrained"]) == 0
    assert "6 classes, 0 epochs, on cpu" in capsys.readouterr().out


class Logging(Callback):
    """A user's callback that logs a number of its own."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("mine", 1.0)


def test_what_a_users_callback_logs_can_be_monitored(here: Path) -> None:
    callbacks = (
        f"[{__name__}.Logging, {{class_path: EarlyStopping, init_args: {{monitor: mine, "
        "check_on_train_epoch_end: true}}]"
    )
    assert main([*FIT.split(), f"--trainer.callbacks={callbacks}", "--run", "mine"]) == 0


@pytest.mark.parametrize("layers", [1, 2])
def test_all_that_is_logged_can_be_monitored(
    layers: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names that are known before a training are those that it logs."""
    known: list[set[str]] = []
    monkeypatch.setattr(
        "camdistill.experiments.training.training_checks.check_monitors",
        lambda trainer: known.append(
            {
                *training_checks._list_training_metrics(trainer.lightning_module),
                *training_checks._list_validation_metrics(trainer.lightning_module),
            }
        ),
    )
    pairs = [f"{{student: stage{n}, teacher: stage{n}}}" for n in (1, 2)][:layers]
    arguments = ["--config", "tiny.yaml", "--run", f"logged{layers}"]
    words = [*arguments, f"--model.transfer.pairs=[{', '.join(pairs)}]"]
    experiment = Experiment(words, run=False)
    experiment.trainer.fit(experiment.model, experiment.datamodule)
    assert known[-1] == set(experiment.trainer.callback_metrics)
    experiment.release()


def test_names_that_a_classifier_logs_are_known_before_it_trains(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[set[str]] = []
    monkeypatch.setattr(
        "camdistill.experiments.training.training_checks.check_monitors",
        lambda trainer: known.append(
            {
                *training_checks._list_training_metrics(trainer.lightning_module),
                *training_checks._list_validation_metrics(trainer.lightning_module),
            }
        ),
    )
    config = yaml.safe_load((here / "tiny.yaml").read_text())
    network = {"name": "shallow_cnn", "args": {"channels": [4, 6], "strides": [1, 2]}}
    config["model"] = {
        "class_path": "camdistill.distill.classifier.Classifier",
        "init_args": {"network": network},
    }
    (here / "classifier.yaml").write_text(yaml.safe_dump(config))
    experiment = Experiment(["--config", "classifier.yaml", "--run", "classifier"], run=False)
    experiment.trainer.fit(experiment.model, experiment.datamodule)
    assert known[-1] == set(experiment.trainer.callback_metrics)
    experiment.release()


@pytest.mark.parametrize("callbacks", ["=Timer", "+=Timer", "+=LearningRateMonitor"])
def test_a_callback_needs_no_list(callbacks: str, here: Path) -> None:
    assert main([*FIT.split(), f"--trainer.callbacks{callbacks}", "--run", "alone"]) == 0


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_maps_are_float32_in_every_precision(
    precision: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    quantities = DistilledExplainer.student_quantities

    def looked(self, images, classes):  # type: ignore[no-untyped-def]
        logits, maps = quantities(self, images, classes)
        weights = {one.dtype for one in self.student.parameters()}
        assert weights == {torch.float64 if precision == "64-true" else torch.bfloat16}
        assert {one.dtype for one in self.teacher.network.parameters()} == {torch.float32}
        seen.extend(one.dtype for one in maps.values())
        return logits, maps

    monkeypatch.setattr(DistilledExplainer, "student_quantities", looked)
    arguments = ["--config", "tiny.yaml", "--run", precision, f"--trainer.precision={precision}"]
    experiment = Experiment([*arguments, "--model.cached=true"], run=False)
    results = experiment.fit_and_test()
    assert set(seen) == {torch.float32}
    assert results["n"] == 36
    # the test is a float32 network's: that of the file
    again = ["test", "-c", "tiny.yaml", "--run", precision, "--ckpt_path"]
    file = experiment.folder / "student.safetensors"
    assert main([*again, str(file), "--trainer.precision", "32-true"]) == 0
    alone = Experiment([*again, "last", f"--trainer.precision={precision}"])
    assert torch.get_default_dtype() == torch.float32
    assert alone.trainer.callback_metrics


def test_the_precision_of_the_holder_does_not_round_the_teacher() -> None:
    spec = NetworkSpec("shallow_cnn", None, {"classes": 6, "channels": [4], "strides": [1]})
    module = DistilledExplainer(spec)
    before = {name: value.clone() for name, value in module.teacher.network.state_dict().items()}
    mean = module.student.mean.clone()
    module.to(torch.bfloat16)
    module.double()
    after = module.teacher.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(module.student.mean, mean)
    assert next(module.student.parameters()).dtype == torch.float64
