"""Theoretical receptive fields of all layers.

Its numbers are read off a forward (`receptive_field_trace`), or, where that can't follow, off
gradients. What a unit *uses* is less: about a Gaussian in the middle of it (Luo et al. 2016,
https://arxiv.org/abs/1701.04128).
"""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from camdistill.layers.units.receptive_field_trace import FieldTracer
from camdistill.layers.units.receptive_spans import Field, ReceptiveField, Span
from camdistill.networks.capture import (
    capture,
    inspection_mode,
    layer_names,
    unwrap_outer,
    visit_layers,
)
from camdistill.types import Images


def receptive_fields(
    network: nn.Module, images: Images, layers: Iterable[str] | None = None
) -> dict[str, Field]:
    """Receptive fields by layer.

    Args:
        network: Bare or wrapped; its modes and buffers stay as they are.
        images: Images as the network takes them; the first is run.
        layers: Names (see `networks.capture`); None is every layer that runs and gives a
            [B, K, h, w].

    Returns:
        None for a layer whose units each see the whole image, or that gives vectors; "unknown"
        where the walk met an operation that it can't follow (a transposed convolution, a join of
        unequal steps) and gradients don't show units that move by one step and see as much.
    """
    names = list(layer_names(network) if layers is None else layers)
    field_by_layer: dict[str, Field] = {}
    vectors: set[str] = set()
    with inspection_mode(network), FieldTracer(images[:1]) as tracer:

        def note(name: str, output: object) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                field_by_layer[name] = tracer.field(output)
            elif layers is not None:
                field_by_layer[name] = None
                vectors.add(name)

        with visit_layers(network, names, note, required=layers is not None):
            unwrap_outer(network)(tracer.images)
    unresolved = [
        name for name in field_by_layer if field_by_layer[name] is None and name not in vectors
    ]
    if tracer.unknown and unresolved:
        field_by_layer |= measure_fields(network, images, unresolved)
    return {name: field_by_layer[name] for name in names if name in field_by_layer}


def measure_fields(
    network: nn.Module, images: Images, layers: Iterable[str], *, seed: int = 0
) -> dict[str, Field]:
    """Receptive fields by layer, from where gradients of some units are not zero.

    In float64, of noise images: independent of the walk, and right for any operation, but slower.
    Two units in the middle tell the field; the first, the last and those between must see what
    follows from it, cut at the image's border. Pixels whose every path to the unit happens to be
    switched off are missed.

    Args:
        network: Bare or wrapped; it is copied.
        images: Their size is taken, and the range of the noise.
        layers: Names.
        seed: Seed of the noise.

    Returns:
        None where a unit in the middle sees the whole image; "unknown" where none lies inside it,
        or not all units move by one step.
    """
    names = list(layers)
    double = copy.deepcopy(network).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(2, *images.shape[1:], generator=generator, dtype=torch.float64)
    noise = noise.to(images.device).requires_grad_()
    with torch.inference_mode(False), torch.enable_grad():
        with capture(double, names) as outputs:
            unwrap_outer(double)(noise)
        return {name: _field_from_gradients(outputs[name], noise) for name in names}


def _field_from_gradients(output: Tensor, images: Tensor) -> Field:
    if output.dim() != 4 or not output.requires_grad:
        return "unknown"
    size, grid = images.shape[2:], output.shape[2:]
    middle = [(length - 1) // 2 for length in grid]
    middle_ranges = _pixel_ranges(output, images, middle)
    if middle_ranges is None:
        return "unknown"
    if middle_ranges == [(0, length) for length in size]:
        return None
    neighbor = [
        min(unit + 1, length - 1) for unit, length in zip(middle, output.shape[2:], strict=True)
    ]
    neighbor_ranges = _pixel_ranges(output, images, neighbor)
    if neighbor_ranges is None or min(output.shape[2:]) < 2:
        return "unknown"
    spans = []
    for (first, end), (next_first, next_end), unit, length in zip(
        middle_ranges, neighbor_ranges, middle, size, strict=True
    ):
        stride = next_first - first
        if not (first > 0 and next_end < length and stride == next_end - end and stride > 0):
            return "unknown"
        spans.append(Span(end - first, stride, first - unit * stride))
    for share in (0.0, 0.25, 0.75, 1.0):
        place = [round(share * (length - 1)) for length in grid]
        expected = [
            (max(start, 0), min(end, length))
            for (start, end), length in zip(map(Span.pixels, spans, place), size, strict=True)
        ]
        if _pixel_ranges(output, images, place) != expected:
            return "unknown"
    return ReceptiveField(spans[0], spans[1])


def _pixel_ranges(
    output: Tensor, images: Tensor, place: Sequence[int]
) -> list[tuple[int, int]] | None:
    """Along each axis the first pixel that a unit uses, and the one after the last."""
    total = output[:, :, place[0], place[1]].sum()
    (gradient,) = torch.autograd.grad(total, images, retain_graph=True)
    used = (gradient != 0).any(0).any(0)
    lines = [used.any(1 - axis).nonzero().flatten() for axis in range(2)]
    if any(not len(line) for line in lines):
        return None
    return [(int(line[0]), int(line[-1]) + 1) for line in lines]
