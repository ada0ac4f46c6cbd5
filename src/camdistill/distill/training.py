"""What fitting a student and fitting a teacher share: views, finite losses, averaging, exact resuming."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from camdistill.data.views import Augment, View, draw_view, view_images
from camdistill.distill.optimisation import Optimisation
from camdistill.errors import UserError
from camdistill.networks.heads import head_size
from camdistill.networks.teachers import Preprocessed
from camdistill.types import Batch, Images

NetworkT = TypeVar("NetworkT", bound=nn.Module)

CHECK_EVERY = 50  # steps between looks at the loss; each look waits for the device


class Training(LightningModule, ABC):
    """The plumbing around a training step; what is learnt stands in the two modules that use it."""

    def __init__(
        self, optimisation: Optimisation, augment: Augment, *, ema: float | None, seed: int
    ) -> None:
        super().__init__()
        if ema is not None and not 0 < ema < 1:
            raise UserError(f"ema is {ema}; give a decay in (0, 1), such as 0.999, or leave it out")
        self.optimisation = optimisation
        self.augment = augment
        self.ema = ema
        self.seed = seed
        self.settings: dict[str, Any] = {}
        self._bad_steps: Tensor | None = None

    @property
    @abstractmethod
    def fitted(self) -> Preprocessed:
        """The network that is trained, with its normalisation."""

    @property
    def progress(self) -> float:
        """The part of the training that is done, in [0, 1]."""
        steps = self.trainer.estimated_stepping_batches
        return float(self.global_step) / max(float(steps), 1.0)

    def training_view(self, batch: Batch) -> tuple[Images, View]:
        """The batch's augmented images in [0, 1] and the view that made them."""
        size = (batch.pixels.shape[-2], batch.pixels.shape[-1])
        view = draw_view(self.augment, batch.ids, size, seed=self.seed, epoch=self.current_epoch)
        return as_images(view_images(batch.pixels, view)), view

    def finite(self, loss: Tensor) -> Tensor:
        """The loss, after noting whether it is a number."""
        bad = (~torch.isfinite(loss.detach())).long()
        self._bad_steps = bad if self._bad_steps is None else self._bad_steps + bad
        if self.global_step % CHECK_EVERY == 0:
            self.stop_if_bad()
        return loss

    def stop_if_bad(self) -> None:
        """Ends the training with a cure if a loss was not a number; called before checkpoints too."""
        if self._bad_steps is not None and int(self._bad_steps) > 0:
            raise UserError(
                f"the loss is not a number by step {self.global_step} (learning rate "
                f"{self.optimisation.lr}); try a third of it, --trainer.gradient_clip_val 1, or "
                "--trainer.precision 32. The last checkpoint is from before"
            )
        self._bad_steps = None

    def on_fit_start(self) -> None:
        """Convolutions run faster in channels_last, on CPUs with bf16 by a factor of 2 to 3."""
        self.to(memory_format=torch.channels_last)

    def on_train_epoch_end(self) -> None:
        """Looks at the losses before a checkpoint is written."""
        self.stop_if_bad()

    def configure_callbacks(self) -> list[Callback]:
        """The running average of the weights, when one is asked for."""
        return [] if self.ema is None else [EMAWeightAveraging(decay=self.ema)]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The recipe over the whole training."""
        return self.optimisation.configure(
            self.fitted.network, int(self.trainer.estimated_stepping_batches)
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the experiment's settings and the state of torch's generators (dropout needs it)."""
        checkpoint["camdistill"] = json.dumps(self.experiment())
        checkpoint["random_state"] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            checkpoint["random_state"]["cuda"] = torch.cuda.get_rng_state()

    def experiment(self) -> dict[str, Any]:
        """Everything that a checkpoint needs to say to be used without its config, as JSON."""
        return {**self.settings, "classes": head_size(self.fitted.network)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts the generators back where they were."""
        state = checkpoint.get("random_state", {})
        if "cpu" in state and self._trainer is not None and self.trainer.training:
            torch.set_rng_state(state["cpu"].cpu())
            if "cuda" in state and torch.cuda.is_available():
                torch.cuda.set_rng_state(state["cuda"].cpu())


def as_images(pixels: Tensor) -> Images:
    """Stored pixels as images in [0, 1], laid out channels_last."""
    images = pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels
    return images.contiguous(memory_format=torch.channels_last)


def plain(value: Any) -> Any:
    """A setting as JSON: dataclasses become dicts, tuples lists."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def seeded(seed: int, build: Callable[[], NetworkT]) -> NetworkT:
    """A network whose random start depends on the seed alone, with the global generator left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
