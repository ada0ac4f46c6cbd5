"""Checkpoints to go on from: whole or not at all on the disk, and read without running code."""

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from camdistill.distill.training import EXPERIMENT
from camdistill.errors import UserError
from camdistill.files import write_atomically
from camdistill.networks.weights import read_weights

LAST = Path("checkpoints") / "last.ckpt"


class WholeFiles(TorchCheckpointIO):
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
        for left in Path(path).parent.glob(f".{Path(path).name}.*.partial"):
            left.unlink(missing_ok=True)

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
        found = torch.load(path, map_location="cpu", weights_only=True)
        if EXPERIMENT not in found or "pytorch-lightning_version" not in found:
            raise UserError(
                f"'{path}' has weights, but is no checkpoint to go on from; give a run's {LAST}, "
                "or name it as the network's weights"
            )
        return dict(found)


class LastCheckpoint(ModelCheckpoint):
    """The end of the last epoch, in one file."""

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
