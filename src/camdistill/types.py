"""Tensor aliases with their shapes; axes are (batch, channels or units, height, width)."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

Pixels = UInt8[Tensor, "batch channels height width"]
Images = Float[Tensor, "batch channels height width"]
Labels = Int[Tensor, "batch"]
Logits = Float[Tensor, "batch classes"]
Activations = Float[Tensor, "batch units height width"]
Maps = Float[Tensor, "batch height width"]
ClassMaps = Float[Tensor, "batch classes height width"]
PerImage = Float[Tensor, "batch"]
Masks = Bool[Tensor, "batch height width"]

Explain = Callable[[nn.Module, Images, Labels], Maps]
"""Raw maps at the images' resolution, of one class an image."""


class Batch(NamedTuple):
    """What every loader yields: images stay uint8 until they are on the device.

    Attributes:
        pixels: The images as stored.
        labels: Class indices; -1 where an image has none.
        ids: The image's number in its data set, whatever the order, split or shard.
        counted: False for images that only fill up the last shard of several processes.
    """

    pixels: Pixels
    labels: Labels
    ids: Labels
    counted: Bool[Tensor, "batch"]
