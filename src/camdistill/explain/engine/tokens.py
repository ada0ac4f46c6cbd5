"""Where the cells of a layer's output are: grids [B, K, h, w], [B, h, w, K], or rows of tokens.

Vision transformers give tokens [B, N, K]: a class token, perhaps registers, then the patches row by
row (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, section 3.1; Darcet et al. 2024,
https://arxiv.org/abs/2309.16588). Swin gives [B, h, w, K] (Liu et al. 2021,
https://arxiv.org/abs/2103.14030). Grad-CAM is a formula of cells, so for it all are one thing.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor

from camdistill.errors import UserError

Kind = Literal["auto", "channels_first", "channels_last", "tokens"]
Layout = Kind | Callable[[Tensor], Tensor]
# A class token and up to eight registers; patches of up to so many pixels.
MOST_PREFIXES = 9
LARGEST_PATCH = 64


def cell_transform(
    name: str, output: Tensor, size: tuple[int, int], layout: Layout = "auto"
) -> Callable[[Tensor], Tensor] | None:
    """How a layer's output, and its gradient, become [B, K, h, w]; None if it is that already.

    Args:
        name: The layer's, for the error.
        output: What the layer gave.
        size: Height and width of the images in pixels.
        layout: "auto" takes three axes as tokens: the fewest tokens are left out from the front so
            that the rest tile the image. It takes four axes as [B, h, w, K] where h and w are the
            image's divided by one whole number and the last two axes have another aspect, else as
            [B, K, h, w]. A callable turns the output into [B, K, h, w]; it must only
            choose and move numbers, as it does the same to the gradient.

    Raises:
        UserError: If the output has no spatial size in that layout.
    """
    if not isinstance(layout, str):
        return layout
    if layout == "tokens" or (layout == "auto" and output.dim() == 3):
        return _patch_transform(name, output, size)
    if output.dim() == 4 and (
        layout == "channels_last" or (layout == "auto" and _is_channels_last(output, size))
    ):
        return _channels_first
    return None


def _is_channels_last(output: Tensor, size: tuple[int, int]) -> bool:
    _, first, second, third = output.shape
    stride = max(size[0] // first, 1)
    tiles = (first * stride, second * stride) == size and first * second > 1
    # To a cell, as convolutions without padding lose some.
    other_aspect = abs(second * size[1] - third * size[0]) > max(size)
    return tiles and other_aspect


def _channels_first(values: Tensor) -> Tensor:
    return values.movedim(-1, -3)


def are_tokens(output: Tensor, size: tuple[int, int]) -> bool:
    """Whether an output [B, N, K] has patches that tile images of a size."""
    return output.dim() == 3 and _tiling(output.shape[1], size) is not None


def _patch_transform(
    name: str, output: Tensor, size: tuple[int, int]
) -> Callable[[Tensor], Tensor]:
    tiling = _tiling(output.shape[1], size) if output.dim() == 3 else None
    if tiling is None:
        raise UserError(
            f"layer '{name}' gives {list(output.shape)}, which has no spatial size: as tokens of "
            f"images {size[0]}x{size[1]} it would be [B, N, K] with N patches in rows and columns, "
            f"after up to {MOST_PREFIXES} class tokens and registers; ask for another layer, or "
            "give layout=, a function of that output which returns [B, K, h, w]"
        )
    return partial(_cells, prefixes=tiling[0], grid=tiling[1])


def _tiling(tokens: int, size: tuple[int, int]) -> tuple[int, tuple[int, int]] | None:
    """How many tokens come before the patches, and the patches' rows and columns."""
    for prefixes in range(MOST_PREFIXES + 1):
        if grid := _grid(tokens - prefixes, size):
            return prefixes, grid
    return None


def _cells(values: Tensor, prefixes: int, grid: tuple[int, int]) -> Tensor:
    patches = values[..., prefixes:, :]
    return patches.reshape(*patches.shape[:-2], *grid, patches.shape[-1]).movedim(-1, -3)


def _grid(patches: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of square patches that tile the image; None if there are none."""
    for patch in range(1, LARGEST_PATCH + 1):
        rows, columns = size[0] // patch, size[1] // patch
        if (rows * patch, columns * patch) == size and rows * columns == patches > 1:
            return rows, columns
    return None
