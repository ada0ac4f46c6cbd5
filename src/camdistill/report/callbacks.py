"""Callbacks that report while a run trains: map pictures, their legend, speed and progress.

They work with any logger or none, in any number of processes, and are silent in the sanity check.
"""

import sys
import time
from pathlib import Path
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.utilities.types import STEP_OUTPUT

from camdistill import tags
from camdistill.distill.comparison import MapComparison
from camdistill.measure.scores import map_scores
from camdistill.report.figures.maps import PanelRow, map_panel
from camdistill.report.tensorboard import (
    Picture,
    front_page_url,
    is_reporting,
    picture_due,
    scalar_step,
    settings_page,
    tensorboard_loggers,
)
from camdistill.report.training_log import epoch_line, last_numbers
from camdistill.types import Batch


@runtime_checkable
class ExplainsImages(Protocol):
    """A module that can show its maps beside its teacher's."""

    def explain_images(self, batch: Batch) -> MapComparison:
        """Maps of a few images. Only rank 0 calls this: it must not wait for the others."""


class MapGrids(Callback):
    """Draws the same validation images again and again: image | teacher | student | difference.

    Args:
        images: Number of images, spread evenly over the validation data.
        pictures: At most so many pictures of a layer in a run. TensorBoard shows 10 of a tag.
        size: Side of a tile in pixels, about.
        scale: "own": each map as a share of its own maximum; "shared": of the larger of the two.
    """

    def __init__(
        self,
        images: int = 8,
        pictures: int = 10,
        size: int = 96,
        scale: Literal["own", "shared"] = "own",
    ) -> None:
        self.images, self.pictures = images, pictures
        self.size: int = size
        self.scale: Literal["own", "shared"] = scale
        self._pictures_drawn = 0
        self._validations = 0
        self._picked: list[Batch] = []
        self._batch: Batch | None = None

    def state_dict(self) -> dict[str, int]:
        """So that a resumed run doesn't start its pictures anew."""
        return {"drawn": self._pictures_drawn, "validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Counterpart of `state_dict`."""
        self._pictures_drawn, self._validations = state_dict["drawn"], state_dict["validations"]

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Picks the images out of the first validation."""
        if self._batch is not None or not self._can_draw(trainer, pl_module) or dataloader_idx:
            return
        batches = int(cast(list[float], trainer.num_val_batches)[0])
        for number in range(self.images):
            place = (number + 0.5) / self.images * batches
            if int(place) == batch_idx:
                row = int((place - int(place)) * len(batch.pixels))
                self._picked.append(Batch(*(part[row : row + 1].cpu() for part in batch)))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws, when enough of the run has passed since the last picture."""
        if not self._can_draw(trainer, pl_module):
            return
        if self._batch is None and self._picked:
            self._batch = Batch(*(torch.cat(parts) for parts in zip(*self._picked, strict=True)))
            self._picked = []
        self._validations += 1
        due = picture_due(trainer, self._validations, self.pictures)
        if self._batch is None or due == self._pictures_drawn:
            return
        self._pictures_drawn = due
        batch = Batch(*(part.to(pl_module.device) for part in self._batch))
        comparison = cast(ExplainsImages, pl_module).explain_images(batch)
        names = class_names(trainer)
        for tag, picture in self._panels(comparison, names, scalar_step(trainer)).items():
            for logger in tensorboard_loggers(trainer):
                logger.log_picture(tag, picture, scalar_step(trainer))

    def _can_draw(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        return is_reporting(trainer) and isinstance(pl_module, ExplainsImages)

    def _panels(
        self, comparison: MapComparison, names: tuple[str, ...], step: int
    ) -> dict[str, Picture]:
        panels = {}
        for layer, teacher_layer in comparison.pairs:
            teacher_maps = comparison.teacher_maps_by_layer[teacher_layer]
            student_maps = comparison.student_maps_by_layer[layer]
            scores = map_scores(student_maps, teacher_maps).pearson.tolist()
            rows = [
                PanelRow(
                    comparison.images01[n].float().numpy(),
                    teacher_maps[n].float().numpy(),
                    student_maps[n].float().numpy(),
                    _caption(comparison, n, names, score),
                )
                for n, score in enumerate(scores)
            ]
            title = f"student {layer}, teacher {teacher_layer}, step {step}"
            panels[tags.grid(layer)] = map_panel(
                rows, title=title, size=self.size, scale=self.scale, abreast=2
            )
        return panels


class RunText(Callback):
    """Writes what each card means, a link to the front page, and the run's configuration.

    The configuration is the run folder's `config.yaml` where the command line wrote one, otherwise
    the settings of the module and the hyper-parameters of the data.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run has these pages already."""
        if trainer.global_step:
            return
        for logger in tensorboard_loggers(trainer):
            file = Path(logger.log_dir) / "config.yaml"
            module_settings = getattr(pl_module, "settings", pl_module.hparams)
            settings = {**module_settings, **getattr(_data_module(trainer), "hparams", {})}
            page = file.read_text(encoding="utf-8") if file.exists() else settings_page(settings)
            logger.log_text(tags.CONFIG, f"```yaml\n{page.rstrip()}\n```")
            cards = getattr(pl_module, "cards", tags.STUDENT_CARDS)
            page_url = front_page_url(scalars=cards)
            link = f"[The cards that matter, on top]({page_url})"
            usage = f" (with `tensorboard --logdir {logger.save_dir}` at its usual port)."
            logger.log_text(tags.HOW_TO_READ, f"{link}{usage}\n\n{tags.how_to_read()}")


class ResumedEvents(Callback):
    """Keeps lines straight: hides what a killed run logged after the checkpoint that goes on.

    It comes before whatever writes events when training starts.

    Args:
        again: Whether the run was killed before its first checkpoint, and starts again.
    """

    def __init__(self, *, again: bool = False) -> None:
        self.again = again

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The checkpoint is loaded by now."""
        if trainer.global_step or self.again:
            for logger in tensorboard_loggers(trainer):
                logger.resume_at(trainer.global_step)


class Throughput(Callback):
    """Logs training images a second of each epoch, all processes together.

    Validation is not counted, nor are the first steps of the process, in which caches fill and
    kernels are chosen.

    Args:
        skip: Steps of the process that are not counted.
    """

    def __init__(self, skip: int = 5) -> None:
        self.skip = skip
        self._steps = 0
        self._clear()

    def _clear(self) -> None:
        self._images, self._seconds = 0, 0.0
        self._since: float | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the epoch's clock."""
        self._clear()
        self._since = _now(pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Counts a batch; waits for the device only where the skipped steps end."""
        self._steps += 1
        if self._steps <= self.skip:
            if self._steps == self.skip:
                self._since = _now(pl_module)
            return
        self._images += len(batch[0])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._pause(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock goes on."""
        self._since = _now(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the epoch's speed, if anything was counted."""
        self._pause(pl_module)
        if self._images and self._seconds:
            speed = self._images / self._seconds * trainer.world_size
            pl_module.log(tags.IMAGES_PER_SECOND, speed, batch_size=1)

    def _pause(self, pl_module: LightningModule) -> None:
        if self._since is not None and self._steps >= self.skip:
            self._seconds += _now(pl_module) - self._since
        self._since = None


class Progress(TQDMProgressBar):
    """A bar with the numbers that matter; a line of each validation and epoch stays on the screen.

    Where there is no terminal (a log file, a pipe) only these lines are written.

    Args:
        refresh_rate: Steps between two updates; 0 shows no bar.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate if sys.stdout.isatty() else 0)
        self._started = time.monotonic()
        self._last_line_epoch = -1  # the last epoch that has a line

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The last loss, accuracy, agreement and Pearson correlation."""
        return dict(last_numbers(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of the lines."""
        super().on_train_start(trainer, pl_module)
        self._started = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts epochs from 1, as the lines do."""
        super().on_train_epoch_start(trainer, pl_module)
        self.train_progress_bar.set_description(_epoch_words(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the line of this validation."""
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        self._write_line(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the line of an epoch that was not validated."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._last_line_epoch != trainer.current_epoch and trainer.is_global_zero:
            self._write_line(trainer)

    def _write_line(self, trainer: Trainer) -> None:
        self._last_line_epoch = trainer.current_epoch
        line = epoch_line(trainer, time.monotonic() - self._started)
        if self.is_enabled:
            self.print(line)  # above the bar
        else:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


def class_names(trainer: Trainer) -> tuple[str, ...]:
    """The data's class names; empty where it has none."""
    return tuple(getattr(_data_module(trainer), "classes", ()))


def _data_module(trainer: Trainer) -> object:
    """The data module, or None where loaders were given."""
    return getattr(trainer, "datamodule", None)


def _epoch_words(trainer: Trainer) -> str:
    last = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
    return f"epoch {trainer.current_epoch + 1}{last}"


def _caption(
    comparison: MapComparison, n: int, names: tuple[str, ...], score: float
) -> tuple[str, ...]:
    def name(index: int, known_names: tuple[str, ...]) -> str:
        return known_names[index] if index < len(known_names) else f"class {index}"

    output_names = names if len(names) == comparison.class_count else ()
    label, teacher, student = (
        int(classes[n])
        for classes in (comparison.labels, comparison.teacher_classes, comparison.student_classes)
    )
    pearson = "no map" if score != score else f"pearson {score:.3f}"
    return (
        name(label, names) if label >= 0 else "no label",
        f"teacher: {name(teacher, output_names)}",
        f"student: {name(student, output_names)}",
        pearson,
    )


def _now(pl_module: LightningModule) -> float:
    """Seconds, when the device has done what it was told."""
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize(pl_module.device)
    return time.perf_counter()
