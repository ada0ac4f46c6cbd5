"""The relatives of Grad-CAM that need no more questions: one formula each.

A is a layer's output with units k and cells ij, Z its number of cells, S the score, G = dS/dA. All
maps are raw and signed, at the layer's resolution, in float32 at least; where a paper ends with a
ReLU that is `explain.maps.relu`. Arguments are those of `explain.gradcam.explain_images`: any
layers, and classes None, one number, [B], or [B, C] for maps [B, C, h, w].
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.engine.request import Classes, Score, upcast
from camdistill.explain.engine.tokens import Layout
from camdistill.explain.gradcam import explain_images
from camdistill.explain.gradients import gradient_maps
from camdistill.networks.capture import unwrap
from camdistill.types import Activations, Images, Maps

Logits = Callable[..., Tensor] | None
AnyMaps = dict[str, Float[Tensor, "..."]]


def hires_cam(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None = None,
    classes: Classes = None,
    *,
    score: Score = "logit",
    layout: Layout = "auto",
    logits: Logits = None,
) -> AnyMaps:
    """HiResCAM: sum_k G_kij A_kij.

    Draelos and Carin 2020, https://arxiv.org/abs/2011.08891. What each cell adds to the
    score of a network that is linear behind the layer; Grad-CAM wherever G is the same at all
    cells.
    """

    def formula(activations: Activations, gradients: Activations) -> Maps:
        return (gradients * activations).sum(1)

    return gradient_maps(
        network, images, layers, classes, formula, score=score, layout=layout, logits=logits
    )


def grad_cam_plus_plus(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None = None,
    classes: Classes = None,
    *,
    score: Score = "logit",
    layout: Layout = "auto",
    logits: Logits = None,
) -> AnyMaps:
    """Grad-CAM++: sum_k w_k A_kij, w_k = sum_ij relu(G_kij) / (2 + G_kij sum_ab A_kab).

    Chattopadhay et al. 2018, https://arxiv.org/abs/1710.11063: eq. 19 gives alpha = G^2 / (2 G^2 +
    sum_ab A G^3), from which G^2 cancels; w_k sums alpha relu(dY/dA) over cells. The paper's
    Y is exp(S); the factor exp(S) that this puts before every w_k only scales an image's map, and
    is left out, as all later code does. The authors' own code also divides alpha by its sum over
    cells, which the paper doesn't; we follow the paper. Where the denominator is 0 (sum A < 0)
    alpha is 0.
    """

    def formula(activations: Activations, gradients: Activations) -> Maps:
        below = 2 + gradients * activations.sum((2, 3), keepdim=True)
        positive = gradients.relu()
        shares = torch.where(below == 0, 0, positive / torch.where(below == 0, 1, below))
        return _weighted(shares.sum((2, 3)), activations)

    return gradient_maps(
        network, images, layers, classes, formula, score=score, layout=layout, logits=logits
    )


def x_grad_cam(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None = None,
    classes: Classes = None,
    *,
    score: Score = "logit",
    layout: Layout = "auto",
    logits: Logits = None,
) -> AnyMaps:
    """XGrad-CAM: sum_k w_k A_kij, w_k = sum_ij G_kij A_kij / sum_ij A_kij.

    Fu et al. 2020, https://arxiv.org/abs/2008.02312. The map sums to sum_kij G A: to the
    score but its biases in a network of ReLUs. A unit whose sum is 0, or lost in rounding, counts
    nothing; the authors' code adds 1e-7 to every sum instead.
    """

    def formula(activations: Activations, gradients: Activations) -> Maps:
        total = activations.sum((2, 3))
        size = activations.abs().sum((2, 3))
        lost = total.abs() <= 8 * torch.finfo(total.dtype).eps * size
        weights = (gradients * activations).sum((2, 3)) / torch.where(lost, 1, total)
        return _weighted(torch.where(lost, 0, weights), activations)

    return gradient_maps(
        network, images, layers, classes, formula, score=score, layout=layout, logits=logits
    )


def layer_cam(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None = None,
    classes: Classes = None,
    *,
    score: Score = "logit",
    layout: Layout = "auto",
    logits: Logits = None,
) -> AnyMaps:
    """LayerCAM: sum_k relu(G_kij) A_kij.

    Jiang et al. 2021, https://doi.org/10.1109/TIP.2021.3089943. Made for early layers,
    where G differs from cell to cell. The paper scales maps of early layers by tanh(2 m / max m)
    before it fuses them; that is left to whoever fuses.
    """

    def formula(activations: Activations, gradients: Activations) -> Maps:
        return (gradients.relu() * activations).sum(1)

    return gradient_maps(
        network, images, layers, classes, formula, score=score, layout=layout, logits=logits
    )


def eigen_cam(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None = None,
    classes: Classes = None,
    *,
    score: Score = "logit",
    layout: Layout = "auto",
    logits: Logits = None,
) -> AnyMaps:
    """Eigen-CAM: sum_k v_k A_kij, v the first right singular vector of A as [cells, units].

    Muhammad and Yeasin 2020, https://arxiv.org/abs/2008.00299. It knows no class: maps
    of several classes are equal. A singular vector has no sign; here the map's sum is positive,
    which makes the maps of rectified layers positive everywhere. pytorch-grad-cam takes each unit's
    mean away first, which the paper doesn't.
    """
    explanation = explain_images(
        network, images, layers, classes, score=score, layout=layout, logits=logits, maps=False
    )
    maps = {name: _principal(upcast(values)) for name, values in explanation.activations.items()}
    if explanation.classes.dim() == 1:
        return maps
    count = explanation.classes.shape[1]
    return {name: class_map[:, None].repeat(1, count, 1, 1) for name, class_map in maps.items()}


def cam(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None = None,
    classes: Classes = None,
    *,
    logits: Logits = None,
) -> AnyMaps:
    """CAM: sum_k w_ck A_kij with the head's weights w.

    Zhou et al. 2016, eq. 2, https://arxiv.org/abs/1512.04150. It is Z times Grad-CAM, and exists
    only where the logits are provably a linear map of the layer's spatial mean.

    Raises:
        UserError: If they aren't.
    """
    explanation = explain_images(network, images, layers, classes, logits=logits)
    for name, head in explanation.heads.items():
        if head is None:
            raise UserError(
                f"CAM has no weights for layer '{name}' of {type(unwrap(network)).__name__}: its "
                "logits are not a linear map of that layer's spatial mean; grad_cam has no such "
                "condition"
            )
    return {name: maps * maps.shape[-2] * maps.shape[-1] for name, maps in explanation.maps.items()}


def _weighted(weights: Tensor, activations: Activations) -> Maps:
    """sum_k w_k A_kij."""
    rows = torch.bmm(weights[:, None], activations.flatten(2))
    return rows.reshape(len(rows), *activations.shape[2:])


@torch.no_grad()
def _principal(activations: Activations) -> Maps:
    """The projection on the first singular vector, by the smaller of the two Gram matrices."""
    rows = activations.flatten(2)
    with torch.autocast(rows.device.type, enabled=False):
        # The square of a small number may be none.
        size = rows.abs().amax((1, 2), keepdim=True)
        scaled = rows / torch.where(size == 0, 1, size)
        units, cells = scaled.shape[1:]
        if units <= cells:
            _, vectors = torch.linalg.eigh(scaled @ scaled.mT)
            projected = (vectors[:, None, :, -1] @ rows)[:, 0]
        else:
            values, vectors = torch.linalg.eigh(scaled.mT @ scaled)
            largest = values[:, -1:].clamp(min=0).sqrt() * size[:, 0]
            projected = vectors[:, :, -1] * largest
    signs = torch.where(projected.sum(1, keepdim=True) < 0, -1, 1)
    principal: Maps = (projected * signs).view(len(rows), *activations.shape[2:])
    return principal
