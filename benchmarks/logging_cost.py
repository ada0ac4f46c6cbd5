"""What reports cost while training: maps, histograms and profiles at epoch ends.

    python benchmarks/logging_cost.py [--data data/cifar10] [--epochs 3] [--limit 20000]

The student of configs/cifar10.yaml (batch 256, bf16) with a ResNet-56 teacher whose answers are
cached, validated after every epoch, which is four times as often as the config does. The time
inside every hook of each callback is set against the epoch without them: training and validation.
What is done once, before the first epoch (text), is in no epoch. Without --data images are
procedural, of the same size.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from camdistill.data.modules import FolderData, ImageData, ShapesData
from camdistill.data.views import Augment
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.networks.teachers import NetworkSpec
from camdistill.report.callbacks import MapGrids, RunText, Throughput
from camdistill.report.layer_callbacks import LayerMonitor
from camdistill.report.tensorboard import TensorBoardLogger


class Timed(Callback):
    """Keeps the seconds that a callback takes in each hook; for the left of its bases.

    Every hook that a report has, whatever it is called: none is forgotten when one is added.
    """

    def __init__(self, *given: object, **named: object) -> None:
        super().__init__(*given, **named)
        self.spent: list[float] = []
        self.epoch = 0.0

    def __init_subclass__(cls) -> None:
        """Puts the clock around the hooks that the other base overrides."""
        super().__init_subclass__()
        for name in dir(Callback):
            hook = getattr(cls, name)
            if name.startswith("on_") and hook is not getattr(Callback, name):
                setattr(cls, name, _clocked(hook))


def _clocked(hook: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(hook)
    def timed(self: Timed, *given: object, **named: object) -> None:
        started = time.perf_counter()
        hook(self, *given, **named)
        self.epoch += time.perf_counter() - started

    return timed


class TimedGrids(Timed, MapGrids):
    """Pictures of maps."""


class TimedLayers(Timed, LayerMonitor):
    """Every layer."""


class TimedText(Timed, RunText):
    """Pages and settings."""


class TimedThroughput(Timed, Throughput):
    """Images a second."""


class Epochs(Callback):
    """Keeps the seconds from each epoch's start to the next."""

    def __init__(self, reports: Sequence[Timed]) -> None:
        self.starts: list[float] = []
        self.reports = reports

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch begins; what came before the first is none's."""
        self._note()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last epoch is over."""
        self._note()

    def _note(self) -> None:
        for report in self.reports:
            if self.starts:
                report.spent.append(report.epoch)
            report.epoch = 0.0
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
    reports = {
        "pictures of maps": TimedGrids(),
        "layers": TimedLayers(),
        "text": TimedText(),
        "throughput": TimedThroughput(),
    }
    epochs = Epochs(list(reports.values()))
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            accelerator="cpu",
            precision="bf16-mixed",
            max_epochs=given.epochs,
            logger=TensorBoardLogger(folder, version="run"),
            callbacks=[epochs, *reports.values()],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        ).fit(module, data)
    _report(np.diff(epochs.starts), {name: np.array(one.spent) for name, one in reports.items()})


def _report(whole: np.ndarray, spent: Mapping[str, np.ndarray]) -> None:
    together = np.sum(list(spent.values()), 0)
    plain = whole - together
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; epoch by epoch:")
    for name, seconds in {**spent, "together": together}.items():
        shares = ", ".join(f"{100 * share:.2f} %" for share in seconds / plain)
        print(
            f"{name:18s} {np.median(seconds):7.2f} s an epoch of {np.median(plain):.1f} s: {shares}"
        )
    shares = together / plain
    print(
        f"{'together':18s} median {100 * np.median(shares):.2f} %, most {100 * shares.max():.2f} %"
    )


if __name__ == "__main__":
    main()
