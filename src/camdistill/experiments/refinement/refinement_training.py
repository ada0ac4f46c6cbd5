"""Trains a start network, or an arm from one, and selects the epoch at matched accuracy."""

import copy
import logging
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from camdistill.data.modules import ImageData
from camdistill.distill.refiner import Refiner
from camdistill.distill.training import TrainingModule
from camdistill.experiments.refinement.refinement_config import Precision


@dataclass(eq=False)
class EpochSelector(Callback):
    """Keeps the last epoch whose validation accuracy is high enough; else the most accurate.

    Args:
        floor: What is high enough; None takes the last epoch.

    Attributes:
        accuracies: Accuracy of each epoch; agreement with the start where there are no labels.
        epoch: The chosen one, from 1.
        state: The network's weights then.
    """

    floor: float | None = None
    accuracies: list[float] = field(default_factory=list)
    epoch: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def matched(self) -> bool:
        """Whether the chosen epoch is accurate enough."""
        return self.floor is None or self.accuracies[self.epoch - 1] >= self.floor

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at an epoch."""
        assert isinstance(pl_module, Refiner), "it chooses among epochs of a refinement"
        self.consider_epoch(pl_module.retention(), pl_module.fitted.network.state_dict())

    def consider_epoch(self, accuracy: float, state: Mapping[str, Tensor]) -> None:
        """Looks at an epoch's accuracy and weights; these are copied where they are kept."""
        best = max(self.accuracies, default=-1.0)
        has_match = self.epoch > 0 and self.matched
        self.accuracies.append(accuracy)
        accurate_enough = self.floor is None or accuracy >= self.floor
        if accurate_enough or (not has_match and accuracy > best):
            self.epoch = len(self.accuracies)
            self.state = copy.deepcopy(dict(state))


def fit_silently(
    module: TrainingModule,
    data: ImageData,
    *,
    epochs: int,
    seed: int,
    precision: Precision,
    device: str,
    callbacks: list[Callback] | None = None,
) -> None:
    """Fits a module, silently.

    Args:
        module: What is trained.
        data: Its training and validation images.
        epochs: Times that each training image is seen.
        seed: Seed of their order.
        precision: Precision of the training.
        device: "cpu" or "cuda".
        callbacks: That look on.
    """
    data.seed = seed
    interrupt_handler = signal.getsignal(signal.SIGINT)
    gpus = [torch.cuda.current_device()] if device == "cuda" else []
    with _silence_lightning(), torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)  # of dropout
        if gpus:
            torch.cuda.manual_seed(seed)
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if precision == "bfloat16" else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            callbacks=callbacks,
        )
        try:
            trainer.fit(module, datamodule=data)
        except SystemExit:  # what Lightning makes of Ctrl-C, after it has switched it off
            signal.signal(signal.SIGINT, interrupt_handler)
            raise KeyboardInterrupt from None


@contextmanager
def _silence_lightning() -> Iterator[None]:
    """Leaves out what Lightning says of itself: there are many short trainings."""
    names = ("pytorch_lightning", "lightning_fabric", "lightning.pytorch")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in (
                ".*LeafSpec.*",  # Lightning's pytree helper against new releases of torch
                ".*does not have many workers.*",  # images come from memory
                ".*module.s. in eval mode at the start.*",  # frozen statistics
                ".*smaller than the logging interval.*",
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
