"""The log of a training: its setup, a line for each epoch, and a last validation."""

import sys
import time
from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Timer

from camdistill import tags

LOG = "training.log"  # in a run's folder
TAGS_BY_METRIC = {
    "loss": (tags.LOSS_TRAIN,),
    "accuracy": (tags.ACCURACY_STUDENT, tags.ACCURACY_VAL),
    "agreement": (tags.AGREEMENT,),
    "pearson": (tags.PEARSON,),
}


class TrainingLog(Callback):
    """Says at the start what is trained on what, and keeps a line of every epoch in a file.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started = time.monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the run before the teacher is asked about all images, which takes its time."""
        if trainer.is_global_zero:
            sys.stdout.write(f"Run: {self.folder}\n  {describe_training(trainer)}\n")
            sys.stdout.flush()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the file; a run that goes on adds to it."""
        self._started = time.monotonic()
        start = f"goes on after epoch {trainer.current_epoch}: " if trainer.global_step else ""
        self._append(trainer, f"{start}{describe_training(trainer)}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the epoch's line; its validation is done by now."""
        self._append(trainer, epoch_line(trainer, time.monotonic() - self._started))

    def _append(self, trainer: Trainer, line: str) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")


class LastValidation(Callback):
    """Lets the end of a training be validated, whatever `check_val_every_n_epoch` is."""

    def __init__(self) -> None:
        self._before: tuple[int | None, int | float | None] | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Has Lightning validate when the last epoch, or the last step, is done."""
        if trainer.check_val_every_n_epoch is None:
            return
        batches = float(trainer.num_training_batches)
        left = float("inf")
        if trainer.max_steps >= 0:
            left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        last = trainer.max_epochs == trainer.current_epoch + 1 or left <= batches
        if not last:
            return
        self._before = (trainer.check_val_every_n_epoch, trainer.val_check_batch)
        trainer.check_val_every_n_epoch = 1
        if 0 < left < min(batches, trainer.val_check_batch or batches):
            trainer.val_check_batch = int(left)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the trainer's settings back."""
        if self._before is not None:
            trainer.check_val_every_n_epoch, trainer.val_check_batch = self._before
            self._before = None


def describe_training(trainer: Trainer) -> str:
    """On how many images, for how long and where a network is trained, in a line."""
    data = getattr(trainer, "datamodule", None)
    parts = []
    for name, purpose in (("train_set", "to train"), ("val_set", "to validate")):
        images = getattr(data, name, None)
        if images is not None:
            parts.append(f"{len(images):,} images {purpose}")
    classes = getattr(data, "classes", None)
    if classes is not None:
        parts.append(f"{len(classes)} classes" if classes else "no labels")
    parts.append(_describe_length(trainer))
    device = trainer.strategy.root_device.type
    count = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    return f"{', '.join(parts)}, on {count}{device} in {trainer.precision}"


def _describe_length(trainer: Trainer) -> str:
    """Of the training: epochs, steps, time, whichever ends it."""
    ends = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        ends.append(_count_words(trainer.max_epochs, "epoch"))
    if trainer.max_steps >= 0:
        ends.append(_count_words(trainer.max_steps, "step"))
    if any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        ends.append("a time")
    return f"up to {' or '.join(ends)}" if len(ends) > 1 else "".join(ends) or "no end"


def _count_words(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def last_numbers(trainer: Trainer) -> dict[str, str]:
    """The last loss, accuracy, agreement and Pearson correlation, as far as there are any."""
    metrics = trainer.callback_metrics
    tag_by_metric = {
        name: next((tag for tag in metric_tags if tag in metrics), "")
        for name, metric_tags in TAGS_BY_METRIC.items()
    }
    return {name: f"{metrics[tag]:.3f}" for name, tag in tag_by_metric.items() if tag}


def epoch_line(trainer: Trainer, seconds: float) -> str:
    """An epoch in a line, with the time since the start."""
    last = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
    numbers = "  ".join(f"{name} {value}" for name, value in last_numbers(trainer).items())
    minutes, seconds_left = divmod(int(seconds), 60)
    return f"epoch {trainer.current_epoch + 1}{last}  {numbers}  {minutes}:{seconds_left:02d}"
