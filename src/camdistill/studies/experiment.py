"""One training run from a config: Lightning's command line, our run folders, resuming, errors."""

import io
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jsonargparse import Namespace
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from camdistill.distill.checkpoints import restore, save
from camdistill.distill.module import DistilledExplainer
from camdistill.errors import UserError, check_number
from camdistill.files import expand_home, read_arrays, write_atomically
from camdistill.measure.fidelity import FidelityTable
from camdistill.networks.weights import read_weights
from camdistill.report.callbacks import MapGrids, Progress, ResumedEvents, RunText, Throughput
from camdistill.report.results import write_results
from camdistill.report.tensorboard import TensorBoardLogger
from camdistill.studies.checkpoint_files import LAST, LastCheckpoint, WholeFiles
from camdistill.studies.option_checks import check_groups, check_words
from camdistill.studies.parsing import Parser, demand_configs, translated

RUNS = Path("runs")
TABLE = "test_images.npz"


class _SaveConfig(SaveConfigCallback):
    """The config goes into the folder of a training run; testing leaves it as it is."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.config = self.config.clone()
            if "ckpt_path" in self.config:  # a run that was gone on with is the same run
                self.config["ckpt_path"] = None
            super().setup(trainer, pl_module, stage)


class Experiment(LightningCLI):
    """`fit`, `validate`, `test` and `predict` of a config, in a folder that resuming finds again.

    A fresh `fit` gets the next `runs/<name>/version_<k>`; `--ckpt_path last` stands for the newest
    version with a checkpoint, and everything goes on in that folder.

    Args:
        args: The command line.
        run: Whether to run the subcommand that it begins with; without, there is none.
        go_on: Without a subcommand: go on in the run's newest folder that has this config, if
            there is one.

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
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that takes whole names of options alone: half of one is a mistake."""
        parser = super().init_parser(**kwargs)
        parser.allow_abbrev = False
        return parser

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
        check_words(args)
        demand_configs(args)
        with translated():
            self.config = parser.parse_args(args)
        # Lightning would read the file's hyperparameters and let them choose the model's class.
        config = self.config.get(self.config.get("subcommand") or "", {})
        for part in ("model", "data"):
            check_groups(config or self.config, part)
        self._wanted: str | None = config.get("ckpt_path")
        if self._wanted:
            config["ckpt_path"] = None

    def instantiate_classes(self) -> None:
        """Lets the mistakes that networks and data find through."""
        with translated():
            super().instantiate_classes()

    def before_instantiate_classes(self) -> None:
        """Finds the run's folder, and the checkpoint that `last` stands for."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        name = config["run"] = config.run or _config_name(config)
        runs = expand_home(name) if "/" in name else RUNS / name
        wanted = self._wanted
        self._small: str | None = None
        if "verbose" in config:
            config["verbose"] = False  # our own table says it better
        if "weights_only" in config:
            config["weights_only"] = True  # a checkpoint runs no code
        if self._go_on and (same := self._same_config(runs)):
            self.folder = same
        elif wanted == "last":
            self.folder = _newest(runs)
            config["ckpt_path"] = str(self.folder / LAST)
        elif wanted:
            self.folder = _folder_of(Path(wanted), runs)
        elif self.subcommand in (None, "fit"):
            self.folder = _next_version(runs)
        else:
            raise UserError(
                f"no checkpoint to {self.subcommand}: give --ckpt_path FILE, or --ckpt_path last "
                f"for the newest run of {runs}"
            )
        if wanted:
            config["ckpt_path"] = self._readable(config["ckpt_path"] or wanted)

    def _readable(self, path: str) -> str | None:
        """A checkpoint for Lightning; a small one, which has weights alone, is ours to read."""
        found = read_weights(path)
        if found.whole:
            return path
        if self.subcommand == "fit":
            raise UserError(
                f"'{path}' has weights alone, so training can't go on from it: give a last.ckpt; "
                "to start from the weights: --model.student.weights FILE"
            )
        self._small = path
        return None

    def after_instantiate_classes(self) -> None:
        """Puts the weights of a small checkpoint where they belong."""
        if self._small is not None:
            restore(self.model, self._small)

    def _same_config(self, runs: Path) -> Path | None:
        """The newest of a run's folders whose config is this one."""
        own = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for folder in reversed(_versions(runs)):
            file = folder / "config.yaml"
            if file.is_file() and yaml.safe_load(file.read_text(encoding="utf-8")) == own:
                return folder
        return None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with our logger and callbacks, unless the config brings its own logger."""
        config: Namespace = self._get(self.config_init, "trainer", default={})
        if (clip := config.get("gradient_clip_val")) is not None:
            name, cure = "--trainer.gradient_clip_val", "give 0 (no clipping) or more"
            check_number(name, clip, "[0, inf)", cure)
        ours: list[Callback] = []
        if config.get("logger") in (None, True):
            # Lightning logs a test at step 0, where a run's lines would break off.
            alone = self.subcommand if self.subcommand != "fit" else None
            kwargs["logger"] = TensorBoardLogger(
                self.folder.parent,
                version=self.folder.name,
                sub_dir=alone,
                hparam_metrics=getattr(self.model, "cards", ()),
            )
            ours += [MapGrids(), RunText(), ResumedEvents(), Throughput()]
        if config.get("enable_checkpointing") is not False and not config.get("fast_dev_run"):
            ours.append(LastCheckpoint(self.folder))
        if config.get("enable_progress_bar") is not False:
            ours.append(Progress())
        kwargs["default_root_dir"] = config.get("default_root_dir") or str(self.folder)
        kwargs["callbacks"] = [*(config.get("callbacks") or []), *ours]
        plugins = config.get("plugins") or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), WholeFiles()]
        return super().instantiate_trainer(**kwargs)

    def fit_and_test(self) -> dict[str, object]:
        """Trains (on from the last checkpoint, if there is one) and tests; returns the results."""
        last = self.folder / LAST
        self.trainer.fit(
            self.model, self.datamodule, ckpt_path=str(last) if last.is_file() else None
        )
        self.save_network()
        self.trainer.test(self.model, self.datamodule, verbose=False)
        results = self.write_results()
        self.trainer.strategy.barrier()  # what the first process wrote, all can read
        return results

    def save_network(self) -> Path:
        """Writes what was trained as a small safetensors file, once; returns its path."""
        kind = "student" if isinstance(self.model, DistilledExplainer) else "network"
        path = self.folder / f"{kind}.safetensors"
        if self.trainer.is_global_zero:
            save(self.model, path)
        return path

    def write_results(self) -> dict[str, object]:
        """Writes what the test measured: `results.json`, and every image's values beside it."""
        found = dict(self.model.results())
        found["seeds"] = [self._get(self.config, "seed_everything")]
        found["seconds"] = round(time.monotonic() - self._started, 1)
        if self.trainer.is_global_zero:
            table = getattr(self.model, "table", None)
            if table is not None:
                save_table(self.folder / TABLE, table)
            write_results(self.folder / "results.json", found)
        return found


def _config_name(config: Namespace) -> str:
    files = config.get("config") or []
    return Path(str(files[0])).stem if files else "run"


def _folder_of(checkpoint: Path, runs: Path) -> Path:
    """The run that a checkpoint lies in; for one that lies elsewhere a new one."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / "config.yaml").is_file():
            return folder
    return _next_version(runs)


def _versions(runs: Path) -> list[Path]:
    """A run's version folders, oldest first."""
    found = [path for path in runs.glob("version_*") if path.name.split("_")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("_")[1]))


def _newest(runs: Path) -> Path:
    for folder in reversed(_versions(runs)):
        if (folder / LAST).is_file():
            return folder
    raise UserError(
        f"no checkpoint to go on from under {runs}; start without --ckpt_path, or name the run "
        "with --run"
    )


def _next_version(runs: Path) -> Path:
    """The next free folder; processes that Lightning starts for the same run get the same one."""
    inherited = os.environ.get("CAMDISTILL_RUN_FOLDER")
    if inherited and "LOCAL_RANK" in os.environ and Path(inherited).parent == runs:
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
    try:
        file = read_arrays(path)
        columns = {name: file[name] for name in file if name not in ("ids", "layers")}
        layers = tuple(str(name) for name in file["layers"])
        return FidelityTable(file["ids"], columns, layers)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is damaged ({error}); run `camdistill test` on that run again"
        ) from None
