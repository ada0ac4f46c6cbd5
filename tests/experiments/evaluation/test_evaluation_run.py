import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camdistill.data.datasets import shapes_set
from camdistill.data.shapes import Shapes
from camdistill.errors import UserError
from camdistill.experiments.evaluation.evaluation_run import (
    EvaluatedExplainer,
    Evaluation,
    EvaluationSubject,
    evaluate_explainers,
    example_maps,
    explainer_maps,
)
from camdistill.measure.panel import measure, prepare_batch
from camdistill.types import Explain

METRICS = ("infidelity", "deletion_gray", "iou", "deletion_rerendered")
SHAPES = Shapes("test", 7)


class Mean(nn.Module):
    """Classes are colors: which channel is brightest in the middle; counts images."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))
        self.asked = 0

    def forward(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        return self.scale * images[:, :, 8:24, 8:24].mean((2, 3))


def brightness(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    return images[torch.arange(len(images)), classes][:, ::4, ::4]


def evaluation(network: Mean, settings: str = "a", **changes: object) -> Evaluation:
    options: dict[str, object] = {
        "subject": EvaluationSubject(network, shapes_set(SHAPES), SHAPES),
        "explainers": [EvaluatedExplainer("brightness", brightness)],
        "metrics": METRICS,
        "seed": 0,
        "batch": 3,
        "ladder": True,
        "settings": {"name": settings},
    }
    return Evaluation(**(options | changes))  # type: ignore[arg-type]


def test_values_are_those_of_each_batch(tmp_path: Path) -> None:
    network = Mean().eval()
    given = evaluation(network)
    values = evaluate_explainers(given, tmp_path)
    assert values.table.shape == (1 + 9 + 6, 4, 7)
    assert values.controls == (
        *("random", "smooth_random", "edges", "center", "mean_map", "inverted", "blurred_copy"),
        *("distractor", "oracle"),
    )
    images = example_maps(given, 3)
    asked = prepare_batch(
        network,
        images,
        METRICS,
        "0 3",
        masks=torch.from_numpy(SHAPES.render(np.arange(3, 6)).masks["object"]),
        rerendered=torch.from_numpy(
            SHAPES.render(np.arange(3, 6), remove=("object", "second", "distractor")).pixels
        ).float()
        / 255,
    )
    maps = torch.nn.functional.interpolate(
        brightness(network, images, asked.classes)[:, None], size=(32, 32), mode="bilinear"
    )[:, 0]
    expected = measure(asked, maps, METRICS).values
    for metric in METRICS:
        found = values.of("brightness", metric)[3:6]
        np.testing.assert_allclose(found, expected[metric].numpy(), rtol=1e-5)
    assert values.of("oracle", "iou").tolist() == [1] * 7
    assert 0 < values.seconds["brightness"] < 1
    assert np.isnan(values.seconds["oracle"])
    assert values.curves["brightness", "deletion_gray"].shape == (7, 17)


def killing(at: int) -> Callable[[int, int], None]:
    def kill(done: int, total: int) -> None:
        assert total == 6  # three batches, for the mean map and to be measured
        if done == at:
            raise KeyboardInterrupt

    return kill


@pytest.mark.parametrize("batches", [2, 5])
def test_killed_and_resumed_gives_the_numbers_of_the_unbroken_run(
    tmp_path: Path, batches: int
) -> None:
    network = Mean().eval()
    whole = evaluate_explainers(evaluation(network), tmp_path / "whole")
    every, network.asked = network.asked, 0
    with pytest.raises(KeyboardInterrupt):
        evaluate_explainers(evaluation(network), tmp_path / "cut", killing(batches))
    assert network.asked > 0
    cut = evaluate_explainers(evaluation(network), tmp_path / "cut", killing(7))
    assert network.asked == every  # no image is asked again
    np.testing.assert_array_equal(cut.table, whole.table)
    assert {name: curve.tobytes() for name, curve in cut.curves.items()} == {
        name: curve.tobytes() for name, curve in whole.curves.items()
    }
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["values.npz"]
    with np.load(tmp_path / "cut" / "values.npz") as found:
        np.testing.assert_array_equal(found["oracle/iou"], np.ones(7, np.float32))


def test_a_finished_evaluation_is_not_measured_again_another_one_is(tmp_path: Path) -> None:
    network = Mean().eval()
    whole = evaluate_explainers(evaluation(network), tmp_path)
    network.asked = 0
    calls = []
    again = evaluate_explainers(evaluation(network), tmp_path, lambda *call: calls.append(call))
    assert network.asked == 0
    assert calls == [(6, 6)]
    np.testing.assert_array_equal(again.table, whole.table)
    assert again.entries == whole.entries
    assert [path.name for path in tmp_path.iterdir()] == ["values.npz"]
    evaluate_explainers(evaluation(network, "b"), tmp_path)
    assert network.asked > 0


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no archive"])
def test_a_damaged_batch_is_measured_again(tmp_path: Path, content: bytes) -> None:
    network = Mean().eval()
    whole = evaluate_explainers(evaluation(network), tmp_path / "whole")
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        evaluate_explainers(evaluation(network), folder, killing(5))
    for name in ("mean_00000000", "00000003"):
        (damaged,) = folder.glob(f"partial/*/{name}.npz")
        damaged.write_bytes(content)
    (folder / "values.npz").write_bytes(b"no archive")
    np.testing.assert_array_equal(
        evaluate_explainers(evaluation(network), folder).table, whole.table
    )


def test_another_evaluation_does_not_go_on_with_these_batches_and_leaves_them(
    tmp_path: Path,
) -> None:
    network = Mean().eval()
    with pytest.raises(KeyboardInterrupt):
        evaluate_explainers(evaluation(network, "a"), tmp_path, killing(5))
    half = network.asked
    other = evaluate_explainers(evaluation(Mean().eval(), "b", seed=5), tmp_path)
    fresh = evaluate_explainers(evaluation(Mean().eval(), "b", seed=5), tmp_path / "fresh")
    np.testing.assert_array_equal(other.table, fresh.table)
    (left,) = tmp_path.glob("partial/*/settings.json")
    assert json.loads(left.read_text()) == {"name": "a"}
    evaluate_explainers(evaluation(network, "a"), tmp_path)
    assert network.asked - half < half  # the last batch of one image alone
    assert not (tmp_path / "partial").exists()


def test_stored_maps_are_the_live_ones(tmp_path: Path) -> None:
    network = Mean().eval()
    given = evaluation(network, ladder=False)
    stored = []
    for start in (0, 3, 6):
        images = example_maps(given, start)
        stored.append(brightness(network, images, network(images).argmax(1)).numpy())
    both = [
        EvaluatedExplainer("brightness", brightness),
        EvaluatedExplainer("stored", stored=np.concatenate(stored)),
    ]
    values = evaluate_explainers(evaluation(network, explainers=both, ladder=False), tmp_path)
    np.testing.assert_array_equal(values.table[0], values.table[1])


def test_maps_larger_than_the_images_are_averaged_and_not_sampled() -> None:
    large = np.random.default_rng(0).random((3, 128, 48)).astype(np.float32)
    images, none = torch.zeros(3, 3, 32, 32), torch.zeros(3).long()
    maps = explainer_maps(EvaluatedExplainer("large", stored=large), nn.Identity(), images, none, 0)
    rows = large.reshape(3, 32, 4, 48).mean(2)
    # 48 columns on 32: a new one is a column and half a column, or half a column and a column
    one, half, other = rows[:, :, ::3], rows[:, :, 1::3], rows[:, :, 2::3]
    expected = np.stack([(one + half / 2) / 1.5, (half / 2 + other) / 1.5], 3).reshape(3, 32, 32)
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-5)


def test_an_explainer_that_changes_its_images_in_place_changes_nothing_else(
    tmp_path: Path,
) -> None:
    def spoiling(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        maps = brightness(network, images, classes).clone()
        images.zero_()
        classes.zero_()
        return maps

    metrics = (*METRICS, "max_sensitivity")
    tables = []
    for name, first in (("spoiling", spoiling), ("clean", brightness)):
        both = [EvaluatedExplainer("first", first), EvaluatedExplainer("second", brightness)]
        given = evaluation(Mean().eval(), explainers=both, metrics=metrics, ladder=False)
        tables.append(evaluate_explainers(given, tmp_path / name).table)
    np.testing.assert_array_equal(*tables)


def test_failures_and_blank_maps_are_counted(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).random((7, 8, 8)).astype(np.float32)
    maps[1, 2, 2], maps[4] = np.nan, 0.0
    one = EvaluatedExplainer("stored", stored=maps)
    values = evaluate_explainers(
        evaluation(Mean().eval(), explainers=[one], ladder=False), tmp_path
    )
    assert np.flatnonzero(values.failed[0]).tolist() == [1]
    assert np.flatnonzero(values.blank[0]).tolist() == [4]
    assert np.isnan(values.table[0]).all(0).tolist() == [i == 1 for i in range(7)]


def test_a_constant_map_is_blank_whatever_its_grid_and_its_order_is_chance(
    tmp_path: Path,
) -> None:
    def explain(value: float, height: int, width: int) -> Explain:
        return lambda network, images, classes: torch.full((len(images), height, width), value)

    both = [
        EvaluatedExplainer("odd", explain(0.1, 5, 7)),
        EvaluatedExplainer("whole", explain(0.5, 32, 32)),
    ]
    metrics = ("deletion_gray", "max_sensitivity", "randomization")
    given = evaluation(Mean().eval(), explainers=both, metrics=metrics, ladder=False)
    values = evaluate_explainers(given, tmp_path)
    for name in ("odd", "whole", "inverted", "blurred_copy"):
        assert values.blank[values.entries.index(name)].all(), name
    deletion = [values.of(name, "deletion_gray") for name in ("odd", "whole", "blurred_copy")]
    np.testing.assert_array_equal(deletion[0], deletion[1])  # the same ties, broken alike
    np.testing.assert_array_equal(deletion[0], deletion[2])
    assert "max_sensitivity" not in values.metrics  # nobody has a value


def test_maps_of_a_wrong_shape_are_told(tmp_path: Path) -> None:
    wrong = EvaluatedExplainer(
        "wrong", lambda network, images, classes: images.mean((1, 2, 3))[:, None]
    )
    with pytest.raises(
        (UserError, TypeError), match=r"one map an image, \[3, height, width\]|Type"
    ):
        evaluate_explainers(evaluation(Mean().eval(), explainers=[wrong]), tmp_path)


def test_ladder_of_an_image_without_a_known_object_does_not_count(tmp_path: Path) -> None:
    images = shapes_set(SHAPES)
    masks = np.array(images.masks)
    masks[2] = 0
    subject = EvaluationSubject(Mean().eval(), replace(images, masks=masks))
    values = evaluate_explainers(
        evaluation(Mean().eval(), subject=subject, metrics=("gini",)), tmp_path
    )
    rungs = np.array(
        [[values.of(rung, "gini")[place] for rung in values.rungs] for place in (1, 2)]
    )
    assert not np.isnan(rungs[0]).any()
    assert np.isnan(rungs[1]).all()
