"""One forward that can be asked for gradients at its layers, and leaves nothing behind."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from camdistill.errors import UserError
from camdistill.explain.closed_form import Verdicts, possible_heads
from camdistill.explain.graph import Edge
from camdistill.explain.norms import light_norms
from camdistill.explain.request import Request, wide
from camdistill.explain.tokens import cells_of
from camdistill.networks.capture import parts, plain, tensor, visiting

Cells = Callable[[Tensor], Tensor] | None


class _Tap(torch.autograd.Function):
    """A layer's output, with a leaf [B, K] whose gradient is the sum over cells of dS/dA.

    The leaf spares keeping dS/dA, and its sum is made in the leaf's precision, whatever the
    network's. What goes on is a copy where something overwrites it in place, so that A stays; or
    the same numbers, which only a custom function may hand on without being a view.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, probe: Tensor, cells: Cells, copy: bool) -> Tensor:
        return output.clone() if copy else output.detach()

    @staticmethod
    def setup_context(  # type: ignore[no-untyped-def]
        ctx, inputs: tuple[Tensor, Tensor, Cells, bool], output: Tensor
    ) -> None:
        _, probe, ctx.cells, _ = inputs
        ctx.dtype = probe.dtype

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
        cells = gradient if ctx.cells is None else ctx.cells(gradient)
        return gradient, cells.to(ctx.dtype).sum((-2, -1)), None, None


@dataclass
class Seen:
    """A layer in one forward.

    Attributes:
        output: What it gave, and the number of in-place operations on that until then.
        version: Likewise.
        activations: The output as [B, K, h, w].
        source: Where it entered the graph.
        cells: How the output became the activations.
        probe: What to ask for the gradient's sum over cells.
        passed: The copy that the network went on with, and its version; None if there was none.
    """

    output: Tensor
    version: int
    activations: Tensor
    source: Edge
    cells: Cells
    probe: Tensor | None = None
    passed: tuple[Tensor, int] | None = None

    @property
    def count(self) -> int:
        """Z, the number of cells."""
        return self.activations.shape[2] * self.activations.shape[3]

    @property
    def is_overwritten(self) -> bool:
        """Whether something in place followed, on the output or on its copy."""
        copy, version = self.passed or (self.output, self.version)
        return version_of(copy) != version or version_of(self.output) != self.version


def recorded_forward(
    ask: Request, verdicts: Verdicts, record: bool, *, every: bool = False
) -> tuple[object, dict[str, Seen], dict[str, tuple[nn.Module, Node]]]:
    """The network's output, the layers asked for, and the possible heads that ran.

    With `every` the graph begins at the first layer even where a closed form needs none.
    """
    seen: dict[str, Seen] = {}
    ran: dict[str, tuple[nn.Module, Node]] = {}
    undecided = ask.maps and not all(verdicts[name].judged for name in ask.names)
    possible = possible_heads(verdicts.inner) if undecided else {}
    size = (ask.images.shape[-2], ask.images.shape[-1])

    def visit(name: str, output: object) -> Tensor | None:
        values = tensor(name, output)
        cells = cells_of(name, values, size, ask.layout)
        activations = values if cells is None else cells(values)
        _demand_spatial(name, values, activations, len(ask.images))
        source: Edge = values.grad_fn, values.output_nr
        seen[name] = Seen(values, version_of(values), activations, source, cells)
        if not ask.maps:
            return values.clone()
        if verdicts[name].head is not None and not every:
            return values.clone() if verdicts[name].overwritten else None
        if not record:
            torch.set_grad_enabled(True)
        # A training step can't run again, so it doesn't trust what was seen before.
        return _tap(seen[name], copy=record or verdicts[name].overwritten is not False)

    def note(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            ran[name] = possible[name], output.grad_fn

    light = ask.maps and ask.grad == "none" and any(verdicts[n].head is None for n in ask.names)
    with (
        visiting(ask.network, ask.names, visit),
        visiting(ask.network, possible, note, required=False),
        light_norms(verdicts.inner) if light else nullcontext(),
    ):
        output = _output(ask)
    return output if ask.logits is None else ask.logits(output), seen, ran


def _output(ask: Request) -> object:
    if ask.grad != "none":
        return ask.network(ask.images)
    network = plain(ask.network)
    if ask.maps and any(
        value is not None and value.is_inference()
        for part in parts(network)
        for value in (*part._parameters.values(), *part._buffers.values())
    ):
        # Tensors made under inference_mode can't take part in a graph; their copies can.
        state = chain(network.named_parameters(), network.named_buffers())
        stale = {name: value.clone() for name, value in state if value.is_inference()}
        return torch.func.functional_call(network, stale, (ask.images,))
    return network(ask.images)


def _tap(layer: Seen, *, copy: bool) -> Tensor:
    """What goes on in place of a layer's output, and can be asked for its gradient."""
    activations = layer.activations
    layer.probe = torch.zeros(
        activations.shape[:2],
        dtype=wide(activations).dtype,
        device=activations.device,
        requires_grad=True,
    )
    with torch.enable_grad():
        passed: Tensor = _Tap.apply(layer.output, layer.probe, layer.cells, copy)
    layer.source = passed.grad_fn, 0
    if copy:
        layer.passed = passed, version_of(passed)
    return passed


def _demand_spatial(name: str, output: Tensor, activations: Tensor, images: int) -> None:
    gave, shape = list(output.shape), list(activations.shape)
    if len(shape) != 4 or shape[2] * shape[3] < 2:
        as_cells = "" if gave == shape else f", as cells {shape}"
        raise UserError(
            f"layer '{name}' gives {gave}{as_cells}, which has no spatial size: ask for a layer "
            "with an output [B, K, h, w] of more than one cell, before the pooling"
        )
    if shape[0] != images:
        raise UserError(
            f"layer '{name}' gives {shape[0]} rows for {images} images: a map needs one an image"
        )


def recordable(value: Tensor) -> Tensor:
    """A copy of a tensor made under inference_mode, which can't take part in a graph."""
    return value.clone() if value.is_inference() else value


def version_of(values: Tensor) -> int:
    """Counts in-place operations; tensors of inference_mode don't."""
    return 0 if values.is_inference() else values._version
