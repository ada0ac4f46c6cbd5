"""The images of an analysis."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool

from camdistill.data.datasets import ImageSet, Positions
from camdistill.distill.training import as_images, match_channels
from camdistill.layers.units.unit_inspection import InspectionSample
from camdistill.types import Images

SAMPLE = 512  # images that single units are looked at with

MasksOf = Callable[[Positions], Mapping[str, Bool[np.ndarray, "n height width"]]]


@dataclass(frozen=True)
class AnalysisData:
    """The images that layers are opened with.

    Attributes:
        images: A set whose ids are its positions.
        order: Positions of those that are looked at, in an order that has nothing to do with
            classes.
        name: What they are, for titles.
        masks_of: Where concepts are in some of them; None where that isn't known.
        classes: Names of the networks' classes; empty when unknown.
        channels: Channels of the images that the networks take: 3, or 1 for their mean.
        device: Where images go; the networks are there.
    """

    images: ImageSet
    order: Positions
    name: str
    masks_of: MasksOf | None = None
    classes: tuple[str, ...] = ()
    channels: int = 3
    device: str = "cpu"

    def fetch(self, numbers: Sequence[int] | Positions) -> Images:
        """Images in [0, 1], in the order of the numbers."""
        images = as_images(self.images.batch(numbers).pixels).to(self.device)
        return match_channels(images, self.channels)

    def sample(self) -> InspectionSample:
        """Images whose units are looked at closely, with what is known of where things are."""
        positions = self.order[:SAMPLE]
        concept_masks = {} if self.masks_of is None else self.masks_of(positions)
        masks = {
            name: torch.from_numpy(mask).to(self.device) for name, mask in concept_masks.items()
        }
        return InspectionSample(self.fetch(positions), masks, self.fetch)
