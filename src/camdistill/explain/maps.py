"""Pure functions of maps: rectify, normalize, resize, fuse.

All take maps of shape [..., h, w] and treat every map on its own; all are differentiable.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Normalization = Literal["minmax", "max"]
Fusion = Literal["mean", "max", "product"]
AnyMaps = Float[Tensor, "*maps height width"]
OnGrid = Float[Tensor, "*maps rows columns"]


def relu(maps: AnyMaps) -> AnyMaps:
    """The evidence for the class: negative values become 0 (Selvaraju et al. 2017, eq. 2)."""
    return F.relu(maps)


def normalize(maps: AnyMaps, kind: Normalization = "minmax", *, epsilon: float = 0.0) -> AnyMaps:
    """Scale every map by its own range.

    Args:
        maps: Raw or rectified maps.
        kind: "minmax" is (m - min m) / (max m - min m), in [0, 1]; "max" is m / max |m|, in
            [-1, 1], and keeps the sign and the zero.
        epsilon: Added to the range, to have other libraries' pictures: 1e-7 is pytorch-grad-cam's,
            1e-8 TorchCAM's. Above 0 it makes weak maps, such as a probability's, pale.

    Returns:
        Maps of the same dtype. A map whose range is lost in rounding (a constant one for "minmax",
        a zero one for "max") becomes 0, never NaN.
    """
    if kind not in ("minmax", "max"):
        raise ValueError(f"kind is {kind!r}; it is 'minmax' or 'max'")
    float_maps = maps if maps.dtype == torch.float64 else maps.float()
    size = float_maps.abs().amax((-2, -1), keepdim=True)
    if kind == "minmax":
        low = float_maps.amin((-2, -1), keepdim=True)
        float_maps = float_maps - low
        span = float_maps.amax((-2, -1), keepdim=True)
        # A few units in the last place of the largest value are rounding, not a picture.
        blank = span <= 8 * torch.finfo(maps.dtype).eps * size
    else:
        span = size
        blank = span == 0
    return torch.where(blank, 0, float_maps / (torch.where(blank, 1, span) + epsilon)).to(
        maps.dtype
    )


def upsample(maps: AnyMaps, size: tuple[int, int]) -> OnGrid:
    """Bilinear interpolation to an image's size, with `align_corners=False`, for looking at.

    To compare maps of different grids take `resize`, which averages where it shrinks.
    """
    return _interpolate(maps, size)


def resize(maps: AnyMaps, size: tuple[int, int]) -> OnGrid:
    """Bring maps to another grid: bilinear where it grows, area-weighted where it shrinks.

    An axis that shrinks is averaged over each new cell (exactly, whatever the ratio, so the mean of
    the map is kept); an axis that grows is interpolated with `align_corners=False`. Half precision
    is averaged in float32, and autocast changes nothing.
    """
    height, width = maps.shape[-2:]
    smaller = (min(size[0], height), min(size[1], width))
    float_maps = maps if maps.dtype == torch.float64 else maps.float()
    with torch.autocast(maps.device.type, enabled=False):  # a matrix product would be in bf16
        if smaller[0] < height:
            float_maps = (
                _averaging(height, smaller[0], float_maps.dtype, float_maps.device) @ float_maps
            )
        if smaller[1] < width:
            float_maps = (
                float_maps @ _averaging(width, smaller[1], float_maps.dtype, float_maps.device).T
            )
    return _interpolate(float_maps, size).to(maps.dtype)


def fuse(
    maps: Sequence[Float[Tensor, "..."]],
    kind: Fusion = "mean",
    size: tuple[int, int] | None = None,
) -> OnGrid:
    """One map from several layers' maps, cell by cell.

    Args:
        maps: One entry a layer; normalize them first, as raw maps of layers differ in scale.
        kind: "mean", "max" or "product".
        size: Grid of the result; None is the finest of the layers, per axis.
    """
    if not maps:
        raise ValueError("there is no map to fuse")
    if kind not in ("mean", "max", "product"):
        raise ValueError(f"kind is {kind!r}; it is 'mean', 'max' or 'product'")
    if size is None:
        size = (max(layer.shape[-2] for layer in maps), max(layer.shape[-1] for layer in maps))
    stack = torch.stack([upsample(layer, size) for layer in maps])
    if kind == "mean":
        return stack.mean(0)
    return stack.amax(0) if kind == "max" else stack.prod(0)


def _interpolate(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    planes = maps.reshape(-1, 1, *maps.shape[-2:])
    grown = F.interpolate(planes, size=tuple(size), mode="bilinear", align_corners=False)
    return grown.reshape(*maps.shape[:-2], *size)


@lru_cache(maxsize=64)
def _averaging(before: int, after: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows are new cells: the share of each old cell in the new one's length.

    Kept, because a training step asks for the same one each time, and bringing it to a GPU waits.
    """
    with torch.inference_mode(False):  # so that a later step can take part in a graph with it
        edges = torch.arange(after + 1, dtype=torch.float64) * before / after
        cells = torch.arange(before, dtype=torch.float64)
        overlap = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
        return (overlap.clamp(min=0) * after / before).to(device, dtype)
