"""Where a gradient can be asked for: a layer's output with a leaf beside it."""

from collections.abc import Callable

import torch
from torch import Tensor

CellTransform = Callable[[Tensor], Tensor] | None


class Tap(torch.autograd.Function):
    """A layer's output, with a leaf [B, K] whose gradient is the sum over cells of dS/dA.

    The leaf spares keeping dS/dA, and its sum is made in the leaf's precision, whatever the
    network's. What goes on is a copy, so that A stays where something overwrites it, by whatever
    way: versions don't count what goes through `.data` or numpy.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, probe: Tensor, to_cells: CellTransform) -> Tensor:
        """What the network goes on with."""
        return output.clone()

    @staticmethod
    def setup_context(  # type: ignore[no-untyped-def]
        ctx, inputs: tuple[Tensor, Tensor, CellTransform], output: Tensor
    ) -> None:
        """Keeps how the output becomes cells, and the leaf's precision."""
        _, probe, ctx.cells = inputs
        ctx.dtype = probe.dtype

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        """The gradients of the output and of the leaf."""
        cells = gradient if ctx.cells is None else ctx.cells(gradient)
        return gradient, cells.to(ctx.dtype).sum((-2, -1)), None
