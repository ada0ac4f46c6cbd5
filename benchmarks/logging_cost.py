"""What reports cost while training: maps, histograms and profiles at epoch ends.

    python benchmarks/logging_cost.py [--data data/cifar10] [--epochs 3] [--limit 20000]

The student of configs/cifar10.yaml (batch 256, bf16) with a ResNet-56 teacher whose answers are
cached, validated after every epoch, which is four times as often as the config does. The time
inside each callback is set against the epoch without it: training and validation. Without --data
images are procedural, of the same size.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from camdistill.data.modules import FolderData, ImageData, ShapesData
from camdistill.data.views import Augment
from camdistill.distill.module import DistilledExplainer
from camdistill.networks.teachers import NetworkSpec
from camdistill.report.callbacks import MapGrids, RunText, Throughput
from camdistill.report.layer_callbacks import LayersForm
from camdistill.report.tensorboard import TensorBoardLogger


class TimedGrids(MapGrids):
    """Keeps the seconds of each epoch's end."""

    spent: tuple[float, ...] = ()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws, on the clock."""
        started = time.perf_counter()
        super().on_validation_epoch_end(trainer, pl_module)
        self.spent += (time.perf_counter() - started,)


class TimedLayers(LayersForm):
    """Keeps the seconds of each epoch's end."""

    spent: tuple[float, ...] = ()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks, on the clock."""
        started = time.perf_counter()
        super().on_validation_epoch_end(trainer, pl_module)
        self.spent += (time.perf_counter() - started,)


class Epochs(Callback):
    """Keeps the seconds from each epoch's start to the next."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch begins."""
        self.starts.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last epoch is over."""
        self.starts.append(time.perf_counter())


def main() -> None:
    """Prints seconds an epoch and shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit", type=int)
    given = parser.parse_args()
    torch.manual_seed(0)
    data: ImageData = (
        FolderData(given.data, batch_size=256, val_fraction=0.05, limit=given.limit)
        if given.data
        else ShapesData(classes=10, train=given.limit or 12000, val=2500, batch_size=256)
    )
    module = DistilledExplainer(
        NetworkSpec("resnet56"),
        NetworkSpec("shallow_cnn", args={"residual": True}),
        beta=10.0,
        augment=Augment(crop="pad", flip=True),
    )
    grids, layers, epochs = TimedGrids(), TimedLayers(), Epochs()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            accelerator="cpu",
            precision="bf16-mixed",
            max_epochs=given.epochs,
            logger=TensorBoardLogger(folder, version="run"),
            callbacks=[epochs, grids, layers, RunText(), Throughput()],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        ).fit(module, data)
    _report(np.diff(epochs.starts), np.array(grids.spent), np.array(layers.spent))


def _report(whole: np.ndarray, grids: np.ndarray, layers: np.ndarray) -> None:
    plain = whole - grids - layers
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; epoch by epoch:")
    for name, spent in {"pictures of maps": grids, "layers": layers}.items():
        shares = ", ".join(f"{100 * share:.2f} %" for share in spent / plain)
        print(
            f"{name:18s} {np.median(spent):7.2f} s an epoch of {np.median(plain):.1f} s: {shares}"
        )
    both = (grids + layers) / plain
    print(f"{'together':18s} median {100 * np.median(both):.2f} %, most {100 * both.max():.2f} %")


if __name__ == "__main__":
    main()
