"""A tiny experiment as a config file."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.weights import save_safetensors

Settings = dict[str, object]


def random_teacher() -> CifarResNet:
    """Untrained, with a head that makes its top classes differ."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CifarResNet(depth=20, classes=8)
        noise = torch.rand(64, 3, 32, 32) * 4 - 2
        with torch.no_grad():
            for _ in range(20):
                network.train()(noise)
            network.linear.weight.mul_(3)
            network.linear.bias -= network.eval()(noise).mean(0)
    return network


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """Writes a config; options are those of the model, or sections that replace ours."""
    save_safetensors(tmp_path / "teacher.safetensors", random_teacher().state_dict(), {})

    def write(
        name: str = "tiny",
        *,
        data: Settings | None = None,
        trainer: Settings | None = None,
        **model: object,
    ) -> Path:
        known: Settings = {
            "teacher": {
                "name": "resnet20",
                "weights": str(tmp_path / "teacher.safetensors"),
                "args": {"classes": 8},
            },
            "student": {"name": "shallow_cnn", "args": {"channels": [6, 8], "strides": [2, 2]}},
            "optimization": {"lr": 0.05},
        }
        images = {"train": 48, "val": 20, "test": 20, "batch_size": 16}
        whole = {
            "model": {
                "class_path": "camdistill.distill.distilled_explainer.DistilledExplainer",
                "init_args": known | model,
            },
            "data": {
                "class_path": "camdistill.data.modules.ShapesData",
                "init_args": images | (data or {}),
            },
            "trainer": {
                "max_epochs": 1,
                "accelerator": "cpu",
                "devices": 1,
                "precision": "32-true",
                "log_every_n_steps": 1,
            }
            | (trainer or {}),
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(whole))
        return path

    return write
