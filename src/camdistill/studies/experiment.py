"""One training run from a config: Lightning's command line with our run folders, resuming and errors."""

import io
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser, Namespace
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from camdistill.distill.checkpoints import save
from camdistill.distill.module import DistilledExplainer
from camdistill.errors import UserError, nearest
from camdistill.measure.fidelity import FidelityTable
from camdistill.report.callbacks import MapGrids, Progress, RunText, Throughput
from camdistill.report.results import write_atomically, write_results
from camdistill.report.tensorboard import TensorBoardLogger

RUNS = Path("runs")
LAST = Path("checkpoints") / "last.ckpt"
TABLE = "test_images.npz"


class Parser(LightningArgumentParser):
    """Lightning's parser whose errors are one `UserError` line that names the nearest option."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Raises the `UserError` that jsonargparse's many-line message stands for."""
        raise UserError(one_line(message, self)) from ex


def one_line(message: str, parser: ArgumentParser) -> str:
    """Jsonargparse's message without its layout, with the options that a mistyped one may have meant."""
    text = " ".join(message.split())
    options = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
    unknown = re.search(r"(?:[Uu]nrecognized arguments?: --?|Key ['\"])([\w.]+)", text)
    if unknown:
        name = unknown.group(1)
        return f"no option '{name}'; {nearest(name, options)}. --help lists all"
    return text


class _SaveConfig(SaveConfigCallback):
    """The config goes into the folder of a training run; testing leaves it as it is."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class Experiment(LightningCLI):
    """`fit`, `validate`, `test` and `predict` of a config, in a run folder that resuming finds again.

    A fresh `fit` gets the next `runs/<name>/version_<k>`; `--ckpt_path last` stands for the newest
    version with a checkpoint, and everything goes on in that folder.

    Args:
        args: The command line.
        run: Whether to run the subcommand that it begins with; without, there is none.
        go_on: Without a subcommand: go on in the run's newest folder, if there is one.

    Attributes:
        folder: The run's folder.
    """

    def __init__(self, args: list[str], *, run: bool = True, go_on: bool = False) -> None:
        self._go_on = go_on
        self._started = time.monotonic()
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={
                "precision": "bf16-mixed",
                "use_distributed_sampler": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 20,
            },
            parser_class=Parser,
            load_from_checkpoint_support=False,
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run's name and hands the one seed to model and data."""
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="Name of the run's folder under runs/, or a path. Default: the config's name.",
        )
        for part in ("model", "data"):
            parser.link_arguments("seed_everything", f"{part}.init_args.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses without Lightning's warning about arguments given from Python."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Finds the run's folder, and the checkpoint that `last` stands for."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        name = config.run or _config_name(config)
        runs = Path(name) if "/" in name else RUNS / name
        wanted = config.get("ckpt_path")
        if "verbose" in config:
            config["verbose"] = False  # our own table says it better
        if self._go_on and (versions := _versions(runs)):
            self.folder = versions[-1]
        elif wanted == "last":
            self.folder = _newest(runs)
            config["ckpt_path"] = str(self.folder / LAST)
        elif wanted and not Path(wanted).is_file():
            raise UserError(
                f"no checkpoint {wanted}; give a file, or `last` for the newest of {runs}"
            )
        elif wanted and Path(wanted).parent.name == LAST.parent.name:
            self.folder = Path(wanted).resolve().parents[1]
        else:
            self.folder = _next_version(runs)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with our logger and callbacks, unless the config brings its own logger."""
        config: Namespace = self._get(self.config_init, "trainer", default={})
        ours: list[Callback] = []
        if config.get("logger") in (None, True):
            kwargs["logger"] = TensorBoardLogger(self.folder)
            ours += [MapGrids(), RunText(), Throughput()]
        if config.get("enable_checkpointing") is not False and not config.get("fast_dev_run"):
            ours.append(
                ModelCheckpoint(
                    dirpath=self.folder / LAST.parent,
                    filename=LAST.stem,
                    auto_insert_metric_name=False,
                    enable_version_counter=False,
                    save_on_train_epoch_end=True,
                )
            )
        if config.get("enable_progress_bar") is not False:
            ours.append(Progress())
        kwargs["default_root_dir"] = config.get("default_root_dir") or str(self.folder)
        kwargs["callbacks"] = [*(config.get("callbacks") or []), *ours]
        return super().instantiate_trainer(**kwargs)

    def fit_and_test(self) -> dict[str, object]:
        """Trains (on from the last checkpoint, if there is one) and tests; returns the results."""
        last = self.folder / LAST
        self.trainer.fit(
            self.model, self.datamodule, ckpt_path=str(last) if last.is_file() else None
        )
        self.save_network()
        self.trainer.test(self.model, self.datamodule, verbose=False)
        return self.write_results()

    def save_network(self) -> Path:
        """Writes what was trained as a small safetensors file; returns its path."""
        kind = "student" if isinstance(self.model, DistilledExplainer) else "network"
        path = self.folder / f"{kind}.safetensors"
        save(self.model, path, getattr(self.datamodule, "classes", ()))
        return path

    def write_results(self) -> dict[str, object]:
        """Writes what the test measured: `results.json`, and every image's values beside it."""
        found = dict(self.model.results())
        found["seeds"] = [self._get(self.config, "seed_everything")]
        found["seconds"] = round(time.monotonic() - self._started, 1)
        table = getattr(self.model, "table", None)
        if table is not None:
            save_table(self.folder / TABLE, table)
        write_results(self.folder / "results.json", found)
        return found


def _config_name(config: Namespace) -> str:
    files = config.get("config") or []
    return Path(str(files[0])).stem if files else "run"


def _versions(runs: Path) -> list[Path]:
    """A run's version folders, oldest first."""
    found = [path for path in runs.glob("version_*") if path.name.split("_")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("_")[1]))


def _newest(runs: Path) -> Path:
    for folder in reversed(_versions(runs)):
        if (folder / LAST).is_file():
            return folder
    raise UserError(
        f"no checkpoint to go on from under {runs}; start without --ckpt_path, or name the run: --run"
    )


def _next_version(runs: Path) -> Path:
    """The next free folder; processes that Lightning starts for the same run get the same one."""
    inherited = os.environ.get("CAMDISTILL_RUN_FOLDER")
    if inherited and "LOCAL_RANK" in os.environ:
        return Path(inherited)
    versions = _versions(runs)
    number = int(versions[-1].name.split("_")[1]) + 1 if versions else 0
    folder = runs / f"version_{number}"
    os.environ["CAMDISTILL_RUN_FOLDER"] = str(folder)
    return folder


def save_table(path: Path, table: FidelityTable) -> None:
    """Keeps the values of every image."""
    content = io.BytesIO()
    arrays = {"ids": table.ids, "layers": np.array(table.layers), **table.columns}
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_atomically(path, content.getvalue())


def read_table(folder: Path) -> FidelityTable:
    """The values of every image of a run that was tested."""
    path = folder / TABLE
    if not path.is_file():
        raise UserError(f"{folder} was not tested: it has no {TABLE}; run `camdistill test` on it")
    with np.load(path, allow_pickle=False) as file:
        columns = {name: file[name] for name in file.files if name not in ("ids", "layers")}
        return FidelityTable(file["ids"], columns, tuple(str(name) for name in file["layers"]))
