"""Where Grad-CAM needs no gradient, or only a head's: proven, and remembered.

For y = W mean_ij(A) + b the gradient is dy_c/dA_kij = w_ck / Z with Z = h w, so the channel weights
are w_c / Z for every input, and the map is the class activation map of Zhou et al. 2016, eq. 2
(https://arxiv.org/abs/1512.04150), divided by Z. That is the closed form: no backward at all.

A head that reads only g = mean_ij(A), whatever it does with it (hidden layers, normalisation, an
active dropout), has alpha = (dS/dg) / Z: the backward ends at g, before it is as large as A.

That these hold is proven, not looked up. Autograd's graph lists the operations between a layer and
the scores (`explain.graph`). If there is one path made of nothing but operations that are linear in
the layer's output and copies, then the gradient is the same for every input, and one vector-
Jacobian product with random numbers tells whether it is W / Z. A ReLU, a hidden layer, a second
path, an operation we don't know: no closed form. The same for the way to g.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from camdistill.explain.graph import Edge, linear_path
from camdistill.networks.capture import structure

# Relative; of the products that confirm the constant, in the precision they are made in. The
# structure says which weights, so this tells apart factors, not decimals (TF32 has 3 of them).
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 2e-2, torch.float32: 5e-3, torch.float64: 1e-8}

Key = tuple[str, tuple[int, ...], int]


@dataclass(frozen=True)
class Verdict:
    """What is known of a layer.

    Attributes:
        judged: Whether it is known if the layer is closed.
        head: The name of the head that makes it closed; None if it isn't.
        pooled: Whether the scores read its spatial mean alone; None if not known.
        overwritten: Whether something in place follows it; None if not known.
        separate: Whether no image's score was seen to depend on another image behind the layer.
        batched: Whether gradients of several classes can be made at once.
    """

    judged: bool = False
    head: str | None = None
    pooled: bool | None = None
    overwritten: bool | None = None
    separate: bool = False
    batched: bool = True


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

    def __getitem__(self, layer: str) -> Verdict:
        return self.known.get((layer, self.shape, self.structure), _NOTHING)

    def learn(self, layer: str, **facts: bool | str | None) -> None:
        """Change what is known of a layer."""
        known = replace(self[layer], **facts)  # type: ignore[arg-type]
        if len(self.known) >= _MOST_VERDICTS:
            self.known.clear()
        self.known[layer, self.shape, self.structure] = known

    def weight(self, layer: str) -> Tensor | None:
        """W [C, K] of the layer's head as it is now, if the layer is closed."""
        head = self[layer].head
        return None if head is None else head_weight(self.inner.get_submodule(head))


_NOTHING = Verdict()


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
    directions = _directions(logits)
    (gradient,) = torch.autograd.grad(logits, probe, directions, retain_graph=True)
    expected = directions.to(probe.dtype) @ weight.to(probe.dtype)
    coarsest = max((logits.dtype, weight.dtype), key=lambda dtype: TOLERANCE.get(dtype, 1.0))
    return fitting[0] if _agree(gradient, expected, coarsest) else None


def is_mean(pooled: GradientEdge, probe: Tensor) -> bool:
    """Whether what was pooled is the layer's spatial mean, unit by unit and image by image.

    Args:
        pooled: A place with as many elements as the probe, reached by linear operations.
        probe: A leaf [B, K] whose gradient is the sum over space of the layer's.
    """
    shown = pooled.node._input_metadata[pooled.output_nr]
    like = torch.empty(shown.shape, dtype=shown.dtype, device=probe.device)
    directions = _directions(like)
    (gradient,) = torch.autograd.grad([pooled], [probe], [directions], retain_graph=True)
    return _agree(gradient, directions.view(probe.shape).to(probe.dtype), shown.dtype)


def _directions(like: Tensor) -> Tensor:
    """Random numbers of a tensor's shape, always the same."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)


def _agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    allowed = TOLERANCE.get(dtype, 0.0) * expected.abs().max()
    return bool((found - expected).abs().max() <= allowed)
