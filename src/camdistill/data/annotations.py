"""Where the object is: `boxes.csv` or mask images beside an image folder."""

import csv
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from camdistill.data import decode
from camdistill.data.folders import BOXES, MASKS, scan
from camdistill.errors import UserError, nearest, shorten
from camdistill.store.atomic_files import check_regular

COLUMNS = ["path", "xmin", "ymin", "xmax", "ymax"]


def read_boxes(root: Path) -> dict[str, tuple[NDArray[np.float64], int]] | None:
    """The boxes of an image folder, or None where it has no `boxes.csv`.

    Returns:
        For each path relative to the root: (xmin, ymin, xmax, ymax), inclusive pixels of the
        upright image, the smallest box around all of the image's boxes; and its line.

    Raises:
        UserError: A line that is not `path,xmin,ymin,xmax,ymax`, with its number.
    """
    file = root / BOXES
    if not file.exists():
        return None
    check_regular(file)
    box_by_path: dict[str, tuple[NDArray[np.float64], int]] = {}
    with file.open(newline="", encoding="utf-8-sig") as stream:
        try:
            for row in (reader := csv.reader(stream)):
                if not row or (reader.line_num == 1 and row[0].strip() == COLUMNS[0]):
                    continue
                path, box = _parse_row(row, f"{file}, line {reader.line_num}")
                if path in box_by_path:
                    other = box_by_path[path][0]
                    box = np.append(np.minimum(box, other)[:2], np.maximum(box, other)[2:])
                box_by_path[path] = box, reader.line_num
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"can't read {file} ({error}); save it as CSV in UTF-8") from None
    return box_by_path


def _parse_row(row: list[str], where: str) -> tuple[str, NDArray[np.float64]]:
    expected = "give " + ",".join(COLUMNS) + " with inclusive pixels"
    if len(row) != len(COLUMNS):
        raise UserError(f"{where}: {len(row)} columns; {expected}")
    try:
        box = np.array([float(number) for number in row[1:]])
    except ValueError:
        raise UserError(
            f"{where}: {','.join(row[1:])!r} are not four numbers; {expected}"
        ) from None
    if not np.isfinite(box).all() or box[2] < box[0] or box[3] < box[1]:
        raise UserError(f"{where}: the box {','.join(row[1:])} is empty; {expected}")
    path = PurePosixPath(row[0].strip().replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0:1]:
        raise UserError(f"{where}: {row[0]!r} leaves the folder; give a path relative to it")
    return str(path), box


def load_boxes(
    root: Path, names: Sequence[str], sizes: NDArray[np.int32], size: int | None
) -> NDArray[np.float32] | None:
    """The boxes of some images, moved to the stored images.

    Args:
        root: The folder with `boxes.csv`.
        names: Paths relative to the root.
        sizes: Width and height of the upright originals.
        size: Size as for `decode.decode`.

    Returns:
        [N, 4]; NaN for an image without a box, or whose box was cut away. None without the file.

    Raises:
        UserError: A box of an image that is not there.
    """
    box_by_path = read_boxes(root)
    if box_by_path is None:
        return None
    position = {name: index for index, name in enumerate(names)}
    boxes = np.full((len(names), 4), np.nan, dtype=np.float32)
    for path, (box, line) in box_by_path.items():
        index = position.get(path)
        if index is not None:
            width, height = sizes[index].tolist()
            boxes[index] = decode.Frame(width, height, size).move_box(box)
        elif not os.path.isfile(root / path):  # noqa: PTH113  (a name may be too long for a file)
            raise UserError(
                f"{root / BOXES}, line {line}: no image {shorten(path)!r}; {nearest(path, names)}"
            )
    return boxes


def annotation_digest(boxes: NDArray[np.float32] | None, masks: NDArray[np.uint8] | None) -> str:
    """A sha256 of both; empty where there is neither."""
    arrays = [part for part in (boxes, masks) if part is not None]
    content = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in arrays))
    return content.hexdigest() if arrays else ""


def load_masks(
    root: Path, names: Sequence[str], sizes: NDArray[np.int32], size: int | None
) -> NDArray[np.uint8] | None:
    """The masks of some images, `masks/<the image's path>.png`, moved to the stored images.

    Returns:
        [N, H, W], 1 where the mask is not 0; all 0 for an image without a mask. None without a
        folder `masks`.

    Raises:
        UserError: A mask of another size than its image, or a broken one.
    """
    folder = root / MASKS
    if folder.is_file():
        raise UserError(f"'{folder}' is a file; masks lie in a folder of that name: rename it")
    if not folder.is_dir() or any(name.startswith(f"{MASKS}/") for name in names):  # a class
        return None
    masks: NDArray[np.uint8] | None = None
    for index, name in enumerate(names):
        file = next(
            (
                path
                for path in (folder / f"{name}.png", (folder / name).with_suffix(".png"))
                if path.is_file()
            ),
            None,
        )
        if file is None:
            continue
        mask, frame = decode.decode(file, size, "mask")
        if (frame.width, frame.height) != tuple(sizes[index].tolist()):
            raise UserError(
                f"mask {str(file)!r} has {frame.width}x{frame.height} pixels, its image "
                f"{sizes[index][0]}x{sizes[index][1]}; save it in the image's size"
            )
        if masks is None:
            masks = np.zeros((len(names), *mask.shape[1:]), dtype=np.uint8)
        masks[index] = mask[0]
    if masks is None and len(scan(folder)):
        raise UserError(
            f"'{folder}' holds masks of no image here; a mask of {names[0]} is "
            f"{MASKS}/{names[0]}.png: name them so, or move the folder elsewhere"
        )
    return masks
