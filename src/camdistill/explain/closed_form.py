"""Where Grad-CAM needs no gradient: logits that are a linear map of a layer's spatial mean.

For y = W mean_ij(A) + b the gradient is dy_c/dA_kij = w_ck / Z with Z = h w, so the channel weights
are w_c / Z for every input, and the map is the class activation map of Zhou et al. 2016, eq. 2
(https://arxiv.org/abs/1512.04150), divided by Z.

That this holds is proven, not looked up. Autograd's graph from the logits back to the layer lists
the operations in between: if there is one path, made of nothing but operations that are linear in
the layer's output and copies, then the gradient is the same for every input, and one vector-
Jacobian product with random numbers tells whether it is W / Z. A ReLU, an active dropout, a
hidden layer, a second path, an operation we don't know: no closed form, autograd does it.
"""

from collections.abc import Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from camdistill.networks.capture import structure

# Operations that move or average numbers, or multiply them by something else's.
LINEAR = {
    "AdaptiveAvgPool2DBackward",
    "AddmmBackward",
    "AliasBackward",
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
    "_TapBackward",
}
# What may stand between a parameter and the operation that uses it.
RELAYOUTS = {"TBackward", "ToCopyBackward", "TransposeBackward", "ViewBackward"}
PARAMETER = "torch::autograd::AccumulateGrad"
# Relative; of the products that confirm the constant, in the precision they are made in. The
# structure says which weights, so this tells apart factors, not decimals (TF32 has 3 of them).
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 2e-2, torch.float32: 5e-3, torch.float64: 1e-8}

Edge = tuple[Node | None, int]
Key = tuple[str, tuple[int, ...], int]


class Verdict(NamedTuple):
    """What is known of a layer: the name of the head that makes it closed, or None if it isn't."""

    head: str | None


# A network that is forgotten takes its verdicts with it.
_VERDICTS: WeakKeyDictionary[nn.Module, dict[Key, Verdict]] = WeakKeyDictionary()
_MOST_VERDICTS = 256


class Verdicts:
    """The verdicts on one network as it is now, for images of one shape.

    A replaced module, a new hook, or another mode is another network.

    Args:
        inner: The bare network.
        image_shape: Channels, height and width.
    """

    def __init__(self, inner: nn.Module, image_shape: torch.Size) -> None:
        self.known = _VERDICTS.setdefault(inner, {})
        self.inner = inner
        self.shape, self.structure = tuple(image_shape), structure(inner)

    def __getitem__(self, layer: str) -> Verdict | None:
        return self.known.get((layer, self.shape, self.structure))

    def __setitem__(self, layer: str, verdict: Verdict) -> None:
        if len(self.known) >= _MOST_VERDICTS:
            self.known.clear()
        self.known[layer, self.shape, self.structure] = verdict

    def weight(self, layer: str) -> Tensor | None:
        """W [C, K] of the layer's head as it is now, if the layer is closed."""
        verdict = self[layer]
        if verdict is None or verdict.head is None:
            return None
        return head_weight(self.inner.get_submodule(verdict.head))


def possible_heads(inner: nn.Module) -> dict[str, nn.Module]:
    """Every module that may turn pooled units into logits."""
    return {
        name: module
        for name, module in inner.named_modules()
        if name
        and (
            isinstance(module, nn.Linear)
            or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
        )
    }


def head_weight(head: nn.Module) -> Tensor:
    """The head's weight as [C, K]."""
    weight = head.weight
    assert isinstance(weight, Tensor)
    return weight.flatten(1)


def proven_head(
    logits: Tensor,
    source: Edge,
    probe: Tensor,
    heads: Mapping[str, tuple[nn.Module, Node]],
) -> str | None:
    """The head that makes a layer closed, or None.

    Args:
        logits: Of a forward with a graph, [B, C].
        source: Where the layer's output enters the graph.
        probe: A leaf [B, K] whose gradient is the sum over space of the layer's.
        heads: By name, the modules that ran and the graph's node of what they gave.
    """
    path = linear_path(logits, source)
    if path is None:
        return None
    fitting = [
        name
        for name, (head, node) in heads.items()
        if any(node is step for step in path)
        and head_weight(head).shape == (logits.shape[1], probe.shape[1])
    ]
    if len(fitting) != 1:
        return None
    weight = head_weight(heads[fitting[0]][0]).detach()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(logits.shape, generator=generator).to(logits)
    (gradient,) = torch.autograd.grad(logits, probe, directions, retain_graph=True)
    expected = directions.to(probe.dtype) @ weight.to(probe.dtype)
    coarsest = max((logits.dtype, weight.dtype), key=lambda dtype: TOLERANCE.get(dtype, 1.0))
    allowed = TOLERANCE.get(coarsest, 0.0) * expected.abs().max()
    return fitting[0] if bool((gradient - expected).abs().max() <= allowed) else None


def linear_path(logits: Tensor, source: Edge) -> list[Node] | None:
    """The operations from a layer to the logits if they are one chain of linear ones, else None."""
    edge: Edge = (logits.grad_fn, 0)
    path: list[Node] = []
    while edge != source:
        node = edge[0]
        if node is None or _operation(node) not in LINEAR:
            return None
        path.append(node)
        others = [other for other in node.next_functions if not _is_parameter(other[0])]
        if len(others) != 1:
            return None
        edge = others[0]
    return path


def _operation(node: Node) -> str:
    return node.name().rstrip("0123456789")


def _is_parameter(node: Node | None) -> bool:
    """Whether nothing but a parameter (or something without gradient) is behind a node."""
    while node is not None and _operation(node) in RELAYOUTS:
        node = node.next_functions[0][0]
    return node is None or node.name() == PARAMETER
