"""The basis of every picture: RGB uint8 arrays (height, width, 3), colors, and tiled sheets.

Pictures are ready for `save_png` and for TensorBoard. Nothing here knows a network or a logger;
`save_png` alone touches a file.
"""

import io
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from PIL.Image import Resampling

from camdistill.store.atomic_files import write_atomically

Picture = UInt8[np.ndarray, "_tall _wide 3"]  # pictures of one call differ in size
Colors = Float[np.ndarray, "tall wide 3"]
# Maps of two networks have two resolutions, so their axes have no common name.
Grid = Shaped[np.ndarray, "_ _"]
Shares = Float[np.ndarray, "_ _"]

SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"
DPI = 100
GAP, LINE, MARGIN = 6, 17, 10  # pixels: between tiles, of a line of text, around everything


def save_png(path: Path, picture: Picture) -> Path:
    """Writes a picture without loss, whole or not at all; gives back the path.

    Raises:
        UserError: The file can't be written.
    """
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG", optimize=True)
    write_atomically(path, content.getvalue())
    return path


class Sheet:
    """A white page with pixel positions from the top left, on which tiles keep their pixels."""

    def __init__(self, width: int, height: int) -> None:
        self._height = height
        self._figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        self._tiles: list[tuple[int, int, Picture]] = []

    def write(
        self,
        x: int,
        y: int,
        words: str,
        *,
        bold: bool = False,
        color: str = "black",
        points: float = 8.0,
        align: Literal["left", "center", "right"] = "left",
    ) -> None:
        """Put words on the page, their top at `y`."""
        width = self._figure.get_figwidth() * DPI
        self._figure.text(
            x / width,
            1 - y / self._height,
            words,
            va="top",
            ha=align,
            color=color,
            fontsize=points,
            weight="bold" if bold else "normal",
            parse_math=False,
        )

    def paste(self, x: int, y: int, pixels: Picture) -> None:
        """Put a picture on the page, pixel for pixel."""
        self._tiles.append((x, y, pixels))

    def bar(self, x: int, y: int, width: int, colors: str, words: tuple[str, str, str]) -> None:
        """A horizontal color bar with words at its left end, middle and right end."""
        ramp = np.broadcast_to(np.linspace(0, 1, width), (8, width))
        self.paste(x, y, as_bytes(colorize(ramp, colors)))
        places: tuple[tuple[int, Literal["left", "center", "right"]], ...] = (
            (x, "left"),
            (x + width // 2, "center"),
            (x + width, "right"),
        )
        for (place, align), word in zip(places, words, strict=True):
            self.write(place, y + 11, word, color="0.35", points=7.5, align=align)

    def axes(self, x: int, y: int, width: int, height: int) -> Axes:
        """Axes whose frame is these pixels; labels go around it."""
        wide = round(self._figure.get_figwidth() * DPI)
        left, bottom = x / wide, 1 - (y + height) / self._height
        return self._figure.add_axes((left, bottom, width / wide, height / self._height))

    def picture(self) -> Picture:
        """The page as it is now."""
        page = render_figure(self._figure)
        for x, y, pixels in self._tiles:
            height, width, _ = pixels.shape
            page[y : y + height, x : x + width] = pixels
        return page


def resize_image(image: Float[np.ndarray, "channels height width"], tall: int, wide: int) -> Colors:
    """The image as RGB at its tile's size: pixels stay square when it grows."""
    colors = np.moveaxis(np.clip(np.nan_to_num(image), 0, 1), 0, -1)
    if colors.shape[-1] not in (1, 3):
        raise ValueError(f"an image has 1 or 3 channels, not {colors.shape[-1]}")
    colors = np.broadcast_to(colors, (*colors.shape[:2], 3))
    grows = tall >= colors.shape[0]
    resampling = Resampling.NEAREST if grows else Resampling.LANCZOS
    resized = Image.fromarray(as_bytes(colors)).resize((wide, tall), resampling)
    return np.asarray(resized, np.float64) / 255


def resize_shares(
    share: Shares, tall: int, wide: int
) -> tuple[Float[np.ndarray, "tall wide"], Bool[np.ndarray, "tall wide"]]:
    """Bilinear, edges held, as `align_corners=False`; and where a NaN's cell is."""
    finite_shares = Image.fromarray(np.nan_to_num(share).astype(np.float32))
    level = np.asarray(finite_shares.resize((wide, tall), Resampling.BILINEAR), np.float64)
    missing = Image.fromarray(np.isnan(share).astype(np.uint8))
    return level, np.asarray(missing.resize((wide, tall), Resampling.NEAREST)) > 0


def colorize(level: Shares, colors: str) -> Colors:
    """Numbers in [0, 1] in a color map's colors, by its name."""
    rgb: Colors = mpl.colormaps[colors](level)[..., :3]
    return rgb


def as_bytes(colors: Colors) -> Picture:
    """Colors in [0, 1] as pixels."""
    pixels: Picture = np.rint(np.clip(colors, 0, 1) * 255).astype(np.uint8)
    return pixels


def add_frame(pixels: Picture) -> Picture:
    """A thin gray border, so that white has an end."""
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        pixels[edge] = 200
    return pixels


def render_figure(figure: Figure) -> Picture:
    """A figure's pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
