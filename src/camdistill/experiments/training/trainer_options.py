"""Checks the options of Lightning's trainer before anything is built or written."""

import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse import Namespace
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from pytorch_lightning.strategies import StrategyRegistry

from camdistill.distill.training import TrainingModule
from camdistill.errors import UserError, nearest, shorten

MAX_SEED = 2**32 - 1  # numpy's


class Range(NamedTuple):
    """Which numbers an option takes.

    Attributes:
        accepts: Whether a number is one of them.
        words: What to give, in words.
    """

    accepts: Callable[[int | float], bool]
    words: str


def _at_least(least: int) -> Range:
    return Range(lambda value: value >= least, f"{least} or more")


def _is_batch_limit(value: int | float) -> bool:
    return 0 <= value <= 1 or (value > 1 and isinstance(value, int))


_ENDLESS = Range(lambda value: value >= -1, "0 or more, or -1 for no end")
_BATCHES = Range(_is_batch_limit, "a share from 0.0 to 1.0, or a whole number of batches")
RANGES = {
    "accumulate_grad_batches": _at_least(1),
    "check_val_every_n_epoch": _at_least(1),
    "fast_dev_run": _at_least(0),
    "limit_predict_batches": _BATCHES,
    "limit_test_batches": _BATCHES,
    "limit_train_batches": _BATCHES,
    "limit_val_batches": _BATCHES,
    "log_every_n_steps": _at_least(0),
    "max_epochs": _ENDLESS,
    "max_steps": _ENDLESS,
    "min_epochs": _at_least(0),
    "min_steps": _at_least(0),
    "num_nodes": _at_least(1),
    "num_sanity_val_steps": Range(lambda value: value >= -1, "0 or more batches, or -1 for all"),
    "overfit_batches": _BATCHES,
    "reload_dataloaders_every_n_epochs": _at_least(0),
    "val_check_interval": Range(
        lambda value: value > 0 and _is_batch_limit(value),
        "a share of an epoch above 0.0 up to 1.0, or a whole number of batches",
    ),
}
CHOICES = {
    "gradient_clip_algorithm": ("norm", "value"),
    "profiler": ("simple", "advanced", "pytorch", "xla"),
}
# How many batches a loop takes; a training of 0 is for looking at a student as it starts.
_LIMITS: dict[str | None, str] = {
    "validate": "limit_val_batches",
    "test": "limit_test_batches",
    "predict": "limit_predict_batches",
}
STUDY_RUN_OPTIONS = (
    *("fast_dev_run", "max_epochs", "max_steps"),
    *("limit_train_batches", "limit_test_batches"),
)
TIME_UNITS = ("weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds")


def check_seed(seed: object) -> None:
    """Checks `seed_everything`.

    Raises:
        UserError: It is no seed of numpy's; true would be a random one, and false none.
    """
    if isinstance(seed, bool):
        word = str(seed).lower()
        raise UserError(f"seed_everything is {word}; give a whole number from 0 to {MAX_SEED}")
    if isinstance(seed, int) and not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed_everything is {seed}; give a whole number from 0 to {MAX_SEED}")


def check_options(options: Mapping[str, object]) -> None:
    """Checks what Lightning accepts and stumbles over later, or takes for something else.

    Args:
        options: Options of the trainer, by name.

    Raises:
        UserError: One is out of its range, or none of its choices.
    """
    for name, allowed in RANGES.items():
        value = options.get(name)
        if isinstance(value, int | float) and not allowed.accepts(value):
            raise UserError(f"--trainer.{name} is {value}; give {allowed.words}")
    strategies = ("auto", *StrategyRegistry.available_strategies())
    for name, choices in {**CHOICES, "strategy": strategies}.items():
        value = options.get(name)
        if isinstance(value, str) and value.lower() not in choices:
            raise UserError(f"--trainer.{name} is '{value}'; {nearest(value, choices)}")
    for name in ("max_time", "val_check_interval"):
        value = options.get(name)
        unknown_units = sorted(set(value) - set(TIME_UNITS)) if isinstance(value, dict) else []
        if unknown_units:
            raise UserError(
                f"--trainer.{name} names '{unknown_units[0]}'; "
                f"{nearest(unknown_units[0], TIME_UNITS)}"
            )
    _check_lengths(options)
    profiler = options.get("profiler")
    named = profiler.get("class_path", "") if isinstance(profiler, Namespace) else profiler
    if str(named).rpartition(".")[2].lower() in ("xla", "xlaprofiler"):
        raise UserError(
            "--trainer.profiler xla is for TPUs, which nothing here runs on; give simple, advanced "
            "or pytorch"
        )
    root = options.get("default_root_dir")
    if root and Path(str(root)).is_file():
        raise UserError(f"--trainer.default_root_dir is '{root}', which is a file; name a folder")
    if options.get("model_registry") and find_spec("litmodels") is None:
        raise UserError(
            "--trainer.model_registry needs the package 'litmodels', which is not installed; "
            "pip install litmodels, or leave it out"
        )
    if options.get("barebones"):
        raise UserError(
            "--trainer.barebones true leaves out checkpoints, logs and validation, which a run "
            "here is made of; leave it out, or call Lightning's Trainer from Python"
        )


def _check_lengths(options: Mapping[str, object]) -> None:
    """Checks that a training can be as long as it must, and has a time above 0."""
    time = options.get("max_time")
    if isinstance(time, str) and re.fullmatch(r"0+(:0+){3}", time):
        raise UserError(f"--trainer.max_time is '{time}', no time at all; give a time above 0")
    if isinstance(time, dict) and all(isinstance(one, int | float) for one in time.values()):
        length = timedelta(**time)
        if length <= timedelta(0):
            raise UserError(
                f"--trainer.max_time is {length.total_seconds():g} seconds; give a time above 0"
            )
    for what in ("epochs", "steps"):
        least, most = options.get(f"min_{what}"), options.get(f"max_{what}")
        if isinstance(least, int) and isinstance(most, int) and least > most >= 0:
            raise UserError(
                f"--trainer.min_{what} is {least}, but max_{what} is {most}, which ends the "
                f"training first; give --trainer.max_{what} {least} or more"
            )


def check_loop(loop: str | None, options: Mapping[str, object], *, resumes: bool) -> None:
    """Checks that a loop has something to do, and that what it does can be kept.

    Args:
        loop: `fit`, `validate`, `test` or `predict`; None is a study's run, which trains and tests.
        options: Options of the trainer, by name.
        resumes: Whether a checkpoint was given.

    Raises:
        UserError: It has nothing to do, or would leave files that don't belong together.
    """
    if loop == "fit" and resumes and options.get("enable_checkpointing") is False:
        raise UserError(
            "--trainer.enable_checkpointing false with --ckpt_path would leave a last.ckpt that is "
            "older than the student; leave one of the two out"
        )
    if loop == "fit" and resumes and options.get("fast_dev_run"):
        raise UserError(
            "--trainer.fast_dev_run is a trial that starts afresh and keeps nothing; leave out "
            "--ckpt_path"
        )
    if loop is None:
        check_run_of_study(options)
    if (name := _LIMITS.get(loop)) and options.get(name) == 0 and not options.get("fast_dev_run"):
        raise UserError(f"--trainer.{name} is 0, so there is nothing to {loop}; give 1 or more")


def check_run_of_study(options: Mapping[str, object], owner: str = "a study's run") -> None:
    """Checks that a run of a study trains a student and tests it.

    Args:
        options: Options of the trainer, by name.
        owner: Who has these options.

    Raises:
        UserError: It doesn't.
    """
    if options.get("fast_dev_run"):
        raise UserError(
            f"{owner} has trainer.fast_dev_run, a trial that keeps nothing, and a study compares "
            "what was kept; try it with `camdistill fit`, or give a study trainer.max_epochs 1"
        )
    for name in STUDY_RUN_OPTIONS[1:]:
        if options.get(name) == 0:
            verb = "tested" if "test" in name else "trained"
            raise UserError(
                f"{owner} has trainer.{name} 0, so that nothing would be {verb}; give 1 or more"
            )


def normalize_callbacks(callbacks: Namespace | list[Namespace]) -> list[Namespace]:
    """A config's callbacks as a list that YAML can hold: enumerations and devices as text."""
    configs = callbacks if isinstance(callbacks, list) else [callbacks]
    for callback in configs:
        arguments = callback.get("init_args") or {}
        for name, value in list(arguments.items()):
            if isinstance(value, Enum):
                arguments[name] = value.value
            elif isinstance(value, torch.device):
                arguments[name] = str(value)
    return configs


def check_callbacks(callbacks: list[Callback], model: LightningModule) -> None:
    """Checks that a config's callbacks can work with a module of ours.

    Raises:
        UserError: One changes what our networks don't have in that form.
    """
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            _check_file_name(callback)
        if isinstance(callback, EarlyStopping) and callback.patience < 0:
            raise UserError(
                f"EarlyStopping: patience is {callback.patience}; give 0 validations or more"
            )
    if not isinstance(model, TrainingModule):
        return
    for callback in callbacks:
        if isinstance(callback, LearningRateFinder):
            raise UserError(
                "the callback LearningRateFinder sets an attribute `lr`; the learning rate here "
                "is --model.optimization.lr with a schedule over the whole training; leave the "
                "callback out and try a few values"
            )
        if isinstance(callback, ModelPruning):
            raise UserError(
                "the callback ModelPruning replaces the weights by masked ones, which no "
                "checkpoint of ours can hold; leave it out, and give a smaller student: "
                "--model.student.args"
            )
        if isinstance(callback, StochasticWeightAveraging):
            raise UserError(
                "the callback StochasticWeightAveraging changes the schedule and keeps weights "
                "that no run can go on from; leave it out, and average with --model.ema 0.999"
            )
        if isinstance(callback, BatchSizeFinder):
            raise UserError(
                "the callback BatchSizeFinder trains with other batches than the config says, "
                "which no run can go on from; leave it out, and give --data.batch_size"
            )


def _check_file_name(callback: ModelCheckpoint) -> None:
    """Refuses a pattern that no numbers of a training fit, before it has trained."""
    pattern = callback.filename or ""
    names = re.findall(r"\{([^{}:!]*)", pattern)
    counters = {"epoch": torch.tensor(1), "step": torch.tensor(1)}
    metrics = {name: torch.tensor(0.5) for name in names if name not in counters}
    try:
        if "!" in "".join(re.findall(r"\{[^{}]*", pattern)):
            raise ValueError("a conversion such as !r")
        callback.format_checkpoint_name(counters | metrics)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(
            f"ModelCheckpoint: filename is '{shorten(pattern)}' ({error}); give names and "
            "formats such as {epoch:02d} or {val_loss:.3f}"
        ) from error


def make_profiler_folder(trainer: Trainer) -> None:
    """Makes the folder of a profiler, which else would fail in the midst of a training.

    Raises:
        UserError: It can't be made.
    """
    folder = getattr(getattr(trainer, "profiler", None), "dirpath", None)
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--trainer.profiler.dirpath is '{folder}', which can't be made "
            f"({error.strerror}); name another folder"
        ) from error


def check_precision(trainer: Trainer) -> None:
    """Checks that the device can train in the precision.

    Raises:
        UserError: It is float16 throughout, on a CPU.
    """
    if trainer.precision == "16-true" and isinstance(trainer.accelerator, CPUAccelerator):
        raise UserError(
            "--trainer.precision 16-true is not for CPUs: float16 overflows there without a GPU's "
            "kernels; give bf16-mixed, bf16-true or 32-true"
        )
