"""The smallest study that trains: what the configs of `rank`, `adapt` and `learn` begin with."""

from pathlib import Path

import torch

from camdistill.networks.students import ShallowCNN
from camdistill.networks.weights import save_safetensors

TINY = {"name": "shallow_cnn", "args": {"channels": [4, 6], "strides": [2, 2]}}
HERE = {"workers": 0, "device": "cpu"}


def study(teacher: str = "teacher.safetensors", **other: object) -> dict[str, object]:
    """One student of 16 images, two seeds, on 6 classes of Shapes; `other` adds and replaces."""
    return {
        "teacher": {**TINY, "weights": teacher},
        "data": {
            "class_path": "camdistill.data.modules.ShapesData",
            "init_args": {"train": 40, "val": 20, "test": 30, "classes": 6},
        },
        "students": {"tiny": TINY},
        "n": [16],
        "seeds": [0, 1],
        "tuning": {"betas": [1.0], "seeds": [7]},
        "recipe": {"steps": 2, "batch_size": 8},
        **other,
    }


def save_teacher(path: Path, seed: int = 0) -> None:
    """Writes the weights that such a study's teacher has."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = ShallowCNN(6, (4, 6), (2, 2)).state_dict()
    save_safetensors(path, state, {})
