"""The patches that excite a unit most, cut to its receptive field.

Zeiler and Fergus 2014, section 4.1 (https://arxiv.org/abs/1311.2901): the top nine, one an image.
A unit whose receptive field is larger than the image is shown with the whole image and the region
in which it is active (Bau et al. 2017, https://arxiv.org/abs/1704.05796, section 2.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from camdistill.explain.engine.request import upcast
from camdistill.layers.units.receptive_spans import Field, ReceptiveField
from camdistill.networks.capture import capture, inspection_mode, unwrap_outer
from camdistill.types import Images

ACTIVE_SHARE = 0.5  # of the unit's maximum in the image: where the region's border is drawn


@dataclass(frozen=True)
class Patch:
    """A piece of an image.

    Attributes:
        pixels: In [0, 1]; gray beyond the image.
        inside: Which pixels are the image's.
        box: Top, left, bottom, right in the image, the last two exclusive; may exceed it.
        region: Where the unit is active, for a whole image; None for a piece that it sees.
        value: Activation there.
        image: Number of the image.
    """

    pixels: Float[Tensor, "channels tall wide"]
    inside: Bool[Tensor, "tall wide"]
    box: tuple[int, int, int, int]
    region: Bool[Tensor, "tall wide"] | None = None
    value: float = float("nan")
    image: int = -1


def exceeds_image(field: Field, size: tuple[int, int]) -> bool:
    """Whether units see more than the image along an axis, or nobody knows: no piece can be cut."""
    if not isinstance(field, ReceptiveField):
        return True
    return field.rows.size > size[0] or field.columns.size > size[1]


def cut_patch(
    image: Float[Tensor, "channels height width"], box: tuple[int, int, int, int]
) -> Patch:
    """The pixels of a box; those beyond the image are gray."""
    top, left, bottom, right = box
    height, width = image.shape[1:]
    pixels = image.new_full((len(image), bottom - top, right - left), 0.5)
    inside = torch.zeros(bottom - top, right - left, dtype=torch.bool)
    rows = slice(min(max(top, 0), height), min(max(bottom, 0), height))
    columns = slice(min(max(left, 0), width), min(max(right, 0), width))
    window = (
        slice(rows.start - top, rows.stop - top),
        slice(columns.start - left, columns.stop - left),
    )
    if rows.start < rows.stop and columns.start < columns.stop:
        pixels[(slice(None), *window)] = image[:, rows, columns]
        inside[window] = True
    return Patch(pixels, inside, box)


def whole_image_patch(
    image: Float[Tensor, "channels height width"], unit_map: Float[Tensor, "rows columns"]
) -> Patch:
    """The whole image, with the region where a unit is at half its maximum or more."""
    size = (image.shape[1], image.shape[2])
    level = F.interpolate(unit_map[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    peak = float(unit_map.max())
    region = level >= ACTIVE_SHARE * peak if peak > 0 else torch.zeros(size, dtype=torch.bool)
    inside = torch.ones(size, dtype=torch.bool)
    return Patch(image, inside, (0, 0, *size), region)


def mean_patch(patches: Sequence[Patch]) -> Patch:
    """The mean of pieces of one size; a pixel beyond one image counts for the others alone."""
    if not patches:
        raise ValueError("a mean needs at least one patch")
    counts = torch.stack([patch.inside for patch in patches]).sum(0)
    total = torch.stack([patch.pixels * patch.inside for patch in patches]).sum(0)
    mean = torch.where(counts > 0, total / counts.clamp_min(1), 0.5)
    value = sum(patch.value for patch in patches) / len(patches)
    return Patch(mean, counts > 0, patches[0].box, None, value)


@torch.no_grad()
def unit_maps(
    network: nn.Module, images: Images, layer: str, units: Sequence[int], *, chunk: int = 32
) -> Float[Tensor, "batch chosen rows columns"]:
    """Some units' activations of images, float32 on the CPU.

    Args:
        network: Bare or wrapped.
        images: Images as the network takes them.
        layer: See `networks.capture`.
        units: Channels.
        chunk: Images in one forward.
    """
    chunks = []
    with inspection_mode(network):
        for part in torch.split(images, chunk):
            with capture(network, [layer]) as outputs:
                unwrap_outer(network)(part)
            chunks.append(upcast(outputs[layer][:, list(units)]).float().cpu())
    return torch.cat(chunks)
