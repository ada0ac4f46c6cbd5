"""Every kind of image file against a truth made by hand."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torchvision.transforms.functional as TF
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from camdistill.data.decode import Frame, decode
from camdistill.data.folders import scan
from camdistill.errors import UserError

H, W = 5, 7


def colors(seed: int = 0, channels: int = 3, size: tuple[int, int] = (H, W)) -> NDArray[np.uint8]:
    shape = (*size, channels) if channels else size
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(path: Path, depth: int, color: int, rows: NDArray[np.generic]) -> None:
    """A PNG written from the specification, for the kinds that Pillow doesn't write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, color, 0, 0, 0)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )


def shown(path: Path, size: int | None = None) -> NDArray[np.int64]:
    pixels, _ = decode(path, size)
    assert pixels.dtype == np.uint8
    return pixels.transpose(1, 2, 0).astype(np.int64)


def gray(values: NDArray[np.generic]) -> NDArray[np.int64]:
    return np.repeat(values.astype(np.int64)[..., None], 3, axis=2)


@pytest.mark.parametrize("kind", ["png", "webp", "bmp", "tiff", "ppm"])
def test_rgb_comes_out_as_it_is(tmp_path: Path, kind: str) -> None:
    truth = colors()
    Image.fromarray(truth).save(
        tmp_path / f"a.{kind}", **({"lossless": True} if kind == "webp" else {})
    )
    assert np.array_equal(shown(tmp_path / f"a.{kind}"), truth)


def test_grayscale_is_three_equal_channels(tmp_path: Path) -> None:
    values = colors(channels=0)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(shown(tmp_path / "a.png"), gray(values))


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    values = colors(channels=0) > 127
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(shown(tmp_path / "a.png"), gray(values * 255))


def test_palette_is_looked_up(tmp_path: Path) -> None:
    palette, index = colors(size=(1, 256))[0], colors(1, channels=0)
    image = Image.frombytes("P", (W, H), index.tobytes())
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "a.png")
    assert np.array_equal(shown(tmp_path / "a.png"), palette[index])


def test_palette_with_a_transparent_color_is_white_there(tmp_path: Path) -> None:
    palette, index = colors(size=(1, 256))[0], colors(1, channels=0) % 4
    image = Image.frombytes("P", (W, H), index.tobytes())
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "a.png", transparency=2)
    truth = palette[index]
    truth[index == 2] = 255
    assert np.array_equal(shown(tmp_path / "a.png"), truth)


def test_rgb_with_a_transparent_color_is_white_there(tmp_path: Path) -> None:
    truth = colors()
    truth[1:3, 2:4] = (10, 20, 30)
    Image.fromarray(truth).save(tmp_path / "a.png", transparency=(10, 20, 30))
    truth[1:3, 2:4] = 255
    assert np.array_equal(shown(tmp_path / "a.png"), truth)


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_lies_on_white(tmp_path: Path, channels: int) -> None:
    values = colors(channels=channels)
    Image.fromarray(values).save(tmp_path / "a.png")
    alpha = values[..., -1:] / 255
    truth = values[..., :-1] * alpha + 255 * (1 - alpha)
    assert np.abs(shown(tmp_path / "a.png") - truth).max() <= 1


def test_16_bit_gray_keeps_its_range(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (H, W), dtype=np.uint16)
    values[0, :2] = 0, 65535
    png(tmp_path / "a.png", 16, 0, values.astype(">u2"))
    assert np.array_equal(shown(tmp_path / "a.png"), gray(np.rint(values / 257)))
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert np.array_equal(shown(tmp_path / "a.tiff"), gray(np.rint(values / 257)))


def test_16_bit_rgb_keeps_its_range(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (H, W, 3), dtype=np.uint16)
    png(tmp_path / "a.png", 16, 2, values.astype(">u2"))
    assert np.abs(shown(tmp_path / "a.png") - values / 257).max() <= 1


def test_cmyk_is_ink_taken_from_white(tmp_path: Path) -> None:
    ink = colors(channels=4)
    Image.frombytes("CMYK", (W, H), ink.tobytes()).save(tmp_path / "a.tiff")
    share = ink / 255
    truth = 255 * (1 - share[..., :3]) * (1 - share[..., 3:])
    assert np.abs(shown(tmp_path / "a.tiff") - truth).max() <= 1


def test_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    ink = np.full((16, 16, 4), (0, 255, 255, 0), dtype=np.uint8)
    Image.frombytes("CMYK", (16, 16), ink.tobytes()).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(shown(tmp_path / "a.jpg") - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_exif_rotated_files_are_upright(tmp_path: Path, orientation: int, kind: str) -> None:
    # stored = what the camera wrote; the EXIF standard says which transform shows it upright
    truth = np.zeros((16, 32, 3), dtype=np.uint8)
    truth[:8, :16] = 255
    truth[8:, :16] = 128
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](truth)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {"quality": 100} if kind == "jpg" else {}
    stored.save(tmp_path / f"a.{kind}", exif=exif, **options)
    assert np.abs(shown(tmp_path / f"a.{kind}") - truth).max() <= 3


def test_an_animation_gives_its_first_picture(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((H, W, 3), value, dtype=np.uint8)) for value in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert shown(tmp_path / "a.gif").max() == 0


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (33, 33), (10, 25), (24, 24)])
def test_resize_and_center_crop_equal_torchvision(tmp_path: Path, shape: tuple[int, int]) -> None:
    image = Image.fromarray(colors(size=shape))
    image.save(tmp_path / "a.png")
    expected = np.asarray(TF.center_crop(TF.resize(image, 24), [24, 24]))
    assert np.array_equal(shown(tmp_path / "a.png", 24), expected)


@pytest.mark.parametrize("shape", [(40, 64), (90, 48), (24, 24), (100, 30)])
def test_boxes_move_with_the_image(tmp_path: Path, shape: tuple[int, int]) -> None:
    """The oracle: a bright rectangle, scaled and cut as an image, found again by threshold."""
    pixels = np.zeros((*shape, 3), dtype=np.uint8)
    xmin, ymin, xmax, ymax = shape[1] // 3, shape[0] // 4, shape[1] * 2 // 3, shape[0] * 3 // 4
    pixels[ymin : ymax + 1, xmin : xmax + 1] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    stored, frame = decode(tmp_path / "a.png", 24)
    box = frame.move_box(np.array([xmin, ymin, xmax, ymax], dtype=np.float64))
    rows, columns = ndimage.find_objects((stored[0] >= 128).astype(int))[0]
    found = [columns.start, rows.start, columns.stop - 1, rows.stop - 1]
    assert np.abs(box - found).max() <= 0.51


def test_a_box_that_is_cut_away_is_nan() -> None:
    frame = Frame(100, 20, 20)
    assert np.isnan(frame.move_box(np.array([0.0, 0, 10, 19]))).all()
    assert np.array_equal(frame.move_box(np.array([30.0, 5, 59, 9])), [0, 5, 19, 9])


def test_masks_move_as_whole_pixels(tmp_path: Path) -> None:
    mask = np.zeros((48, 80), dtype=np.uint8)
    mask[12:24, 40:60] = 7
    Image.fromarray(mask).save(tmp_path / "a.png")
    stored, _ = decode(tmp_path / "a.png", 24, "mask")
    expected = np.zeros((24, 24), dtype=np.uint8)
    expected[6:12, 20 - 8 : 30 - 8] = 1
    assert np.array_equal(stored[0], expected)


def test_a_palette_mask_counts_by_index(tmp_path: Path) -> None:
    index = np.zeros((H, W), dtype=np.uint8)
    index[2, 3] = 1
    mask = Image.frombytes("P", (W, H), index.tobytes())
    mask.putpalette([255, 255, 255, 0, 0, 0] + [9] * 762)
    mask.save(tmp_path / "a.png")
    assert np.array_equal(decode(tmp_path / "a.png", None, "mask")[0][0], index)


def _good_jpeg() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(colors(size=(64, 64))).save(stream, "jpeg")
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # the cache silences it around all files
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(_good_jpeg()[:1500], id="truncated"),
        pytest.param(_good_jpeg()[:20], id="header only"),
        pytest.param(b"", id="empty"),
        pytest.param(b"<html>not found</html>", id="a web page"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + b"\0" * 40, id="png of zeros"),
        pytest.param(b"GIF89a" + b"\xff" * 30, id="gif of ones"),
        pytest.param(b"II*\0" + b"\xff" * 30, id="tiff of ones"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.jpg") as told:
        decode(tmp_path / "bad.jpg", None)
    assert "\n" not in str(told.value)
    assert "on_broken" in str(told.value)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((H, W), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="8 or 16 bits"):
        decode(tmp_path / "a.tiff", None)


def test_32_bit_gray_within_16_bits_keeps_its_range(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (H, W)).astype(np.int32)
    Image.fromarray(values).save(tmp_path / "x.tiff")
    pixels, _ = decode(tmp_path / "x.tiff", None)
    assert np.array_equal(pixels[0], np.rint(values / 257))


@pytest.mark.parametrize("value", [65536, 2**31 - 1, -1])
def test_gray_values_beyond_16_bits_are_refused(tmp_path: Path, value: int) -> None:
    values = np.zeros((H, W), np.int32)
    values[1, 1] = value
    Image.fromarray(values).save(tmp_path / "x.tiff")
    with pytest.raises(UserError, match=rf"{value}.*no agreed range"):
        decode(tmp_path / "x.tiff", None)


@pytest.mark.parametrize("suffix", ["avif", "jfif", "tga", "jp2", "qoi", "ico"])
def test_other_kinds_are_read_from_folders_too(tmp_path: Path, suffix: str) -> None:
    picture = Image.fromarray(colors(size=(16, 16)))
    picture.save(tmp_path / f"x.{suffix}", format="JPEG" if suffix == "jfif" else None)
    (name,) = scan(tmp_path).names
    assert decode(tmp_path / name, None)[0].shape == (3, 16, 16)


@pytest.mark.parametrize("shape", [(4000, 2), (2, 4000), (1, 60000), (60000, 1)])
def test_thin_images_are_scaled_where_they_are_kept(
    tmp_path: Path, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept of a thin image is what would be kept of all of it, to rounding."""
    ramp = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) % 256
    Image.fromarray(np.stack([ramp] * 3, 2).astype(np.uint8)).save(tmp_path / "x.png")
    largest: list[int] = []
    resize = Image.Image.resize

    def measured(image: Image.Image, size: tuple[int, int], *rest: object) -> Image.Image:
        largest.append(size[0] * size[1])
        return resize(image, size, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", measured)
    pixels, frame = decode(tmp_path / "x.png", 224)
    assert max(largest) == 224**2
    scale = min(shape) / 224
    for axis, along in ((0, 1), (1, 0)):
        first = (
            (round((frame.size_after_scaling()[along] - 224) / 2) + 0.5)
            * shape[axis]
            / frame.size_after_scaling()[along]
        )
        centers = first + np.arange(224) * scale - 0.5
        if shape[axis] == max(shape):  # the ramp itself at these places, wraps apart
            line = pixels[0, :, 100] if axis == 0 else pixels[0, 100, :]
            across = np.clip((100.5) * scale - 0.5, 0, min(shape) - 1)
            wanted = centers + across
            inside = (wanted % 256 > 1) & (wanted % 256 < 254)
            assert np.abs(line[inside] - wanted[inside] % 256).max() <= 1


def test_sides_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    Image.fromarray(colors()).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"size is 100000; give .*, at most 8,192"):
        decode(tmp_path / "x.png", 100_000)


def test_a_program_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(UserError, match="cannot identify"):
        decode(tmp_path / "x.png", None)
