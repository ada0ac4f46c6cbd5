"""Sets of images: subsets, splits, folders, CIFAR's files."""

import logging
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from camdistill.data.datasets import ImageSet, carve, limit_set, load_cifar, load_folder, shapes_set
from camdistill.data.shapes import Shapes
from camdistill.errors import UserError


def numbered(count: int, classes: int = 3) -> ImageSet:
    values = np.arange(count, dtype=np.int64)
    return ImageSet(
        pixels=np.tile(values[:, None, None, None], (1, 3, 4, 5)).astype(np.uint8),
        labels=values % classes,
        ids=values + 100,
        names=[f"n{value}" for value in values],
        classes=tuple(map(str, range(classes))),
        fingerprint="f",
        boxes=np.repeat(values[:, None], 4, axis=1).astype(np.float32),
        masks=np.tile(values[:, None, None], (1, 4, 5)).astype(np.uint8),
    )


def save(root: Path, seed: int = 0, size: tuple[int, int] = (8, 8), **counts: int) -> None:
    """`train__cat=3` writes three images into train/cat."""
    rng = np.random.default_rng(seed)
    for place, count in counts.items():
        path = root.joinpath(*place.split("__"))
        path.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / f"{index}.png")


def shown(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as opened:
        return np.asarray(opened)


def test_a_subset_of_a_subset_keeps_ids_and_everything_in_step() -> None:
    part = numbered(30).subset(np.arange(10, 30)).subset(np.array([5, 0, 19]))
    assert part.ids.tolist() == [115, 110, 129]
    assert part.labels.tolist() == [0, 1, 2]
    assert list(part.names) == ["n15", "n10", "n29"]
    assert part.fingerprint == "f"
    for column in (part.pixels, part.masks, part.boxes):
        assert column is not None
        assert np.asarray(column).reshape(3, -1)[:, 0].tolist() == [15, 10, 29]
    assert part.size == (4, 5)
    batch = part.batch([2, 0], counted=np.array([True, False]))
    assert batch.pixels[:, 0, 0, 0].tolist() == [29, 15]
    assert batch.pixels.dtype == torch.uint8
    assert batch.labels.tolist() == [2, 0]
    assert batch.ids.tolist() == [129, 115]
    assert batch.counted.tolist() == [True, False]


@given(count=st.integers(2, 300), fraction=st.floats(0.0, 0.9), seed=st.integers(0, 2**63))
@settings(max_examples=50, deadline=None)
def test_carving_splits_without_overlap_or_rest(count: int, fraction: float, seed: int) -> None:
    whole = numbered(count)
    if int(np.ceil(fraction * count - 1e-9)) >= count:
        return
    train, val = carve(whole, fraction, seed)
    assert sorted([*train.ids, *val.ids]) == whole.ids.tolist()
    assert fraction * count - 1e-6 <= len(val) < fraction * count + 1
    again = carve(whole, fraction, seed)[1]
    assert again.ids.tolist() == val.ids.tolist()


def test_carving_takes_a_number_too_and_depends_on_seed_and_purpose() -> None:
    whole = numbered(200)
    parts = [carve(whole, 20.0, 0), carve(whole, 20.0, 1), carve(whole, 20.0, 0, purpose="test")]
    assert [len(val) for _, val in parts] == [20, 20, 20]
    assert len({tuple(val.ids.tolist()) for _, val in parts}) == 3


@pytest.mark.parametrize("fraction", [-0.1, 1.5, 200.0, 1000.0, float("nan"), float("inf"), 0.9999])
def test_a_fraction_out_of_range_is_told(fraction: float) -> None:
    with pytest.raises(UserError, match="val_fraction"):
        carve(numbered(200), fraction, 0)


@given(small=st.integers(1, 60), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_few_shots_are_balanced_and_nested(small: int, seed: int) -> None:
    whole = numbered(60)
    few, more = limit_set(whole, small, seed), limit_set(whole, min(small + 7, 60), seed)
    assert len(few) == small
    assert set(few.ids.tolist()) <= set(more.ids.tolist())
    counts = np.bincount(few.labels, minlength=3)
    assert counts.max() - counts.min() <= 1


def test_shapes_are_rendered_with_labels_names_and_masks() -> None:
    shapes = Shapes(split="val", length=20, seed=3)
    images = shapes_set(shapes)
    rendered = shapes.render(np.arange(20))
    assert np.array_equal(images.pixels, rendered.pixels)
    assert np.array_equal(images.labels, rendered.labels)
    assert np.array_equal(images.masks, rendered.masks["object"])
    assert images.classes == shapes.class_names
    assert shapes_set(Shapes(split="val", length=20, seed=4)).fingerprint != images.fingerprint


def test_a_folder_with_splits_is_read_with_paths_relative_to_the_root(tmp_path: Path) -> None:
    save(tmp_path, train__cat=3, train__dog=2, val__cat=1, val__dog=1)
    (tmp_path / "boxes.csv").write_text("val/dog/0.png,1,2,3,4\n")
    train = load_folder(tmp_path, "train", cache_dir=tmp_path / "c")
    test = load_folder(tmp_path, "test", cache_dir=tmp_path / "c")
    assert list(train.names) == [
        *(f"train/cat/{i}.png" for i in range(3)),
        "train/dog/0.png",
        "train/dog/1.png",
    ]
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert train.classes == test.classes == ("cat", "dog")
    assert train.boxes is not None
    assert test.boxes is not None
    assert np.isnan(train.boxes).all()
    assert test.boxes[1].tolist() == [1, 2, 3, 4]
    for name, pixels in zip(train.names, np.asarray(train.pixels), strict=True):
        assert np.array_equal(pixels.transpose(1, 2, 0), shown(tmp_path / name))
    assert train.fingerprint != test.fingerprint


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    for place in ("one", "two"):
        save(tmp_path / place, a=2, b=2)
    save(tmp_path / "three", seed=1, a=2, b=2)
    one, two, three = (
        load_folder(tmp_path / place, cache_dir=tmp_path / "c").fingerprint
        for place in ("one", "two", "three")
    )
    assert one == two
    assert one != three


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    save(tmp_path / "flat", **{"": 4})
    images = load_folder(tmp_path / "flat", cache_dir=tmp_path / "c")
    assert images.labels.tolist() == [-1] * 4
    assert images.classes == ()
    assert not images.labeled
    save(tmp_path / "deep", a=2, b__c=2)
    deep = load_folder(tmp_path / "deep", labeled=False, cache_dir=tmp_path / "c")
    assert list(deep.names) == ["a/0.png", "a/1.png", "b/c/0.png", "b/c/1.png"]
    assert deep.labels.tolist() == [-1] * 4


def test_labels_stay_in_step_when_broken_files_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "d", a=3, b=3)
    (tmp_path / "d" / "a" / "1.png").write_bytes(b"broken")
    with caplog.at_level(logging.WARNING):
        images = load_folder(tmp_path / "d", on_broken="skip", cache_dir=tmp_path / "c")
    assert "1 of 6 files" in caplog.text
    assert images.labels.tolist() == [0, 0, 1, 1, 1]
    assert images.names[1] == "a/2.png"
    assert images.ids.tolist() == [0, 1, 2, 3, 4]


def test_a_class_whose_images_are_all_broken_is_told(tmp_path: Path) -> None:
    save(tmp_path / "d", a=3, b=1)
    (tmp_path / "d" / "b" / "0.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="class 'b'"):
        load_folder(tmp_path / "d", on_broken="skip", cache_dir=tmp_path / "c")


def test_missing_splits_folders_and_images_are_told(tmp_path: Path) -> None:
    save(tmp_path / "d", a=1, b=1)
    with pytest.raises(UserError, match="has no test split; there are: 'train'"):
        load_folder(tmp_path / "d", "test", cache_dir=tmp_path / "c")
    with pytest.raises(UserError, match="nearest: 'd'"):
        load_folder(tmp_path / "dd", cache_dir=tmp_path / "c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in"):
        load_folder(tmp_path / "empty", cache_dir=tmp_path / "c")
    with pytest.raises(UserError, match="size is 0"):
        load_folder(tmp_path / "d", size=0, cache_dir=tmp_path / "c")


def test_cifar_without_files_or_internet_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    with pytest.raises(UserError, match=r"no cifar10 in .*put cifar-10-python") as told:
        load_cifar("cifar10", tmp_path, "train", download=False)
    assert "\n" not in str(told.value)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(UserError, match=r"name resolution.*put cifar-100-python") as told:
        load_cifar("cifar100", tmp_path / "new", "test")
    assert "\n" not in str(told.value)


def test_cifar_equals_its_published_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in Krizhevsky's format: rows of 1024 red, 1024 green, 1024 blue values."""
    rows = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    (base / "test_batch").write_bytes(pickle.dumps({"data": rows, "labels": [3, 1, 4, 1, 5]}))
    names = [f"c{index}" for index in range(10)]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(base, base.name)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    images = load_cifar("cifar10", tmp_path, "test", download=False)
    assert np.array_equal(images.pixels, rows.reshape(5, 3, 32, 32))
    assert images.labels.tolist() == [3, 1, 4, 1, 5]
    assert images.classes == tuple(names)


@pytest.mark.data
def test_tiny_imagenet_boxes_and_grayscale_files_are_read(tmp_path: Path) -> None:
    root = os.environ.get("CAMDISTILL_DATA")
    if not root or not (Path(root) / "tinyimagenet10").is_dir():
        pytest.skip("CAMDISTILL_DATA names no folder with tinyimagenet10")
    images = load_folder(Path(root) / "tinyimagenet10", "test", cache_dir=tmp_path)
    assert len(images) == 500
    assert images.size == (64, 64)
    assert np.bincount(images.labels).tolist() == [50] * 10
    assert images.boxes is not None
    assert np.isfinite(images.boxes).all()
    assert images.boxes.min() >= 0
    assert images.boxes.max() <= 63
    grayscale = []
    for index, name in enumerate(images.names):
        with Image.open(Path(root) / "tinyimagenet10" / name) as opened:
            if opened.mode == "L":
                grayscale.append(index)
    assert grayscale
    for index in grayscale:
        assert np.ptp(images.pixels[np.array([index])][0].astype(int), axis=0).max() == 0
