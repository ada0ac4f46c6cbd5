"""What Shapes is drawn with: counter-based random numbers, 1/f noise, and shapes as formulas.

Everything is integer arithmetic or single IEEE float32 operations (+ - * / sqrt and comparisons,
no sine, no matrix product), so that every machine draws the same bits.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float32, Int, Int16, UInt64

Coordinates = Float32[np.ndarray, "n size size"]
Mask = Bool[np.ndarray, "n size size"]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
CORE = 0.45
"""Radius of the disc at the center that every shape contains."""
REACH = 1.598
"""Radius of the disc that contains every shape."""


def splitmix64(words: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Hash 64-bit words: the output function of SplitMix64 (Steele, Lea, Flood 2014, figure 15)."""
    hashed: UInt64[np.ndarray, "*shape"] = words ^ (words >> np.uint64(30))
    hashed *= np.uint64(0xBF58476D1CE4E5B9)
    hashed ^= hashed >> np.uint64(27)
    hashed *= np.uint64(0x94D049BB133111EB)
    hashed ^= hashed >> np.uint64(31)
    return hashed


def random_words(
    keys: UInt64[np.ndarray, "n"], stream: int, count: int
) -> UInt64[np.ndarray, "n count"]:
    """Random 64-bit words that depend on the key, the stream and the position alone."""
    start = splitmix64(keys + np.array([stream + 1], np.uint64) * GOLDEN)
    return splitmix64(start[:, None] + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN)


def uniforms_by_key(
    keys: UInt64[np.ndarray, "n"], stream: int, count: int
) -> Float32[np.ndarray, "n count"]:
    """Random numbers in [0, 1), multiples of 2**-24."""
    return (random_words(keys, stream, count) >> np.uint64(40)).astype(np.float32) * np.float32(
        2.0**-24
    )


def _double_columns(values: Int16[np.ndarray, "n channels height width"]) -> np.ndarray:
    """Twice as many columns, linearly interpolated between the old columns' centers."""
    wide = np.empty((*values.shape[:-1], 2 * values.shape[-1]), np.int16)
    tripled = values * np.int16(3)
    wide[..., 0] = values[..., 0] * 4
    np.add(tripled[..., 1:], values[..., :-1], out=wide[..., 2::2])
    np.add(tripled[..., :-1], values[..., 1:], out=wide[..., 1:-1:2])
    wide[..., -1] = values[..., -1] * 4
    wide >>= 2
    return wide


def _double_rows(values: Int16[np.ndarray, "n channels height width"]) -> np.ndarray:
    """Twice as many rows, linearly interpolated between the old rows' centers."""
    n, channels, height, width = values.shape
    tall = np.empty((n, channels, 2 * height, width), np.int16)
    tripled = values * np.int16(3)
    tall[:, :, 0] = values[:, :, 0] * 4
    np.add(tripled[:, :, 1:], values[:, :, :-1], out=tall[:, :, 2::2])
    np.add(tripled[:, :, :-1], values[:, :, 1:], out=tall[:, :, 1:-1:2])
    tall[:, :, -1] = values[:, :, -1] * 4
    tall >>= 2
    return tall


def noise(
    keys: UInt64[np.ndarray, "n"], stream: int, channels: int, size: int
) -> Int16[np.ndarray, "n channels size size"]:
    """Noise with an amplitude spectrum near 1/f: one octave of random grids upon the other.

    Args:
        keys: One a sample.
        stream: Which of the samples' fields.
        channels: Independent fields a sample.
        size: 32, 64 or 96 pixels: two or three times a power of two.

    Returns:
        Values of about zero mean and a deviation near 90, within +-762.
    """
    grid = 3 if size % 3 == 0 else 2
    grids = [grid << octave for octave in range(8) if grid << octave <= size]
    count = channels * sum(g * g for g in grids)
    words = random_words(keys, stream, (count + 7) // 8).astype("<u8", copy=False)
    values = words.view(np.int8)
    field = np.zeros((len(keys), channels, grid, grid), np.int16)
    offset = 0
    for g in grids:
        if g > grid:
            field = _double_columns(_double_rows(field))
        octave = values[:, offset : offset + channels * g * g].reshape(-1, channels, g, g)
        # The finest octave is not smoothed by an interpolation: half its amplitude is as much.
        field += octave >> 1 if g == size else octave
        offset += channels * g * g
    return field


# The shapes, in units in which each has the area of the unit circle; y points down.


def _disc(x: Coordinates, y: Coordinates) -> Mask:
    inside: Mask = x * x + y * y < 1
    return inside


def _triangle(x: Coordinates, y: Coordinates) -> Mask:
    inner = np.float32(0.77756)
    inside: Mask = (y < inner) & (np.float32(0.8660254) * np.abs(x) - np.float32(0.5) * y < inner)
    return inside


def _plus(x: Coordinates, y: Coordinates) -> Mask:
    across, down = np.abs(x), np.abs(y)
    inside: Mask = (np.minimum(across, down) < 0.46) & (np.maximum(across, down) < 1.08367)
    return inside


def _bar(x: Coordinates, y: Coordinates) -> Mask:
    inside: Mask = (np.abs(x) < 1.428) & (np.abs(y) < 0.55)
    return inside


def _bullseye(x: Coordinates, y: Coordinates) -> Mask:
    square = x * x + y * y
    inside: Mask = (square < 0.46 * 0.46) | ((square > 0.64) & (square < 1.4284))
    return inside


def _beam(x: Coordinates, y: Coordinates) -> Mask:
    across, down = np.abs(x), np.abs(y)
    inside: Mask = (across < 1) & (down < 1.1108) & ((across > 0.5) | (down < 0.46))
    return inside


def _tee(x: Coordinates, y: Coordinates) -> Mask:
    across = np.abs(x)
    head = (across < 1.2) & (y < -0.3)
    inside: Mask = ((across < 0.46) | head) & (y > -0.95) & (y < 1.419)
    return inside


def _step(x: Coordinates, y: Coordinates) -> Mask:
    across, down = np.abs(x), np.abs(y)
    arm = (across < 1.1) & (down > 0.227) & (x * y > 0)
    inside: Mask = ((across < 0.46) | arm) & (down < 1.1)
    return inside


def _arrow(x: Coordinates, y: Coordinates) -> Mask:
    across = np.abs(x)
    head = (across - y < 1.35) & (y < -0.05)
    inside: Mask = head | ((across < 0.46) & (y >= -0.05) & (y < 1.5278))
    return inside


def _bow(x: Coordinates, y: Coordinates) -> Mask:
    across = np.abs(x)
    inside: Mask = (across < 1.1) & (np.abs(y) - np.float32(0.46181) * across < 0.46)
    return inside


def _half(x: Coordinates, y: Coordinates) -> Mask:
    below = y + np.float32(0.6)
    inside: Mask = (below > 0) & (x * x + below * below < 2)
    return inside


def _corner(x: Coordinates, y: Coordinates) -> Mask:
    right, up = x + np.float32(0.5517), np.float32(0.5517) - y
    inside = (right > 0) & (up > 0) & (np.maximum(right, up) < 2.0466)
    return inside & (np.minimum(right, up) < 1.0233)


def _spokes(x: Coordinates, y: Coordinates) -> Mask:
    half, root = np.float32(0.5), np.float32(0.8660254)
    across = np.abs(x)
    upright = (across < 0.46) & (y <= 0) & (y > -1.271)
    along, off = root * across + half * y, np.abs(half * across - root * y)
    inside: Mask = upright | ((off < 0.46) & (along >= 0) & (along < 1.271))
    return inside


CLASSES: dict[str, Callable[[Coordinates, Coordinates], Mask]] = {
    "disc": _disc,
    "triangle": _triangle,
    "plus": _plus,
    "bar": _bar,
    "bullseye": _bullseye,
    "beam": _beam,
    "tee": _tee,
    "step": _step,
    "arrow": _arrow,
    "bow": _bow,
}
DISTRACTORS: dict[str, Callable[[Coordinates, Coordinates], Mask]] = {
    "half": _half,
    "corner": _corner,
    "spokes": _spokes,
}
_FORMULAS = [*CLASSES.values(), *DISTRACTORS.values()]


def shape_masks(
    kinds: Int[np.ndarray, "n"], poses: Float32[np.ndarray, "n 5"], size: int
) -> tuple[Mask, Mask]:
    """Draw one shape an image: the pixels whose centers lie inside it.

    Args:
        kinds: Position in CLASSES followed by DISTRACTORS.
        poses: Center x, center y and unit in pixels (a shape's area is pi units squared), the
            half-angle tangent of the rotation, and -1 for mirrored or 1.
        size: Side of the image in pixels.

    Returns:
        The shapes, and their cores: what all shapes have in common in the same pose.
    """
    ticks = np.arange(size, dtype=np.float32) + np.float32(0.5)
    across = (ticks - poses[:, 0, None]) / poses[:, 2, None]
    down = (ticks - poses[:, 1, None]) / poses[:, 2, None]
    squared = poses[:, 3, None] * poses[:, 3, None]
    cosine = (1 - squared) / (1 + squared)
    sine = 2 * poses[:, 3, None] / (1 + squared)
    mirror = poses[:, 4, None]
    x_of_column, x_of_row = mirror * (cosine * across), mirror * (sine * down)
    y_of_column, y_of_row = -(sine * across), cosine * down
    shapes = np.empty((len(kinds), size, size), bool)
    for kind in np.unique(kinds):
        chosen = np.flatnonzero(kinds == kind)
        x = x_of_row[chosen, :, None] + x_of_column[chosen, None, :]
        y = y_of_row[chosen, :, None] + y_of_column[chosen, None, :]
        shapes[chosen] = _FORMULAS[kind](x, y)
    cores = (down * down)[:, :, None] + (across * across)[:, None, :] < CORE * CORE
    return shapes, cores
