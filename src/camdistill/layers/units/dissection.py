"""What a unit responds to, where masks of concepts are known: network dissection.

Bau et al. 2017, https://arxiv.org/abs/1704.05796, section 2: a unit's map, stretched to the image,
is thresholded at a quantile of its own activations, and compared with each concept's mask by
intersection over union, over all images together. The paper takes one quantile (the top 0.5 %);
objects that fill a tenth of a small image are then out of reach, so several are tried on one half
of the images, and what is told is measured on the other half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.engine.request import upcast
from camdistill.networks.capture import capture, inspection_mode, unwrap_outer
from camdistill.types import Images

TOPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
ROOM = 256 << 20  # bytes of units' levels at the images' size
COPIES = 3  # a level, whether it is above a threshold, and that as a number again
DETECTOR = 0.04  # the paper's: a unit with this IoU or more is a detector

# Of their own size, so that a misfit is told in words.
Masks = Mapping[str, Bool[Tensor, "_ _ _"]]


@dataclass(frozen=True)
class Dissection:
    """Concepts of a layer's units.

    Attributes:
        layer: Its name.
        concepts: Names, in the order of the columns.
        iou: Intersection over union on the images that chose nothing, [K, concepts].
        chance: What a mask of the same size that knows nothing of the concept has, [K, concepts].
        top: Share of places above the threshold, chosen for each unit and concept.
    """

    layer: str
    concepts: tuple[str, ...]
    iou: Float[Tensor, "units concepts"]
    chance: Float[Tensor, "units concepts"]
    top: Float[Tensor, "units concepts"]

    def best(self, unit: int, count: int = 3) -> list[tuple[str, float, float]]:
        """The concepts of a unit by what their IoU is above chance: (name, IoU, chance)."""
        order = (self.iou[unit] - self.chance[unit]).argsort(descending=True)[:count].tolist()
        return [
            (self.concepts[place], float(self.iou[unit, place]), float(self.chance[unit, place]))
            for place in order
        ]

    @property
    def detectors(self) -> Int[Tensor, "found"]:
        """Units whose best concept has an IoU of 0.04 or more and twice chance or more."""
        best = (self.iou - self.chance).argmax(1, keepdim=True)
        iou, chance = self.iou.gather(1, best)[:, 0], self.chance.gather(1, best)[:, 0]
        return ((iou >= DETECTOR) & (iou >= 2 * chance)).nonzero().flatten()


@torch.no_grad()
def dissect(
    network: nn.Module,
    images: Images,
    masks: Masks,
    layers: Sequence[str],
    *,
    chunk: int = 64,
    room: int = ROOM,
) -> dict[str, Dissection]:
    """What units respond to, by layer.

    Args:
        network: Bare or wrapped.
        images: As the network takes them; in an order that has nothing to do with concepts.
        masks: Where each concept is in each image, by name, at the images' size.
        layers: Layers [B, K, h, w]; see `networks.capture`.
        chunk: Images in one forward.
        room: Bytes for units stretched to the images' size; as many units at once as fit, one in
            any case. Changes nothing but memory.

    Returns:
        By layer; nothing for fewer than 2 images, as there are no two halves.

    Raises:
        UserError: The masks don't fit the images.
    """
    count = len(images)
    if count < 2:
        return {}
    wrong = [name for name, mask in masks.items() if mask.shape != (count, *images.shape[2:])]
    if wrong or not masks:
        raise UserError(
            f"the mask '{(wrong or ['none'])[0]}' doesn't fit {count} images of "
            f"{images.shape[2]}x{images.shape[3]}; give one mask an image, of its size"
        )
    concepts = torch.stack([mask.flatten(1) for mask in masks.values()], 1)
    thresholds: dict[str, Tensor] = {}
    tallies: dict[str, list[_Tally]] = {}
    with inspection_mode(network):
        for layer, values in _sampled(network, images[0::2], layers, chunk).items():
            thresholds[layer] = _quantiles(values, images.shape[2:], room)
        for start in range(0, count, chunk):
            part = images[start : start + chunk]
            with capture(network, layers) as outputs:
                unwrap_outer(network)(part)
            half = (torch.arange(start, start + len(part)) % 2).bool()
            for layer in layers:
                both = tallies.setdefault(layer, [_Tally(), _Tally()])
                for number, chosen in enumerate((~half, half)):
                    if chosen.any():
                        both[number].add(
                            outputs[layer][chosen],
                            concepts[start : start + len(part)][chosen],
                            thresholds[layer],
                            part.shape[2:],
                            room,
                        )
    return {layer: _told(layer, tuple(masks), *tallies[layer]) for layer in layers}


class _Tally:
    """Counts of pixels: of unit masks, of concepts, of both."""

    def __init__(self) -> None:
        self.both: Tensor | int = 0
        self.units: Tensor | int = 0
        self.concepts: Tensor | int = 0
        self.pixels = 0

    def add(
        self, output: Tensor, concepts: Tensor, thresholds: Tensor, size: Sequence[int], room: int
    ) -> None:
        """Counts some images: output [B, K, h, w], concepts [B, N, P], thresholds [T, K]."""
        known = concepts.transpose(0, 1).flatten(1).float()
        both, own = [], []
        for units in _slices(output, size, room):
            levels = _stretched(output[:, units], size).transpose(0, 1).flatten(1)
            counted = [_overlaps(levels > one[:, None], known) for one in thresholds[:, units]]
            both.append(torch.stack([shared for shared, _ in counted]))
            own.append(torch.stack([alone for _, alone in counted]))
        self.both = self.both + torch.cat(both, 1)
        self.units = self.units + torch.cat(own, 1)
        self.concepts = self.concepts + known.sum(1).double()
        self.pixels += known.shape[1]

    def iou(self) -> Tensor:
        """[T, K, N]; 0 where there is neither."""
        assert isinstance(self.units, Tensor), "images were counted"
        assert isinstance(self.concepts, Tensor), "images were counted"
        union = self.units[..., None] + self.concepts - self.both
        return self.both / union.clamp_min(1)

    def chance(self) -> Tensor:
        """IoU of independent masks of these sizes, [T, K, N]."""
        assert isinstance(self.units, Tensor), "images were counted"
        assert isinstance(self.concepts, Tensor), "images were counted"
        unit, concept = self.units[..., None] / self.pixels, self.concepts / self.pixels
        both = unit * concept
        return both / (unit + concept - both).clamp_min(1e-12)


def _overlaps(above: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels that units [K, P] share with concepts [N, P], and those that they have."""
    numbers = above.float()
    return (numbers @ known.T).double(), numbers.sum(1).double()


def _told(layer: str, concepts: tuple[str, ...], choosing: _Tally, telling: _Tally) -> Dissection:
    best = (choosing.iou() - choosing.chance()).argmax(0, keepdim=True)
    tops = torch.tensor(TOPS, dtype=torch.float64)[best[0].cpu()]
    return Dissection(
        layer,
        concepts,
        telling.iou().gather(0, best)[0],
        telling.chance().gather(0, best)[0],
        tops,
    )


def _sampled(
    network: nn.Module, images: Images, layers: Sequence[str], chunk: int
) -> dict[str, Tensor]:
    """Outputs [S, K, h, w] of at most 64 evenly spread images, by layer."""
    places = torch.linspace(0, len(images) - 1, min(len(images), 64)).long()
    found: dict[str, list[Tensor]] = {}
    for part in torch.split(images[places], chunk):
        with capture(network, layers) as outputs:
            unwrap_outer(network)(part)
        for layer, output in outputs.items():
            found.setdefault(layer, []).append(output)
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def _quantiles(output: Tensor, size: Sequence[int], room: int) -> Float[Tensor, "tops units"]:
    """Thresholds above which the shares `TOPS` lie; at least 0, as an inactive unit has no mask."""
    found = []
    for units in _slices(output, size, room):
        # Every seventh pixel: 7 shares no factor with sides and strides.
        values = _stretched(output[:, units], size)[:, :, ::7].transpose(0, 1).flatten(1)
        ordered = values.sort(dim=1).values
        last = ordered.shape[1] - 1
        places = [round((1 - top) * last) for top in TOPS]
        found.append(ordered[:, places].T.clamp_min(0))
    return torch.cat(found, 1)


def _slices(output: Tensor, size: Sequence[int], room: int) -> list[slice]:
    """Units of an output [B, K, h, w] that fit into so many bytes at the images' size."""
    units, values = output.shape[1], len(output) * size[0] * size[1]
    width = max(room // (4 * COPIES * values), 1)
    return [slice(start, start + width) for start in range(0, units, width)]


def _stretched(output: Tensor, size: Sequence[int]) -> Tensor:
    """A layer's output at the images' size, [B, K, pixels]."""
    values = upcast(output).float().contiguous()  # one way to compute, whatever the slice
    return F.interpolate(values, tuple(size), mode="bilinear", align_corners=False).flatten(2)
