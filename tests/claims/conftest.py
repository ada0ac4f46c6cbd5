"""A lab of tiny, untrained networks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from camdistill.claims.claim import ClaimSetup
from camdistill.data.shapes import Shapes
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Preprocessed


def tiny(seed: int, channels: tuple[int, ...] = (6, 8)) -> Preprocessed:
    """Two strided stages, batch statistics of noise; its top classes differ between images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ShallowCNN(8, channels, (2,) * len(channels))
        noise = torch.rand(64, 3, 32, 32) * 4 - 2
        with torch.no_grad():
            for _ in range(20):
                network.train()(noise)
            network.linear.bias -= network.eval()(noise).mean(0)
    return Preprocessed(network).eval().requires_grad_(False)


@pytest.fixture
def lab(tmp_path: Path) -> Callable[..., ClaimSetup]:
    """Makes a lab; networks and count as wanted."""

    def make(
        teacher: nn.Module | None = None, student: nn.Module | None = None, count: int = 16
    ) -> ClaimSetup:
        return ClaimSetup(
            teacher=teacher or tiny(0),  # type: ignore[arg-type]
            student=student or tiny(1),  # type: ignore[arg-type]
            shapes=Shapes("test", count, seed=3),
            ids=np.arange(count, dtype=np.int64),
            seed=3,
            device="cpu",
            folder=tmp_path / "networks",
        )

    return make
