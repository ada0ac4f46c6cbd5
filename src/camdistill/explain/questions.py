"""What a network says of images seen through many masks, in forwards of bounded size."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.closed_form import TOLERANCE
from camdistill.explain.footprint import footprint, room
from camdistill.explain.gradients import request
from camdistill.explain.recording import recordable
from camdistill.explain.request import (
    Classes,
    Request,
    Score,
    asked_classes,
    columns,
    score_columns,
    wide,
)
from camdistill.networks.capture import bare, plain
from camdistill.networks.teachers import Preprocessed
from camdistill.perturb.asking import demand_settled
from camdistill.perturb.imputers import Baseline, baseline
from camdistill.types import Images

Fill = Literal["zero"] | Baseline
"""What stands where an image is removed: "zero" is 0 after the network's own normalisation."""
Masks = Callable[[Int[Tensor, "asked"], Int[Tensor, "asked"]], Float[Tensor, "asked height width"]]
"""Masks by numbers of an image and of a mask: 1 keeps a pixel, 0 removes it."""


@dataclass(frozen=True)
class Questions:
    """Images about which a network will be asked, for fixed classes.

    Attributes:
        ask: With the images; no layer.
        classes: [B] or [B, C].
        scores: Of the unchanged images.
        memory: Bytes that one forward may take, about.
    """

    ask: Request
    classes: Tensor
    scores: Float[Tensor, "batch asked"]
    memory: int

    def through(self, masks: Masks, count: int, fill: Fill) -> Float[Tensor, "batch asked count"]:
        """The scores of every image through every mask."""
        images = self.ask.images
        shown = filling(self.ask.network, images, fill)
        pairs = torch.arange(len(images) * count, device=images.device)
        found = []
        for part in torch.split(pairs, self.at_once):
            image, number = part // count, part % count
            keep = masks(image, number)[:, None].to(images.dtype)
            changed = images[image] * keep + shown[image] * (1 - keep)
            found.append(scores_of(self.ask, changed, self.classes[image]))
        return torch.cat(found).view(len(images), count, -1).movedim(1, 2)

    @property
    def at_once(self) -> int:
        """Images in one forward."""
        return max(1, self.memory // footprint(self.ask.network, self.ask.images).without_graph)

    def shaped(self, maps: Float[Tensor, "batch asked height width"]) -> Float[Tensor, "..."]:
        """Maps as the classes were asked for: [B, h, w] or [B, C, h, w]."""
        return maps if self.classes.dim() == 2 else maps[:, 0]


def questions(
    network: nn.Module,
    images: Images,
    classes: Classes,
    *,
    score: Score,
    logits: Callable[..., Tensor] | None,
    memory: int | None,
) -> Questions:
    """Fixes the classes by one forward of the unchanged images; call it without a graph.

    Raises:
        UserError: If the network answers by chance or mixes images, or there is no such class.
    """
    demand_settled(network)
    ask = request(network, images, [], classes, score=score, logits=logits)
    ask = replace(ask, network=plain(network), images=recordable(images))
    memory = room(images, memory)
    count = max(1, memory // footprint(network, images).without_graph)
    parts = [ask.network(part) for part in torch.split(ask.images, count)]
    taken = [part if logits is None else logits(part) for part in parts]
    if isinstance(score, str):
        whole = torch.cat(taken) if all(isinstance(part, Tensor) for part in taken) else taken[0]
        asked = asked_classes(ask, whole)
        scores = score_columns(ask, whole, asked)
    else:
        asked = asked_classes(ask, None)
        rows = torch.split(ask.images, count)
        parts = [
            score_columns(replace(ask, images=some), part, asked)
            for some, part in zip(rows, taken, strict=True)
        ]
        scores = torch.cat(parts)
    _demand_same_alone(ask, asked, scores, beside=min(count, len(images)) > 1)
    return Questions(ask, asked, scores, memory)


def _demand_same_alone(ask: Request, classes: Tensor, known: Tensor, *, beside: bool) -> None:
    """Refuse a network whose score of an image depends on what else is in the batch.

    Args:
        ask: With the images.
        classes: Of all images.
        known: Their scores.
        beside: Whether several images were asked about together. Then the first and the last are
            asked about alone, else the first one between two others.
    """
    images = ask.images
    if beside:
        places = [0, len(images) - 1]
        again = [scores_of(ask, images[[one]], classes[[one]]) for one in places]
    else:
        places = [0]
        other = 0.5 * images[:1].flip(-1) + 0.25
        three, asked = torch.cat([other, images[:1], other]), classes[:1].repeat_interleave(3, 0)
        again = [scores_of(ask, three, asked)[1:2]]
    for place, scores in zip(places, again, strict=True):
        largest = torch.maximum(known[place].abs(), scores[0].abs()).max()
        apart = (known[place] - scores[0]).abs()
        # What isn't a number would not be one in any batch.
        if bool((apart > TOLERANCE.get(images.dtype, 0.0) * largest).any()):
            name = type(bare(ask.network)).__name__
            if _answers_by_chance(ask, classes):
                raise UserError(
                    f"{name} answers by chance: the same image gets other scores the second time; "
                    "give a network that draws nothing in eval mode, such as by "
                    "F.dropout(..., training=self.training)"
                )
            raise UserError(
                f"{name} mixes the images of a batch: an image's score "
                "alone is another one, and changed images are asked about together; give a "
                "network (or score=, logits=) that keeps them apart"
            )


def _answers_by_chance(ask: Request, classes: Tensor) -> bool:
    """Whether an image's scores are others when it is asked about again, three times."""
    first, *others = (scores_of(ask, ask.images[:1], classes[:1]) for _ in range(4))
    # The same forward is rounded alike, or nearly so.
    allowed = 0.02 * TOLERANCE.get(ask.images.dtype, 0.0) * first.abs().max()
    return any(bool(((first - other).abs() > allowed).any()) for other in others)


def scores_of(ask: Request, images: Images, classes: Tensor) -> Float[Tensor, "rows asked"]:
    """One forward's scores, in float32 at least.

    One image may stand for many rows of classes, if the network makes it many on its way.
    """
    output = ask.network(images)
    output = output if ask.logits is None else ask.logits(output)
    rows = images.expand(len(classes), *images.shape[1:])
    with torch.autocast(images.device.type, enabled=False):
        return wide(score_columns(replace(ask, images=rows), output, columns(classes)))


def filling(network: nn.Module, images: Images, fill: Fill) -> Images:
    """The picture that shows where an image is removed."""
    if fill != "zero":
        return baseline(images, fill)
    inner = plain(network)
    colour = inner.mean if isinstance(inner, Preprocessed) else torch.zeros(())
    return colour.to(images).expand_as(images)
