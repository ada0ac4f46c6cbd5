"""Activations and whole gradients of all layers, and of the pixels, from one forward.

Grad-CAM itself needs only a gradient's sum over cells (`explain.gradcam`); its relatives need dS/dA
at every cell. This is the one place that gives it: one forward, whose graph begins at the first
layer asked for, and one backward a class.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from camdistill.errors import UserError
from camdistill.explain.engine.alphas import HALF_SCALE, check_unmixed_graph
from camdistill.explain.engine.graph import ScoreGraph
from camdistill.explain.engine.hidden_gradients import describe_missing_gradient, refuse_reentrant
from camdistill.explain.engine.recording import (
    LayerRecord,
    check_intact_outputs,
    clone_if_inference,
    record_forward,
)
from camdistill.explain.engine.request import (
    Classes,
    Request,
    Score,
    check_image_batch,
    check_request_options,
    check_separate_images,
    resolve_classes,
    score_columns,
    upcast,
)
from camdistill.explain.engine.tokens import Layout
from camdistill.explain.gradcam import last_layer
from camdistill.networks.capture import examination_lock
from camdistill.types import Activations, Images, Maps

Formula = Callable[[Activations, Activations], Maps]
"""A map from a layer's activations and the gradient dS/dA at every cell, in float32 at least."""
PIXELS = ""  # stands for the images among names of layers; no layer is called so


@dataclass(frozen=True)
class GradientPass:
    """One forward with a graph from the first layer, or from the pixels, to the scores.

    Attributes:
        classes: [B] or [B, C].
        scores: One column a class, each times `scale`.
        layers: By name.
        edges: Where gradients are asked, by name; the pixels' under `PIXELS`.
        scale: Keeps small gradients of float16 from becoming 0.
    """

    classes: Tensor
    scores: Float[Tensor, "batch asked"]
    layers: dict[str, LayerRecord]
    edges: dict[str, GradientEdge]
    scale: float

    def activations(self, name: str) -> Activations:
        """A layer's output [B, K, h, w], in float32 at least."""
        return upcast(self.layers[name].activations.detach())

    def gradients(
        self, column: int, names: Sequence[str] | None = None, *, last: bool = False
    ) -> dict[str, Float[Tensor, "batch units height width"]] | None:
        """dS/dA of one column's scores by name; None if they don't depend on one of the layers.

        Args:
            column: Which.
            names: Names of all edges, or of these.
            last: Whether nothing more will be asked: then what the graph keeps is let go on the
                way.
        """
        names = tuple(self.edges) if names is None else names
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            refuse_reentrant(),
        ):
            gradients = torch.autograd.grad(
                self.scores[:, column].sum(),
                [self.edges[name] for name in names],
                retain_graph=not last,
                allow_unused=True,
            )
        by_name = {}
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is None:
                return None
            to_cells = self.layers[name].to_cells if name in self.layers else None
            by_name[name] = (
                upcast(gradient if to_cells is None else to_cells(gradient)) / self.scale
            )
        return by_name


def gradient_maps(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None,
    classes: Classes,
    formula: Formula,
    *,
    score: Score = "logit",
    layout: Layout = "auto",
    logits: Callable[..., Tensor] | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """Maps by layer, [B, h, w] or [B, C, h, w], made by a formula of activations and gradients.

    The arguments are those of `explain.gradcam.explain_images`; nothing is left behind likewise.

    Raises:
        UserError: If a layer, a class or the network can't be explained as asked.
    """
    request = build_request(
        network, images, layers, classes, score=score, layout=layout, logits=logits
    )
    # A network that switches the graph off itself somewhere is recorded whole.
    for record in (False, True):
        with examination_lock(), torch.inference_mode(False), torch.set_grad_enabled(record):
            maps_by_layer = _maps(_clone_inference_tensors(request), formula, record)
        if maps_by_layer is not None:
            return maps_by_layer
    raise no_gradient_error(request)


def pixel_pass(request: Request) -> GradientPass:
    """A pass whose graph begins at the pixels.

    Raises:
        UserError: If the scores don't depend on the pixels or a layer.
    """
    with examination_lock(), torch.inference_mode(False), torch.enable_grad():
        gradient_pass = forward_pass(_clone_inference_tensors(request), record=True, pixels=True)
    if gradient_pass is None:
        raise no_gradient_error(request)
    return gradient_pass


def build_request(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None,
    classes: Classes,
    *,
    score: Score,
    layout: Layout = "auto",
    logits: Callable[..., Tensor] | None = None,
) -> Request:
    """What is asked, after refusing what can't be answered."""
    check_request_options(score, classes, "none", layout)
    check_image_batch(images)
    with examination_lock():
        check_separate_images(network, len(images))
    if layers is None:
        names: tuple[str, ...] = (last_layer(network, images, score=score, logits=logits),)
    else:
        names = (layers,) if isinstance(layers, str) else tuple(dict.fromkeys(layers))
    return Request(network, images, names, classes, score, "none", True, layout, logits)


def forward_pass(request: Request, record: bool, *, pixels: bool = False) -> GradientPass | None:
    """The forward; None if the scores have no graph, or don't depend on a layer.

    Args:
        request: With images that can take part in a graph.
        record: Whether the whole network is recorded, not only what follows the first layer.
        pixels: Whether gradients will be asked at the pixels too.
    """
    if pixels:
        request = replace(request, images=request.images.detach().requires_grad_())
    forward = record_forward(request, record)
    output, layers = forward.output, forward.layers
    check_intact_outputs(layers)
    half = any(layer.output.dtype == torch.float16 for layer in layers.values())
    scale = HALF_SCALE if half or request.images.dtype == torch.float16 else 1.0
    with torch.autocast(request.images.device.type, enabled=False), torch.enable_grad():
        classes = resolve_classes(request, output)
        scores = score_columns(request, output, classes) * scale
        if not scores.requires_grad:
            return None
        edges = {name: _edge(layer) for name, layer in layers.items()}
        if pixels:
            edges[PIXELS] = get_gradient_edge(request.images)
        with refuse_reentrant():
            if not check_unmixed_graph(request, scores, ScoreGraph(scores), edges):
                return None
    return GradientPass(classes, scores, layers, edges, scale)


def no_gradient_error(request: Request) -> UserError:
    """What to say where a score has no gradient."""
    return UserError(describe_missing_gradient(request.network, request.images, request.names))


def stack_classes(maps: Sequence[Tensor], classes: Tensor) -> Tensor:
    """Maps of each class as [B, C, ...]; as [B, ...] where one class an image was asked for."""
    return torch.stack(list(maps), 1) if classes.dim() == 2 else maps[0]


def _maps(request: Request, formula: Formula, record: bool) -> dict[str, Tensor] | None:
    gradient_pass = forward_pass(request, record)
    if gradient_pass is None:
        return None
    parts: dict[str, list[Tensor]] = {name: [] for name in request.names}
    activations = {name: gradient_pass.activations(name) for name in request.names}
    with torch.no_grad(), torch.autocast(request.images.device.type, enabled=False):
        count = gradient_pass.scores.shape[1]
        for column in range(count):
            gradients = gradient_pass.gradients(column, last=column + 1 == count)
            if gradients is None:
                return None
            for name in request.names:
                parts[name].append(formula(activations[name], gradients[name]))
        return {name: stack_classes(maps, gradient_pass.classes) for name, maps in parts.items()}


def _edge(layer: LayerRecord) -> GradientEdge:
    node, number = layer.source
    # A layer that was neither tapped nor has a graph is a leaf of its own.
    return get_gradient_edge(layer.output) if node is None else GradientEdge(node, number)


def _clone_inference_tensors(request: Request) -> Request:
    classes = (
        clone_if_inference(request.classes)
        if isinstance(request.classes, Tensor)
        else request.classes
    )
    return replace(request, images=clone_if_inference(request.images), classes=classes)
