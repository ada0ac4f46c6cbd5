"""Checks that need the batches or the checkpoint of a training, before it writes anything."""

import os
from collections.abc import Iterator, Sequence

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from camdistill import tags
from camdistill.distill.classifier import Classifier
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.errors import UserError, nearest


def check_processes(trainer: Trainer) -> None:
    """Checks that a CPU has a core for each process.

    Raises:
        UserError: It doesn't; so many processes would fill the memory and stop the machine.
    """
    cores = os.cpu_count() or 1
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > cores:
        raise UserError(
            f"--trainer.devices is {trainer.num_devices}, each a process, but this machine has "
            f"{cores} CPU cores; give {cores} or less"
        )


def check_training(trainer: Trainer, batches: int | float, epochs: int) -> None:
    """Checks a training when its batches are counted and its checkpoint is read.

    Args:
        trainer: With its module set up.
        batches: Number of batches in an epoch; infinite where it is not known.
        epochs: Number of epochs that the checkpoint has been trained; 0 without one.

    Raises:
        UserError: It would end before it begins, or a callback monitors what is never logged.
    """
    _check_length(trainer, epochs)
    accumulated = trainer.accumulate_grad_batches
    if 0 < batches < accumulated and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise UserError(
            f"--trainer.accumulate_grad_batches is {accumulated}, but an epoch has {batches} "
            f"batches, and its last one ends the accumulation; give {batches} or less"
        )
    check_monitors(trainer)


def _check_length(trainer: Trainer, epochs: int) -> None:
    """Refuses to go on from a checkpoint that has been trained for longer than is asked for."""
    steps = trainer.global_step
    for name, most, done in (
        ("max_epochs", trainer.max_epochs, epochs),
        ("max_steps", trainer.max_steps, steps),
    ):
        if most is not None and 0 <= most < done:
            what = name.removeprefix("max_").removesuffix("s" if done == 1 else "")
            raise UserError(
                f"--trainer.{name} is {most}, but the checkpoint has been trained for {done} "
                f"{what}; give {done} or more, or start without --ckpt_path"
            )


def check_monitors(trainer: Trainer) -> None:
    """Checks that callbacks monitor what is logged, where all that is logged can be known.

    Raises:
        UserError: One monitors something else.
    """
    callbacks: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    libraries = {type(one).__module__.partition(".")[0] for one in callbacks}
    module = trainer.lightning_module
    if type(module) not in (DistilledExplainer, Classifier) or libraries - {
        "camdistill",
        "pytorch_lightning",
    }:
        return  # someone's code may log anything
    trained, validated = set(_list_training_metrics(module)), set(_list_validation_metrics(module))
    is_validated = trainer.limit_val_batches != 0
    known = trained | validated if is_validated else trained
    for callback in callbacks:
        name = _monitor_of(callback)
        rates = any(isinstance(one, LearningRateMonitor) for one in callbacks)
        if name is None or name in known or (rates and name.startswith("lr-")):
            continue
        if isinstance(callback, ModelCheckpoint) and name in ("epoch", "step"):
            continue
        what = f"a callback monitors '{name}', which is not logged"
        if name in validated:
            raise UserError(
                f"{what} without a validation; leave out --trainer.limit_val_batches 0, or the "
                f"callback {type(callback).__name__}"
            )
        raise UserError(f"{what}; {nearest(name, sorted(known))}")


def _monitor_of(callback: Callback) -> str | None:
    """What a callback can't do without."""
    if isinstance(callback, ModelCheckpoint) or (
        isinstance(callback, EarlyStopping) and callback.strict
    ):
        return callback.monitor
    return None


def _list_training_metrics(module: LightningModule) -> Iterator[str]:
    yield from (tags.LEARNING_RATE, tags.LOSS_TRAIN, tags.IMAGES_PER_SECOND)
    if isinstance(module, Classifier):
        yield tags.ACCURACY_TRAIN
    elif isinstance(module, DistilledExplainer):
        yield from [tags.LOSS_CE] if module.ce else []
        yield from [tags.LOSS_KD] if module.kd else []
        yield from [tags.LOSS_MAPS, tags.BETA] if module.beta else []


def _list_validation_metrics(module: LightningModule) -> Iterator[str]:
    if isinstance(module, Classifier):
        yield from (tags.LOSS_VAL, tags.ACCURACY_VAL)
    elif isinstance(module, DistilledExplainer):
        yield from (tags.ACCURACY_STUDENT, tags.AGREEMENT)
        yield from (tags.PEARSON, tags.SPEARMAN, tags.COSINE, tags.SKILL)
        for layer, _, _ in module.pairs if len(module.pairs) > 1 else ():
            yield from (tags.pearson(layer), tags.spearman(layer))
            yield from (tags.cosine(layer), tags.skill(layer))
