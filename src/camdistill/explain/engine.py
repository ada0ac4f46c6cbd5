"""What one forward tells: logits, activations, and maps by closed form or by one backward."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import Node

from camdistill.errors import UserError
from camdistill.explain.alphas import alphas_by_gradient, closed_maps
from camdistill.explain.closed_form import Verdicts, proven_head
from camdistill.explain.graph import linear_path
from camdistill.explain.recording import Seen, recorded_forward
from camdistill.explain.request import Request, asked_classes, score_columns, wide
from camdistill.networks.capture import bare
from camdistill.types import Activations


@dataclass(frozen=True)
class Explanation:
    """What one forward tells.

    Attributes:
        logits: The network's output; where that is no tensor, the scores.
        classes: Of which class the maps are, [B] or [B, C]; -1 where a callable made the score.
        maps: Raw, signed maps by layer, [B, h, w], or [B, C, h, w] for classes [B, C].
        activations: The layers' outputs, by layer.
    """

    logits: Float[Tensor, "batch *outputs"]
    classes: Tensor
    maps: dict[str, Float[Tensor, "batch *classes height width"]]
    activations: dict[str, Activations]


def explained(ask: Request, *, record: bool) -> Explanation | None:
    """One forward and what follows from it; None if a score doesn't depend on a layer.

    Without `record` the graph begins at the first layer whose map needs a gradient.
    """
    verdicts = Verdicts(bare(ask.network), ask.images.shape[1:])
    output, seen, heads = recorded_forward(ask, verdicts, record)
    if ask.maps and not intact(ask, seen, verdicts):
        return explained(ask, record=record)
    with torch.autocast(ask.images.device.type, enabled=False):
        classes = asked_classes(ask, output)
        found: dict[str, Tensor] | None = {}
        if ask.maps:
            _judge(seen, heads, verdicts, output)
            found = _maps(ask, output, classes, seen, verdicts)
        if found is None:
            return None
        logits = output if isinstance(output, Tensor) else score_columns(ask, output, classes)[:, 0]
    activations = {name: seen[name].activations for name in ask.names}
    if ask.grad == "none":
        logits = logits.detach()
        found = {name: layer.detach() for name, layer in found.items()}
        activations = {name: layer.detach() for name, layer in activations.items()}
    return Explanation(logits, classes, found, activations)


def intact(ask: Request, seen: dict[str, Seen], verdicts: Verdicts) -> bool:
    """Whether no layer's output was lost to an in-place operation; learns where copies are needed.

    The first forward goes on with copies and sees which of them are overwritten; later ones copy
    only there. Code that does now what it didn't do then is found by the version, and run again.
    """
    intact = True
    for name, layer in seen.items():
        if layer.is_overwritten and layer.passed is None:
            intact = False
            if ask.grad != "none":
                raise UserError(
                    f"layer '{name}' is overwritten in place by what follows it: ask for the layer "
                    "that overwrites it"
                )
        if layer.is_overwritten or verdicts[name].overwritten is None:
            verdicts.learn(name, overwritten=layer.is_overwritten)
    return intact


def _judge(
    seen: dict[str, Seen],
    heads: dict[str, tuple[nn.Module, Node]],
    verdicts: Verdicts,
    output: object,
) -> None:
    """Decides which layers have a closed form, where that isn't known or no longer so."""
    for name, layer in seen.items():
        if not isinstance(output, Tensor) or output.dim() != 2:
            verdicts.learn(name, judged=True, head=None)
        elif not output.requires_grad:
            continue
        elif layer.probe is not None and not verdicts[name].judged:
            head = proven_head(output, layer.source, layer.probe, heads)
            verdicts.learn(name, judged=True, head=head)
        elif layer.probe is None and layer.source[0] and not linear_path(output, layer.source):
            # There is a graph, so look again: code may do at one step what it didn't at another.
            verdicts.learn(name, head=None)


def _maps(
    ask: Request, output: object, classes: Tensor, seen: dict[str, Seen], verdicts: Verdicts
) -> dict[str, Tensor] | None:
    """Maps by layer; None if a score doesn't depend on a layer."""
    weights = {name: verdicts.weight(name) for name in seen}
    others = {name: layer for name, layer in seen.items() if weights[name] is None}
    alphas = alphas_by_gradient(ask, output, classes, others, verdicts)
    if alphas is None:
        return None
    found = {}
    for name in ask.names:
        layer, weight = seen[name], weights[name]
        activations = wide(layer.activations).flatten(2)
        with torch.set_grad_enabled(ask.grad != "none"):
            if weight is None:
                rows = torch.bmm(alphas[name], activations)
            else:
                assert isinstance(output, Tensor), "a closed form has logits"
                weight = wide(weight if ask.grad == "full" else weight.detach())
                rows = closed_maps(ask, output, classes, weight, activations) / layer.count
        spatial = rows.view(*rows.shape[:2], *layer.activations.shape[2:])
        found[name] = spatial if classes.dim() == 2 else spatial[:, 0]
    return found
