"""Whether images of a batch stay apart between a layer and the scores: read, or measured.

One backward of the scores' sum serves all images if no image's score depends on another image's
activations. That is a property of the operations. Each knows here which of its inputs' elements
can touch which of its output's; for one that isn't known nothing is claimed, and `measure_mixing`
measures.

A tensor's layout says where the images are: its elements, in row-major order, are `outer` groups
of B blocks, a block an image. A batch [B, K, h, w] has `outer` 1, tokens [T, B, K] have T. Views
keep it; of other operations the axis of the images is followed from the scores back to the layer.
Every operation on the way must have one layout for all that read it.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from camdistill.explain.engine.graph import Edge, ScoreGraph, operation, read_axes


class _Step(NamedTuple):
    """One input of one operation.

    Attributes:
        node: The operation.
        place: Which of its inputs.
        output_shape: The output's shape.
        input_shape: The input's shape.
        outer: The output's layout.
        axis: The output's axis that holds the images.
        within: The layout inside that axis.
    """

    node: Node
    place: int
    output_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    outer: int
    axis: int
    within: int

    def layout_on(self, axis: int) -> int | None:
        """The input's layout if its axis is the output's axis of the images."""
        fits = (
            0 <= axis < len(self.input_shape)
            and self.input_shape[axis] == self.output_shape[self.axis]
        )
        return math.prod(self.input_shape[:axis]) * self.within if fits else None

    def read_argument(self, name: str) -> object:
        return getattr(self.node, f"_saved_{name}", None)

    def axes(self, name: str, count: int) -> list[int]:
        return read_axes(self.node, name, count)

    def single_axis(self, name: str, count: int) -> int | None:
        """An axis as autograd keeps it; None where torch calls it otherwise, or keeps several."""
        axes = self.axes(name, count)
        return axes[0] if len(axes) == 1 else None


# Relative; a GPU may sum in another order. Mixed images of less would change no digit that counts.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
_Rule = Callable[[_Step], int | None]
"""The layout of an operation's input, or None if images may mix there."""


def keeps_images_apart(graph: ScoreGraph, sources: Sequence[GradientEdge], count: int) -> bool:
    """Whether it is certain that no image's score depends on another image at the sources.

    Args:
        graph: The graph of scores [B, N].
        sources: Where gradients will be asked, each [B, ...].
        count: B.

    Returns:
        False if images are mixed, and if some operation isn't known here.
    """
    source_edges = {(source.node, source.output_nr) for source in sources}
    readers = graph.readers(source_edges)
    layouts: dict[Edge, int] = {}
    waiting: list[tuple[Edge, int]] = [(graph.start, 1)]
    while waiting:
        edge, outer = waiting.pop()
        if edge in layouts:
            if layouts[edge] != outer:
                return False
            continue
        layouts[edge] = outer
        node, number = edge
        if edge in source_edges and outer != 1:
            return False
        if node not in readers or node is None:
            continue
        rule = _RULES.get(operation(node))
        output_shape = tuple(node._input_metadata[number].shape)
        images_axis = _images_axis(output_shape, outer, count)
        if rule is None or images_axis is None:
            return False
        for place, source in enumerate(node.next_functions):
            if source[0] is None or (source[0] not in readers and source not in source_edges):
                continue
            input_shape = tuple(source[0]._input_metadata[source[1]].shape)
            layout = rule(_Step(node, place, output_shape, input_shape, outer, *images_axis))
            if layout is None:
                return False
            waiting.append((source, layout))
    return True


def measure_mixing(
    scores: Tensor, sources: Sequence[Tensor] | Sequence[GradientEdge]
) -> list[bool | None]:
    """Measures at which sources a score depends on other images' rows, by two backwards.

    Where images stay apart, the gradient of a weighted sum of the scores is the gradient of the
    plain sum, each image's times its own weight. The weights are powers of two, so that this holds
    to the last digit on a CPU.

    Args:
        scores: Scores of each image, [B] or [B, N], with a graph, which is kept.
        sources: Where to look, each [B, ...].

    Returns:
        None where the scores don't depend on a source.
    """
    with torch.enable_grad():
        rows = scores.flatten(1).sum(1) if scores.dim() > 1 else scores
        total = rows.sum()
    plain = torch.autograd.grad(total, sources, retain_graph=True, allow_unused=True)
    half = any(gradient is not None and gradient.dtype == torch.float16 for gradient in plain)
    # 1, 1/2, 1/4, ...: of 16 images no two have one weight; float16 has no room for so many.
    weights = 2.0 ** -(torch.arange(len(rows), device=rows.device) % (4 if half else 16))
    with torch.enable_grad():
        total = (weights.to(rows) * rows).sum()
    weighted = torch.autograd.grad(total, sources, retain_graph=True, allow_unused=True)
    return [
        None
        if gradient is None or weighted_gradient is None
        else _differ(gradient, weighted_gradient, weights)
        for gradient, weighted_gradient in zip(plain, weighted, strict=True)
    ]


def _differ(plain: Tensor, weighted: Tensor, weights: Tensor) -> bool:
    plain, weighted = plain.to_dense(), weighted.to_dense()
    expected = plain.flatten(1) * weights.to(plain)[:, None]
    # What isn't a number would not be one alone either.
    difference = (weighted.flatten(1) - expected).abs().nan_to_num()
    tolerance = _ROUNDING[plain.dtype] * expected.abs().nan_to_num().amax(1, keepdim=True)
    return bool((difference > tolerance).any())


def _images_axis(shape: tuple[int, ...], outer: int, count: int) -> tuple[int, int] | None:
    """The axis that holds the images, and the layout inside it."""
    before = 1
    for axis, size in enumerate(shape):
        if outer % before == 0 and size % (outer // before * count) == 0:
            return axis, outer // before
        before *= size
    return None


def _view(step: _Step) -> int | None:
    """Views, which keep the order of the elements."""
    return step.outer if math.prod(step.input_shape) == math.prod(step.output_shape) else None


def _elementwise(step: _Step) -> int | None:
    """Element by element, after broadcasting."""
    if step.input_shape == step.output_shape:
        return step.outer
    return step.layout_on(step.axis - len(step.output_shape) + len(step.input_shape))


def _first(rule: _Rule) -> _Rule:
    """Only the first input may carry images; others are weights."""
    return lambda step: rule(step) if step.place == 0 else None


def _by_rows(step: _Step) -> int | None:
    """The first axis counts samples that don't touch each other."""
    return (
        step.layout_on(0)
        if step.axis == 0 and len(step.input_shape) == len(step.output_shape)
        else None
    )


def _norm_by_statistics(step: _Step) -> int | None:
    """Batch normalization, unless it takes the batch's own statistics."""
    return (
        _elementwise(step) if step.place == 0 and step.read_argument("training") is False else None
    )


def _layer_norm(step: _Step) -> int | None:
    normalized = step.read_argument("normalized_shape")
    inner = len(normalized) if isinstance(normalized, tuple) else len(step.output_shape)
    return step.layout_on(step.axis) if step.axis < len(step.output_shape) - inner else None


def _along(step: _Step) -> int | None:
    """What moves or sums elements along some axes and keeps all axes."""
    axes = step.axes("dim", len(step.input_shape)) or step.axes("dims", len(step.input_shape))
    return step.layout_on(step.axis) if axes and step.axis not in axes else None


def _reduction(step: _Step) -> int | None:
    """What makes one number of some axes, or keeps them with one element."""
    axes = step.axes("dim", len(step.input_shape))
    kept_axes = [
        axis
        for axis in range(len(step.input_shape))
        if step.read_argument("keepdim") or axis not in axes
    ]
    if not axes or len(kept_axes) != len(step.output_shape) or kept_axes[step.axis] in axes:
        return None
    return step.layout_on(kept_axes[step.axis])


def _select(step: _Step) -> int | None:
    axis = step.single_axis("dim", len(step.input_shape))
    return None if axis is None else step.layout_on(step.axis + (step.axis >= axis))


def _stack(step: _Step) -> int | None:
    axis = step.single_axis("dim", len(step.output_shape))
    if axis is None or step.axis == axis:
        return None
    return step.layout_on(step.axis - (step.axis > axis))


def _permute(step: _Step) -> int | None:
    axes = step.axes("dims", len(step.input_shape))
    return step.layout_on(axes[step.axis]) if len(axes) == len(step.output_shape) else None


def _transpose(step: _Step) -> int | None:
    first, second = (step.single_axis(name, len(step.input_shape)) for name in ("dim0", "dim1"))
    if first is None or second is None:
        return None
    return step.layout_on({first: second, second: first}.get(step.axis, step.axis))


def _transpose_matrix(step: _Step) -> int | None:
    return step.layout_on(1 - step.axis) if len(step.input_shape) == 2 else _elementwise(step)


def _pad(step: _Step) -> int | None:
    pad = step.read_argument("pad")
    padded = len(pad) // 2 if isinstance(pad, tuple) else len(step.output_shape)
    return step.layout_on(step.axis) if step.axis < len(step.output_shape) - padded else None


def _product(step: _Step) -> int | None:
    """A matrix product: rows belong to the first factor, columns to the second."""
    return step.layout_on(step.axis) if step.place == step.axis else None


def _sum_and_product(step: _Step) -> int | None:
    if step.place == 0:
        return _elementwise(step)
    return step.layout_on(step.axis) if step.place - 1 == step.axis else None


def _linear(step: _Step) -> int | None:
    return step.layout_on(step.axis) if step.axis < len(step.output_shape) - 1 else None


def _attention(step: _Step) -> int | None:
    """Scaled dot products [..., tokens, units]: tokens touch each other, the axes before don't."""
    return (
        step.layout_on(step.axis)
        if step.place < 3 and step.axis < len(step.output_shape) - 2
        else None
    )


def _restride(step: _Step) -> int | None:
    """What pooling in channels_last does to its own result: other strides at axes of size 1."""
    strides, expected = step.read_argument("stride"), []
    for axis in range(len(step.output_shape)):
        expected.append(math.prod(step.output_shape[axis + 1 :]))
    same = isinstance(strides, tuple) and all(
        size == 1 or stride == row_major
        for size, stride, row_major in zip(step.output_shape, strides, expected, strict=True)
    )
    fresh = operation(step.node.next_functions[0][0]) in _FRESH
    return step.outer if same and fresh and step.input_shape == step.output_shape else None


def _tap_rule(step: _Step) -> int | None:
    """The layer's output, and the leaf [B, K] beside it."""
    if step.place == 0:
        return step.outer
    return step.layout_on(0) if step.outer == 1 and step.axis == 0 else None


_FRESH = ("MeanBackward", "AdaptiveAvgPool2DBackward")
_NAMES: dict[_Rule, str] = {
    _view: "Alias Clone ReshapeAlias Squeeze ToCopy UnsafeView Unsqueeze View",
    _elementwise: "Abs Add Addcmul Clamp ClampMax ClampMin Cos Div Elu Erf Exp Expand Gelu "
    "Hardsigmoid Hardswish Hardtanh LeakyRelu Lerp Log Log1P LogSigmoid MaskedFill Maximum Minimum "
    "Mish Mul NativeDropout Neg Pow Reciprocal Relu Repeat Rsqrt Rsub Sigmoid Silu Sin Softplus "
    "Sqrt Sub Tanh Threshold Where",
    _first(_elementwise): "PreluKernel Scaled",
    _first(_by_rows): "AdaptiveAvgPool2D AdaptiveMaxPool2D AvgPool2D Convolution "
    "MaxPool2DWithIndices MkldnnAdaptiveAvgPool2D NativeGroupNorm PixelShuffle PixelUnshuffle "
    "ReflectionPad2D ReplicationPad2D UpsampleBicubic2D UpsampleBilinear2D UpsampleNearest2D",
    _by_rows: "Baddbmm Bmm GridSampler2D",
    _norm_by_statistics: "CudnnBatchNorm MiopenBatchNorm NativeBatchNorm",
    _first(_layer_norm): "NativeLayerNorm",
    _along: "Cat Cumsum Flip Gather IndexSelect LogSoftmax Roll SafeSoftmax Slice Softmax Split "
    "SplitWithSizes Topk",
    _reduction: "Amax Amin LinalgVectorNorm Logsumexp Max Mean Min Std Sum Var",
    _select: "Select Unbind",
    _stack: "Stack",
    _permute: "Permute",
    _transpose: "Transpose",
    _transpose_matrix: "T",
    _pad: "ConstantPadNd",
    _product: "Mm",
    _sum_and_product: "Addmm",
    _first(_linear): "Linear",
    _attention: "ScaledDotProductEfficientAttention ScaledDotProductFlashAttention "
    "ScaledDotProductFlashAttentionForCpu ScaledDotProductCudnnAttention",
    _restride: "AsStrided",
    _tap_rule: "Tap",
}
_RULES = {f"{name}Backward": rule for rule, names in _NAMES.items() for name in names.split()}
