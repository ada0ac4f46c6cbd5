"""Where Grad-CAM needs no gradient, or only a head's: proven at every call.

For y = W mean_ij(A) + b the gradient is dy_c/dA_kij = w_ck / Z with Z = h w, so the channel weights
are w_c / Z for every input, and the map is the class activation map of Zhou et al. 2016, eq. 2
(https://arxiv.org/abs/1512.04150), divided by Z. That is the closed form: no backward at all.

A head that reads only g = mean_ij(A), whatever it does with it (hidden layers, normalization, an
active dropout), has alpha = (dS/dg) / Z: the backward ends at g, before it is as large as A.

That these hold is proven, not looked up. Autograd's graph lists the operations between a layer and
the scores (`explain.engine.graph`). If there is one path made of nothing but operations that are
linear in the layer's output and copies, then the gradient is the same for every input, and one
vector-Jacobian product with random numbers tells whether it is W / Z. A ReLU, a hidden layer, a
second path, an operation we don't know: no closed form. The same for the way to g.

Nothing of this is remembered: which head runs depends on a network's attributes, on `logits` and
`score`, and on whatever else its code reads. The proof is a few nodes and a product with the head's
weights, which every forward can pay.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from camdistill.explain.engine.gradient_taps import CellTransform
from camdistill.explain.engine.graph import WEIGHTED, Edge, is_spatial_mean, linear_path, operation

# Relative, between two ways to compute one thing, in the precision they are made in: forwards of
# different batches (TF32 has 3 decimals), and products that confirm a constant.
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 2e-2, torch.float32: 5e-3, torch.float64: 1e-8}
PROOF = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4, torch.float64: 1e-8}


def may_be_head(module: nn.Module) -> bool:
    """Whether a module may turn pooled units into logits."""
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    )


def head_weight(head: nn.Module) -> Tensor:
    """The head's weight as [C, K]."""
    weight = head.weight
    assert isinstance(weight, Tensor)
    return weight.flatten(1)


def find_linear_head(
    logits: Tensor,
    source: Edge,
    probe: Tensor,
    to_cells: CellTransform,
    heads: Mapping[nn.Module, Node],
) -> nn.Module | None:
    """The head that makes a layer closed, or None.

    Args:
        logits: Logits of a forward with a graph, [B, C].
        source: Where the layer's output enters the graph.
        probe: A leaf [B, K] whose gradient is the sum over space of the layer's.
        to_cells: How the output becomes [B, K, h, w]; None if it is that already.
        heads: The modules that ran, with the graph's node of what each gave.
    """
    path = linear_path(logits, source)
    # With weights besides the head's, the product could be nearly W and yet another matrix.
    if path is None or sum(operation(step) in WEIGHTED for step in path) != 1:
        return None
    candidates = [
        head
        for head, node in heads.items()
        if any(node is step for step in path)
        and head_weight(head).shape == (logits.shape[1], probe.shape[1])
    ]
    if len(candidates) != 1:
        return None
    weight = head_weight(candidates[0]).detach()
    directions = _directions(logits)
    # A mean that the graph shows needs no proof of its own, and no gradient as large as the layer.
    mean = path[-1] if to_cells is None and is_spatial_mean(path[-1], source) else None
    edge = get_gradient_edge(probe) if mean is None else GradientEdge(mean, 0)
    (gradient,) = torch.autograd.grad([logits], [edge], [directions], retain_graph=True)
    expected = directions.to(probe.dtype) @ weight.to(probe.dtype)
    coarsest = max((logits.dtype, weight.dtype), key=lambda dtype: PROOF.get(dtype, 1.0))
    return candidates[0] if _agree(gradient.flatten(1), expected, coarsest) else None


def is_mean(pooled: GradientEdge, source: Edge, probe: Tensor, to_cells: CellTransform) -> bool:
    """Whether what was pooled is the layer's spatial mean, unit by unit and image by image.

    Args:
        pooled: A place with as many elements as the probe, reached by linear operations.
        source: Where the layer's output enters the graph.
        probe: A leaf [B, K] whose gradient is the sum over space of the layer's.
        to_cells: How the output becomes [B, K, h, w]; None if it is that already.
    """
    if to_cells is None and is_spatial_mean(pooled.node, source):
        return True
    pooled_metadata = pooled.node._input_metadata[pooled.output_nr]
    like = torch.empty(pooled_metadata.shape, dtype=pooled_metadata.dtype, device=probe.device)
    directions = _directions(like)
    (gradient,) = torch.autograd.grad([pooled], [probe], [directions], retain_graph=True)
    return _agree(gradient, directions.view(probe.shape).to(probe.dtype), pooled_metadata.dtype)


def _directions(like: Tensor) -> Tensor:
    """Random numbers of a tensor's shape, always the same."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)


def _agree(gradient: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    allowed = PROOF.get(dtype, 0.0) * expected.abs().max()
    return bool((gradient - expected).abs().max() <= allowed)
