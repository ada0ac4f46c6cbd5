"""Reduces a batch's activations to numbers by image and channel."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from camdistill.explain.engine.request import upcast

SATURATED = 0.99  # of a non-linearity's bound


@dataclass(frozen=True)
class BatchReduction:
    """Numbers of a batch by image and channel, on the CPU.

    Attributes:
        cells: Values of a channel in an image.
        finite: Images whose values are all finite; the other rows mean nothing.
        mean: Over the cells.
        squares: Sum of squares.
        magnitudes: Sum of absolute values.
        largest: Over the cells.
        active: Cells above 0.
        saturated: Cells at the bound.
    """

    cells: int
    finite: Bool[Tensor, "batch"]
    mean: Float[Tensor, "batch channels"]
    squares: Float[Tensor, "batch channels"]
    magnitudes: Float[Tensor, "batch channels"]
    largest: Float[Tensor, "batch channels"]
    active: Float[Tensor, "batch channels"]
    saturated: Float[Tensor, "batch channels"]


def add_spatial_axes(output: Tensor) -> Float[Tensor, "batch channels height width"]:
    """A layer's output with two spatial axes, in float32 or wider."""
    return upcast(output.detach())[(..., *[None] * (4 - output.dim()))]


def reduce_output(
    output: Float[Tensor, "batch channels height width"],
    *,
    rectified: bool = False,
    bound: float | None = None,
) -> BatchReduction:
    """Reads a tensor as few times as can be.

    Args:
        output: What a layer gave.
        rectified: Whether it is known to hold no negative value, which spares passes.
        bound: Bound of the non-linearity.
    """
    numbers = _numbers(output, rectified, bound)
    finite = torch.isfinite(numbers[:2]).all(2).all(0)
    if not finite.all():
        suspects = (~finite).nonzero().flatten()
        # Values that are finite though their float32 sums overflow.
        exact_output = output[suspects.to(output.device)].cpu().double()
        finite[suspects] = torch.isfinite(exact_output).flatten(1).all(1)
        numbers[:, suspects] = _numbers(exact_output, rectified, bound)
    total, squares, magnitudes, largest, active, saturated = numbers
    cells = output.shape[2] * output.shape[3]
    return BatchReduction(
        cells, finite, total / cells, squares, magnitudes, largest, active, saturated
    )


def _numbers(output: Tensor, rectified: bool, bound: float | None) -> Tensor:
    """Sum, squares, magnitudes, largest, active, saturated: [6, B, C], float64 on the CPU.

    Norms would spare copies, but on the CPU they take five times as long as a copy in this layout.
    """
    places = (2, 3)
    total = output.sum(places)
    squares = output.square().sum(places)
    positive = output if rectified else output.clamp_min(0)
    active = positive.sign().sum(places)
    magnitudes = total if rectified else output.abs().sum(places)
    saturated = torch.zeros_like(total)
    if bound is not None:
        saturated = (output.abs() >= SATURATED * bound).to(output.dtype).sum(places)
    numbers = torch.stack([total, squares, magnitudes, _largest(output), active, saturated])
    return numbers.cpu().double()


def _largest(output: Tensor) -> Float[Tensor, "batch channels"]:
    """Over the cells.

    With channels last and few channels PyTorch's own goes value by value (80 times slower at 16
    channels on the CPU), so that several cells are laid side by side first.
    """
    batch, channels, height, width = output.shape
    fold = math.gcd(height * width, max(256 // channels, 1))
    if fold == 1 or not output.is_contiguous(memory_format=torch.channels_last):
        return output.amax((2, 3))
    folded = output.permute(0, 2, 3, 1).reshape(batch, -1, fold * channels)
    return folded.amax(1).view(batch, fold, channels).amax(1)
