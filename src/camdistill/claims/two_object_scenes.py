"""Images of two objects, and what is true of them: what stands where, bright or dark."""

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from camdistill.claims.claim import Drawn, Lab, drawn
from camdistill.data.shapes import Removable, Shapes
from camdistill.distill.training import as_images
from camdistill.types import Images, Masks

OBJECTS = ("object", "second")
"""Names of the two objects' masks, in the order of every axis of two."""


class Scenes(NamedTuple):
    """Images of two objects.

    Attributes:
        images: In [0, 1].
        classes: Of both objects.
        masks: Of both objects.
        places: Of their centres: y and x, in pixels.
        bright: Whether an object is brighter than its background.
        drawn: All else that is known.
    """

    images: Images
    classes: Int[Tensor, "n 2"]
    masks: Bool[Tensor, "n 2 height width"]
    places: Float[Tensor, "n 2 2"]
    bright: Bool[Tensor, "n 2"]
    drawn: Drawn


def held_out(lab: Lab) -> Scenes:
    """The lab's images, with two objects."""
    return _scenes(drawn(lab, dataclasses.replace(lab.shapes, objects=2)))


def lessons(lab: Lab, count: int) -> Scenes:
    """Images of two objects to learn from."""
    return _scenes(drawn_lessons(lab, taught(lab, count, objects=2)))


def taught(
    lab: Lab, count: int, *, objects: int = 1, shortcut: float = 0.0, seed: int | None = None
) -> Shapes:
    """Draws images to learn from, which are never held out."""
    seed = lab.shapes.seed if seed is None else seed
    return dataclasses.replace(
        lab.shapes, split="train", length=count, objects=objects, shortcut=shortcut, seed=seed
    )


def drawn_lessons(lab: Lab, shapes: Shapes) -> Drawn:
    """All images of a drawer."""
    return drawn(dataclasses.replace(lab, ids=np.arange(len(shapes), dtype=np.int64)), shapes)


def rendered(lab: Lab, shapes: Shapes, remove: Collection[Removable]) -> Images:
    """The lab's images, drawn again without something."""
    pixels = shapes.render(lab.ids, remove=remove).pixels
    return as_images(torch.from_numpy(pixels).to(lab.device))


def _scenes(found: Drawn) -> Scenes:
    masks = torch.stack([found.masks[name] for name in OBJECTS], 1)
    return Scenes(
        found.images,
        torch.stack([found.labels, found.seconds], 1),
        masks,
        _centres(masks),
        _bright(found.images, masks, found.masks["background"]),
        found,
    )


def _centres(masks: Bool[Tensor, "n 2 height width"]) -> Float[Tensor, "n 2 2"]:
    rows = torch.arange(masks.shape[2], device=masks.device)[:, None]
    columns = torch.arange(masks.shape[3], device=masks.device)
    area = masks.sum((2, 3)).clamp(min=1)
    return torch.stack([(masks * ticks).sum((2, 3)) / area for ticks in (rows, columns)], 2)


def _bright(
    images: Images, masks: Bool[Tensor, "n 2 height width"], background: Masks
) -> Bool[Tensor, "n 2"]:
    """By mean grey: every channel differs from the background's by 60 to 85 levels, up or down."""
    grey = images.mean(1, keepdim=True)
    inside = (grey * masks).sum((2, 3)) / masks.sum((2, 3)).clamp(min=1)
    behind = (grey[:, 0] * background).sum((1, 2)) / background.sum((1, 2))
    return inside > behind[:, None]
