"""A tiny teacher in a file, tiny data, and short trainings."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from camdistill.data.modules import ShapesData
from camdistill.data.views import Augment
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.distill.optimization import Optimization
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.teachers import NetworkSpec
from camdistill.networks.weights import save_safetensors
from camdistill.types import Batch

STUDENT = NetworkSpec("shallow_cnn", args={"channels": [6, 8, 10, 12], "strides": [1, 2, 2, 1]})


def shapes(**options: object) -> ShapesData:
    sizes = {"train": 64, "val": 24, "test": 20, "batch_size": 16}
    return ShapesData(**(sizes | options))  # type: ignore[arg-type]


def random_teacher(seed: int = 0) -> CifarResNet:
    """Untrained, with statistics and a head that make its top classes and maps differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = CifarResNet(depth=20, classes=8)
        data = shapes(train=128)
        data.setup("fit")
        assert data.train_set is not None
        images = data.train_set.batch(torch.arange(128).numpy()).pixels.float() / 255
        images = (images - images.mean((0, 2, 3), keepdim=True)) / 0.226
        for _ in range(30):  # batch normalization learns the data's statistics
            network.train()(images)
        with torch.no_grad():
            network.linear.weight.mul_(3)
            network.linear.bias -= network.eval()(images).mean(0)
    return network


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_safetensors(path, random_teacher().state_dict(), {})
    return path


@pytest.fixture
def explainer(teacher_file: Path) -> Callable[..., DistilledExplainer]:
    """A small experiment; options are the module's."""

    def build(**options: object) -> DistilledExplainer:
        known: dict[str, object] = {
            "teacher": NetworkSpec("resnet20", str(teacher_file), {"classes": 8}),
            "student": STUDENT,
            "optimization": Optimization(lr=0.05),
            "augment": Augment("pad", padding=3, flip=True),
        }
        return DistilledExplainer(**(known | options))  # type: ignore[arg-type]

    return build


class Recorder(Callback):
    """Keeps each step's batch, loss, gradients, and the module as it was before."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.losses: list[float] = []
        self.befores: list[LightningModule] = []
        self.epochs: list[int] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        self.epochs.append(trainer.current_epoch)
        self.befores.append(copy.deepcopy(pl_module))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: object
    ) -> None:
        self.gradients.append(
            {
                name: parameter.grad.clone()
                for name, parameter in pl_module.named_parameters()
                if parameter.grad is not None
            }
        )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self.losses.append(float(outputs["loss"]))


def trainer_of(*callbacks: Callback, **options: object) -> Trainer:
    known: dict[str, object] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "callbacks": list(callbacks),
    }
    return Trainer(**(known | options))  # type: ignore[arg-type]


@pytest.fixture(name="shapes")
def _shapes() -> Callable[..., ShapesData]:
    return shapes


@pytest.fixture(name="trainer_of")
def _trainer_of() -> Callable[..., Trainer]:
    return trainer_of


@pytest.fixture(name="recorder")
def _recorder() -> Recorder:
    return Recorder()
