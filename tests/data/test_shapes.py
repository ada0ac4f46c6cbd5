import hashlib

import numpy as np
import pytest
from scipy import stats
from scipy.ndimage import uniform_filter

from camdistill.data.shapes import RenderedShapes, Shapes
from camdistill.errors import UserError

SPLITS = ("train", "val", "test", "aligned", "neutral", "conflict")
# Of VERSION 1: a change here must raise it.
GOLDEN = {
    "train": {"plain": "a279921c8a811fc7", "rich": "952479960b568e74"},
    "val": {"plain": "39b88b88b1299891", "rich": "dc08cdd52b54ffdc"},
    "test": {"plain": "883378536cc94bf1", "rich": "2718e023685f3e43"},
    "aligned": {"plain": "a662248b693f67d3", "rich": "153ee4aec18003b4"},
    "neutral": {"plain": "f57fcbf94d58df50", "rich": "42c22ceff016d777"},
    "conflict": {"plain": "f57fcbf94d58df50", "rich": "9cef78150084aa50"},
}


def rendered(count: int, split: str = "train", **options) -> RenderedShapes:
    return Shapes(split=split, length=count, **options).render(np.arange(count))


def digest(images: RenderedShapes) -> str:
    seen = hashlib.sha256(images.pixels.tobytes() + images.labels.tobytes())
    for name in sorted(images.masks):
        seen.update(name.encode() + np.packbits(images.masks[name]).tobytes())
    return seen.hexdigest()[:16]


@pytest.mark.parametrize("split", SPLITS)
def test_first_eight_images_are_golden(split: str) -> None:
    found = {
        "plain": digest(rendered(8, split, shortcut=0.9)),
        "rich": digest(
            rendered(8, split, size=96, seed=7, classes=10, shortcut=0.5, objects=2, suppressor=0.5)
        ),
    }
    assert found == GOLDEN[split]


@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("cells", [0.5, 1.0, 2.0])
def test_masks_split_the_image_and_parts_lie_in_the_object(size, objects, cells) -> None:
    masks = rendered(
        500, size=size, objects=objects, shortcut=0.5, shortcut_cells=cells, seed=3
    ).masks
    pieces, parts = {"object", "distractor", "shortcut", "background"}, {"parts"}
    if objects == 2:
        pieces, parts = pieces | {"second"}, parts | {"second_parts"}
    assert set(masks) == pieces | parts
    np.testing.assert_array_equal(sum(masks[name].astype(int) for name in pieces), 1)
    assert not (masks["parts"] & ~masks["object"]).any()
    assert (masks["parts"].sum((1, 2)) > 0.7 * masks["object"].sum((1, 2))).all()
    for name in pieces - {"shortcut", "background"}:
        area = masks[name].mean((1, 2))
        assert area.min() >= 0.04
        assert area.max() <= 0.15
    assert (masks["shortcut"].sum((1, 2)) == round(cells * size / 8) ** 2).all()


def test_any_order_and_any_subset_give_the_same_images() -> None:
    shapes = Shapes(split="val", length=10**9, shortcut=0.8, objects=2, suppressor=0.3)
    indices = np.array([999_999_999, 5, 123_456_789, 0, 5, 77])
    together = shapes.render(np.concatenate([np.arange(300), indices]))
    for place, index in enumerate(indices):
        alone = shapes.render(np.array([index]))
        np.testing.assert_array_equal(alone.pixels[0], together.pixels[300 + place])
        assert alone.labels[0] == together.labels[300 + place]
        for name, mask in alone.masks.items():
            np.testing.assert_array_equal(mask[0], together.masks[name][300 + place])


def test_splits_and_seeds_have_different_images() -> None:
    first = {
        digest(rendered(4, split, shortcut=0.5, seed=seed))
        for split in ("train", "val", "test")
        for seed in (0, 1)
    }
    assert len(first) == 6


def test_render_of_nothing_is_empty() -> None:
    nothing = Shapes(split="train", length=5).render(np.arange(0))
    assert nothing.pixels.shape == (0, 3, 32, 32)
    assert nothing.masks["object"].shape == (0, 32, 32)


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("element", ["object", "distractor", "shortcut", "second"])
def test_removal_changes_only_the_removed_pixels(element: str, objects: int) -> None:
    if element == "second" and objects == 1:
        pytest.skip("there is no second object")
    shapes = Shapes(split="test", length=300, shortcut=0.5, objects=objects, suppressor=0.4)
    before = shapes.render(np.arange(300))
    after = shapes.render(np.arange(300), remove={element})
    changed = (before.pixels != after.pixels).any(axis=1)
    assert not (changed & ~before.masks[element]).any()
    assert changed[before.masks[element]].mean() > 0.99
    assert not after.masks[element].any()
    np.testing.assert_array_equal(
        after.masks["background"], before.masks["background"] | before.masks[element]
    )


def test_patch_leaves_the_rest_of_the_scene_alone() -> None:
    without, with_patch = rendered(300), rendered(300, shortcut=0.7)
    changed = (without.pixels != with_patch.pixels).any(axis=1)
    assert not (changed & ~with_patch.masks["shortcut"]).any()
    assert (without.shortcut_labels == -1).all()


@pytest.mark.parametrize("shift", range(1, 8))
def test_class_swap_changes_only_parts(shift: int) -> None:
    shapes = Shapes(split="test", length=300, size=64, shortcut=0.5)
    before = shapes.render(np.arange(300))
    after = shapes.render(np.arange(300), swap_class=shift)
    np.testing.assert_array_equal(after.labels, (before.labels + shift) % 8)
    np.testing.assert_array_equal(after.shortcut_labels, before.shortcut_labels)
    changed = (before.pixels != after.pixels).any(axis=1)
    assert not (changed & ~(before.masks["parts"] ^ after.masks["parts"])).any()
    assert (changed.sum((1, 2)) > 0.1 * before.masks["object"].sum((1, 2))).all()
    for name in ("distractor", "shortcut"):
        np.testing.assert_array_equal(before.masks[name], after.masks[name])


def test_all_classes_share_the_core_and_the_area() -> None:
    shapes = Shapes(split="test", length=200, size=96, classes=10)
    renders = [shapes.render(np.arange(200), swap_class=shift) for shift in range(10)]
    cores = [images.masks["object"] & ~images.masks["parts"] for images in renders]
    for core in cores[1:]:
        np.testing.assert_array_equal(core, cores[0])
    # Whole shapes only: tips may lie outside the image.
    inner = np.zeros((96, 96), bool)
    inner[1:-1, 1:-1] = True
    whole = np.logical_and.reduce(
        [~(images.masks["object"] & ~inner).any((1, 2)) for images in renders]
    )
    areas = np.stack([images.masks["object"][whole].mean((1, 2)) for images in renders])
    assert whole.sum() > 50
    np.testing.assert_allclose(areas / areas.mean(axis=0), 1, atol=0.04)


def test_background_swap_changes_only_background() -> None:
    shapes = Shapes(split="test", length=300, shortcut=0.5, suppressor=0.2)
    before = shapes.render(np.arange(300))
    others = [shapes.render(np.arange(300), swap_background=other) for other in (1, 2)]
    for after in others:
        changed = (before.pixels != after.pixels).any(axis=1)
        assert not (changed & ~before.masks["background"]).any()
        assert changed[before.masks["background"]].mean() > 0.95
    assert (others[0].pixels != others[1].pixels).any(axis=1).mean() > 0.8


def test_position_prior_is_flat() -> None:
    mean = rendered(20_000).masks["object"].mean(axis=0)
    # On a map of 8 x 8 cells; the outermost ones are half empty: shapes don't reach into corners.
    inner = mean.reshape(8, 4, 8, 4).mean((1, 3))[1:-1, 1:-1]
    assert inner.max() / inner.min() < 1.5
    # A prior for the center must fail.
    assert inner[2:4, 2:4].mean() < inner.mean()


def held_out_accuracy(features: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Of a linear probe: least squares on one-hot labels, fitted on the first half."""
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    design = np.concatenate([features, features**2, np.ones((len(features), 1))], axis=1)
    half = len(labels) // 2
    weights = np.linalg.lstsq(design[:half], np.eye(classes)[labels[:half]], rcond=None)[0]
    return float(((design[half:] @ weights).argmax(axis=1) == labels[half:]).mean())


def test_global_statistics_tell_nothing_about_the_label() -> None:
    images = rendered(12_000, seed=11)
    pixels, shape = images.pixels.astype(np.float32), images.masks["object"]
    area = shape.mean((1, 2))
    color = np.einsum("nchw,nhw->nc", pixels, shape) / shape.sum((1, 2))[:, None]
    rows, columns = (
        np.einsum("nhw,hw->n", shape, grid) / shape.sum((1, 2)) for grid in np.mgrid[:32, :32]
    )
    features = np.column_stack(
        [pixels.mean((2, 3)), pixels.std((2, 3)), color, area, rows, columns]
    )
    # Chance is 1/8; 6,000 held-out images have a standard error of 0.43 %.
    assert abs(held_out_accuracy(features, images.labels, 8) - 1 / 8) < 0.02


def test_probe_would_find_a_leak() -> None:
    images = rendered(12_000, seed=11)
    leak = images.masks["object"].mean((1, 2)) + 0.002 * (images.labels == 3)
    features = np.column_stack([leak, np.where(images.labels == 1, 1.0, 0.0)])
    assert held_out_accuracy(features, images.labels, 8) > 0.145


def test_distractor_and_second_label_are_independent_of_the_label() -> None:
    images = rendered(12_000, objects=2)
    table = np.zeros((8, 3))
    np.add.at(table, (images.labels, images.distractors), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert (images.labels != images.second_labels).all()
    assert (
        stats.chisquare(np.bincount((images.second_labels - images.labels) % 8)[1:]).pvalue > 1e-3
    )
    assert stats.chisquare(np.bincount(images.labels, minlength=8)).pvalue > 1e-3


def test_distractor_resembles_the_object_but_for_its_shape() -> None:
    images = rendered(6_000)
    pixels = images.pixels.astype(np.float32)
    contrast, area = {}, {}
    for name in ("object", "distractor", "background"):
        mask = images.masks[name]
        area[name] = mask.mean()
        contrast[name] = np.einsum("nchw,nhw->nc", pixels, mask) / mask.sum((1, 2))[:, None]
    gaps = [np.abs(contrast[name] - contrast["background"]).mean() for name in list(contrast)[:2]]
    assert gaps[0] == pytest.approx(gaps[1], rel=0.02)
    assert area["object"] == pytest.approx(area["distractor"], rel=0.02)


@pytest.mark.parametrize(
    ("split", "rho"),
    [("train", 0.9), ("val", 0.3), ("test", 1.0), ("aligned", 1.0), ("neutral", 1 / 8)],
)
def test_patch_agrees_as_often_as_rho_says(split: str, rho: float) -> None:
    images = rendered(12_000, split, shortcut=rho if split in ("train", "val", "test") else 0.9)
    agree = int((images.shortcut_labels == images.labels).sum())
    assert stats.binomtest(agree, 12_000, rho).pvalue > 1e-3


def test_conflicting_patch_never_agrees_and_prefers_no_class() -> None:
    images = rendered(12_000, "conflict", shortcut=0.9)
    shift = np.bincount((images.shortcut_labels - images.labels) % 8, minlength=8)
    assert shift[0] == 0
    assert stats.chisquare(shift[1:]).pvalue > 1e-3


def test_patch_has_one_color_a_class() -> None:
    images = rendered(3_000, "neutral", shortcut=0.9)
    image, row, column = np.nonzero(images.masks["shortcut"])
    colors = images.pixels[image, :, row, column]
    by_class = [
        np.unique(colors[images.shortcut_labels[image] == label], axis=0) for label in range(8)
    ]
    assert all(len(found) == 1 for found in by_class)
    assert len(np.unique(np.concatenate(by_class), axis=0)) == 8


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("cells", [0.5, 1.0, 2.0])
def test_patch_is_off_center_and_occludes_nothing(cells: float, objects: int) -> None:
    images = rendered(5_000, shortcut=0.5, shortcut_cells=cells, objects=objects)
    without = rendered(5_000, objects=objects)
    for name in ("object", "distractor"):
        np.testing.assert_array_equal(images.masks[name], without.masks[name])
        assert not (images.masks[name] & images.masks["shortcut"]).any()
    assert not images.masks["shortcut"][:, 13:19, 13:19].any()


def test_paired_splits_show_the_scenes_of_test() -> None:
    renders = [
        rendered(100, split, shortcut=0.9) for split in ("test", "aligned", "neutral", "conflict")
    ]
    patch = renders[0].masks["shortcut"][:, None]
    for images in renders[1:]:
        np.testing.assert_array_equal(
            np.where(patch, 0, images.pixels), np.where(patch, 0, renders[0].pixels)
        )


@pytest.mark.parametrize("size", [32, 64, 96])
def test_background_amplitude_falls_like_one_over_frequency(size: int) -> None:
    shapes = Shapes(split="train", length=400, size=size)
    pixels = shapes.render(np.arange(400), remove={"object", "distractor"}).pixels.mean(axis=1)
    window = np.hanning(size)[:, None] * np.hanning(size)
    centered = (pixels - pixels.mean((1, 2), keepdims=True)) * window
    amplitude = np.sqrt((np.abs(np.fft.fft2(centered)) ** 2).mean(axis=0))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    used = (frequency > 2.5 / size) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[used]), np.log(amplitude[used]), 1)[0]
    assert -1.5 < slope < -0.6


def test_suppressor_is_shared_by_object_and_background() -> None:
    plain = rendered(400).pixels.astype(int)
    images = rendered(400, suppressor=0.3)
    inside = (plain > 40) & (plain < 215) & (images.pixels > 0) & (images.pixels < 255)
    inside = inside.all(axis=1)
    added = images.pixels.astype(int) - plain
    for channel in (1, 2):
        np.testing.assert_array_equal(added[:, channel][inside], added[:, 0][inside])
    beside = []
    for shape, field in zip(images.masks["object"], added[:, 0], strict=True):
        near = uniform_filter(shape.astype(float), 3) > 0
        beside.append((field[shape].mean(), field[near & ~shape].mean()))
    assert np.corrcoef(np.array(beside).T)[0, 1] > 0.8


def test_conjunction_is_true_where_both_shapes_are() -> None:
    images = rendered(6000, objects=2, task="conjunction")
    disc = (images.kinds == 0) | (images.second_labels == 0)
    triangle = (images.kinds == 1) | (images.second_labels == 1)
    np.testing.assert_array_equal(images.labels, disc & triangle)
    assert images.labels.mean() == pytest.approx(0.5, abs=0.02)
    counts = [(disc & ~triangle).mean(), (~disc & triangle).mean(), (~disc & ~triangle).mean()]
    assert counts == pytest.approx([1 / 6] * 3, abs=0.02)


def test_no_single_object_tells_the_xor() -> None:
    images = rendered(12000, objects=2, task="xor")
    disc = (images.kinds == 0) | (images.second_labels == 0)
    triangle = (images.kinds == 1) | (images.second_labels == 1)
    np.testing.assert_array_equal(images.labels, disc ^ triangle)
    assert (images.kinds != images.second_labels).all()
    for kinds in (images.kinds, images.second_labels):
        for kind in np.unique(kinds):
            chosen = images.labels[kinds == kind]
            assert chosen.mean() == pytest.approx(0.5, abs=4 * 0.5 / len(chosen) ** 0.5)
    table = np.zeros((10, 2))
    np.add.at(table, (images.distractors, images.labels), 1)
    assert stats.chi2_contingency(table[:3]).pvalue > 0.001


@pytest.mark.parametrize("task", ["conjunction", "xor"])
def test_task_changes_shapes_alone(task: str) -> None:
    plain, asked = rendered(64, objects=2), rendered(64, objects=2, task=task)
    np.testing.assert_array_equal(plain.distractors, asked.distractors)
    either = sum(one.masks[name] for one in (plain, asked) for name in ("object", "second"))
    outside = np.broadcast_to((either == 0)[:, None], plain.pixels.shape)
    np.testing.assert_array_equal(plain.pixels[outside], asked.pixels[outside])
    assert Shapes("train", 64, objects=2).fingerprint != (
        Shapes("train", 64, objects=2, task=task).fingerprint
    )


def test_swapped_shape_has_the_label_that_goes_with_it() -> None:
    shapes = Shapes("test", 400, objects=2, task="xor")
    swapped = shapes.render(np.arange(400), swap_class=3)
    disc = (swapped.kinds == 0) | (swapped.second_labels == 0)
    triangle = (swapped.kinds == 1) | (swapped.second_labels == 1)
    np.testing.assert_array_equal(swapped.labels, disc ^ triangle)


@pytest.mark.parametrize(("split", "share"), [("aligned", 1.0), ("neutral", 0.5), ("conflict", 0)])
def test_patch_shows_one_of_the_tasks_two_labels(split: str, share: float) -> None:
    images = rendered(2000, split, objects=2, task="xor", shortcut=0.9)
    assert set(images.shortcut_labels.tolist()) == {0, 1}
    agree = (images.shortcut_labels == images.labels).mean()
    assert agree == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"task": "xor"},
        {"size": 48},
        {"classes": 5},
        {"classes": 11},
        {"shortcut": 1.5},
        {"shortcut": -0.1},
        {"shortcut": float("nan")},
        {"shortcut_cells": 3.0},
        {"objects": 3},
        {"suppressor": 2.0},
        {"length": 0},
        {"split": "conflict"},
    ],
)
def test_mistaken_option_is_one_line_with_a_cure(options: dict) -> None:
    with pytest.raises(UserError) as caught:
        Shapes(**{"split": "train", "length": 8, **options})
    assert "\n" not in str(caught.value)


def test_unknown_split_is_told_the_nearest() -> None:
    # Past the constructor, whose types the tests check.
    shapes = object.__new__(Shapes)
    object.__setattr__(shapes, "split", "tests")
    with pytest.raises(UserError, match="nearest: 'test'"):
        shapes.__post_init__()


def test_index_outside_the_split_is_refused() -> None:
    shapes = Shapes(split="train", length=8)
    for index in (-1, 8):
        with pytest.raises(ValueError, match="indices"):
            shapes.render(np.array([index]))
    with pytest.raises(ValueError, match="remove"):
        Shapes.render.__wrapped__(shapes, np.array([0]), remove={"patch"})


def test_fingerprint_tells_splits_apart() -> None:
    prints = {Shapes(split=split, length=8, shortcut=0.5).fingerprint for split in SPLITS}
    prints |= {
        Shapes(split="train", length=8, suppressor=value).fingerprint for value in (0.0, 0.5)
    }
    assert len(prints) == 8
    assert Shapes("train", 8).fingerprint == Shapes("train", 8).fingerprint
