"""Which pixels a unit sees: the theoretical receptive field of every layer.

Unit u of a layer sees the pixels [start + u stride, start + u stride + size - 1] along an axis
(Araujo et al. 2019, https://distill.pub/2019/computing-receptive-fields, sections 2 and 3). The
three numbers are read off a real forward, operation by operation, so that shortcuts, branches and
control flow are what they are. What a unit *uses* is less: about a Gaussian in the middle of it
(Luo et al. 2016, https://arxiv.org/abs/1701.04128).
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from camdistill.networks.capture import capture, layer_names, plain, undisturbed, visiting
from camdistill.types import Images


@dataclass(frozen=True)
class Span:
    """What units see along one axis, in pixels; it may reach beyond the image.

    Attributes:
        size: How many pixels.
        stride: Pixels from one unit to the next.
        start: First pixel of unit 0; negative where it begins in the padding.
    """

    size: int = 1
    stride: int = 1
    start: int = 0

    def windowed(self, kernel: int, stride: int, padding: int, dilation: int = 1) -> "Span":
        """After a convolution or pooling."""
        return Span(
            self.size + (kernel - 1) * dilation * self.stride,
            self.stride * stride,
            self.start - padding * self.stride,
        )

    def joined(self, other: "Span") -> "Span | None":
        """What both see together; None if their units don't move together."""
        if self.stride != other.stride:
            return None
        start = min(self.start, other.start)
        end = max(self.start + self.size, other.start + other.size)
        return Span(end - start, self.stride, start)

    def pixels(self, unit: int) -> tuple[int, int]:
        """First pixel, and the one after the last."""
        first = self.start + unit * self.stride
        return first, first + self.size


@dataclass(frozen=True)
class ReceptiveField:
    """What a layer's units see.

    Attributes:
        rows: Along the height.
        columns: Along the width.
        gated: Whether a factor computed from the whole image (squeeze and excitation, group
            normalisation) multiplies it: the field is then of all other paths.
    """

    rows: Span
    columns: Span
    gated: bool = False

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Top, left, bottom, right in pixels, the last two exclusive; may exceed the image."""
        (top, bottom), (left, right) = self.rows.pixels(row), self.columns.pixels(column)
        return top, left, bottom, right


Field = ReceptiveField | Literal["unknown"] | None
_Walked = ReceptiveField | None
_Rule = Callable[[_Walked, tuple[Any, ...], Tensor], _Walked]


def receptive_fields(
    network: nn.Module, images: Images, layers: Iterable[str] | None = None
) -> dict[str, Field]:
    """Receptive fields by layer.

    Args:
        network: Bare or wrapped; its modes and buffers stay as they are.
        images: As the network takes them; the first is run.
        layers: Names (see `networks.capture`); None is every layer that runs and gives a
            [B, K, h, w].

    Returns:
        None for a layer whose units each see the whole image, or that gives vectors; "unknown"
        where the walk met an operation that it can't follow (a transposed convolution, a join of
        unequal steps) and gradients don't show units that move by one step and see as much.
    """
    names = list(layer_names(network) if layers is None else layers)
    found: dict[str, Field] = {}
    vectors: set[str] = set()
    with undisturbed(network), _Walk(images[:1]) as walk:

        def note(name: str, output: object) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                found[name] = walk.field(output)
            elif layers is not None:
                found[name] = None
                vectors.add(name)

        with visiting(network, names, note, required=layers is not None):
            plain(network)(walk.images)
    lost = [name for name in found if found[name] is None and name not in vectors]
    if walk.unknown and lost:
        found |= measured_fields(network, images, lost)
    return {name: found[name] for name in names if name in found}


def measured_fields(
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
        seed: Of the noise.

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
            plain(double)(noise)
        return {name: _support(outputs[name], noise) for name in names}


def _support(output: Tensor, images: Tensor) -> Field:
    if output.dim() != 4 or not output.requires_grad:
        return "unknown"
    size, grid = images.shape[2:], output.shape[2:]
    middle = [(length - 1) // 2 for length in grid]
    here = _reached(output, images, middle)
    if here is None:
        return "unknown"
    if here == [(0, length) for length in size]:
        return None
    beside = [
        min(unit + 1, length - 1) for unit, length in zip(middle, output.shape[2:], strict=True)
    ]
    after = _reached(output, images, beside)
    if after is None or min(output.shape[2:]) < 2:
        return "unknown"
    spans = []
    for (first, end), (next_first, next_end), unit, length in zip(
        here, after, middle, size, strict=True
    ):
        stride = next_first - first
        if not (first > 0 and next_end < length and stride == next_end - end and stride > 0):
            return "unknown"
        spans.append(Span(end - first, stride, first - unit * stride))
    for share in (0.0, 0.25, 0.75, 1.0):
        place = [round(share * (length - 1)) for length in grid]
        expected = [
            (max(one, 0), min(end, length))
            for (one, end), length in zip(map(Span.pixels, spans, place), size, strict=True)
        ]
        if _reached(output, images, place) != expected:
            return "unknown"
    return ReceptiveField(spans[0], spans[1])


def _reached(output: Tensor, images: Tensor, place: Sequence[int]) -> list[tuple[int, int]] | None:
    """Along each axis the first pixel that a unit uses, and the one after the last."""
    total = output[:, :, place[0], place[1]].sum()
    (slope,) = torch.autograd.grad(total, images, retain_graph=True)
    seen = (slope != 0).any(0).any(0)
    lines = [seen.any(1 - axis).nonzero().flatten() for axis in range(2)]
    if any(not len(line) for line in lines):
        return None
    return [(int(line[0]), int(line[-1]) + 1) for line in lines]


class _Walk(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the images through a forward; knows the field of every tensor made of them."""

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
            *("view", "unsafe_view", "reshape", "split", "split_with_sizes", "chunk", "lift_fresh"),
            *("native_dropout", "narrow"),
        ),
        _same,
    ),
}
