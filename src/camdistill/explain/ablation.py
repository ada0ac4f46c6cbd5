"""Ablation-CAM: what a score loses when a unit is switched off."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.engine.closed_form import TOLERANCE
from camdistill.explain.engine.memory import footprint
from camdistill.explain.engine.request import Classes, Score, upcast
from camdistill.explain.engine.tokens import Layout, cell_transform
from camdistill.explain.gradcam import explain_images, last_layer
from camdistill.explain.masked_forward import BatchedScorer, make_scorer, score_images
from camdistill.networks.capture import check_tensor, visit_layers
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
        network: Network as for `explain.gradcam.explain_images`, like all that isn't named here.
        images: Images as for `explain_images`.
        layers: Layers as for `explain_images`.
        classes: Classes as for `explain_images`.
        score: Score as for `explain_images`.
        layout: Layout as for `explain_images`, but no callable: units must be found.
        logits: Logits as for `explain_images`.
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
    scorer = make_scorer(network, images, classes, score=score, logits=logits, memory=memory)
    explanation = explain_images(
        network, images, layers, score=score, layout=layout, logits=logits, maps=False
    )
    calls = _last_calls(scorer, list(explanation.activations))
    maps = {}
    for name, values in explanation.activations.items():
        activations = upcast(values)
        score_sizes = scorer.scores.abs()[..., None]
        drops = scorer.scores[..., None] - _scores_without_units(
            scorer, calls[name], layout, values.shape[1]
        )
        weights = torch.where(
            score_sizes > 0, drops / torch.where(score_sizes > 0, score_sizes, 1), 0
        )
        with torch.autocast(images.device.type, enabled=False):
            rows = torch.bmm(weights.to(activations), activations.flatten(2))
        maps[name] = scorer.match_classes(rows.view(*rows.shape[:2], *activations.shape[2:]))
    return maps


def _last_calls(scorer: BatchedScorer, names: Sequence[str]) -> dict[str, str]:
    """Each name with the number of the call that it means, which is the last one."""
    call_counts = dict.fromkeys(names, 0)

    def count(name: str, output: object) -> None:
        call_counts[name] += 1

    with visit_layers(scorer.request.network, names, count):
        scorer.request.network(scorer.request.images[:1])
    return {name: name if "#" in name else f"{name}#{call_counts[name] - 1}" for name in names}


def _scores_without_units(
    scorer: BatchedScorer, name: str, layout: Layout, units: int
) -> Float[Tensor, "batch asked units"]:
    """The score of every image without each unit."""
    shared = True
    rows = []
    for image in range(len(scorer.request.images)):
        scores = _score_after_shared_trunk(scorer, name, layout, units, image) if shared else None
        if scores is None:
            shared = False
            scores = _score_by_full_forwards(scorer, name, layout, units, image)
        rows.append(scores.T)
    return torch.stack(rows)


def _score_after_shared_trunk(
    scorer: BatchedScorer, name: str, layout: Layout, units: int, image: int
) -> Float[Tensor, "units asked"] | None:
    """The image goes in once, and comes out of the layer once for each unit; None if it can't.

    What follows the layer may read something from before it, that has one row: sums of the two are
    right, concatenations fail. So each forward has the whole image too, whose score is known.
    """
    rows = scorer.memory // footprint(scorer.request.network, scorer.request.images).behind(name)
    single_image = scorer.request.images[image : image + 1]
    known_scores = scorer.scores[image]
    tolerance = TOLERANCE.get(single_image.dtype, 0.0) * (1 + known_scores.abs().max())
    score_chunks = []
    for numbers in torch.split(torch.arange(units, device=single_image.device), max(1, rows - 1)):
        classes = scorer.classes[image : image + 1].expand(
            len(numbers) + 1, *scorer.classes.shape[1:]
        )
        try:
            scores = _score_ablated_rows(scorer, single_image, classes, name, layout, numbers)
        except UNFITTING:
            return None
        if bool((scores[0] - known_scores).abs().max() > tolerance):
            return None
        score_chunks.append(scores[1:])
    return torch.cat(score_chunks)


def _score_by_full_forwards(
    scorer: BatchedScorer, name: str, layout: Layout, units: int, image: int
) -> Float[Tensor, "units asked"]:
    """The whole network runs for every unit."""
    score_chunks = []
    for numbers in torch.split(
        torch.arange(units, device=scorer.request.images.device), scorer.chunk_size
    ):
        rows = torch.full_like(numbers, image)
        images, classes = scorer.request.images[rows], scorer.classes[rows]
        score_chunks.append(_score_ablated_rows(scorer, images, classes, name, layout, numbers))
    return torch.cat(score_chunks)


def _score_ablated_rows(
    scorer: BatchedScorer,
    images: Images,
    classes: Tensor,
    name: str,
    layout: Layout,
    numbers: Tensor,
) -> Tensor:
    """Scores where each row lacks a unit; a first row is whole if there is one class row more."""
    intact_rows = len(classes) - len(numbers)

    def remove_units(layer: str, output: object) -> Tensor:
        values = check_tensor(layer, output)
        size = (images.shape[-2], images.shape[-1])
        axis = 1 if cell_transform(layer, values, size, layout) is None else values.dim() - 1
        keep_mask = torch.ones(
            len(classes), values.shape[axis], device=values.device, dtype=values.dtype
        )
        keep_mask[torch.arange(len(numbers), device=values.device) + intact_rows, numbers] = 0
        shape = [1] * values.dim()
        shape[0], shape[axis] = keep_mask.shape
        # A product would leave what isn't a number.
        return torch.where(keep_mask.view(shape) > 0, values, 0)

    with visit_layers(scorer.request.network, [name], remove_units):
        return score_images(scorer.request, images, classes)
