"""How much each unit counts for each score: by one backward for all layers, or a head's weights."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from camdistill.errors import UserError, is_out_of_memory
from camdistill.explain.engine.closed_form import is_mean
from camdistill.explain.engine.graph import ScoreGraph
from camdistill.explain.engine.image_separation import keeps_images_apart, measure_mixing
from camdistill.explain.engine.recording import LayerRecord
from camdistill.explain.engine.request import Grad, Request, class_columns, score_columns, upcast
from camdistill.networks.capture import unwrap
from camdistill.perturb.probability import probabilities

# Gradients in float16 below 6e-8 are 0; as S is scaled and alpha scaled back, they aren't.
HALF_SCALE = 1024.0
# What gradients of several classes may take at once. A CPU is fastest while they fit its caches:
# ResNet-56 at batch 16, 10 classes, all stages took 192 ms two at once, 219 ms ten at once.
CPU_MEMORY, OTHER_MEMORY = 2**25, 2**29
# So many tensors of the largest layer's size live in a backward (measured on ResNet-18: 6.1).
ALIVE = 7

# Layers behind which some operation knows no batch of gradients; they go one after another.
_ONE_BY_ONE: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def alphas_by_gradient(
    request: Request, output: object, classes: Tensor, layers: dict[str, LayerRecord]
) -> dict[str, Tensor] | None:
    """Channel weights [B, N, K] by layer, all layers from one backward.

    Several classes go back together, as many as the request's memory allows.

    Returns:
        None if a score doesn't depend on a layer.
    """
    if not layers:
        return {}
    half = any(layer.output.dtype == torch.float16 for layer in layers.values())
    scale = HALF_SCALE if half else 1.0
    full = request.grad == "full"
    with torch.enable_grad():
        scores = score_columns(request, output, classes) * scale
        if not scores.requires_grad:
            return None
        graph = ScoreGraph(scores)
        places = {name: _place(layer, graph) for name, layer in layers.items()}
        if request.grad == "none" and not check_unmixed_graph(request, scores, graph, places):
            return None
        gradients = _gradients(request, scores, places, graph)
        if gradients is None:
            return None
        alphas = {}
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
            alpha = _sum_over_cells(layer, gradient).movedim(0, 1) / (scale * layer.count)
            alphas[name] = alpha if full else alpha.detach()
    return alphas


def _place(layer: LayerRecord, graph: ScoreGraph) -> GradientEdge:
    """Where to ask for a layer's gradient: at its spatial mean if the scores read only that."""
    if layer.probe is None:
        return get_gradient_edge(layer.output)
    pooled = graph.funnel(layer.source, layer.probe.numel())
    if (
        pooled is not None
        and _is_by_image(pooled, layer)
        and is_mean(pooled, layer.source, layer.probe, layer.to_cells)
    ):
        return pooled
    return get_gradient_edge(layer.probe)


def _is_by_image(pooled: GradientEdge, layer: LayerRecord) -> bool:
    """Whether a place has the units of each image, [B, K] or [B, K, 1, 1]."""
    shape = pooled.node._input_metadata[pooled.output_nr].shape
    return tuple(shape[:2]) == tuple(layer.activations.shape[:2])


def _sum_over_cells(layer: LayerRecord, gradient: Tensor) -> Tensor:
    """A gradient [N, B, ...] asked at a layer's place, summed over cells: [N, B, K]."""
    if layer.probe is not None:
        return upcast(gradient).flatten(2)
    cells = gradient if layer.to_cells is None else layer.to_cells(gradient)
    return upcast(cells).sum((-2, -1))


def check_unmixed_graph(
    request: Request, scores: Tensor, graph: ScoreGraph, places: dict[str, GradientEdge]
) -> bool:
    """Refuse layers behind which images are mixed; False if a score doesn't depend on a layer.

    One gradient serves all images where none changes another's score. Where the graph doesn't show
    that, it is measured, for two more backwards.

    Args:
        request: With the images.
        scores: [B, N], with a graph.
        graph: That graph.
        places: Where gradients will be asked, by layer.
    """
    count, edges = len(request.images), list(places.values())
    if count == 1 or keeps_images_apart(graph, edges, count):
        return True
    for name, is_mixed in zip(places, measure_mixing(scores, edges), strict=True):
        if is_mixed is None:
            return False
        if is_mixed:
            raise UserError(
                f"{type(unwrap(request.network)).__name__} mixes the images of a batch behind "
                "layer "
                f"'{name}': give one image at a time"
            )
    return True


def _gradients(
    request: Request, scores: Tensor, places: dict[str, GradientEdge], graph: ScoreGraph
) -> list[Tensor] | None:
    """The gradients [N, ...] of every column's sum at the places."""
    totals, edges = scores.sum(0), list(places.values())
    chunk_size = _chunk_size(request, graph) if len(totals) > 1 else 1
    one_by_one = _ONE_BY_ONE.setdefault(unwrap(request.network), set())
    if chunk_size > 1 and one_by_one.isdisjoint(places):
        try:
            return _in_chunks(totals, edges, chunk_size, request.grad)
        except RuntimeError as error:
            # One after another they may fit; only what knows no batch of gradients is remembered.
            if not is_out_of_memory(error):
                one_by_one.update(places)
    return _in_chunks(totals, edges, 1, request.grad)


def _chunk_size(request: Request, graph: ScoreGraph) -> int:
    """How many classes' gradients fit into the memory."""
    default = CPU_MEMORY if request.images.device.type == "cpu" else OTHER_MEMORY
    memory = default if request.memory is None else request.memory
    return max(1, memory // (ALIVE * graph.largest_bytes()))


def _in_chunks(
    totals: Tensor, places: Sequence[GradientEdge], chunk_size: int, grad: Grad
) -> list[Tensor] | None:
    rows = torch.eye(len(totals), dtype=totals.dtype, device=totals.device)
    parts: list[tuple[Tensor | None, ...]] = []
    for start in range(0, len(rows), chunk_size):
        several = chunk_size > 1
        gradients = torch.autograd.grad(
            [totals],
            places,
            [rows[start : start + chunk_size] if several else rows[start]],
            retain_graph=several or grad != "none" or start + 1 < len(rows),
            create_graph=grad == "full",
            allow_unused=True,
            is_grads_batched=several,
        )
        parts.append(gradients if several else tuple(_single(gradient) for gradient in gradients))
    columns_by_place = []
    for place in zip(*parts, strict=True):
        used_gradients = [part for part in place if part is not None]
        if len(used_gradients) < len(place):
            return None
        columns_by_place.append(torch.cat(used_gradients))
    return columns_by_place


def _single(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient[None]


def linear_head_maps(
    request: Request, logits: Tensor, classes: Tensor, weight: Tensor, activations: Tensor
) -> Tensor:
    """Z times the maps [B, N, h w], by the chain rule through logits = weight mean(A) + bias.

    Of a logit or a probability; a callable score may read more than the logits.
    """
    chosen = class_columns(classes)
    if request.score == "logit" and 2 * chosen.shape[1] > len(weight):
        maps_of_all_classes = torch.einsum("ck,bkp->bcp", weight, activations)
        return maps_of_all_classes.gather(
            1, chosen[..., None].expand(-1, -1, maps_of_all_classes.shape[2])
        )
    if request.score == "logit":
        alpha = weight[chosen]
    else:
        # d softmax_c / d y = p_c (e_c - p); of a single logit d sigmoid / d y = p (1 - p)
        class_probabilities = probabilities(
            upcast(logits if request.grad == "full" else logits.detach())
        )
        alpha = class_probabilities.gather(1, chosen)[..., None] * (
            weight[chosen] - (class_probabilities @ weight)[:, None]
        )
    return torch.bmm(alpha, activations)
