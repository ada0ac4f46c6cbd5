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
from camdistill.explain.engine.gradient_taps import CellTransform, Tap
from camdistill.explain.engine.graph import Edge
from camdistill.explain.engine.norms import light_norms
from camdistill.explain.engine.request import Request, upcast
from camdistill.explain.engine.tokens import are_tokens, cell_transform
from camdistill.networks.capture import (
    check_tensor,
    list_modules,
    unwrap,
    unwrap_outer,
    visit_layers,
    watch_modules,
)

# Modules that only pass on what the layer before them gave, smaller or thinned out.
PASS_THROUGH = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Identity,
)


@dataclass
class LayerRecord:
    """A layer in one forward.

    Attributes:
        output: What it gave, and the number of in-place operations on that until then.
        version: Likewise.
        activations: The output as [B, K, h, w].
        source: Where it entered the graph.
        to_cells: How the output became the activations.
        probe: What to ask for the gradient's sum over cells.
    """

    output: Tensor
    version: int
    activations: Tensor
    source: Edge
    to_cells: CellTransform
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
    layers: dict[str, LayerRecord]
    heads: dict[nn.Module, Node]
    finished: list[tuple[nn.Module, torch.Size]]


def record_forward(request: Request, record: bool, *, follow: bool = False) -> Recording:
    """Runs the network once, from the first layer asked for with a graph.

    Args:
        request: With layers, unless only the output is wanted.
        record: Whether the whole network has a graph.
        follow: Whether to note every module that gives a spatial output.
    """
    inner = unwrap(request.network)
    layers: dict[str, LayerRecord] = {}
    heads: dict[nn.Module, Node] = {}
    finished: list[tuple[nn.Module, torch.Size]] = []
    size = (request.images.shape[-2], request.images.shape[-1])

    def visit(name: str, output: object) -> Tensor | None:
        values = check_tensor(name, output)
        to_cells = cell_transform(name, values, size, request.layout)
        activations = values if to_cells is None else to_cells(values)
        _check_spatial(name, values, activations, len(request.images))
        source: Edge = values.grad_fn, values.output_nr
        layers[name] = LayerRecord(values, version_of(values), activations, source, to_cells)
        if not request.maps:
            return values.clone()
        if not record:
            torch.set_grad_enabled(True)
        return _tap(layers[name])

    modules = list_modules(inner)
    head_candidates = (
        {module for module in modules if may_be_head(module)} if request.maps else set()
    )
    spatial = set(may_be_last(modules)) if follow else set()

    def note(module: nn.Module, output: object) -> None:
        if module in head_candidates and isinstance(output, Tensor) and output.grad_fn is not None:
            heads[module] = output.grad_fn
        if module in spatial and (shape := spatial_shape(output, size)) is not None:
            finished.append((module, shape))

    with (
        visit_layers(request.network, request.names, visit),
        watch_modules(head_candidates | spatial, note),
        light_norms(modules) if request.maps and request.grad == "none" else nullcontext(),
    ):
        output = _output(request, modules)
    recorded_output = output if request.logits is None else request.logits(output)
    return Recording(recorded_output, layers, heads, finished)


def may_be_last(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Which of a network's modules, itself first, may be the last layer before the head."""
    return [module for module in modules[1:] if not isinstance(module, PASS_THROUGH)]


def spatial_shape(output: object, size: tuple[int, int]) -> torch.Size | None:
    """The shape of an output that has more than one cell for images of a size, else None."""
    if not isinstance(output, Tensor):
        return None
    shape = output.shape
    is_grid = len(shape) == 4 and shape[2] * shape[3] > 1
    return shape if is_grid or are_tokens(output, size) else None


def check_intact_outputs(layers: dict[str, LayerRecord]) -> None:
    """Refuse outputs that were changed although the network went on with copies of them."""
    for name, layer in layers.items():
        if version_of(layer.output) != layer.version:
            raise UserError(
                f"layer '{name}' keeps its output and changes it in place later: ask for the layer "
                "that overwrites it"
            )


def _output(request: Request, modules: Sequence[nn.Module]) -> object:
    if request.grad != "none":
        return request.network(request.images)
    network = unwrap_outer(request.network)
    if request.maps and any(
        value is not None and value.is_inference()
        for part in {network, *modules}
        for value in (*part._parameters.values(), *part._buffers.values())
    ):
        # Tensors made under inference_mode can't take part in a graph; their copies can.
        state = chain(network.named_parameters(), network.named_buffers())
        cloned_state = {name: value.clone() for name, value in state if value.is_inference()}
        return torch.func.functional_call(network, cloned_state, (request.images,))
    return network(request.images)


def _tap(layer: LayerRecord) -> Tensor:
    """What goes on in place of a layer's output: a copy that can be asked for its gradient."""
    activations = layer.activations
    layer.probe = torch.zeros(
        activations.shape[:2],
        dtype=upcast(activations).dtype,
        device=activations.device,
        requires_grad=True,
    )
    with torch.enable_grad():
        passed_on: Tensor = Tap.apply(layer.output, layer.probe, layer.to_cells)
    layer.source = passed_on.grad_fn, 0
    return passed_on


def _check_spatial(name: str, output: Tensor, activations: Tensor, images: int) -> None:
    output_shape, shape = list(output.shape), list(activations.shape)
    if len(shape) != 4 or shape[2] * shape[3] < 2:
        as_cells = "" if output_shape == shape else f", as cells {shape}"
        raise UserError(
            f"layer '{name}' gives {output_shape}{as_cells}, which has no spatial size: ask for "
            "a layer "
            "with an output [B, K, h, w] of more than one cell, before the pooling"
        )
    if shape[0] != images:
        raise UserError(
            f"layer '{name}' gives {shape[0]} rows for {images} images: a map needs one an image"
        )


def clone_if_inference(value: Tensor) -> Tensor:
    """A copy of a tensor made under inference_mode, which can't take part in a graph."""
    return value.clone() if value.is_inference() else value


def version_of(values: Tensor) -> int:
    """Counts in-place operations; tensors of inference_mode don't."""
    return 0 if values.is_inference() else values._version
