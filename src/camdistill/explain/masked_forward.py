"""What a network says of images seen through many masks, in forwards of bounded size."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.engine.closed_form import TOLERANCE
from camdistill.explain.engine.memory import footprint, memory_budget
from camdistill.explain.engine.recording import clone_if_inference
from camdistill.explain.engine.request import (
    Classes,
    Request,
    Score,
    class_columns,
    resolve_classes,
    score_columns,
    upcast,
)
from camdistill.explain.gradients import build_request
from camdistill.networks.capture import unwrap, unwrap_outer
from camdistill.networks.teachers import Preprocessed
from camdistill.perturb.batched_forward import check_eval_mode
from camdistill.perturb.imputers import Baseline, baseline
from camdistill.types import Images

Fill = Literal["zero"] | Baseline
"""What stands where an image is removed: "zero" is 0 after the network's own normalization."""
MaskFunction = Callable[
    [Int[Tensor, "asked"], Int[Tensor, "asked"]], Float[Tensor, "asked height width"]
]
"""Masks by numbers of an image and of a mask: 1 keeps a pixel, 0 removes it."""


@dataclass(frozen=True)
class BatchedScorer:
    """Images about which a network will be asked, for fixed classes.

    Attributes:
        request: With the images; no layer.
        classes: [B] or [B, C].
        scores: Scores of the unchanged images.
        memory: Bytes that one forward may take, about.
    """

    request: Request
    classes: Tensor
    scores: Float[Tensor, "batch asked"]
    memory: int

    def score_masks(
        self, masks: MaskFunction, count: int, fill: Fill
    ) -> Float[Tensor, "batch asked count"]:
        """The scores of every image through every mask."""
        images = self.request.images
        replacement = make_replacement(self.request.network, images, fill)
        pairs = torch.arange(len(images) * count, device=images.device)
        score_chunks = []
        for part in torch.split(pairs, self.chunk_size):
            image, number = part // count, part % count
            keep = masks(image, number)[:, None].to(images.dtype)
            changed = images[image] * keep + replacement[image] * (1 - keep)
            score_chunks.append(score_images(self.request, changed, self.classes[image]))
        return torch.cat(score_chunks).view(len(images), count, -1).movedim(1, 2)

    @property
    def chunk_size(self) -> int:
        """Images in one forward."""
        return max(
            1, self.memory // footprint(self.request.network, self.request.images).without_graph
        )

    def match_classes(
        self, maps: Float[Tensor, "batch asked height width"]
    ) -> Float[Tensor, "..."]:
        """Maps as the classes were asked for: [B, h, w] or [B, C, h, w]."""
        return maps if self.classes.dim() == 2 else maps[:, 0]


def make_scorer(
    network: nn.Module,
    images: Images,
    classes: Classes,
    *,
    score: Score,
    logits: Callable[..., Tensor] | None,
    memory: int | None,
) -> BatchedScorer:
    """Fixes the classes by one forward of the unchanged images; call it without a graph.

    Raises:
        UserError: If the network answers by chance or mixes images, or there is no such class.
    """
    check_eval_mode(network)
    request = build_request(network, images, [], classes, score=score, logits=logits)
    request = replace(request, network=unwrap_outer(network), images=clone_if_inference(images))
    memory = memory_budget(images, memory)
    count = max(1, memory // footprint(network, images).without_graph)
    chunks = [request.network(part) for part in torch.split(request.images, count)]
    output_chunks = [part if logits is None else logits(part) for part in chunks]
    if isinstance(score, str):
        outputs = (
            torch.cat(output_chunks)
            if all(isinstance(part, Tensor) for part in output_chunks)
            else output_chunks[0]
        )
        target_classes = resolve_classes(request, outputs)
        scores = score_columns(request, outputs, target_classes)
    else:
        target_classes = resolve_classes(request, None)
        rows = torch.split(request.images, count)
        chunks = [
            score_columns(replace(request, images=chunk_images), part, target_classes)
            for chunk_images, part in zip(rows, output_chunks, strict=True)
        ]
        scores = torch.cat(chunks)
    _check_same_alone(request, target_classes, scores, in_one_batch=min(count, len(images)) > 1)
    return BatchedScorer(request, target_classes, scores, memory)


def _check_same_alone(
    request: Request, classes: Tensor, expected_scores: Tensor, *, in_one_batch: bool
) -> None:
    """Refuse a network whose score of an image depends on what else is in the batch.

    Args:
        request: With the images.
        classes: Classes of all images.
        expected_scores: Their scores.
        in_one_batch: Whether several images were asked about together. Then the first and the
            last are asked about alone, else the first one between two others.
    """
    images = request.images
    if in_one_batch:
        places = [0, len(images) - 1]
        scores_alone = [
            score_images(request, images[[index]], classes[[index]]) for index in places
        ]
    else:
        places = [0]
        other = 0.5 * images[:1].flip(-1) + 0.25
        triplet, repeated_classes = (
            torch.cat([other, images[:1], other]),
            classes[:1].repeat_interleave(3, 0),
        )
        scores_alone = [score_images(request, triplet, repeated_classes)[1:2]]
    for place, scores in zip(places, scores_alone, strict=True):
        largest = torch.maximum(expected_scores[place].abs(), scores[0].abs()).max()
        difference = (expected_scores[place] - scores[0]).abs()
        # What isn't a number would not be one in any batch.
        if bool((difference > TOLERANCE.get(images.dtype, 0.0) * largest).any()):
            name = type(unwrap(request.network)).__name__
            if _answers_by_chance(request, classes):
                raise UserError(
                    f"{name} answers by chance: the same image gets other scores the second time; "
                    "give a network that draws nothing in eval mode, such as by "
                    "F.dropout(..., training=self.training)"
                )
            raise UserError(
                f"{name} mixes the images of a batch: an image's score alone is another one, and "
                "changed images are asked about together; give a network (or score=, logits=) "
                "that keeps them apart"
            )


def _answers_by_chance(request: Request, classes: Tensor) -> bool:
    """Whether an image's scores differ when it is asked about again, three times."""
    first, *others = (score_images(request, request.images[:1], classes[:1]) for _ in range(4))
    # The same forward is rounded alike, or nearly so.
    tolerance = 0.02 * TOLERANCE.get(request.images.dtype, 0.0) * first.abs().max()
    return any(bool(((first - other).abs() > tolerance).any()) for other in others)


def score_images(request: Request, images: Images, classes: Tensor) -> Float[Tensor, "rows asked"]:
    """One forward's scores, in float32 at least.

    One image may stand for many rows of classes, if the network makes it many on its way.
    """
    output = request.network(images)
    output = output if request.logits is None else request.logits(output)
    rows = images.expand(len(classes), *images.shape[1:])
    with torch.autocast(images.device.type, enabled=False):
        return upcast(score_columns(replace(request, images=rows), output, class_columns(classes)))


def make_replacement(network: nn.Module, images: Images, fill: Fill) -> Images:
    """The picture that shows where an image is removed."""
    if fill != "zero":
        return baseline(images, fill)
    inner = unwrap_outer(network)
    color = inner.mean if isinstance(inner, Preprocessed) else torch.zeros(())
    return color.to(images).expand_as(images)
