"""One forward that can be asked for gradients at its layers, and leaves nothing behind."""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from camdistill.errors import UserError
from camdistill.explain.closed_form import Edge, Verdicts, possible_heads
from camdistill.explain.request import Request, wide
from camdistill.networks.capture import plain, tensor, visiting


class _Tap(torch.autograd.Function):
    """A copy of a layer's output, with a leaf [B, K] whose gradient is the sum over cells of dS/dA.

    The copy keeps in-place operations that follow away from A; the leaf spares keeping dS/dA, and
    its sum is made in the leaf's precision, whatever the network's.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(activations: Tensor, probe: Tensor) -> Tensor:
        return activations.clone()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # type: ignore[no-untyped-def]
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        return gradient, gradient.to(ctx.dtype).sum((2, 3))


@dataclass
class Seen:
    """A layer in one forward: its output, where that entered the graph, and how to ask there."""

    activations: Tensor
    version: int
    source: Edge
    probe: Tensor | None = None

    @property
    def cells(self) -> int:
        """Z, the number of cells."""
        return self.activations.shape[2] * self.activations.shape[3]


def recorded_forward(
    ask: Request, verdicts: Verdicts, record: bool
) -> tuple[object, dict[str, Seen], dict[str, tuple[nn.Module, Node]]]:
    """The network's output, the layers asked for, and the possible heads that ran."""
    seen: dict[str, Seen] = {}
    ran: dict[str, tuple[nn.Module, Node]] = {}
    undecided = ask.maps and any(verdicts[name] is None for name in ask.names)
    possible = possible_heads(verdicts.inner) if undecided else {}

    def visit(name: str, output: object) -> Tensor | None:
        activations = tensor(name, output)
        _demand_spatial(name, activations, len(ask.images))
        source: Edge = activations.grad_fn, activations.output_nr
        seen[name] = Seen(activations, version_of(activations), source)
        if not ask.maps:
            return activations.clone()
        if verdicts.weight(name) is not None:
            return None
        if not record:
            torch.set_grad_enabled(True)
        return _tap(seen[name])

    def note(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            ran[name] = possible[name], output.grad_fn

    network = plain(ask.network) if ask.grad == "none" else ask.network
    with visiting(network, ask.names, visit), visiting(network, possible, note, required=False):
        stale = {}
        if ask.grad == "none" and ask.maps:
            state = chain(network.named_parameters(), network.named_buffers())
            stale = {name: value.clone() for name, value in state if value.is_inference()}
        if stale:
            # Tensors made under inference_mode can't take part in a graph; their copies can.
            output: object = torch.func.functional_call(network, stale, (ask.images,))
        else:
            output = network(ask.images)
    return output, seen, ran


def _tap(layer: Seen) -> Tensor:
    """What goes on in place of a layer's output, and can be asked for its gradient."""
    activations = layer.activations
    layer.probe = torch.zeros(
        activations.shape[:2],
        dtype=wide(activations).dtype,
        device=activations.device,
        requires_grad=True,
    )
    with torch.enable_grad():
        passed: Tensor = _Tap.apply(activations, layer.probe)
    layer.source = passed.grad_fn, 0
    return passed


def _demand_spatial(name: str, activations: Tensor, images: int) -> None:
    shape = list(activations.shape)
    if len(shape) != 4 or shape[2] * shape[3] < 2:
        raise UserError(
            f"layer '{name}' gives {shape}, which has no spatial size: ask for a layer with an "
            "output [B, K, h, w] of more than one cell, before the pooling"
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
