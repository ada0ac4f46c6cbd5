"""What a student learns from: a recipe, a pool of images, and the maps of its arm.

Everything that is random depends on a student's seed and the step alone, so arms of one seed see
the same batches in the same views, bit for bit.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camdistill.data.views import Augment, View, draw_view, view_images
from camdistill.distill.losses import MapDistance
from camdistill.distill.optimization import Optimization
from camdistill.distill.training import as_images
from camdistill.errors import UserError, check_number
from camdistill.types import Images, Labels, Pixels


@dataclass(frozen=True)
class Recipe:
    """How every student of a study is trained: the same for all arms.

    Args:
        steps: Updates of the weights.
        batch_size: Images a step; all of them where there are fewer.
        temperature: Temperature of distillation.
        distance: Between the student's rectified map and the target.
        optimization: The optimizer and its schedule.
        augment: How images (and their maps with them) are varied; mirrored images have the
            teacher's answers and maps of their own.
        precision: Precision of training; students are measured in float32. "bfloat16" is autocast.
    """

    steps: int = 600
    batch_size: int = 128
    temperature: float = 4.0
    distance: MapDistance = "pearson"
    optimization: Optimization = field(default_factory=lambda: Optimization(lr=0.1))
    augment: Augment = field(default_factory=lambda: Augment(crop="pad", flip=True))
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2:
            raise UserError(
                f"recipe.steps {self.steps} and batch_size {self.batch_size}; give at least 1 step "
                "and 2 images (batch normalization needs two)"
            )
        check_number(
            "recipe.temperature", self.temperature, "(0, inf)", "give one above 0, such as 4"
        )


class ImagePool(NamedTuple):
    """What students learn from: images without labels, and the teacher's logits of them.

    Attributes:
        pixels: Pixels as stored, uint8.
        ids: The images' numbers, which decide their views.
        logits: Logits of each image and of its mirror image.
    """

    pixels: Pixels
    ids: Labels
    logits: Float[Tensor, "batch 2 classes"]


class StudentTask(NamedTuple):
    """What one student is taught.

    Attributes:
        seed: Seed of its start, its batches and its views.
        beta: Weight of the maps' distance; 0 for none.
        maps: Rectified, for each image of the pool and its mirror image; None without.
    """

    seed: int
    beta: float = 0.0
    maps: Float[Tensor, "batch 2 rows columns"] | None = None


class StudentBatch(NamedTuple):
    """One step's batch: the same for all arms of a seed."""

    images: Images
    positions: Labels
    view: View


def batch_at(pool: ImagePool, recipe: Recipe, seed: int, step: int) -> StudentBatch:
    """The batch of a step: the pool in a new order each time it was seen, in views of this step."""
    count = len(pool.pixels)
    size = min(recipe.batch_size, count)
    first, last = step * size // count, ((step + 1) * size - 1) // count
    orders = [np.random.default_rng([seed, number]).permutation(count) for number in (first, last)]
    order = orders[0] if first == last else np.concatenate(orders)
    start = step * size - first * count
    positions = torch.from_numpy(order[start : start + size]).to(pool.ids.device)
    pixels, ids = pool.pixels[positions], pool.ids[positions]
    height, width = pixels.shape[-2:]
    view = draw_view(recipe.augment, ids, (height, width), seed=seed, epoch=step)
    return StudentBatch(as_images(view_images(pixels, view)), positions, view)
