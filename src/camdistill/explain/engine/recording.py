"""One forward that can be asked for gradients at its layers, and leaves nothing behind."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from camdistill.errors import UserError
from camdistill.explain.engine.closed_form import may_be_head
from camdistill.explain.engine.gradient_taps import Cells, Tap
from camdistill.explain.engine.graph import Edge
from camdistill.explain.engine.norms import light_norms
from camdistill.explain.engine.request import Request, wide
from camdistill.explain.engine.tokens import are_tokens, cells_of
from camdistill.networks.capture import bare, parts, plain, tensor, visiting, watching

# Modules that only pass on what the layer before them gave, smaller or thinned out.
PASSING = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Identity,
)


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
    """

    output: Tensor
    version: int
    activations: Tensor
    source: Edge
    cells: Cells
    probe: Tensor | None = None

    @property
    def count(self) -> int:
        """Z, the number of cells."""
        return self.activations.shape[2] * self.activations.shape[3]


@dataclass(frozen=True)
class Recording:
    """One forward.

    Attributes:
        output: What the network gave, or what `logits` took out of it.
        layers: The layers asked for, by name.
        heads: The possible heads that ran, with the graph's node of what each gave.
        finished: The modules that gave spatial outputs, in the order in which they finished, with
            the shapes; empty unless they were asked for.
    """

    output: object
    layers: dict[str, Seen]
    heads: dict[nn.Module, Node]
    finished: list[tuple[nn.Module, torch.Size]]


def recorded_forward(ask: Request, record: bool, *, follow: bool = False) -> Recording:
    """Runs the network once, from the first layer asked for with a graph.

    Args:
        ask: With layers, unless only the output is wanted.
        record: Whether the whole network has a graph.
        follow: Whether to note every module that gives a spatial output.
    """
    inner = bare(ask.network)
    layers: dict[str, Seen] = {}
    heads: dict[nn.Module, Node] = {}
    finished: list[tuple[nn.Module, torch.Size]] = []
    size = (ask.images.shape[-2], ask.images.shape[-1])

    def visit(name: str, output: object) -> Tensor | None:
        values = tensor(name, output)
        cells = cells_of(name, values, size, ask.layout)
        activations = values if cells is None else cells(values)
        _demand_spatial(name, values, activations, len(ask.images))
        source: Edge = values.grad_fn, values.output_nr
        layers[name] = Seen(values, version_of(values), activations, source, cells)
        if not ask.maps:
            return values.clone()
        if not record:
            torch.set_grad_enabled(True)
        return _tap(layers[name])

    modules = parts(inner)
    possible = {module for module in modules if may_be_head(module)} if ask.maps else set()
    spatial = set(may_be_last(modules)) if follow else set()

    def note(module: nn.Module, output: object) -> None:
        if module in possible and isinstance(output, Tensor) and output.grad_fn is not None:
            heads[module] = output.grad_fn
        if module in spatial and (shape := spatial_shape(output, size)) is not None:
            finished.append((module, shape))

    with (
        visiting(ask.network, ask.names, visit),
        watching(possible | spatial, note),
        light_norms(modules) if ask.maps and ask.grad == "none" else nullcontext(),
    ):
        output = _output(ask, modules)
    taken = output if ask.logits is None else ask.logits(output)
    return Recording(taken, layers, heads, finished)


def may_be_last(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Which of a network's modules, itself first, may be the last layer before the head."""
    return [module for module in modules[1:] if not isinstance(module, PASSING)]


def spatial_shape(output: object, size: tuple[int, int]) -> torch.Size | None:
    """The shape of an output that has more than one cell for images of a size, else None."""
    if not isinstance(output, Tensor):
        return None
    shape = output.shape
    is_grid = len(shape) == 4 and shape[2] * shape[3] > 1
    return shape if is_grid or are_tokens(output, size) else None


def demand_intact(layers: dict[str, Seen]) -> None:
    """Refuse outputs that were changed although the network went on with copies of them."""
    for name, layer in layers.items():
        if version_of(layer.output) != layer.version:
            raise UserError(
                f"layer '{name}' keeps its output and changes it in place later: ask for the layer "
                "that overwrites it"
            )


def _output(ask: Request, modules: Sequence[nn.Module]) -> object:
    if ask.grad != "none":
        return ask.network(ask.images)
    network = plain(ask.network)
    if ask.maps and any(
        value is not None and value.is_inference()
        for part in {network, *modules}
        for value in (*part._parameters.values(), *part._buffers.values())
    ):
        # Tensors made under inference_mode can't take part in a graph; their copies can.
        state = chain(network.named_parameters(), network.named_buffers())
        stale = {name: value.clone() for name, value in state if value.is_inference()}
        return torch.func.functional_call(network, stale, (ask.images,))
    return network(ask.images)


def _tap(layer: Seen) -> Tensor:
    """What goes on in place of a layer's output: a copy that can be asked for its gradient."""
    activations = layer.activations
    layer.probe = torch.zeros(
        activations.shape[:2],
        dtype=wide(activations).dtype,
        device=activations.device,
        requires_grad=True,
    )
    with torch.enable_grad():
        passed: Tensor = Tap.apply(layer.output, layer.probe, layer.cells)
    layer.source = passed.grad_fn, 0
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
