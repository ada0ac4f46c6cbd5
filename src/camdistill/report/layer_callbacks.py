"""A callback that follows the layers while a network trains, on the same images."""

import math
from typing import Protocol, TypedDict, cast, runtime_checkable

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from camdistill import tags
from camdistill.layers.filters import WeightSummary, bin_weights, weight_summaries
from camdistill.layers.profiles import profiles
from camdistill.layers.sweep.layer_sweep import sweep_layers
from camdistill.layers.sweep.statistics.histograms import log10_bins
from camdistill.layers.sweep.sweep_plan import SweepOptions
from camdistill.layers.sweep.sweep_summary import SweepResult
from camdistill.networks.teachers import Preprocessed
from camdistill.report.figures.depth import ProfileLine, profile_chart
from camdistill.report.tensorboard import (
    TensorBoardLogger,
    is_reporting,
    picture_due,
    scalar_step,
    tensorboard_loggers,
)
from camdistill.types import Batch

TEACHER = "teacher"  # its run's folder below the student's, and its line in the picture
PLOTTED = ("active", "dead", "lifetime_sparsity", "effective_rank")  # in the picture
BATCH = 64  # images in a forward of the sweep


@runtime_checkable
class FitsNetwork(Protocol):
    """A module that trains one network."""

    @property
    def fitted(self) -> Preprocessed:
        """The network, with its normalization."""


@runtime_checkable
class HasTeacher(Protocol):
    """A module whose network learns from a frozen one."""

    @property
    def teacher(self) -> Preprocessed:
        """The frozen network, with its normalization."""


class EpochProfiles(TypedDict):
    """What the picture shows of one epoch, as a checkpoint holds it."""

    label: str
    profiles: dict[str, tuple[list[float], list[float]]]


class TeacherProfiles(TypedDict):
    """What stays of a network that doesn't change: looked at once, shown at every epoch."""

    numbers: dict[str, float]
    profiles: dict[str, tuple[list[float], list[float]]]


class LayerMonitor(Callback):
    """Activations and weights of every layer on the same validation images, at epoch ends.

    A histogram a layer, the layer's numbers as scalars, and a picture in which each epoch's profile
    through depth is a line. Costs about a validation of so many images, and
    `benchmarks/logging_cost.py` measures it.

    Where a network learns from a teacher, the teacher is looked at once on the same images: a run
    of its own, below the student's, holds its histograms and level curves, and the picture has its
    profile as a dashed line.

    Args:
        images: Number of images, spread evenly over the validation data.
        layers: Names or patterns; none for blocks and non-linearities outside them.
        weights: Whether the layers' weights are shown too.
        pictures: At most so many pictures in a run. TensorBoard shows 10 of a tag.
    """

    def __init__(
        self,
        images: int = 256,
        layers: list[str] | None = None,
        weights: bool = True,
        pictures: int = 10,
    ) -> None:
        self.images, self.pictures = images, pictures
        self.layers, self.weights = layers, weights
        self._history: list[EpochProfiles] = []
        self._teacher: TeacherProfiles | None = None
        self._teacher_loggers: list[TensorBoardLogger] = []
        self._pictures_drawn = 0
        self._validations = 0
        self._picked: list[Batch] = []
        self._batches: list[Batch] = []

    def state_dict(self) -> dict[str, object]:
        """So that a resumed run's picture holds the epochs before."""
        return {
            "past": self._history,
            "teacher": self._teacher,
            "drawn": self._pictures_drawn,
            "validations": self._validations,
        }

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Counterpart of `state_dict`."""
        self._history = cast(list[EpochProfiles], state_dict["past"])
        self._teacher = cast(TeacherProfiles | None, state_dict.get("teacher"))
        self._pictures_drawn = cast(int, state_dict["drawn"])
        self._validations = cast(int, state_dict["validations"])

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Picks the images out of the first validation: as many from each batch."""
        if self._batches or dataloader_idx or not self._can_report(trainer, pl_module):
            return
        batches = int(cast(list[float], trainer.num_val_batches)[0])
        share = -(-self.images // max(batches, 1))
        self._picked.append(Batch(*(part[:share].cpu() for part in batch)))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the network as it is now."""
        if not self._can_report(trainer, pl_module):
            return
        if self._picked and not self._batches:
            parts = zip(*self._picked, strict=True)
            all_images = Batch(*(torch.cat(part)[: self.images] for part in parts))
            self._batches = [
                Batch(*(part[start : start + BATCH] for part in all_images))
                for start in range(0, len(all_images.pixels), BATCH)
            ]
            self._picked = []
        if not self._batches:
            return
        self._validations += 1
        network = cast(FitsNetwork, pl_module).fitted
        swept = self._sweep("student", network)
        step = scalar_step(trainer)
        for logger in tensorboard_loggers(trainer):
            _log_layers(logger, swept, step)
            logger.log_metrics(_scalars_by_tag(swept), step)
            if self.weights:
                _log_weights(logger, weight_summaries(network), step)
        if isinstance(pl_module, HasTeacher):
            self._log_teacher(trainer, pl_module.teacher, step)
        self._draw(trainer, swept, step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Closes the teacher's run, however the loop ended."""
        for logger in self._teacher_loggers:
            logger.experiment.close()
        self._teacher_loggers = []

    def _sweep(self, name: str, network: Preprocessed) -> SweepResult:
        return sweep_layers(
            {name: network},
            self._batches,
            layers=None if name == TEACHER else self.layers,
            options=SweepOptions(top=1, cka=False, matching=False),
        )

    def _log_teacher(self, trainer: Trainer, teacher: Preprocessed, step: int) -> None:
        """Histograms once, and numbers at every epoch: a level to read the student's curve by."""
        self._teacher_loggers = self._teacher_loggers or [
            parent.sub_logger(TEACHER) for parent in tensorboard_loggers(trainer)
        ]
        if self._teacher is None:
            swept = self._sweep(TEACHER, teacher)
            self._teacher = {"numbers": _scalars_by_tag(swept), "profiles": _lines_to_plot(swept)}
            for logger in self._teacher_loggers:
                _log_layers(logger, swept, step)
                if self.weights:
                    _log_weights(logger, weight_summaries(teacher), step)
        for logger in self._teacher_loggers:
            logger.log_metrics(self._teacher["numbers"], step)

    def _draw(self, trainer: Trainer, swept: SweepResult, step: int) -> None:
        """The picture, when enough of the run has passed since the last one."""
        if (due := picture_due(trainer, self._validations, self.pictures)) == self._pictures_drawn:
            return
        self._pictures_drawn = due
        self._history.append(
            {"label": f"epoch {trainer.current_epoch + 1}", "profiles": _lines_to_plot(swept)}
        )
        picture = profile_chart(
            {
                name.replace("_", " "): {
                    epoch["label"]: ProfileLine(
                        *(np.asarray(line) for line in epoch["profiles"][name])
                    )
                    for epoch in self._history
                    if name in epoch["profiles"]
                }
                for name in PLOTTED
            },
            title=f"Layers as they form, {swept.images} validation images",
            columns=2,
            ranges=dict.fromkeys((name.replace("_", " ") for name in PLOTTED), (0.0, 1.0)),
            graded=True,
            references=self._teacher_lines(),
        )
        for logger in tensorboard_loggers(trainer):
            logger.log_picture(tags.FORMING, picture, step)

    def _teacher_lines(self) -> dict[str, dict[str, ProfileLine]]:
        """The teacher's line in each chart."""
        if self._teacher is None:
            return {}
        return {
            name.replace("_", " "): {TEACHER: ProfileLine(*(np.asarray(line) for line in lines))}
            for name, lines in self._teacher["profiles"].items()
        }

    def _can_report(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        return is_reporting(trainer) and isinstance(pl_module, FitsNetwork)


def _lines_to_plot(swept: SweepResult) -> dict[str, tuple[list[float], list[float]]]:
    """What the picture shows of one network."""
    (name,) = swept.networks
    table = profiles(swept)
    return {
        statistic: (list(line.depth), list(line.values))
        for statistic in PLOTTED
        if (line := table.get(statistic, {}).get(name)) is not None
    }


def _scalars_by_tag(swept: SweepResult) -> dict[str, float]:
    """Each layer's numbers, by tag."""
    numbers: dict[str, float] = {}
    for statistic, lines in profiles(swept).items():
        if statistic in tags.OF_LAYERS:
            (line,) = lines.values()
            for order, (layer_name, value) in enumerate(zip(line.layers, line.values, strict=True)):
                if math.isfinite(value):
                    numbers[tags.of_layer(statistic, f"{order:02d}.{layer_name}")] = value
    return numbers


def _log_layers(logger: TensorBoardLogger, swept: SweepResult, step: int) -> None:
    """A histogram of each layer."""
    (layers,) = swept.networks.values()
    for layer in layers:
        edges, counts = log10_bins(layer.post)
        tag = tags.log10(f"{layer.order:02d}.{layer.name}")
        logger.log_histogram(tag, edges.numpy(), counts.numpy(), step)


def _log_weights(logger: TensorBoardLogger, summaries: dict[str, WeightSummary], step: int) -> None:
    """Histograms of each layer's weights and of its filters' norms."""
    for order, (layer, summary) in enumerate(summaries.items()):
        name = f"{order:02d}.{layer}"
        logger.log_histogram(tags.weights(name), *bin_weights(summary), step)
        norms = summary.norms[torch.isfinite(summary.norms)].numpy()
        if len(norms):
            counts, edges = np.histogram(norms, 30)
            logger.log_histogram(tags.norms(name), edges, counts, step)
