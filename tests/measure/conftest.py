"""Networks whose evidence is known in closed form."""

import pytest
import torch
from torch import Tensor, nn

SIDE = 16


class Linear(nn.Module):
    """Three classes, each logit a weighted sum of the pixels; counts the images it is asked."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.asked = 0

    def forward(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        return torch.einsum("bchw,kchw->bk", images, self.weight)


@pytest.fixture
def linear(generator: torch.Generator) -> Linear:
    """Random weights, 16 pixels, three channels."""
    shape = (3, 3, SIDE, SIDE)
    return Linear(torch.randn(shape, generator=generator, dtype=torch.float64) / 20)


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    """Five images of noise."""
    return torch.rand(5, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)


OBJECT = torch.zeros(SIDE, SIDE, dtype=torch.bool)
OBJECT[2:8, 5:11] = True


class Sees(nn.Module):
    """The first of two logits grows with the brightness of the object's pixels and of no other."""

    def forward(self, images: Tensor) -> Tensor:
        inside = images.mean(1)[:, OBJECT].mean(1)
        return torch.stack([12 * (inside - 0.6), torch.zeros_like(inside)], 1)


@pytest.fixture
def bright(generator: torch.Generator) -> Tensor:
    """Images whose object is bright, so that removing it changes the class."""
    noise = torch.rand(6, 3, SIDE, SIDE, generator=generator)
    return 0.2 * noise + 0.4 + 0.4 * OBJECT


def contest(generator: torch.Generator, count: int) -> dict[str, Tensor]:
    """The oracle's map of `Sees` and maps that know nothing, or the wrong thing."""
    maps = {
        "oracle": OBJECT.float(),
        "inverted": -OBJECT.float(),
        "constant": torch.full((SIDE, SIDE), 0.3),
        "shifted": OBJECT.float().roll((7, 4), (0, 1)),
    }
    whole = {name: one.expand(count, -1, -1) for name, one in maps.items()}
    whole["random"] = torch.rand(count, SIDE, SIDE, generator=generator)
    return whole
