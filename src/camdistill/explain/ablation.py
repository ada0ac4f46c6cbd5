"""Ablation-CAM: what a score loses when a unit is switched off."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.engine.closed_form import TOLERANCE
from camdistill.explain.engine.memory import footprint
from camdistill.explain.engine.request import Classes, Score, wide
from camdistill.explain.engine.tokens import Layout, cells_of
from camdistill.explain.gradcam import explain, last_layer
from camdistill.explain.masked_forward import Questions, questions, scores_of
from camdistill.networks.capture import tensor, visiting
from camdistill.types import Images

# What a network may say to rows that don't fit each other, or whose number it knows better. If
# something else is wrong, it is so for the whole network too, and says it then.
UNFITTING = (RuntimeError, TypeError, ValueError, AssertionError, IndexError)
Logits = Callable[..., Tensor] | None


@torch.no_grad()
def ablation_cam(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None = None,
    classes: Classes = None,
    *,
    score: Score = "logit",
    layout: Layout = "auto",
    logits: Logits = None,
    memory: int | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """Ablation-CAM: sum_k w_k A_kij, w_k = (S - S_k) / |S| with S_k the score without unit k.

    Desai and Ramaswamy 2020, https://doi.org/10.1109/WACV45572.2020.9093360. The paper divides by S
    (in place of the norm of A_k); with a negative S that would turn the map around, so we divide by
    its size, which is the same wherever S is positive. A layer costs as many evaluations an image
    as it has units; the part of the network before the layer runs once for all that fit into
    `memory`, where what follows allows that.

    Args:
        network: As for `explain.gradcam.explain`, like all that isn't named here.
        images: Likewise.
        layers: Likewise.
        classes: Likewise.
        score: Likewise.
        layout: Likewise; but no callable, as units must be found in the output.
        logits: Likewise.
        memory: Bytes that one forward may take, about; None is 32 MiB on
            a CPU, 512 MiB elsewhere.
    """
    if callable(layout):
        raise UserError(
            "ablation_cam can't find units by a callable layout: give 'channels_first', "
            "'channels_last' or 'tokens'"
        )
    if layers is None:
        layers = [last_layer(network, images, score=score, logits=logits)]
    asked = questions(network, images, classes, score=score, logits=logits, memory=memory)
    found = explain(network, images, layers, score=score, layout=layout, logits=logits, maps=False)
    calls = _calls(asked, list(found.activations))
    maps = {}
    for name, values in found.activations.items():
        activations = wide(values)
        size = asked.scores.abs()[..., None]
        drops = asked.scores[..., None] - _without_units(
            asked, calls[name], layout, values.shape[1]
        )
        weights = torch.where(size > 0, drops / torch.where(size > 0, size, 1), 0)
        with torch.autocast(images.device.type, enabled=False):
            rows = torch.bmm(weights.to(activations), activations.flatten(2))
        maps[name] = asked.shaped(rows.view(*rows.shape[:2], *activations.shape[2:]))
    return maps


def _calls(asked: Questions, names: Sequence[str]) -> dict[str, str]:
    """Each name with the number of the call that it means, which is the last one."""
    seen = dict.fromkeys(names, 0)

    def count(name: str, output: object) -> None:
        seen[name] += 1

    with visiting(asked.ask.network, names, count):
        asked.ask.network(asked.ask.images[:1])
    return {name: name if "#" in name else f"{name}#{seen[name] - 1}" for name in names}


def _without_units(
    asked: Questions, name: str, layout: Layout, units: int
) -> Float[Tensor, "batch asked units"]:
    """The score of every image without each unit."""
    shared = True
    rows = []
    for image in range(len(asked.ask.images)):
        scores = _after_one_trunk(asked, name, layout, units, image) if shared else None
        if scores is None:
            shared = False
            scores = _whole(asked, name, layout, units, image)
        rows.append(scores.T)
    return torch.stack(rows)


def _after_one_trunk(
    asked: Questions, name: str, layout: Layout, units: int, image: int
) -> Float[Tensor, "units asked"] | None:
    """The image goes in once, and comes out of the layer once for each unit; None if it can't.

    What follows the layer may read something from before it, that has one row: sums of the two are
    right, concatenations fail. So each forward has the whole image too, whose score is known.
    """
    rows = asked.memory // footprint(asked.ask.network, asked.ask.images).behind(name)
    one = asked.ask.images[image : image + 1]
    truth = asked.scores[image]
    allowed = TOLERANCE.get(one.dtype, 0.0) * (1 + truth.abs().max())
    found = []
    for numbers in torch.split(torch.arange(units, device=one.device), max(1, rows - 1)):
        classes = asked.classes[image : image + 1].expand(
            len(numbers) + 1, *asked.classes.shape[1:]
        )
        try:
            scores = _scores(asked, one, classes, name, layout, numbers)
        except UNFITTING:
            return None
        if bool((scores[0] - truth).abs().max() > allowed):
            return None
        found.append(scores[1:])
    return torch.cat(found)


def _whole(
    asked: Questions, name: str, layout: Layout, units: int, image: int
) -> Float[Tensor, "units asked"]:
    """The whole network runs for every unit."""
    found = []
    for numbers in torch.split(torch.arange(units, device=asked.ask.images.device), asked.at_once):
        rows = torch.full_like(numbers, image)
        images, classes = asked.ask.images[rows], asked.classes[rows]
        found.append(_scores(asked, images, classes, name, layout, numbers))
    return torch.cat(found)


def _scores(
    asked: Questions,
    images: Images,
    classes: Tensor,
    name: str,
    layout: Layout,
    numbers: Tensor,
) -> Tensor:
    """Scores where each row lacks a unit; a first row is whole if there is one class row more."""
    whole = len(classes) - len(numbers)

    def without(at: str, output: object) -> Tensor:
        values = tensor(at, output)
        size = (images.shape[-2], images.shape[-1])
        axis = 1 if cells_of(at, values, size, layout) is None else values.dim() - 1
        kept = torch.ones(
            len(classes), values.shape[axis], device=values.device, dtype=values.dtype
        )
        kept[torch.arange(len(numbers), device=values.device) + whole, numbers] = 0
        shape = [1] * values.dim()
        shape[0], shape[axis] = kept.shape
        # A product would leave what isn't a number.
        return torch.where(kept.view(shape) > 0, values, 0)

    with visiting(asked.ask.network, [name], without):
        return scores_of(asked.ask, images, classes)
