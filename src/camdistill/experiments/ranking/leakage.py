"""Measures how much a map alone reveals of its class, without the image."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from camdistill.distill.training import build_with_seed
from camdistill.measure.intervals import Interval, bootstrap_interval
from camdistill.types import Labels

STEPS = 300
BATCH = 64


class Leak(NamedTuple):
    """Accuracy of a small CNN that sees maps alone, on maps that it was not trained with.

    Attributes:
        accuracy: With its interval over those maps.
        chance: That of always naming the most frequent class.
    """

    accuracy: Interval
    chance: float


def leak(maps: Float[Tensor, "images rows columns"], classes: Labels, seed: int = 0) -> Leak:
    """How well the teacher's class is told from a map (Jethani et al. 2023, "encoding").

    A map that names the class teaches by that alone, wherever it points: a method with a high leak
    has to beat the controls that leak as much (`class_mean`, `shuffled_in_class`).

    Args:
        maps: Rectified; three quarters train, the rest is judged.
        classes: The teacher's top classes.
        seed: Seed of the split and of the training.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(maps), generator=generator)
    cut = max(1, len(maps) * 3 // 4)
    planes = F.normalize(maps.float().flatten(1)).view_as(maps)[:, None] * maps[0].numel() ** 0.5
    train, held = order[:cut], order[cut:]
    if not len(held):
        raise ValueError(f"{len(maps)} maps are too few to train with and to judge")
    network = build_with_seed(seed, lambda: _reader(int(classes.max()) + 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    network.train()
    for _ in range(STEPS):
        rows = train[torch.randint(len(train), (BATCH,), generator=generator)]
        loss = F.cross_entropy(network(planes[rows]), classes[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    network.eval()
    with torch.no_grad():
        right = (network(planes[held]).argmax(1) == classes[held]).double()
    frequent = int(classes[train].bincount().argmax())
    return Leak(
        bootstrap_interval(right.numpy()), float((classes[held] == frequent).double().mean())
    )


def _reader(classes: int) -> nn.Module:
    """Two convolutions and two linear layers: places matter, unlike after global pooling."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, classes)),
    )
