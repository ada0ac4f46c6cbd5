"""What Shapes looks like: backgrounds, colors, textures and patches, painted where masks say."""

import numpy as np
from jaxtyping import Bool, Float32, Int16, Int64, UInt8, UInt64

from camdistill.data import shapes_drawing as drawing

PATCH_COLORS = np.array(
    [
        *[(230, 25, 25), (25, 230, 25), (25, 25, 230), (230, 230, 25), (230, 25, 230)],
        *[(25, 230, 230), (245, 245, 245), (10, 10, 10), (230, 125, 25), (125, 25, 230)],
    ],
    np.uint8,
)
_STRIPES = np.array([(8, 0), (0, 8), (6, 6), (6, -6), (8, 4), (4, 8), (8, -4), (4, -8)])
# Numbers of the random streams; 0 is the scene's. Other backgrounds count up from the last.
_COLORS, _GRAIN, _SUPPRESSOR, _BACKGROUND = 1, 2, 3, 4


def paint_images(
    keys: UInt64[np.ndarray, "n"],
    masks: dict[str, Bool[np.ndarray, "n size size"]],
    shortcut_labels: Int64[np.ndarray, "n"],
    *,
    suppressor: float,
    swap: int,
) -> UInt8[np.ndarray, "n 3 size size"]:
    """Background, items and patch; every item's contrast is 60 to 85 in each channel.

    Args:
        keys: One an image.
        masks: Where everything is.
        shortcut_labels: Labels whose color the patch has.
        suppressor: Strength of a noise field that everything shares.
        swap: Which other background, from 1; 0 is the image's own.
    """
    n, size = len(keys), masks["background"].shape[-1]
    draw = drawing.uniforms_by_key(keys, _COLORS, 40)
    base = _levels(draw[:, :3], 85, 170)
    background, amplitude = base, _levels(draw[:, 3], 14, 40)
    if swap:
        # Near the first one, or the items' contrast would go.
        swap_numbers = drawing.uniforms_by_key(keys, _BACKGROUND + 2 * swap + 1, 4)
        background, amplitude = (
            base + _levels(swap_numbers[:, :3], -24, 25),
            _levels(swap_numbers[:, 3], 14, 40),
        )
    field = drawing.noise(keys, _BACKGROUND + 2 * swap, 3, size)
    field *= amplitude[:, None, None, None]
    field >>= 8
    field += background[:, :, None, None]
    grain = drawing.noise(keys, _GRAIN, 1, size)
    flat = field.reshape(n, 3, size * size)
    for index, name in enumerate(("object", "second", "distractor")):
        if name in masks:
            image, pixel = np.divmod(np.flatnonzero(masks[name]), size * size)
            item_numbers = draw[:, 4 + 12 * index : 16 + 12 * index]
            texture = _texture(
                item_numbers[:, 6:9], grain.reshape(n, size * size), image, pixel, size
            )
            sign = np.where(item_numbers[:, :3] < 0.5, -1, 1).astype(np.int16)
            color = base + sign * _levels(item_numbers[:, 3:6], 60, 86)
            for channel in range(3):
                flat[image, channel, pixel] = color[image, channel] + texture
    if suppressor > 0:
        shared = drawing.noise(keys, _SUPPRESSOR, 1, size) * np.int16(40 * suppressor)
        field += shared >> 7
    pixels: UInt8[np.ndarray, "n 3 size size"] = np.clip(field, 0, 255).astype(np.uint8)
    image, pixel = np.divmod(np.flatnonzero(masks["shortcut"]), size * size)
    pixels.reshape(n, 3, size * size)[image, :, pixel] = PATCH_COLORS[shortcut_labels[image]]
    return pixels


def _levels(draw: Float32[np.ndarray, "*n"], low: int, high: int) -> Int16[np.ndarray, "*n"]:
    """Whole numbers in [low, high)."""
    return (np.floor(draw * np.float32(high - low)) + low).astype(np.int16)


def _texture(
    draw: Float32[np.ndarray, "n 3"],
    grain: Int16[np.ndarray, "n pixels"],
    image: Int64[np.ndarray, "chosen"],
    pixel: Int64[np.ndarray, "chosen"],
    size: int,
) -> Int16[np.ndarray, "chosen"]:
    """Noise and stripes, both of random strength, at the chosen pixels."""
    rough, striped = _levels(draw[:, 0], 8, 40)[image], _levels(draw[:, 1], 0, 16)[image]
    row, column = np.divmod(pixel, size)
    direction = _STRIPES[_levels(draw[:, 2], 0, len(_STRIPES))][image]
    stripe = (column * direction[:, 0] + row * direction[:, 1]) // (size // 2) & 1
    level: Int16[np.ndarray, chosen] = grain[image, pixel] * rough >> 8
    level += striped * (2 * stripe - 1).astype(np.int16)
    return level
