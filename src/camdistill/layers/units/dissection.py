"""Network dissection: which concepts a unit responds to, where their masks are known.

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
MAX_BYTES = 256 << 20  # bytes of units' levels at the images' size
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
    max_bytes: int = MAX_BYTES,
) -> dict[str, Dissection]:
    """What units respond to, by layer.

    Args:
        network: Bare or wrapped.
        images: Images as the network takes them; in an order that has nothing to do with concepts.
        masks: Where each concept is in each image, by name, at the images' size.
        layers: Layers [B, K, h, w]; see `networks.capture`.
        chunk: Images in one forward.
        max_bytes: Bytes for units stretched to the images' size; as many units at once as fit,
            one in any case. Changes nothing but memory.

    Returns:
        By layer; nothing for fewer than 2 images, as there are no two halves.

    Raises:
        UserError: The masks don't fit the images.
    """
    count = len(images)
    if count < 2:
        return {}
    misfits = [name for name, mask in masks.items() if mask.shape != (count, *images.shape[2:])]
    if misfits or not masks:
        raise UserError(
            f"the mask '{(misfits or ['none'])[0]}' doesn't fit {count} images of "
            f"{images.shape[2]}x{images.shape[3]}; give one mask an image, of its size"
        )
    concepts = torch.stack([mask.flatten(1) for mask in masks.values()], 1)
    thresholds: dict[str, Tensor] = {}
    tallies: dict[str, list[_Tally]] = {}
    with inspection_mode(network):
        for layer, values in _sample_outputs(network, images[0::2], layers, chunk).items():
            thresholds[layer] = _quantiles(values, images.shape[2:], max_bytes)
        for start in range(0, count, chunk):
            part = images[start : start + chunk]
            with capture(network, layers) as outputs:
                unwrap_outer(network)(part)
            second_half = (torch.arange(start, start + len(part)) % 2).bool()
            for layer in layers:
                half_tallies = tallies.setdefault(layer, [_Tally(), _Tally()])
                for number, rows in enumerate((~second_half, second_half)):
                    if rows.any():
                        half_tallies[number].add(
                            outputs[layer][rows],
                            concepts[start : start + len(part)][rows],
                            thresholds[layer],
                            part.shape[2:],
                            max_bytes,
                        )
    return {layer: _build_dissection(layer, tuple(masks), *tallies[layer]) for layer in layers}


class _Tally:
    """Counts of pixels: of unit masks, of concepts, of both."""

    def __init__(self) -> None:
        self.shared: Tensor | int = 0
        self.units: Tensor | int = 0
        self.concepts: Tensor | int = 0
        self.pixels = 0

    def add(
        self,
        output: Tensor,
        concepts: Tensor,
        thresholds: Tensor,
        size: Sequence[int],
        max_bytes: int,
    ) -> None:
        """Counts some images: output [B, K, h, w], concepts [B, N, P], thresholds [T, K]."""
        concept_masks = concepts.transpose(0, 1).flatten(1).float()
        overlaps, unit_pixels = [], []
        for units in _unit_slices(output, size, max_bytes):
            levels = _resize_outputs(output[:, units], size).transpose(0, 1).flatten(1)
            tallies = [
                _overlaps(levels > threshold[:, None], concept_masks)
                for threshold in thresholds[:, units]
            ]
            overlaps.append(torch.stack([overlap for overlap, _ in tallies]))
            unit_pixels.append(torch.stack([unit_count for _, unit_count in tallies]))
        self.shared = self.shared + torch.cat(overlaps, 1)
        self.units = self.units + torch.cat(unit_pixels, 1)
        self.concepts = self.concepts + concept_masks.sum(1).double()
        self.pixels += concept_masks.shape[1]

    def iou(self) -> Tensor:
        """[T, K, N]; 0 where there is neither."""
        assert isinstance(self.units, Tensor), "images were counted"
        assert isinstance(self.concepts, Tensor), "images were counted"
        union = self.units[..., None] + self.concepts - self.shared
        return self.shared / union.clamp_min(1)

    def chance(self) -> Tensor:
        """IoU of independent masks of these sizes, [T, K, N]."""
        assert isinstance(self.units, Tensor), "images were counted"
        assert isinstance(self.concepts, Tensor), "images were counted"
        unit, concept = self.units[..., None] / self.pixels, self.concepts / self.pixels
        shared = unit * concept
        return shared / (unit + concept - shared).clamp_min(1e-12)


def _overlaps(above: Tensor, concept_masks: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels that units [K, P] share with concepts [N, P], and those that they have."""
    unit_masks = above.float()
    return (unit_masks @ concept_masks.T).double(), unit_masks.sum(1).double()


def _build_dissection(
    layer: str, concepts: tuple[str, ...], choosing_tally: _Tally, measuring_tally: _Tally
) -> Dissection:
    best = (choosing_tally.iou() - choosing_tally.chance()).argmax(0, keepdim=True)
    tops = torch.tensor(TOPS, dtype=torch.float64)[best[0].cpu()]
    return Dissection(
        layer,
        concepts,
        measuring_tally.iou().gather(0, best)[0],
        measuring_tally.chance().gather(0, best)[0],
        tops,
    )


def _sample_outputs(
    network: nn.Module, images: Images, layers: Sequence[str], chunk: int
) -> dict[str, Tensor]:
    """Outputs [S, K, h, w] of at most 64 evenly spread images, by layer."""
    places = torch.linspace(0, len(images) - 1, min(len(images), 64)).long()
    outputs_by_layer: dict[str, list[Tensor]] = {}
    for part in torch.split(images[places], chunk):
        with capture(network, layers) as outputs:
            unwrap_outer(network)(part)
        for layer, output in outputs.items():
            outputs_by_layer.setdefault(layer, []).append(output)
    return {layer: torch.cat(parts) for layer, parts in outputs_by_layer.items()}


def _quantiles(output: Tensor, size: Sequence[int], max_bytes: int) -> Float[Tensor, "tops units"]:
    """Thresholds above which the shares `TOPS` lie; at least 0, as an inactive unit has no mask."""
    thresholds = []
    for units in _unit_slices(output, size, max_bytes):
        # Every seventh pixel: 7 shares no factor with sides and strides.
        values = _resize_outputs(output[:, units], size)[:, :, ::7].transpose(0, 1).flatten(1)
        ordered = values.sort(dim=1).values
        last = ordered.shape[1] - 1
        places = [round((1 - top) * last) for top in TOPS]
        thresholds.append(ordered[:, places].T.clamp_min(0))
    return torch.cat(thresholds, 1)


def _unit_slices(output: Tensor, size: Sequence[int], max_bytes: int) -> list[slice]:
    """Units of an output [B, K, h, w] that fit into so many bytes at the images' size."""
    units, pixels = output.shape[1], len(output) * size[0] * size[1]
    width = max(max_bytes // (4 * COPIES * pixels), 1)
    return [slice(start, start + width) for start in range(0, units, width)]


def _resize_outputs(output: Tensor, size: Sequence[int]) -> Tensor:
    """A layer's output at the images' size, [B, K, pixels]."""
    values = upcast(output).float().contiguous()  # one way to compute, whatever the slice
    return F.interpolate(values, tuple(size), mode="bilinear", align_corners=False).flatten(2)
