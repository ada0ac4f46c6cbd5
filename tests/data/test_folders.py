"""Image folders: layouts, order, classes, and what is said when they are wrong."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from camdistill.data.decode import SUFFIXES
from camdistill.data.folders import (
    check_folder,
    check_same_classes,
    class_folders,
    find_classes,
    find_layout,
    labels_from_paths,
    scan,
)
from camdistill.errors import UserError


def make(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            (root / path).mkdir(exist_ok=True)
        else:
            Image.new("RGB", (4, 4)).save(root / path, format="png")
    return root


def test_order_and_labels_equal_torchvision_image_folder(tmp_path: Path) -> None:
    names = [f"{c}/{i}.png" for c in ("b2", "b10", "A", "ä") for i in (10, 9, 1)]
    make(tmp_path, *names, "b2/deep/er/x.JPEG")
    (tmp_path / "b2" / "notes.txt").write_text("")
    (tmp_path / "b2" / ".hidden.png").write_text("")
    files, classes = scan(tmp_path), class_folders(tmp_path)
    theirs = ImageFolder(
        str(tmp_path), is_valid_file=lambda p: "hidden" not in p and ".txt" not in p
    )
    assert list(classes) == theirs.classes
    ours = dict(zip(files.names, labels_from_paths(files, classes).tolist(), strict=True))
    expected = {Path(p).relative_to(tmp_path).as_posix(): label for p, label in theirs.samples}
    assert ours == expected
    assert list(files.names) == sorted(files.names)


def test_digest_changes_with_names_sizes_and_times_only(tmp_path: Path) -> None:
    make(tmp_path / "one", "a/1.png", "b/2.png")
    shutil.copytree(tmp_path / "one", tmp_path / "two")  # keeps times
    assert scan(tmp_path / "one").digest() == scan(tmp_path / "two").digest()
    (tmp_path / "two/a/1.png").rename(tmp_path / "two/a/3.png")
    assert scan(tmp_path / "one").digest() != scan(tmp_path / "two").digest()


@pytest.mark.parametrize(
    ("folders", "train", "val", "test"),
    [
        (["train", "val", "test"], "train", "val", "test"),
        (["training", "validation", "testing"], "training", "validation", "testing"),
        (["Train", "Valid", "Test"], "Train", "Valid", "Test"),
        (["train", "test"], "train", None, "test"),
        # what is tuned on is not what is tested on
        (["train", "val"], "train", None, "val"),
        (["train"], "train", None, None),
        (["cats", "dogs"], "", None, None),
    ],
)
def test_split_folders(
    tmp_path: Path, folders: list[str], train: str, val: str | None, test: str | None
) -> None:
    make(tmp_path, *(f"{folder}/" for folder in folders))
    layout = find_layout(tmp_path)
    assert layout.train == tmp_path / train
    assert layout.val == (None if val is None else tmp_path / val)
    assert layout.test == (None if test is None else tmp_path / test)


def test_missing_folder_offers_its_neighbors(tmp_path: Path) -> None:
    make(tmp_path, "cifar10/", "flowers/")
    with pytest.raises(UserError, match=r"no folder .*cifar1'.*nearest: 'cifar10'"):
        check_folder(tmp_path / "cifar1")
    with pytest.raises(UserError, match="nearest: 'cifar10'"):
        check_folder(tmp_path / "cifar" / "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_folder(tmp_path / "file")


def test_test_without_train_is_told(tmp_path: Path) -> None:
    make(tmp_path, "test/a/1.png")
    with pytest.raises(UserError, match="has a folder 'test' but no 'train'"):
        find_layout(tmp_path)


def test_classes_are_looked_for_required_or_ignored(tmp_path: Path) -> None:
    make(tmp_path / "classes", "a/1.png", "b/1.png", "masks/a/1.png")
    assert find_classes(tmp_path / "classes", None) == ("a", "b")
    assert find_classes(tmp_path / "classes", False) == ()
    assert "masks/a/1.png" not in scan(tmp_path / "classes").names
    make(tmp_path / "flat", "1.png", "2.png")
    assert find_classes(tmp_path / "flat", None) == ()
    with pytest.raises(UserError, match="no class folders"):
        find_classes(tmp_path / "flat", True)


def test_one_class_only_is_told(tmp_path: Path) -> None:
    make(tmp_path, "cats/1.png")
    with pytest.raises(UserError, match=r"one class only, 'cats'.*labeled: false"):
        find_classes(tmp_path, None)


def test_images_beside_class_folders_are_told(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png", "b/1.png", "loose.png")
    with pytest.raises(UserError, match=r"loose\.png lies beside"):
        labels_from_paths(scan(tmp_path), find_classes(tmp_path, None))
    make(tmp_path / "single", "a/1.png", "loose.png")
    with pytest.raises(UserError, match="1 images and one folder 'a'"):
        find_classes(tmp_path / "single", None)


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png", "b/")
    with pytest.raises(UserError, match=r"class folder .*b' holds no images"):
        labels_from_paths(scan(tmp_path), find_classes(tmp_path, None))


def test_classes_that_differ_between_splits_are_named(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/", "train/dog/", "test/cat/", "test/dogs/", "val/cat/")
    check_same_classes(tmp_path / "train", tmp_path / "train")
    with pytest.raises(UserError, match=r"class 'dogs' of .*test is not in .*nearest: 'dog'"):
        check_same_classes(tmp_path / "train", tmp_path / "test")
    with pytest.raises(UserError, match=r"class 'dog' of .*train is not in .*val"):
        check_same_classes(tmp_path / "train", tmp_path / "val")


def test_a_dead_link_is_named(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png")
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"2\.png is a link to nothing"):
        scan(tmp_path)


def test_a_linked_class_folder_is_followed_and_a_circle_is_not(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", "1.png")
    make(tmp_path / "data", "a/1.png")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "round").symlink_to(tmp_path / "data")
    assert scan(tmp_path / "data").names == ("a/1.png", "b/1.png")


def test_a_folder_that_is_called_like_an_image_is_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "a/set.png/1.png", "b/2.png")
    assert scan(tmp_path).names == ("a/set.png/1.png", "b/2.png")


def test_a_class_that_is_called_train_is_told(tmp_path: Path) -> None:
    make(tmp_path, "car/1.png", "plane/2.png", "train/3.png")
    with pytest.raises(UserError, match=r"'train' and images in 'car' beside it; if both are"):
        find_layout(tmp_path)
    assert (
        find_layout(make(tmp_path / "own", "train/a/1.png", "masks/m.png", "notes/")).test is None
    )


def test_a_class_called_masks_is_a_class(tmp_path: Path) -> None:
    make(tmp_path, "gloves/0.png", "helmets/1.png", "masks/2.png", "masks/more/3.png")
    assert class_folders(tmp_path) == tuple(ImageFolder(tmp_path).classes)
    assert scan(tmp_path).names == (
        "gloves/0.png",
        "helmets/1.png",
        "masks/2.png",
        "masks/more/3.png",
    )


def test_a_class_called_masks_inside_a_split_is_a_class(tmp_path: Path) -> None:
    make(
        tmp_path,
        *(f"{split}/{name}/0.png" for split in ("train", "test") for name in ("a", "masks")),
    )
    layout = find_layout(tmp_path)
    assert class_folders(layout.train) == ("a", "masks")
    assert len(scan(layout.train)) == 2


@pytest.mark.parametrize("mask", ["masks/a/0.png", "masks/a/0.jpg.png"])
def test_masks_that_mirror_the_images_are_no_class(tmp_path: Path, mask: str) -> None:
    make(tmp_path, "a/0.jpg", "b/1.jpg", mask)
    assert class_folders(tmp_path) == ("a", "b")
    assert scan(tmp_path).names == ("a/0.jpg", "b/1.jpg")


@pytest.mark.parametrize("mask", ["masks/0.png", "masks/0.jpg.png"])
def test_masks_beside_a_flat_folder_are_no_images(tmp_path: Path, mask: str) -> None:
    assert scan(make(tmp_path, "0.jpg", "1.jpg", mask)).names == ("0.jpg", "1.jpg")


def test_a_folder_of_masks_and_of_other_images_is_told(tmp_path: Path) -> None:
    make(tmp_path, "a/0.png", "b/1.png", "masks/a/0.png", "masks/2.png")
    with pytest.raises(UserError, match=r"masks/2\.png is of none; remove it"):
        class_folders(tmp_path)


def test_images_beside_the_splits_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "train/a/0.png", "test/a/0.png", "masks/train/a/0.png", "bus/0.png", "notes/")
    find_layout(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: images in 'bus' are not used; splits are train/, val/, test/"
    ]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_reads_what_a_single_file_is_read_as(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"0{suffix.upper()}").touch()
    (tmp_path / "0.txt").touch()
    assert len(scan(tmp_path)) == 1


def test_a_pipe_called_like_an_image_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png is a pipe, a socket or a device"):
        scan(tmp_path)
