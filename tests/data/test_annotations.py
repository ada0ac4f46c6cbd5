"""Boxes and masks beside an image folder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camdistill.data.annotations import load_boxes, load_masks, read_boxes
from camdistill.data.datasets import ImageSet, load_folder
from camdistill.errors import UserError

SIZES = np.array([[40, 20], [20, 20]], dtype=np.int32)
NAMES = ("train/a/1.png", "train/b/2.png")


def write(root: Path, text: str) -> Path:
    (root / "boxes.csv").write_text(text)
    return root


def test_boxes_are_read_with_or_without_a_header(tmp_path: Path) -> None:
    lines = "train/a/1.png,1,2,3,4\n\ntrain/b/2.png,0.5,0,19,19\n"
    for text in (lines, "path,xmin,ymin,xmax,ymax\n" + lines, "﻿" + lines):
        boxes = load_boxes(write(tmp_path, text), NAMES, SIZES, None)
        assert boxes is not None
        assert boxes.tolist() == [[1, 2, 3, 4], [0.5, 0, 19, 19]]
    assert load_boxes(tmp_path / "elsewhere", NAMES, SIZES, None) is None


def test_boxes_move_to_the_stored_image_and_nan_means_none(tmp_path: Path) -> None:
    boxes = load_boxes(write(tmp_path, "train/a/1.png,10,0,29,9\n"), NAMES, SIZES, 10)
    assert boxes is not None
    # 40x20 -> 20x10 -> columns 5 to 15
    assert boxes[0].tolist() == [0, 0, 9, 4]
    assert np.isnan(boxes[1]).all()


def test_several_boxes_become_the_smallest_around_them(tmp_path: Path) -> None:
    boxes = read_boxes(write(tmp_path, "train/a/1.png,1,8,3,9\ntrain/a/1.png,2,2,6,4\n"))
    assert boxes is not None
    assert boxes["train/a/1.png"][0].tolist() == [1, 2, 6, 9]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train/a/1.png,1,2,3", "line 3: 4 columns"),
        ("train/a/1.png,1,2,three,4", "line 3: '1,2,three,4' are not four numbers"),
        ("train/a/1.png,5,2,3,4", "line 3: the box 5,2,3,4 is empty"),
        ("train/a/1.png,nan,2,3,4", "line 3: the box"),
        ("../secret.png,1,2,3,4", "line 3: .* leaves the folder"),
        ("/etc/x.png,1,2,3,4", "line 3: .* leaves the folder"),
        ("train/..\\..\\x.png,1,2,3,4", "line 3: .* leaves the folder"),
        ("train/a/11.png,1,2,3,4", r"line 3: no image 'train/a/11.png'; nearest: 'train/a/1.png'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    write(tmp_path, f"path,xmin,ymin,xmax,ymax\ntrain/b/2.png,0,0,1,1\n{line}\n")
    with pytest.raises(UserError, match=told) as raised:
        load_boxes(tmp_path, NAMES, SIZES, None)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "boxes.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="UTF-8"):
        read_boxes(tmp_path)


def test_boxes_of_another_split_are_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "9.png").write_bytes(b"")
    boxes = load_boxes(write(tmp_path, "val/9.png,0,0,1,1\n"), NAMES, SIZES, None)
    assert boxes is not None
    assert np.isnan(boxes).all()


def test_masks_lie_beside_the_images(tmp_path: Path) -> None:
    assert load_masks(tmp_path, NAMES, SIZES, 10) is None
    mask = np.zeros((20, 40), dtype=np.uint8)
    mask[:10, 20:] = 255
    (tmp_path / "masks" / "train" / "a").mkdir(parents=True)
    Image.fromarray(mask).save(tmp_path / "masks" / "train" / "a" / "1.png")
    masks = load_masks(tmp_path, NAMES, SIZES, 10)
    assert masks is not None
    expected = np.zeros((2, 10, 10))
    expected[0, :5, 5:] = 1
    assert np.array_equal(masks, expected)


def test_a_mask_of_another_size_is_told(tmp_path: Path) -> None:
    (tmp_path / "masks" / "train" / "a").mkdir(parents=True)
    Image.new("L", (20, 40)).save(tmp_path / "masks" / "train" / "a" / "1.png")
    with pytest.raises(UserError, match="20x40 pixels, its image 40x20"):
        load_masks(tmp_path, NAMES, SIZES, 10)


def test_corrected_masks_and_boxes_are_another_truth_of_the_same_images(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), (9 * number, 0, 0)).save(
                tmp_path / "train" / name / f"{number}.png"
            )
    (tmp_path / "masks" / "train" / "a").mkdir(parents=True)
    file = tmp_path / "masks" / "train" / "a" / "0.png"

    def seen() -> ImageSet:
        return load_folder(tmp_path, "train", cache_dir=tmp_path / "cache")

    found = [seen()]
    for place in (1, 5):
        mask = np.zeros((8, 8), np.uint8)
        mask[place] = 255
        Image.fromarray(mask).save(file)
        found.append(seen())
    (tmp_path / "boxes.csv").write_text("train/a/0.png,1,1,4,4\n")
    found.append(seen())
    assert len({one.fingerprint for one in found}) == 1
    assert len({one.annotation_digest for one in found}) == 4
    assert found[1].subset(np.array([0])).annotation_digest == found[1].annotation_digest
