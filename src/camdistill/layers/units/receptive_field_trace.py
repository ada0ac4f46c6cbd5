"""Receptive fields read off a real forward, operation by operation.

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

_Walked = ReceptiveField | None
_Rule = Callable[[_Walked, tuple[Any, ...], Tensor], _Walked]


class Walk(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
        self._known: dict[int, tuple[Tensor, _Walked]] = {}
        self._set(self.images, ReceptiveField(Span(), Span()))

    def field(self, values: Tensor) -> _Walked:
        """The field of a tensor; None where its units see everything."""
        known = self._known.get(id(values))
        return known[1] if known else None

    def _set(self, values: Tensor, field: _Walked) -> None:
        self._known[id(values)] = values, field

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made_of = [leaf for leaf in read if id(leaf) in self._known]
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._known.pop(id(leaf), None) if not made_of else self._set(
                    leaf, self._after(func, args, made_of, leaf)
                )
        return output

    def _after(
        self, func: Any, args: tuple[Any, ...], made_of: list[Tensor], out: Tensor
    ) -> _Walked:
        name = func.overloadpacket.__name__.rstrip("_").lstrip("_")
        fields = [self.field(leaf) for leaf in made_of]
        if out.dim() < 3 or _is_one_cell(out):
            return None
        found = None
        # A network may multiply kernels made of the images: only the first is the image.
        if name in _RULES and len(fields) == 1:
            found = _RULES[name](fields[0], args, out)
        elif name == "cat" or torch.Tag.pointwise in func.tags:
            found = _merged(made_of, fields, out)
        if found is None and any(field is not None for field in fields):
            self.unknown.add(name)
        return found


def _merged(made_of: list[Tensor], fields: list[_Walked], out: Tensor) -> _Walked:
    """Of a sum, product or concatenation over channels."""
    spatial = [field for leaf, field in zip(made_of, fields, strict=True) if not _is_one_cell(leaf)]
    if not spatial or None in spatial:
        return None
    if any(leaf.shape[-2:] != out.shape[-2:] and not _is_one_cell(leaf) for leaf in made_of):
        return None
    first, *others = (field for field in spatial if field is not None)
    for other in others:
        rows, columns = first.rows.joined(other.rows), first.columns.joined(other.columns)
        if rows is None or columns is None:
            return None
        first = ReceptiveField(rows, columns, first.gated or other.gated)
    return replace(first, gated=first.gated or len(spatial) < len(fields))


def _is_one_cell(values: Tensor) -> bool:
    return values.dim() < 3 or (values.shape[-1] == 1 and values.shape[-2] == 1)


def _pair(value: Any) -> tuple[int, int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return (numbers[0], numbers[-1]) if numbers else (0, 0)


def _window(field: _Walked, kernel: Any, stride: Any, padding: Any, dilation: Any = 1) -> _Walked:
    if field is None:
        return None
    steps = list(zip(*map(_pair, (kernel, stride, padding, dilation)), strict=True))
    return replace(
        field, rows=field.rows.windowed(*steps[0]), columns=field.columns.windowed(*steps[1])
    )


def _convolution(field: _Walked, args: tuple[Any, ...], out: Tensor) -> _Walked:
    _, weight, _, stride, padding, dilation, transposed, *_ = args
    if transposed or weight.dim() != 4:
        return None
    return _window(field, weight.shape[2:], stride, padding, dilation)


def _pool(field: _Walked, args: tuple[Any, ...], out: Tensor) -> _Walked:
    kernel = args[1]
    stride = args[2] if len(args) > 2 and args[2] else kernel
    padding = args[3] if len(args) > 3 else 0
    return _window(field, kernel, stride, padding)


def _max_pool(field: _Walked, args: tuple[Any, ...], out: Tensor) -> _Walked:
    kernel = args[1]
    stride = args[2] if len(args) > 2 and args[2] else kernel
    padding = args[3] if len(args) > 3 else 0
    dilation = args[4] if len(args) > 4 else 1
    return _window(field, kernel, stride, padding, dilation)


def _adaptive(field: _Walked, args: tuple[Any, ...], out: Tensor) -> _Walked:
    before, after = args[0].shape[-2:], out.shape[-2:]
    if any(length % cells for length, cells in zip(before, after, strict=True)):
        return None
    cells = [length // cells for length, cells in zip(before, after, strict=True)]
    return _window(field, cells, cells, 0)


def _padded(field: _Walked, args: tuple[Any, ...], out: Tensor) -> _Walked:
    """Zeros, reflection or replication around it, (left, right, top, bottom, ...)."""
    left, top = args[1][0], args[1][2] if len(args[1]) > 2 else 0
    return _window(field, 1, 1, (top, left))


def _sliced(field: _Walked, args: tuple[Any, ...], out: Tensor) -> _Walked:
    whole: Tensor = args[0]
    axis = args[1] if len(args) > 1 else 0
    start = args[2] if len(args) > 2 else 0
    step = args[4] if len(args) > 4 else 1
    from_end = axis % whole.dim() - whole.dim()
    if field is None or from_end < -2:
        return field
    line = field.rows if from_end == -2 else field.columns
    first = min((start or 0) % whole.shape[axis], whole.shape[axis] - 1) if start else 0
    line = Span(line.size, line.stride * step, line.start + first * line.stride)
    return replace(field, rows=line) if from_end == -2 else replace(field, columns=line)


def _same(field: _Walked, args: tuple[Any, ...], out: Tensor) -> _Walked:
    """Channels are regrouped, if rows and columns are still last."""
    return field if args[0].shape[-2:] == out.shape[-2:] else None


def _transposed(field: _Walked, args: tuple[Any, ...], out: Tensor) -> _Walked:
    axes = {axis % args[0].dim() - args[0].dim() for axis in args[1:3]}
    return None if axes & {-1, -2} else field


def _gated(field: _Walked, args: tuple[Any, ...], out: Tensor) -> _Walked:
    return None if field is None else replace(field, gated=True)


_RULES: dict[str, _Rule] = {
    "convolution": _convolution,
    "max_pool2d_with_indices": _max_pool,
    "avg_pool2d": _pool,
    "adaptive_avg_pool2d": _adaptive,
    "adaptive_max_pool2d": _adaptive,
    "constant_pad_nd": _padded,
    "reflection_pad2d": _padded,
    "replication_pad2d": _padded,
    "slice": _sliced,
    "transpose": _transposed,
    "native_group_norm": _gated,
    **dict.fromkeys(
        (
            *("native_batch_norm", "native_batch_norm_legit", "clone", "alias", "detach"),
            *("native_batch_norm_legit_no_training", "to_copy", "contiguous"),
            *("cudnn_batch_norm", "miopen_batch_norm"),  # what torch calls on a GPU
            *("view", "unsafe_view", "reshape", "split", "split_with_sizes", "chunk", "lift_fresh"),
            *("native_dropout", "narrow"),
        ),
        _same,
    ),
}
