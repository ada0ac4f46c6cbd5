"""What one forward tells: logits, activations, and maps by closed form or by one backward."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.explain.engine.alphas import alphas_by_gradient, linear_head_maps
from camdistill.explain.engine.closed_form import find_linear_head, head_weight
from camdistill.explain.engine.recording import Recording, check_intact_outputs, record_forward
from camdistill.explain.engine.request import Request, resolve_classes, score_columns, upcast
from camdistill.networks.capture import unwrap
from camdistill.types import Activations


@dataclass(frozen=True)
class Explanation:
    """What one forward tells.

    Attributes:
        logits: The network's output; where that is no tensor, the scores.
        classes: Classes of the maps, [B] or [B, C]; -1 where a callable made the
            score.
        maps: Raw, signed maps by layer, [B, h, w], or [B, C, h, w] for classes [B, C].
        activations: The layers' outputs, by layer.
        heads: By layer that has a map, the module that makes the logits from the layer's spatial
            mean by one linear map, as this forward proved; None where there is none.
    """

    logits: Float[Tensor, "batch *outputs"]
    classes: Tensor
    maps: dict[str, Float[Tensor, "batch *classes height width"]]
    activations: dict[str, Activations]
    heads: dict[str, nn.Module | None] = field(default_factory=dict)


class NotLastLayerError(Exception):
    """The layer that was taken for the last one isn't the last in this forward."""


def explain_forward(request: Request, *, record: bool, is_last: bool = False) -> Explanation | None:
    """One forward and what follows from it; None if a score doesn't depend on a layer.

    Without `record` the graph begins at the first layer whose map needs a gradient.

    Raises:
        NotLastLayerError: With `is_last`, if the layer isn't this forward's last spatial one.
    """
    forward = record_forward(request, record, follow=is_last)
    if is_last and not _ends_with(forward, request):
        raise NotLastLayerError
    check_intact_outputs(forward.layers)
    output = forward.output
    with torch.autocast(request.images.device.type, enabled=False):
        classes = resolve_classes(request, output)
        heads = _linear_heads(forward) if request.maps else {}
        maps = _maps(request, forward, classes, heads) if request.maps else {}
        if maps is None:
            return None
        logits = (
            output if isinstance(output, Tensor) else score_columns(request, output, classes)[:, 0]
        )
    activations = {name: forward.layers[name].activations for name in request.names}
    if request.grad == "none":
        logits = logits.detach()
        maps = {name: layer.detach() for name, layer in maps.items()}
        activations = {name: layer.detach() for name, layer in activations.items()}
    return Explanation(logits, classes, maps, activations, heads)


def _ends_with(forward: Recording, request: Request) -> bool:
    """Whether the layer asked for is the last that gave a grid of cells; of tokens nobody knows."""
    (layer,) = request.names
    last, shape = forward.finished[-1] if forward.finished else (None, ())
    return len(shape) == 4 and last is unwrap(request.network).get_submodule(layer)


def _linear_heads(forward: Recording) -> dict[str, nn.Module | None]:
    """The head of every layer that has a closed form."""
    output = forward.output
    heads: dict[str, nn.Module | None] = dict.fromkeys(forward.layers)
    if not isinstance(output, Tensor) or output.dim() != 2 or not output.requires_grad:
        return heads
    for name, layer in forward.layers.items():
        if layer.probe is not None:
            heads[name] = find_linear_head(
                output, layer.source, layer.probe, layer.to_cells, forward.heads
            )
    return heads


def _maps(
    request: Request, forward: Recording, classes: Tensor, heads: dict[str, nn.Module | None]
) -> dict[str, Tensor] | None:
    """Maps by layer; None if a score doesn't depend on a layer."""
    output = forward.output
    if not isinstance(request.score, str):  # it may read more than the logits
        heads = dict.fromkeys(heads)
    layers_without_head = {
        name: layer for name, layer in forward.layers.items() if heads[name] is None
    }
    alphas = alphas_by_gradient(request, output, classes, layers_without_head)
    if alphas is None:
        return None
    maps = {}
    for name in request.names:
        layer, head = forward.layers[name], heads[name]
        activations = upcast(layer.activations).flatten(2)
        with torch.set_grad_enabled(request.grad != "none"):
            if head is None:
                flat_maps = torch.bmm(alphas[name], activations)
            else:
                assert isinstance(output, Tensor), "a closed form has logits"
                weight = head_weight(head)
                weight = upcast(weight if request.grad == "full" else weight.detach())
                flat_maps = (
                    linear_head_maps(request, output, classes, weight, activations) / layer.count
                )
        spatial = flat_maps.view(*flat_maps.shape[:2], *layer.activations.shape[2:])
        maps[name] = spatial if classes.dim() == 2 else spatial[:, 0]
    return maps
