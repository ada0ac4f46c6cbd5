"""Reading autograd's graph between a layer and the scores: what was done there, and where.

An edge is a place in the graph: an operation and the number of its output. A layer's source is the
edge of its output.
"""

import math
from collections import defaultdict
from collections.abc import Collection
from functools import cached_property

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from camdistill.explain.engine.gradient_taps import Tap
from camdistill.explain.engine.norms import LightBatchNorm

Edge = tuple[Node | None, int]
_OWN_FUNCTIONS: dict[type, str] = {Tap: "TapBackward", LightBatchNorm: "ScaledBackward"}

# Operations that move or average numbers, or multiply them by something else's.
LINEAR = {
    "AdaptiveAvgPool2DBackward",
    "AddmmBackward",
    "AliasBackward",
    "AsStridedBackward",
    "AvgPool2DBackward",
    "CloneBackward",
    "ConvolutionBackward",
    "LinearBackward",
    "MeanBackward",
    "MkldnnAdaptiveAvgPool2DBackward",
    "MmBackward",
    "PermuteBackward",
    "ReshapeAliasBackward",
    "SelectBackward",
    "SliceBackward",
    "SqueezeBackward",
    "TBackward",
    "ToCopyBackward",
    "TransposeBackward",
    "UnsafeViewBackward",
    "UnsqueezeBackward",
    "ViewBackward",
    "TapBackward",
}
# Those of them whose factors are weights: a product of two may be nearly anything.
WEIGHTED = {"AddmmBackward", "ConvolutionBackward", "LinearBackward", "MmBackward"}
# What may stand between a parameter and the operation that uses it.
RELAYOUTS = {"TBackward", "ToCopyBackward", "TransposeBackward", "ViewBackward"}
PARAMETER = "torch::autograd::AccumulateGrad"


class ScoreGraph:
    """Everything that the scores were made of, back to where the graph begins.

    Walked when it is first asked about.

    Args:
        scores: With a graph.
    """

    def __init__(self, scores: Tensor) -> None:
        assert scores.grad_fn is not None, "scores have a graph"
        self.start: Edge = scores.grad_fn, scores.output_nr

    @cached_property
    def _users_and_nodes(self) -> tuple[dict[Edge, list[Node]], set[Node]]:
        """Which operations read each edge, and all operations."""
        users: dict[Edge, list[Node]] = defaultdict(list)
        first = self.start[0]
        assert first is not None, "scores have a graph"
        waiting, nodes = [first], {first}
        while waiting:
            node = waiting.pop()
            for source, number in node.next_functions:
                if source is None:
                    continue
                users[source, number].append(node)
                if source not in nodes:
                    nodes.add(source)
                    waiting.append(source)
        return users, nodes

    def readers(self, sources: Collection[Edge]) -> set[Node]:
        """Every operation through which the scores read one of the sources."""
        users, _ = self._users_and_nodes
        outputs: dict[Node, list[Edge]] = defaultdict(list)
        for edge in users:
            if edge[0] is not None:
                outputs[edge[0]].append(edge)
        nodes: set[Node] = set()
        waiting = [node for source in sources for node in users.get(source, ())]
        while waiting:
            node = waiting.pop()
            if node not in nodes:
                nodes.add(node)
                waiting += [user for edge in outputs.get(node, ()) for user in users[edge]]
        return nodes

    def largest_bytes(self) -> int:
        """Size of the largest tensor that some operation gave, parameters aside."""
        nodes = [node for node in self._users_and_nodes[1] if not _is_parameter(node)]
        output_metadata = [metadata for node in nodes for metadata in node._input_metadata]
        return max(
            (
                math.prod(metadata.shape) * int(metadata.dtype.itemsize)
                for metadata in output_metadata
            ),
            default=1,
        )

    def funnel(self, source: Edge, elements: int) -> GradientEdge | None:
        """Where a layer has been pooled, if the scores read nothing else of it.

        That is an edge of so many elements, reached from the layer by a chain of linear operations
        without weights, each of which is the only user of the one before.
        """
        edge = source
        while len(users := self._users_and_nodes[0].get(edge, [])) == 1:
            node = users[0]
            if operation(node) not in LINEAR - WEIGHTED or _inputs(node) != [edge]:
                return None
            if len(node._input_metadata) != 1:
                return None
            edge = node, 0
            if math.prod(node._input_metadata[0].shape) == elements:
                return GradientEdge(node, 0)
        return None


def linear_path(logits: Tensor, source: Edge) -> list[Node] | None:
    """The operations from a layer to the logits if they are one chain of linear ones, else None."""
    edge: Edge = (logits.grad_fn, 0)
    path: list[Node] = []
    while edge != source:
        node = edge[0]
        if node is None or operation(node) not in LINEAR:
            return None
        path.append(node)
        inputs = _inputs(node)
        if len(inputs) != 1:
            return None
        edge = inputs[0]
    return path


def read_axes(node: Node, name: str, count: int) -> list[int]:
    """An operation's argument as axes from the front; autograd keeps negative ones unsigned."""
    saved = getattr(node, f"_saved_{name}", None)
    axes = saved if isinstance(saved, tuple) else (saved,)
    signed = [axis - 2**64 if axis >= 2**63 else axis for axis in axes if isinstance(axis, int)]
    return [axis % count for axis in signed]


def is_spatial_mean(node: Node, source: Edge) -> bool:
    """Whether an operation is the mean over the cells of a source [B, K, h, w]."""
    return (
        operation(node) == "MeanBackward"
        and node.next_functions[0] == source
        and len(getattr(node, "_saved_self_sym_sizes", ())) == 4
        and sorted(read_axes(node, "dim", 4)) == [2, 3]
    )


def _inputs(node: Node) -> list[Edge]:
    """Where an operation's inputs come from, parameters aside."""
    return [edge for edge in node.next_functions if not _is_parameter(edge[0])]


def operation(node: Node | None) -> str:
    """An operation's name without its variant; "" for a custom function, unless it is ours.

    A user's function may be called like one of torch's.
    """
    if node is None:
        return ""
    if isinstance(node, BackwardCFunction):
        return _OWN_FUNCTIONS.get(type(node)._forward_cls, "")
    return node.name().rstrip("0123456789")


def _is_parameter(node: Node | None) -> bool:
    """Whether nothing but a parameter (or something without gradient) is behind a node."""
    while node is not None and operation(node) in RELAYOUTS:
        node = node.next_functions[0][0]
    return node is None or node.name() == PARAMETER
