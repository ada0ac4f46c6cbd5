"""Images of two objects, and what is true of them: what stands where, bright or dark."""

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from camdistill.claims.claim import ClaimSetup, ShapesBatch, draw_batch
from camdistill.data.shapes import Removable, Shapes
from camdistill.distill.training import as_images
from camdistill.types import Images, Masks

OBJECTS = ("object", "second")
"""Names of the two objects' masks, in the order of every axis of two."""


class Scenes(NamedTuple):
    """Images of two objects.

    Attributes:
        images: In [0, 1].
        classes: Classes of both objects.
        masks: Masks of both objects.
        centers: Centers of the objects: y and x, in pixels.
        bright: Whether an object is brighter than its background.
        batch: All else that is known.
    """

    images: Images
    classes: Int[Tensor, "n 2"]
    masks: Bool[Tensor, "n 2 height width"]
    centers: Float[Tensor, "n 2 2"]
    bright: Bool[Tensor, "n 2"]
    batch: ShapesBatch


def draw_test_scenes(setup: ClaimSetup) -> Scenes:
    """The lab's images, with two objects."""
    return _scenes(draw_batch(setup, dataclasses.replace(setup.shapes, objects=2)))


def draw_training_scenes(setup: ClaimSetup, count: int) -> Scenes:
    """Images of two objects to learn from."""
    return _scenes(draw_all_images(setup, training_shapes(setup, count, objects=2)))


def training_shapes(
    setup: ClaimSetup,
    count: int,
    *,
    objects: int = 1,
    shortcut: float = 0.0,
    seed: int | None = None,
) -> Shapes:
    """Draws images to learn from, which are never held out."""
    seed = setup.shapes.seed if seed is None else seed
    return dataclasses.replace(
        setup.shapes, split="train", length=count, objects=objects, shortcut=shortcut, seed=seed
    )


def draw_all_images(setup: ClaimSetup, shapes: Shapes) -> ShapesBatch:
    """All images of a drawer."""
    return draw_batch(
        dataclasses.replace(setup, ids=np.arange(len(shapes), dtype=np.int64)), shapes
    )


def render_without(setup: ClaimSetup, shapes: Shapes, remove: Collection[Removable]) -> Images:
    """The lab's images, drawn again without something."""
    pixels = shapes.render(setup.ids, remove=remove).pixels
    return as_images(torch.from_numpy(pixels).to(setup.device))


def _scenes(batch: ShapesBatch) -> Scenes:
    masks = torch.stack([batch.masks[name] for name in OBJECTS], 1)
    return Scenes(
        batch.images,
        torch.stack([batch.labels, batch.second_labels], 1),
        masks,
        _centers(masks),
        _bright(batch.images, masks, batch.masks["background"]),
        batch,
    )


def _centers(masks: Bool[Tensor, "n 2 height width"]) -> Float[Tensor, "n 2 2"]:
    rows = torch.arange(masks.shape[2], device=masks.device)[:, None]
    columns = torch.arange(masks.shape[3], device=masks.device)
    area = masks.sum((2, 3)).clamp(min=1)
    return torch.stack([(masks * ticks).sum((2, 3)) / area for ticks in (rows, columns)], 2)


def _bright(
    images: Images, masks: Bool[Tensor, "n 2 height width"], background: Masks
) -> Bool[Tensor, "n 2"]:
    """By mean gray: every channel differs from the background's by 60 to 85 levels, up or down."""
    gray = images.mean(1, keepdim=True)
    inside = (gray * masks).sum((2, 3)) / masks.sum((2, 3)).clamp(min=1)
    behind = (gray[:, 0] * background).sum((1, 2)) / background.sum((1, 2))
    return inside > behind[:, None]
