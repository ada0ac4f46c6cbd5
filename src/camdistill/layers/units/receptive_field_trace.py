"""Traces receptive fields through a real forward, operation by operation.

So shortcuts, branches and control flow are what they are in the network that runs.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from camdistill.layers.units.receptive_spans import ReceptiveField, Span

_TracedField = ReceptiveField | None
_Rule = Callable[[_TracedField, tuple[Any, ...], Tensor], _TracedField]


class FieldTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the images through a forward; knows the field of every tensor made of them.

    Attributes:
        images: What the network must be given inside the block.
        unknown: Names of operations that it couldn't follow.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.images = images.clone()
        self.unknown: set[str] = set()
        # Tensors are kept alive: a freed one's id could come back.
        self._fields: dict[int, tuple[Tensor, _TracedField]] = {}
        self._remember(self.images, ReceptiveField(Span(), Span()))

    def field(self, values: Tensor) -> _TracedField:
        """The field of a tensor; None where its units see everything."""
        entry = self._fields.get(id(values))
        return entry[1] if entry else None

    def _remember(self, values: Tensor, field: _TracedField) -> None:
        self._fields[id(values)] = values, field

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        traced_inputs = [leaf for leaf in inputs if id(leaf) in self._fields]
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._fields.pop(id(leaf), None) if not traced_inputs else self._remember(
                    leaf, self._trace_output(func, args, traced_inputs, leaf)
                )
        return output

    def _trace_output(
        self, func: Any, args: tuple[Any, ...], traced_inputs: list[Tensor], output: Tensor
    ) -> _TracedField:
        name = func.overloadpacket.__name__.rstrip("_").lstrip("_")
        fields = [self.field(leaf) for leaf in traced_inputs]
        if output.dim() < 3 or _is_one_cell(output):
            return None
        output_field = None
        # A network may multiply kernels made of the images: only the first is the image.
        if name in _RULES and len(fields) == 1:
            output_field = _RULES[name](fields[0], args, output)
        elif name == "cat" or torch.Tag.pointwise in func.tags:
            output_field = _merge_fields(traced_inputs, fields, output)
        if output_field is None and any(field is not None for field in fields):
            self.unknown.add(name)
        return output_field


def _merge_fields(
    traced_inputs: list[Tensor], fields: list[_TracedField], output: Tensor
) -> _TracedField:
    """Of a sum, product or concatenation over channels."""
    spatial = [
        field for leaf, field in zip(traced_inputs, fields, strict=True) if not _is_one_cell(leaf)
    ]
    if not spatial or None in spatial:
        return None
    if any(
        leaf.shape[-2:] != output.shape[-2:] and not _is_one_cell(leaf) for leaf in traced_inputs
    ):
        return None
    first, *others = (field for field in spatial if field is not None)
    for other in others:
        rows, columns = first.rows.join(other.rows), first.columns.join(other.columns)
        if rows is None or columns is None:
            return None
        first = ReceptiveField(rows, columns, first.gated or other.gated)
    return replace(first, gated=first.gated or len(spatial) < len(fields))


def _is_one_cell(values: Tensor) -> bool:
    return values.dim() < 3 or (values.shape[-1] == 1 and values.shape[-2] == 1)


def _pair(value: Any) -> tuple[int, int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return (numbers[0], numbers[-1]) if numbers else (0, 0)


def _window(
    field: _TracedField, kernel: Any, stride: Any, padding: Any, dilation: Any = 1
) -> _TracedField:
    if field is None:
        return None
    steps = list(zip(*map(_pair, (kernel, stride, padding, dilation)), strict=True))
    return replace(
        field,
        rows=field.rows.apply_window(*steps[0]),
        columns=field.columns.apply_window(*steps[1]),
    )


def _convolution(field: _TracedField, args: tuple[Any, ...], output: Tensor) -> _TracedField:
    _, weight, _, stride, padding, dilation, transposed, *_ = args
    if transposed or weight.dim() != 4:
        return None
    return _window(field, weight.shape[2:], stride, padding, dilation)


def _pool(field: _TracedField, args: tuple[Any, ...], output: Tensor) -> _TracedField:
    kernel = args[1]
    stride = args[2] if len(args) > 2 and args[2] else kernel
    padding = args[3] if len(args) > 3 else 0
    return _window(field, kernel, stride, padding)


def _max_pool(field: _TracedField, args: tuple[Any, ...], output: Tensor) -> _TracedField:
    kernel = args[1]
    stride = args[2] if len(args) > 2 and args[2] else kernel
    padding = args[3] if len(args) > 3 else 0
    dilation = args[4] if len(args) > 4 else 1
    return _window(field, kernel, stride, padding, dilation)


def _adaptive_pool(field: _TracedField, args: tuple[Any, ...], output: Tensor) -> _TracedField:
    before, after = args[0].shape[-2:], output.shape[-2:]
    if any(length % cells for length, cells in zip(before, after, strict=True)):
        return None
    cells = [length // cells for length, cells in zip(before, after, strict=True)]
    return _window(field, cells, cells, 0)


def _pad(field: _TracedField, args: tuple[Any, ...], output: Tensor) -> _TracedField:
    """Zeros, reflection or replication around it, (left, right, top, bottom, ...)."""
    left, top = args[1][0], args[1][2] if len(args[1]) > 2 else 0
    return _window(field, 1, 1, (top, left))


def _slice(field: _TracedField, args: tuple[Any, ...], output: Tensor) -> _TracedField:
    source: Tensor = args[0]
    axis = args[1] if len(args) > 1 else 0
    start = args[2] if len(args) > 2 else 0
    step = args[4] if len(args) > 4 else 1
    from_end = axis % source.dim() - source.dim()
    if field is None or from_end < -2:
        return field
    line = field.rows if from_end == -2 else field.columns
    first = min((start or 0) % source.shape[axis], source.shape[axis] - 1) if start else 0
    line = Span(line.size, line.stride * step, line.start + first * line.stride)
    return replace(field, rows=line) if from_end == -2 else replace(field, columns=line)


def _keep_field(field: _TracedField, args: tuple[Any, ...], output: Tensor) -> _TracedField:
    """Channels are regrouped, if rows and columns are still last."""
    return field if args[0].shape[-2:] == output.shape[-2:] else None


def _transpose(field: _TracedField, args: tuple[Any, ...], output: Tensor) -> _TracedField:
    axes = {axis % args[0].dim() - args[0].dim() for axis in args[1:3]}
    return None if axes & {-1, -2} else field


def _gate(field: _TracedField, args: tuple[Any, ...], output: Tensor) -> _TracedField:
    return None if field is None else replace(field, gated=True)


_RULES: dict[str, _Rule] = {
    "convolution": _convolution,
    "max_pool2d_with_indices": _max_pool,
    "avg_pool2d": _pool,
    "adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_max_pool2d": _adaptive_pool,
    "constant_pad_nd": _pad,
    "reflection_pad2d": _pad,
    "replication_pad2d": _pad,
    "slice": _slice,
    "transpose": _transpose,
    "native_group_norm": _gate,
    **dict.fromkeys(
        (
            *("native_batch_norm", "native_batch_norm_legit", "clone", "alias", "detach"),
            *("native_batch_norm_legit_no_training", "to_copy", "contiguous"),
            *("cudnn_batch_norm", "miopen_batch_norm"),  # what torch calls on a GPU
            *("view", "unsafe_view", "reshape", "split", "split_with_sizes", "chunk", "lift_fresh"),
            *("native_dropout", "narrow"),
        ),
        _keep_field,
    ),
}
