"""The images and places at which each channel is most active, the strongest first.

Value and image are one integer: the float's bits in an order that integers keep, then the image's
number counted down, so that of equal values the image with the smaller number comes first. No two
keys are equal, so the winners don't depend on the order in which images were seen.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camdistill.errors import UserError
from camdistill.layers.sweep.statistics.layer_statistics import TopImages

NOTHING = torch.iinfo(torch.int64).min
LARGEST_ID = (1 << 32) - 1


@dataclass(frozen=True)
class TopKeys:
    """The largest keys of each channel, descending, and where in the image.

    Attributes:
        keys: `NOTHING` where there is no image.
        places: Row times the grid's width, plus column.
    """

    keys: Int[Tensor, "channels top"]
    places: Int[Tensor, "channels top"]

    @classmethod
    def empty(cls, channels: int, top: int) -> "TopKeys":
        """Of no image."""
        keys = torch.full((channels, top), NOTHING)
        return cls(keys, torch.zeros_like(keys))

    @classmethod
    def of(
        cls,
        output: Float[Tensor, "batch channels height width"],
        largest: Float[Tensor, "batch channels"],
        ids: Int[Tensor, "batch"],
        finite: Tensor,
        earlier: "TopKeys",
    ) -> "TopKeys":
        """Of a batch.

        Args:
            output: What the layer gave.
            largest: Its maxima by image and channel.
            ids: The images' numbers.
            finite: Images that count.
            earlier: Of earlier batches: what can't beat it isn't located.

        Raises:
            UserError: If a number is negative or above 2^32 - 1.
        """
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) <= LARGEST_ID:
            raise UserError(
                f"image numbers go from {int(ids.min())} to {int(ids.max())}: "
                f"number images from 0 to {LARGEST_ID}"
            )
        keys = _keys(largest.float(), ids)
        keys[~finite] = NOTHING
        count = min(earlier.keys.shape[1], len(ids))
        candidates = torch.topk(keys.T, count, dim=1)
        better = (candidates.values > earlier.keys[:, -1:]) & (candidates.values > NOTHING)
        channels, ranks = better.nonzero(as_tuple=True)
        images = candidates.indices[channels, ranks]
        device = output.device
        maps = output[images.to(device), channels.to(device)].flatten(1)
        best = cls.empty(*earlier.keys.shape)
        best.keys[:, :count] = torch.where(better, candidates.values, NOTHING)
        best.places[channels, ranks] = maps.argmax(1).cpu()
        return best

    def merge(self, other: "TopKeys") -> "TopKeys":
        """Of both."""
        keys = torch.cat([self.keys, other.keys], 1)
        best = torch.topk(keys, self.keys.shape[1], dim=1)
        places = torch.cat([self.places, other.places], 1).gather(1, best.indices)
        return TopKeys(best.values, places)

    def top_images(self, columns: int) -> TopImages:
        """As people read it.

        Args:
            columns: Width of the layer's grid.
        """
        missing = self.keys == NOTHING
        values = _keys_to_floats(self.keys >> 32)
        images = LARGEST_ID - (self.keys & LARGEST_ID)
        return TopImages(
            values=values.masked_fill(missing, torch.nan),
            images=images.masked_fill(missing, -1),
            rows=(self.places // columns).masked_fill(missing, -1),
            columns=(self.places % columns).masked_fill(missing, -1),
        )


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    bits = (values + 0.0).view(torch.int32)
    # Negative floats are ordered backwards: turn all but the sign.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (LARGEST_ID - ids.long())[:, None]


def _keys_to_floats(ordered: Tensor) -> Tensor:
    bits = ordered.int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
