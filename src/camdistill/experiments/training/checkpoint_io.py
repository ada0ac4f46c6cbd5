"""Writes Lightning's checkpoints atomically, and reads them without running code."""

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, Timer
from pytorch_lightning.loops.fit_loop import _FitLoop
from pytorch_lightning.trainer.states import TrainerFn

from camdistill.errors import UserError
from camdistill.experiments.training.training_checks import check_training
from camdistill.networks.training_facts import EXPERIMENT, parse_experiment
from camdistill.networks.weights import read_weights
from camdistill.store.atomic_files import write_atomically

LAST = Path("checkpoints") / "last.ckpt"
STOPPED = "stopped"  # a checkpoint's key: the limits of a training that a callback ended


class AtomicCheckpointIO(TorchCheckpointIO):
    """Puts a checkpoint in place by renaming it inside its folder.

    Lightning's own writer moves it from the system's temporary folder, which is a copy, and no
    transaction, where that is another file system.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Writes the file, and removes what a killed process left half-written.

        Raises:
            UserError: It can't be written; the checkpoint that was there is intact.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(Path(path), content.getvalue())
        for leftover in Path(path).parent.glob(f".{Path(path).name}.*.partial"):
            leftover.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: object = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads a checkpoint of ours, tensors and plain values only.

        Raises:
            UserError: It isn't there, damaged, holds code, or is something else.
        """
        read_weights(path)  # says what is wrong with a file
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if EXPERIMENT not in checkpoint or "pytorch-lightning_version" not in checkpoint:
            raise UserError(
                f"'{path}' has weights, but is no checkpoint to go on from; give a run's {LAST}, "
                "or name it as the network's weights"
            )
        parse_experiment(checkpoint[EXPERIMENT], f"'{path}'")  # says which version wrote it
        return dict(checkpoint)


class CompletingFitLoop(_FitLoop):
    """Lightning's loop, which also ends a training whose checkpoint was its last.

    Lightning does nothing then. But what happens when training ends comes after the checkpoint:
    the average of the weights takes their place, and other callbacks do likewise.
    """

    @classmethod
    def from_trainer(cls, trainer: Trainer) -> "CompletingFitLoop":
        """A loop in the place of a new trainer's own."""
        old = trainer.fit_loop
        loop = cls(trainer, min_epochs=old.min_epochs, max_epochs=old.max_epochs)
        loop.epoch_loop = old.epoch_loop
        return loop

    def setup_data(self) -> None:
        """Counts the batches, and checks that the training fits them and its checkpoint."""
        super().setup_data()
        epochs: int = self.epoch_progress.current.processed  # type: ignore[attr-defined]
        check_training(self.trainer, self.max_batches, epochs)

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do, not even to end what a checkpoint left to end."""
        trainer = self.trainer
        is_empty = trainer.limit_train_batches == 0 or self.max_batches == 0
        is_resumed = trainer.ckpt_path is not None and trainer.global_step > 0
        return is_empty or (self.done and not is_resumed)


class LastCheckpoint(ModelCheckpoint):
    """The end of the last epoch, in one file; a training that was stopped there stays stopped."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            dirpath=folder / LAST.parent,
            filename=LAST.stem,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Without Lightning's warning of a folder that isn't empty: a resumed run's never is."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*exists and is not empty.*")
            super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes whether a callback ended the training, such as `EarlyStopping`."""
        checkpoint[STOPPED] = _training_limits(trainer) if trainer.should_stop else None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Ends a training that was ended, unless it may be longer now."""
        if trainer.state.fn == TrainerFn.FITTING and checkpoint.get(STOPPED) == _training_limits(
            trainer
        ):
            trainer.should_stop = True


def _training_limits(trainer: Trainer) -> list[str]:
    """What decides how long a training is, as text."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return [
        f"{trainer.max_epochs} epochs, {trainer.max_steps} steps",
        *(f"{timer._duration} seconds" for timer in timers),
        *sorted(type(callback).__name__ for callback in trainer.callbacks),  # type: ignore[attr-defined]
    ]
