"""What fitting students and teachers shares: views, finite losses, averages, exact resuming."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.utilities.types import STEP_OUTPUT, OptimizerLRSchedulerConfig
from torch import Tensor, distributed, nn

from camdistill import tags
from camdistill.data.modules import ImageData
from camdistill.data.views import Augment, View, draw_view, view_images
from camdistill.distill.optimization import Optimization
from camdistill.errors import UserError, check_number
from camdistill.networks.heads import head_size
from camdistill.networks.teachers import Preprocessed
from camdistill.networks.training_facts import EXPERIMENT, dump_experiment, parse_experiment
from camdistill.types import Batch, Images

NetworkT = TypeVar("NetworkT", bound=nn.Module)

CHECK_EVERY = 50  # steps between looks at the loss; each look waits for the device
IMAGES = "images"  # a checkpoint's key of which images it was trained on


class TrainingModule(LightningModule, ABC):
    """The plumbing around a training step; what is learned stands in the modules that use it.

    Attributes:
        cards: Tags of what one looks at first: TensorBoard's front page and table of settings.
        settings: The experiment's, as JSON has them.
        cure: What to do where the loss is not a number.
    """

    cards: tuple[str, ...] = ()
    cure = (
        "; try a third of it, --trainer.gradient_clip_val 1, or --trainer.precision 32. The last "
        "checkpoint is from before"
    )

    def __init__(
        self, optimization: Optimization, augment: Augment, *, ema: float | None, seed: int
    ) -> None:
        super().__init__()
        if ema is not None and not 0 < ema < 1:
            raise UserError(f"ema is {ema}; give a decay in (0, 1), such as 0.999, or leave it out")
        check_number("seed", seed, "[0, inf)", "give 0 or more")
        self.optimization = optimization
        self.augment = augment
        self.ema = ema
        self.seed = seed
        self.settings: dict[str, Any] = {}
        self._images: dict[str, Any] = {}
        self._bad_steps: Tensor | None = None
        self._random_state: dict[str, Tensor] = {}

    @property
    @abstractmethod
    def fitted(self) -> Preprocessed:
        """The network that is trained, with its normalization."""

    @property
    def class_names(self) -> list[str]:
        """Names of the network's classes; empty where the data have none, or other classes."""
        names = getattr(getattr(self._trainer, "datamodule", None), "classes", ())
        return list(names) if len(names) == head_size(self.fitted.network) else []

    @property
    def progress(self) -> float:
        """The part of the training that is done, in [0, 1]."""
        steps = self.trainer.estimated_stepping_batches
        return float(self.global_step) / max(float(steps), 1.0)

    def prepare_data(self) -> None:
        """Checks that views show something of the images, before anything is written."""
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, ImageData) and self.trainer.state.fn == "fit":
            data.setup("fit")
            self.augment.check_size(data.size)

    def setup(self, stage: str) -> None:
        """Notes what the images are.

        Convolutions run faster in channels_last, on CPUs with bf16 by a factor of 2 to 3.
        """
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, ImageData) and (stage == "fit" or not self._images):
            self._images = {"size": list(data.size), "carving": data.carving._asdict()}
        self.to(memory_format=torch.channels_last)

    def training_view(self, batch: Batch) -> tuple[Images, View]:
        """The batch's augmented images in [0, 1] and the view that made them."""
        size = (batch.pixels.shape[-2], batch.pixels.shape[-1])
        view = draw_view(self.augment, batch.ids, size, seed=self.seed, epoch=self.current_epoch)
        return as_images(view_images(batch.pixels, view)), view

    def watch_loss(self, loss: Tensor) -> Tensor:
        """The loss, after noting whether it is a number."""
        bad = (~torch.isfinite(loss.detach())).long()
        self._bad_steps = bad if self._bad_steps is None else self._bad_steps + bad
        if self.global_step % CHECK_EVERY == 0:
            self.stop_if_bad()
        return loss

    def stop_if_bad(self) -> None:
        """Ends the training with a cure, in all processes, if a loss was not a number in one."""
        if self._bad_steps is None:
            return
        # a clone, because processes are summed in place
        bad = self.trainer.strategy.reduce(self._bad_steps.clone(), reduce_op="sum")
        if int(bad) > 0:
            raise UserError(
                f"the loss is not a number by step {self.global_step} (learning rate "
                f"{self.optimization.lr}){self.cure}"
            )
        self._bad_steps = None

    def on_train_start(self) -> None:
        """Puts a resumed run's generators where they were; tells loggers a new run's settings."""
        if self._random_state:
            torch.set_rng_state(self._random_state["cpu"].cpu())
            if "cuda" in self._random_state and torch.cuda.is_available():
                torch.cuda.set_rng_state(self._random_state["cuda"].cpu())
            self._random_state = {}
        if self.global_step == 0:
            for logger in self.loggers:
                logger.log_hyperparams(self.settings)

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Logs the learning rate of this step."""
        self.log(tags.LEARNING_RATE, self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_start(self) -> None:
        """Looks at the losses before anything is drawn of the network."""
        self.stop_if_bad()

    def on_train_epoch_end(self) -> None:
        """Looks at the losses before a checkpoint is written."""
        self.stop_if_bad()

    def on_test_start(self) -> None:
        """Measures in float32 what was trained in any precision."""
        with torch.inference_mode(False):
            self.fitted.float()

    def on_predict_start(self) -> None:
        """Predicts in float32 as it is tested."""
        self.on_test_start()

    def on_test_epoch_start(self) -> None:
        """Tests one network in all processes: DDP shares buffers in a fit's steps only."""
        if distributed.is_available() and distributed.is_initialized():
            for buffer in self.fitted.buffers():
                distributed.broadcast(buffer, 0)

    def configure_callbacks(self) -> list[Callback]:
        """The running average of the weights, when one is asked for."""
        return [] if self.ema is None else [RunningAverage(decay=self.ema)]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The recipe over the whole training."""
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise UserError(
                "the learning rate falls over the whole training, which has no end; "
                "give --trainer.max_epochs or --trainer.max_steps"
            )
        return self.optimization.configure(self.fitted.network, int(steps))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the experiment's settings and the state of torch's generators (dropout needs it)."""
        checkpoint[EXPERIMENT] = dump_experiment(self.experiment())
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, ImageData):
            checkpoint[IMAGES] = _image_settings(data)
        checkpoint["random_state"] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            checkpoint["random_state"]["cuda"] = torch.cuda.get_rng_state()

    def experiment(self) -> dict[str, Any]:
        """Everything that a checkpoint needs to say to be used without its config, as JSON."""
        moments = {name: json.loads(text) for name, text in self.fitted.metadata().items()}
        classes = {"classes": head_size(self.fitted.network), "class_names": self.class_names}
        return {**self.settings, **moments, **classes, **self._images}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of something else; notes where the generators were."""
        _check_same_weights(self.state_dict(), checkpoint.get("state_dict", {}))
        if self._trainer is None or not self.trainer.training:
            return
        self._check_same_run(checkpoint)
        self._random_state = checkpoint.get("random_state", {})

    def _check_same_run(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with other settings or other images than the checkpoint's."""
        current = to_plain_data(self.settings)
        stored = parse_experiment(checkpoint[EXPERIMENT], "the checkpoint to go on from")
        pairs = {name: (stored[name], value) for name, value in current.items() if name in stored}
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, ImageData):
            images = checkpoint.get(IMAGES, {})
            pairs |= {
                name: (images[name], value)
                for name, value in _image_settings(data).items()
                if name in images
            }
        for name, (stored_value, current_value) in pairs.items():
            if name == "teacher":  # its file may have moved; what is in it is compared
                stored_value, current_value = (
                    {**teacher_spec, "weights": None}
                    for teacher_spec in (stored_value, current_value)
                )
            if stored_value != current_value:
                raise UserError(
                    f"the checkpoint was trained with {name} {stored_value}, which goes on (here "
                    f"{current_value}); give the same, or start without --ckpt_path"
                )


def _image_settings(data: ImageData) -> dict[str, Any]:
    """What a training's order and content depend on, as a checkpoint holds it."""
    images = {
        f"{name} images": digest for name, digest in data.fingerprints.items() if name != "test"
    }
    return {"batch_size": data.batch_size, "limit": data.limit, "order's seed": data.seed, **images}


class RunningAverage(EMAWeightAveraging):
    """Lightning's running average, for networks that are built in `setup` too; silent in tests."""

    _constants: Sequence[tuple[Tensor, Tensor]] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets up the module first: the network whose weights are averaged has to be there."""
        if stage == "fit":
            pl_module.setup(stage)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the buffers that are no part of the weights."""
        assert self._average_model is not None, "set up"
        state_names = pl_module.state_dict().keys()
        averages = dict(self._average_model.module.named_buffers())
        buffers = pl_module.named_buffers()
        self._constants = [
            (averages[name], value) for name, value in buffers if name not in state_names
        ]

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Averages what is trained.

        The average of a constant (mean and standard deviation of the images) drifts by rounding,
        and no checkpoint holds it, so that a run that was killed would end with another one.
        """
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        for average, constant in self._constants:
            average.copy_(constant)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A test takes the average, which is what the checkpoint calls the module's weights."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def _check_same_weights(current: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    differing = sorted(current.keys() ^ stored.keys())
    differing += [
        name for name in current if name in stored and current[name].shape != stored[name].shape
    ]
    if differing:
        raise UserError(
            f"the checkpoint is of another network ('{differing[0]}' differs); give the config "
            "that it "
            "was trained with, or start without --ckpt_path"
        )


@contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Computes in float32, whatever the trainer's precision makes of new tensors and of layers."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)


def as_images(pixels: Tensor) -> Images:
    """Stored pixels as images in [0, 1], laid out channels_last."""
    images = pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels
    return images.contiguous(memory_format=torch.channels_last)


def match_channels(images: Images, channels: int) -> Float[Tensor, "batch taken height width"]:
    """Images as a network of so many channels takes them: 3, or 1 for their mean."""
    return images.mean(1, keepdim=True) if channels == 1 else images


def to_plain_data(value: Any) -> Any:
    """A setting as JSON: dataclasses become dicts, tuples lists."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): to_plain_data(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain_data(entry) for entry in value]
    return value


def build_with_seed(seed: int, build: Callable[[], NetworkT]) -> NetworkT:
    """A network whose random start depends on the seed alone; the global generator stays."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()
