"""Geometric views (crop, flip, resize), applied to images and to their maps together.

A view is drawn from (seed, epoch, image id) alone, so it is the same whatever the batch, the device
or the number of processes, and a resumed run draws the views of the run that was not killed.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, Num
from torch import Tensor

from camdistill.errors import UserError
from camdistill.types import Labels, Maps

# Aspect ratios of a resized crop: those of Szegedy et al. 2015 (GoogLeNet), as in torchvision.
RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Augment:
    """How training images are varied: one geometric view per image and epoch.

    Args:
        crop: `pad` shifts by up to `padding` pixels, black outside (He et al. 2016, section 4.2);
            `resized` cuts a part of the image and enlarges it (Szegedy et al. 2015).
        padding: Largest shift of `pad`, in pixels.
        scale: Smallest and largest area of a `resized` crop, as a fraction of the image.
        flip: Mirror half of the images, left to right.
    """

    crop: Literal["none", "pad", "resized"] = "none"
    padding: int = 4
    scale: tuple[float, float] = (0.35, 1.0)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise UserError(f"augment.padding is {self.padding}; give 0 or more pixels")
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise UserError(
                f"augment.scale is {self.scale}; give (low, high) with 0 < low <= high <= 1"
            )

    def check_size(self, size: tuple[int, int]) -> None:
        """Checks that views of images of a height and width show something of them.

        Raises:
            UserError: They may be shifted by more than half of their shorter side.
        """
        if self.crop == "pad" and 2 * self.padding > min(size):
            raise UserError(
                f"augment.padding is {self.padding} for images of {size[0]}x{size[1]} pixels, and "
                f"would leave little but black; give {min(size) // 2} or less"
            )


class View(NamedTuple):
    """One view per image: first the flip, then the box.

    Attributes:
        flip: Whether the image is mirrored, left to right.
        box: (top, left, height, width) in fractions of the image, in the coordinates after the
            flip. It may leave [0, 1]: an image is black there, a map goes on with its edge.
        shift: True promises that every box is as large as the image and moved by whole pixels, so
            that images are moved exactly (no arithmetic on pixels) and without asking the device.
    """

    flip: Bool[Tensor, "batch"]
    box: Float[Tensor, "batch 4"]
    shift: bool = False


def _to_int64(number: int) -> int:
    """The int64 with the same bits as a number modulo 2**64."""
    return (number + 2**63) % 2**64 - 2**63


_GOLDEN = _to_int64(0x9E3779B97F4A7C15)


def _splitmix64(state: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) in wrapping int64 arithmetic."""
    # `>>` keeps the sign; the mask makes it the logical shift of the published code
    state = (state ^ ((state >> 30) & (2**34 - 1))) * _to_int64(0xBF58476D1CE4E5B9)
    state = (state ^ ((state >> 27) & (2**37 - 1))) * _to_int64(0x94D049BB133111EB)
    return state ^ ((state >> 31) & (2**33 - 1))


def uniforms_by_id(
    ids: Labels, count: int, *, seed: int, epoch: int
) -> Float[Tensor, "batch {count}"]:
    """Random numbers in [0, 1) that depend on (seed, epoch, id, column) alone.

    Integer arithmetic only, so every device gives the same bits.
    """
    words = torch.tensor([_to_int64(seed), _to_int64(epoch)], dtype=torch.int64)
    # a Python number: bringing a tensor to a GPU would make every step wait for it
    key = int(_splitmix64(_splitmix64(words[:1] + _GOLDEN) + words[1:]))
    # id + 1: splitmix of an all-zero state is zero
    rows = _splitmix64(key + (ids.to(torch.int64) + 1) * _GOLDEN)
    columns = torch.arange(1, count + 1, device=ids.device) * _GOLDEN
    bits = _splitmix64(rows[:, None] + columns[None, :])
    return ((bits >> 40) & (2**24 - 1)).to(torch.float32) * 2.0**-24


def identity_view(n: int, device: torch.device | str | None = None) -> View:
    """The view that changes nothing."""
    box = torch.zeros(n, 4, device=device)
    box[:, 2:] = 1
    return View(torch.zeros(n, dtype=torch.bool, device=device), box, shift=True)


def draw_view(
    augment: Augment, ids: Labels, size: tuple[int, int], *, seed: int, epoch: int
) -> View:
    """The views of some images in one epoch.

    Args:
        augment: What may vary.
        ids: The images' ids; a view depends on the id, not on the place in the batch.
        size: Height and width of the images in pixels.
        seed: The augmentation's seed.
        epoch: The epoch, from 0.
    """
    height, width = size
    # always five columns, so that the choice of the crop doesn't change who is flipped
    u = uniforms_by_id(ids, 5, seed=seed, epoch=epoch)
    view = identity_view(len(ids), device=ids.device)
    flip = u[:, 0] < 0.5 if augment.flip else view.flip
    if augment.crop == "none":
        return View(flip, view.box, shift=True)
    if augment.crop == "pad":
        reach = augment.padding
        shifts = torch.floor(u[:, 1:3] * (2 * reach + 1)) - reach
        corner = torch.stack([shifts[:, 0] / height, shifts[:, 1] / width], dim=1)
        return View(flip, torch.cat([corner, view.box[:, 2:]], dim=1), shift=True)
    low, high = augment.scale
    area = low + (high - low) * u[:, 3]
    log_low, log_high = math.log(RATIO[0]), math.log(RATIO[1])
    # width over height in pixels; the box is in fractions
    ratio = torch.exp(log_low + (log_high - log_low) * u[:, 4]) * (height / width)
    extent = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=1).clamp(max=1.0)
    corner = u[:, 1:3] * (1 - extent)
    return View(flip, torch.cat([corner, extent], dim=1))


def view_images(
    images: Num[Tensor, "batch channels height width"],
    view: View,
    size: tuple[int, int] | None = None,
) -> Num[Tensor, "batch channels rows columns"]:
    """Images under a view: flipped, then cut out and resized; black (0) outside the image.

    Whole-pixel shifts copy pixels. Other boxes are resampled with the antialiased triangle filter
    of `torch.nn.functional.interpolate(mode="bilinear", antialias=True)`; uint8 is rounded.

    Args:
        images: uint8 or floating point.
        view: One flip and box for each image.
        size: Height and width of the result; None keeps the images' own.
    """
    height, width = images.shape[-2:]
    if view.shift and size in (None, (height, width)):
        return _shift_images(images, view)
    top, left, box_height, box_width = view.box.unbind(1)
    rows, columns = size or (height, width)
    vertical = _resampling_weights(top, box_height, height, rows, outside="zero")
    horizontal = _resampling_weights(left, box_width, width, columns, outside="zero")
    # mirroring the source mirrors the columns of the matrix, which is smaller than the images
    horizontal = torch.where(view.flip[:, None, None], horizontal.flip(-1), horizontal)
    exact = images if images.is_floating_point() else images.float()
    # channels and rows as one axis: one matrix product for each image instead of three
    batch, channels = images.shape[:2]
    with torch.autocast(images.device.type, enabled=False):  # bf16 is too coarse for 256 levels
        narrow = exact.reshape(batch, channels * height, width) @ horizontal.to(exact).mT
        wide = narrow.view(batch, channels, height, columns).transpose(1, 2)
        resampled = vertical.to(exact) @ wide.reshape(batch, height, channels * columns)
    resampled = resampled.view(batch, rows, channels, columns).transpose(1, 2).contiguous()
    if images.is_floating_point():
        return resampled
    return resampled.round_().clamp_(0, 255).to(images.dtype)


def _shift_images(
    images: Num[Tensor, "batch channels height width"], view: View
) -> Num[Tensor, "batch channels height width"]:
    """Flip and whole-pixel shift as one gather: 0.7 ms for 256 CIFAR images on one core."""
    batch, channels, height, width = images.shape
    device = images.device
    top = (view.box[:, 0] * height).round().to(torch.int64)
    left = (view.box[:, 1] * width).round().to(torch.int64)
    row = torch.arange(height, device=device) + top[:, None]
    column = torch.arange(width, device=device) + left[:, None]
    column = torch.where(view.flip[:, None], width - 1 - column, column)
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[
        :, None, :
    ]
    index = row.clamp(0, height - 1)[:, :, None] * width + column.clamp(0, width - 1)[:, None, :]
    index = index.view(batch, 1, -1).expand(-1, channels, -1)
    shifted = images.reshape(batch, channels, -1).gather(2, index)
    return shifted.view(images.shape) * inside[:, None]


def view_maps(maps: Maps, view: View, *, flipped: bool) -> Maps:
    """Maps under a view, on the same grid: what the network's map of the moved image would be.

    The map is read as its bilinear interpolant (`align_corners=False`, edge-clamped) at the center
    of each cell of the moved grid, antialiased where a box enlarges the field of view. A shift by
    whole cells is thus exact, and the identity changes nothing; for shifts by part of a cell this
    equals moving a piecewise constant map and averaging over the cells.

    Args:
        maps: Raw maps of whole images.
        view: The images' views.
        flipped: True where the maps already belong to the mirrored images of `view.flip` (a network
            is not exactly symmetric, so a cache keeps both orientations); only the box is applied.
    """
    height, width = maps.shape[-2:]
    top, left, box_height, box_width = view.box.unbind(1)
    vertical = _resampling_weights(top, box_height, height, height, outside="edge")
    horizontal = _resampling_weights(left, box_width, width, width, outside="edge")
    if not flipped:
        horizontal = torch.where(view.flip[:, None, None], horizontal.flip(-1), horizontal)
    with torch.autocast(maps.device.type, enabled=False):
        return vertical.to(maps) @ maps @ horizontal.to(maps).mT


def _resampling_weights(
    start: Float[Tensor, "batch"],
    extent: Float[Tensor, "batch"],
    source: int,
    target: int,
    *,
    outside: Literal["zero", "edge"],
) -> Float[Tensor, "batch {target} {source}"]:
    """Weights of the source pixels in each target pixel, along one axis.

    The triangle filter as wide as the larger of a source and a target pixel, cut at the border and
    normalized to 1, which is what torch and Pillow do.
    """
    cells = (torch.arange(target, device=start.device, dtype=torch.float64) + 0.5) / target
    # float64: in float32 an error of 1e-7 of a large image is visible in the weights
    center = (start.double()[:, None] + extent.double()[:, None] * cells) * source
    inside = (center >= 0) & (center <= source)
    center = center.clamp(0.5, source - 0.5)
    support = (extent * source / target).clamp(min=1.0)[:, None, None]
    pixels = torch.arange(source, device=start.device, dtype=torch.float32) + 0.5
    # the whole part of the center apart, so that the difference is exact in float32
    base = center.floor()
    distance = (pixels - base.float()[:, :, None]) - (center - base).float()[:, :, None]
    weights = distance.abs_().div_(support).neg_().add_(1).clamp_(min=0)
    weights /= weights.sum(dim=2, keepdim=True)
    return weights * inside[:, :, None] if outside == "zero" else weights
