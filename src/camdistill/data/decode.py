"""One image file to uint8 RGB at one size, whatever its kind."""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from camdistill.errors import UserError, check_number
from camdistill.store.atomic_files import check_regular

# Raise it when decoding changes: every cache is then rebuilt
VERSION = 1
# What Pillow raises on files that are damaged, cut off, of an unknown kind or absurdly large
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    MemoryError,
)
# Of an image's side in pixels: one of 8,192 x 8,192 takes 200 MB
LARGEST_SIDE = 8192
# Of a whole scaled image, in pixels: beyond, only what is kept of it is scaled
LARGEST_SCALED = 2**24
# Not images but programs (PostScript), and what Pillow only knows by name
_NOT_IMAGES = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")
Image.init()
FORMATS = tuple(name for name in Image.OPEN if name not in _NOT_IMAGES)
_KNOWN = [suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS]
_USUAL = [".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jfif"]
# What Pillow can open, the usual ones first
SUFFIXES = tuple(dict.fromkeys([ending for ending in _USUAL if ending in _KNOWN] + sorted(_KNOWN)))
SUPPORTED = ", ".join(SUFFIXES[: len(_USUAL)]) + " and what else Pillow opens"


@dataclass(frozen=True)
class Frame:
    """How stored pixels lie in an upright image: scaled, then cut out at the center.

    Attributes:
        width: Width of the upright image before scaling.
        height: Height of the upright image before scaling.
        size: Length of the shorter side after scaling and of the stored square; None: as it is.
    """

    width: int
    height: int
    size: int | None

    def size_after_scaling(self) -> tuple[int, int]:
        """Width and height after scaling: torchvision's `Resize(size)`."""
        if self.size is None:
            return self.width, self.height
        if self.width <= self.height:
            return self.size, int(self.size * self.height / self.width)
        return int(self.size * self.width / self.height), self.size

    def crop_corner(self) -> tuple[int, int]:
        """Left and top of the cut-out in the scaled image: torchvision's `CenterCrop(size)`."""
        if self.size is None:
            return 0, 0
        width, height = self.size_after_scaling()
        return round((width - self.size) / 2), round((height - self.size) / 2)

    def move_box(self, box: NDArray[np.float64]) -> NDArray[np.float64]:
        """A box (inclusive pixels) of the upright image in the stored one; NaN if outside it."""
        width, height = self.size_after_scaling()
        left, top = self.crop_corner()
        stored_size = (width, height) if self.size is None else (self.size, self.size)
        scale = np.array([width / self.width, height / self.height] * 2)
        # inclusive pixels to edges and back: pixel p covers [p, p + 1)
        edges = (box + np.array([0, 0, 1, 1])) * scale - np.array([left, top, left, top])
        edges = np.clip(edges, 0, np.array([*stored_size, *stored_size]))
        if edges[2] <= edges[0] or edges[3] <= edges[1]:
            return np.full(4, np.nan)
        moved: NDArray[np.float64] = edges - np.array([0, 0, 1, 1])
        return moved


def check_side(name: str, side: int) -> None:
    """Checks the side of the square that images are brought to.

    Raises:
        UserError: It is less than 1 pixel, or so large that an image would fill the memory.
    """
    cure = f"give the images' side in pixels, 1 or more, at most {LARGEST_SIDE:,}"
    check_number(name, side, f"[1, {LARGEST_SIDE}]", cure)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB; transparency lies on white, as a page shows it."""
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        # 16 bits (mode I too, where older files and TIFF put them): 65535 becomes 255
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(
                f"gray values from {low} to {high} have no agreed range; save it with 8 or 16 bits"
            )
        # rounds value / 257, which is never halfway between two numbers
        gray = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return Image.fromarray(gray).convert("RGB")
    if mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        page = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(page, rgba).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _apply_exif_orientation(image: Image.Image) -> Image.Image:
    """Turned as the camera's EXIF note says."""
    # getexif costs as much as decoding a small image; most files have none
    if "exif" in image.info or image.format in ("TIFF", "MPO", "JPEG"):
        return ImageOps.exif_transpose(image)
    return image


def decode(
    path: Path | str, size: int | None, kind: Literal["image", "mask"] = "image"
) -> tuple[NDArray[np.uint8], Frame]:
    """Read one file.

    Args:
        path: The file.
        size: Shorter side after scaling, and side of the square cut out of the middle; None keeps
            the image as it is.
        kind: `image` gives [3, H, W], scaled with Pillow's antialiased bilinear filter; `mask`
            gives [1, H, W] of 0 and 1 (anything above 0), scaled by nearest pixels.

    Raises:
        UserError: The file is broken, with the reason.
    """
    if size is not None:
        check_side("size", size)
    try:
        check_regular(Path(path))
        with Image.open(path, formats=FORMATS) as file_image:
            image = _apply_exif_orientation(file_image)
            frame = Frame(*image.size, size)
            image = _to_rgb(image) if kind == "image" else Image.fromarray(_binarize_mask(image))
            image = _scale_and_crop(image, frame, kind)
            pixels = np.asarray(image, dtype=np.uint8)
    except BROKEN as error:
        reason = " ".join(str(error).replace(f" {str(path)!r}", "").split())
        raise UserError(
            f"can't read {str(path)!r} ({reason or type(error).__name__}); replace or remove the "
            "file (a data config goes on without it with on_broken: skip)"
        ) from None
    channels = pixels.reshape(*pixels.shape[:2], -1)
    return channels.transpose(2, 0, 1), frame


def size_in_bytes(path: Path, size: int | None) -> int:
    """The bytes of a file's pixels at a size (see `decode`), of which no file has more.

    Without a size it is what the file announces; a small number where it can't be read.
    """
    if size is not None:
        return 3 * size**2
    try:
        check_regular(path)
        with Image.open(path, formats=FORMATS) as image:
            return 3 * image.width * image.height
    except (UserError, *BROKEN):
        return 1 << 20


def _binarize_mask(image: Image.Image) -> NDArray[np.uint8]:
    """1 where a mask is marked; palette masks (VOC) count by index, not by color."""
    pixels = np.asarray(image)
    if image.mode in ("RGBA", "LA"):
        pixels = pixels[..., :-1]
    marked = np.atleast_3d(pixels > 0).any(axis=2)
    return np.asarray(marked, dtype=np.uint8)


def _scale_and_crop(
    image: Image.Image, frame: Frame, kind: Literal["image", "mask"]
) -> Image.Image:
    if frame.size is None:
        return image
    left, top = frame.crop_corner()
    width, height = frame.size_after_scaling()
    filter_ = Image.Resampling.BILINEAR if kind == "image" else Image.Resampling.NEAREST
    if width * height > LARGEST_SCALED:
        # An image of 60,000 x 1 pixels would be scaled to 9 GB, of which a square is kept: the same
        # filter at the same places, to the rounding of its weights.
        across, down = frame.width / width, frame.height / height
        box = (left * across, top * down, (left + frame.size) * across, (top + frame.size) * down)
        return image.resize((frame.size, frame.size), filter_, box)
    if (width, height) != image.size:
        image = image.resize((width, height), filter_)
    if image.size != (frame.size, frame.size):
        image = image.crop((left, top, left + frame.size, top + frame.size))
    return image
