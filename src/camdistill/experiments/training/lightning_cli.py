"""Lightning's command line with this project's run folders, resuming and errors."""

import io
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jsonargparse import Namespace
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from camdistill.distill.checkpoints import is_saved, restore, write_checkpoint
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.errors import UserError, check_number, shorten
from camdistill.experiments.training.checkpoint_io import (
    LAST,
    AtomicCheckpointIO,
    CompletingFitLoop,
    LastCheckpoint,
)
from camdistill.experiments.training.config_errors import (
    Parser,
    check_config_files,
    raise_user_errors,
)
from camdistill.experiments.training.earlier_results import RESULTS, TABLE, remove_earlier_results
from camdistill.experiments.training.option_checks import check_groups, check_seeds, check_words
from camdistill.experiments.training.run_folders import (
    CONFIG,
    RunFolder,
    choose_folder,
    find_same_config,
)
from camdistill.experiments.training.trainer_options import (
    check_callbacks,
    check_loop,
    check_options,
    check_precision,
    check_seed,
    make_profiler_folder,
    normalize_callbacks,
)
from camdistill.experiments.training.training_checks import check_processes
from camdistill.measure.fidelity import FidelityTable
from camdistill.networks.weights import read_weights
from camdistill.report.callbacks import MapGrids, Progress, ResumedEvents, RunText, Throughput
from camdistill.report.results import write_results
from camdistill.report.tensorboard import TensorBoardLogger
from camdistill.report.training_log import LastValidation, TrainingLog
from camdistill.store.atomic_files import expand_home, printable, read_arrays, write_atomically

RUNS = Path("runs")


class _SaveConfig(Callback):
    """Writes the config into the run's folder when all checks are passed and training begins."""

    def __init__(self, folder: RunFolder, text: str) -> None:
        self._folder, self._text = folder, text

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replaces the config of a run that goes on, whole or not at all."""
        if trainer.is_global_zero:  # another's folder, if it claimed one, is never used
            self._folder.keep()
            write_atomically(self._folder.path / CONFIG, self._text.encode())


class Experiment(LightningCLI):
    """`fit`, `validate`, `test` and `predict` of a config, in a folder that resuming finds again.

    A fresh `fit` gets the next `runs/<name>/version_<k>`; `--ckpt_path last` stands for the newest
    version of the same model, data, seed and numerics, and everything goes on in that folder.

    Args:
        args: The command line.
        run: Whether to run the subcommand that it begins with; without, there is none.
        resume: Without a subcommand: go on in the run's newest folder that has this config, if
            there is one.

    Attributes:
        folder: The run's folder.
        removed_files: Names of what `save_network` removed, as it was of an earlier student.
    """

    def __init__(self, args: list[str], *, run: bool = True, resume: bool = False) -> None:
        self._resume = resume
        self._start_time = time.monotonic()
        self._run_folder: RunFolder | None = None
        self._restarts = self._is_trial = False
        self.removed_files: list[str] = []
        try:
            self._run_cli(args, run)
        except BaseException:
            self.release()
            raise
        if run:
            self.release(keep=not self._is_trial)

    def _run_cli(self, args: list[str], run: bool) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
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
        check_seeds(args)
        check_config_files(args)
        with raise_user_errors():
            self.config = parser.parse_args(args)
        # Lightning would read the file's hyperparameters and let them choose the model's class.
        config = self.config.get(self.config.get("subcommand") or "", {})
        for part in ("model", "data"):
            check_groups(config or self.config, part)
        self._requested_checkpoint: str | None = config.get("ckpt_path")
        if self._requested_checkpoint:
            config["ckpt_path"] = None

    def _set_seed(self) -> None:
        """Seeds everything, with a seed that numpy takes too."""
        check_seed(self._get(self.config, "seed_everything"))
        super()._set_seed()

    def instantiate_classes(self) -> None:
        """Lets the mistakes that networks and data find through."""
        with raise_user_errors():
            super().instantiate_classes()

    def before_instantiate_classes(self) -> None:
        """Finds the run's folder, and the checkpoint that `last` stands for."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        trainer = config["trainer"]
        check_options(vars(trainer))
        self._is_trial = bool(trainer.get("fast_dev_run"))
        check_loop(self.subcommand, vars(trainer), resumes=bool(self._requested_checkpoint))
        if trainer.get("callbacks"):
            trainer["callbacks"] = normalize_callbacks(trainer.callbacks)
        name = config["run"] = config.run or _config_name(config)
        runs = _runs_folder(name)
        requested = self._requested_checkpoint
        self._weights_file: str | None = None
        if "verbose" in config:
            config["verbose"] = False  # our own table says it better
        if "weights_only" in config:
            config["weights_only"] = True  # a checkpoint runs no code
        config_text = self._parser(self.subcommand).dump(config, skip_none=False)
        self._config_text, config_options = config_text, yaml.safe_load(config_text)
        if requested and requested != "last":
            config["ckpt_path"] = self._resolve_checkpoint(requested)
        same_folder = find_same_config(runs, config_options) if self._resume else None
        if same_folder is not None:
            self._run_folder, self._restarts = (
                RunFolder(same_folder),
                not (same_folder / LAST).is_file(),
            )
        else:
            self._run_folder, last_checkpoint, self._restarts = choose_folder(
                runs, config_options, requested, self.subcommand
            )
            if last_checkpoint is not None:
                config["ckpt_path"] = self._resolve_checkpoint(str(last_checkpoint))
        self.folder = self._run_folder.path
        if self.subcommand == "fit":
            self._run_folder.lock()

    def release(self, *, keep: bool = False) -> None:
        """Lets other processes train in the folder; one that was never needed is removed.

        Args:
            keep: Whether it was needed.
        """
        if self._run_folder is not None:
            trainer = getattr(self, "trainer", None)
            if keep and trainer is not None and trainer.is_global_zero:
                self._run_folder.keep()
            self._run_folder.release()

    def _resolve_checkpoint(self, path: str) -> str | None:
        """A checkpoint for Lightning; a small one, which has weights alone, is ours to read."""
        weights_file = read_weights(path)
        if weights_file.is_lightning:
            return path
        if self.subcommand == "fit":
            raise UserError(
                f"'{path}' has weights alone, so training can't go on from it: give a last.ckpt; "
                "to start from the weights: --model.student.weights FILE"
            )
        self._weights_file = path
        return None

    def after_instantiate_classes(self) -> None:
        """Puts the weights of a small checkpoint where they belong."""
        if self._weights_file is not None:
            restore(self.model, self._weights_file)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with our logger and callbacks, unless the config brings its own logger."""
        config: Namespace = self._get(self.config_init, "trainer", default={})
        if (clip := config.get("gradient_clip_val")) is not None:
            name, cure = "--trainer.gradient_clip_val", "give 0 (no clipping) or more"
            check_number(name, clip, "[0, inf)", cure)
        assert self._run_folder is not None, "chosen"
        # First, because others read the config and write events.
        our_callbacks: list[Callback] = []
        if not config.get("fast_dev_run"):
            our_callbacks += [
                _SaveConfig(self._run_folder, self._config_text),
                LastValidation(),
                TrainingLog(self.folder),
            ]
        if config.get("logger") in (None, True):
            # Lightning logs a test at step 0, where a run's lines would break off.
            sub_dir = self.subcommand if self.subcommand != "fit" else None
            kwargs["logger"] = TensorBoardLogger(
                self.folder.parent,
                version=self.folder.name,
                sub_dir=sub_dir,
                hparam_metrics=getattr(self.model, "cards", ()),
            )
            our_callbacks += [
                ResumedEvents(again=self._restarts),
                MapGrids(),
                RunText(),
                Throughput(),
            ]
        if config.get("enable_checkpointing") is not False:
            our_callbacks.append(LastCheckpoint(self.folder))
        if config.get("enable_progress_bar") is not False:
            our_callbacks.append(Progress())
        kwargs["default_root_dir"] = config.get("default_root_dir") or str(self.folder)
        user_callbacks = config.get("callbacks") or []
        check_callbacks(user_callbacks, self.model)
        kwargs["callbacks"] = [*user_callbacks, *our_callbacks]
        plugins = config.get("plugins") or []
        kwargs["plugins"] = [
            *(plugins if isinstance(plugins, list) else [plugins]),
            AtomicCheckpointIO(),
        ]
        trainer = super().instantiate_trainer(**kwargs)
        check_processes(trainer)
        check_precision(trainer)
        make_profiler_folder(trainer)
        trainer.fit_loop = CompletingFitLoop.from_trainer(trainer)
        return trainer

    def fit_and_test(self) -> dict[str, object]:
        """Trains (on from the last checkpoint, if there is one) and tests; returns the results."""
        assert self._run_folder is not None, "chosen"
        self._run_folder.lock()
        try:
            last_checkpoint = self.folder / LAST
            with raise_user_errors():
                self.trainer.fit(
                    self.model,
                    self.datamodule,
                    ckpt_path=str(last_checkpoint) if last_checkpoint.is_file() else None,
                )
            # Only the first process claimed it.
            self.folder = Path(self.trainer.strategy.broadcast(str(self.folder)))
            if self.trainer.is_global_zero:
                self._run_folder.keep()
            self.save_network()
            with raise_user_errors():
                self.trainer.test(self.model, self.datamodule, verbose=False)
            results = self.write_results()
            self.trainer.strategy.barrier()  # what the first process wrote, all can read
        finally:
            self.release()
        return results

    def save_network(self) -> Path:
        """Writes what was trained as a small safetensors file, once; returns its path.

        What was measured of another one that it replaces is removed first.
        """
        kind = "student" if isinstance(self.model, DistilledExplainer) else "network"
        path = self.folder / f"{kind}.safetensors"
        if self.trainer.is_global_zero:
            if not is_saved(self.model, path):
                self.removed_files = remove_earlier_results(self.folder)
            write_checkpoint(self.model, path)
        return path

    def write_results(self) -> dict[str, object]:
        """Writes what the test measured: `results.json`, and every image's values beside it."""
        results = dict(self.model.results())
        results["seeds"] = [self._get(self.config, "seed_everything")]
        results["seconds"] = round(time.monotonic() - self._start_time, 1)
        if self.trainer.is_global_zero:
            table = getattr(self.model, "table", None)
            if table is not None:
                save_table(self.folder / TABLE, table)
            write_results(self.folder / RESULTS, results)
        return results


def _config_name(config: Namespace) -> str:
    files = config.get("config") or []
    return Path(str(files[0])).stem if files else "run"


def _runs_folder(name: str) -> Path:
    """Where the versions of a run lie: in a folder that has a name of its own.

    Raises:
        UserError: It would be `runs` itself, the working folder, or one above these.
    """
    path = expand_home(name) if "/" in name else RUNS / name
    folder_name = Path(name).name
    is_home = name.startswith("~") and len(Path(name).parts) == 1  # a home folder
    reserved = (RUNS.resolve(), *RUNS.resolve().parents)
    if folder_name in ("", "..") or is_home or not printable(name).isprintable():
        reason = "names no folder of its own"
    elif path.resolve() in reserved:
        reason = "is the folder that runs/ is, or lies in"
    else:
        return path
    raise UserError(
        f"--run is {shorten(name)!r}, which {reason}; give a name for a folder under runs/, or "
        "a path that ends in one"
    )


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
