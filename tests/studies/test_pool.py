"""Evaluations side by side: pairs, intervals over seeds and images, and what may be pooled."""

from pathlib import Path

import numpy as np
import pytest

from camdistill.errors import UserError
from camdistill.measure.intervals import interval
from camdistill.studies.evaluation_tables import told
from camdistill.studies.meta_evaluation import beaten
from camdistill.studies.pool import Pool, demand_pairs, differences, means, read_pool
from camdistill.studies.values import Values, read_values, save_values

ENTRIES = ("grad_cam", "student#1", "student#2", "random", *(f"ladder_{n}" for n in range(6)))
MEANS = (0.5, 0.4, 0.3, 0.0, *np.linspace(1, 0, 6))


def values(seed: int, *, shift: float = 0.0, count: int = 60) -> Values:
    """Of two metrics: higher is better in one, lower in the other; images differ much."""
    generator = np.random.default_rng(seed)
    images = np.random.default_rng(99).standard_normal(count)  # the same in every evaluation
    rows = np.asarray(MEANS)[:, None] + images + 0.05 * generator.standard_normal((10, count))
    rows[1:3] += shift
    table = np.stack([rows, -rows], 1).astype(np.float32)
    flags = np.zeros((10, count), bool)
    flags[1, :2] = True
    curves = {("grad_cam", "insertion_blur"): np.full((count, 17), seed, np.float32)}
    seconds = dict(zip(ENTRIES, [0.001 * (seed + 1), *[float("nan")] * 9], strict=True))
    metrics = ("road", "deletion_grey")
    return Values(ENTRIES, 3, metrics, table, flags, flags, seconds, curves)


def kept(folder: Path, found: Values, **changes: object) -> Path:
    settings = {"images": ["print", [0, 1]], "of": "teacher", "seed": folder.name, **changes}
    save_values(folder, found, np.arange(found.table.shape[2]), settings)
    return folder


def test_a_file_gives_back_what_was_found(tmp_path: Path) -> None:
    before = values(3)
    after, settings = read_values(kept(tmp_path / "a", before))
    assert (after.entries, after.explainers, after.metrics) == (ENTRIES, 3, before.metrics)
    for name in ("table", "failed", "blank"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    np.testing.assert_equal(after.seconds, before.seconds)
    assert after.curves.keys() == before.curves.keys()
    assert settings["seed"] == "a"
    with np.load(tmp_path / "a" / "values.npz") as arrays:  # without us
        np.testing.assert_array_equal(arrays["grad_cam/road"], before.table[0, 0])


def test_explainers_of_one_name_are_seeds_of_one_row() -> None:
    pool = Pool((values(0), values(1)))
    assert (pool.real, pool.controls) == (("grad_cam", "student"), ("random",))
    assert pool.scores("student", "road").shape == (4, 60)
    assert pool.counted("failed", "student") == 4
    assert pool.counted("blank", "grad_cam") == 0
    assert pool.seconds("grad_cam") == pytest.approx(0.0015)
    curve = pool.curve("grad_cam", "insertion_blur")
    assert curve is not None
    assert curve[:, 0].tolist() == [0] * 60 + [1] * 60
    assert pool.curve("student", "insertion_blur") is None


def test_differences_are_taken_image_by_image_within_each_evaluation() -> None:
    pool = Pool((values(0), values(1, shift=0.2)))
    gains = pool.gains("student", "grad_cam", "road")
    first, second = pool.runs
    np.testing.assert_allclose(gains[1], first.table[2, 0] - first.table[0, 0], atol=1e-6)
    np.testing.assert_allclose(gains[2], second.table[1, 0] - second.table[0, 0], atol=1e-6)
    found = differences(Pool((values(0),)), 0)["student"]
    assert found["road"].mean == pytest.approx(-0.15, abs=0.02)
    assert found["deletion_grey"].mean == pytest.approx(0.15, abs=0.02)
    # Two seeds whose means differ by 0.1: their spread decides, not the images'.
    assert found["road"].high - found["road"].low > 0.5
    alone = means(Pool((values(0),)), 0)
    assert alone["grad_cam"]["road"] == interval(values(0).table[0, 0])


def test_controls_stand_above_only_beyond_the_interval_over_seeds_and_images() -> None:
    weak = Pool(tuple(values(seed, shift=-1.0) for seed in range(2)))
    for metric in weak.metrics:
        assert beaten(weak, metric, 0) == ["random > student"]
        assert beaten(Pool((values(0),)), metric, 0) == []


def test_text_and_results_tell_of_seeds_differences_and_the_metrics_own_test() -> None:
    pool = Pool((values(0), values(1), values(2)))
    results, table, text = told(pool, 0, meta=True)
    assert (results["n"], results["seeds"]) == (60, 6)
    assert "n = 60 x 6 seeds" in text
    assert "student minus grad_cam" in text
    assert "student: 6 of 360 maps failed" in text
    assert set(table) == {"grad_cam", "student", "random"}
    by_run = results["meta"]
    assert isinstance(by_run, list)
    ladders = [one["road"]["ladder"].mean for one in by_run]
    shown = f"{np.mean(ladders):.2f} [{min(ladders):.2f}, {max(ladders):.2f}]"
    assert shown in text
    one, _, words = told(Pool((values(0),)), 0, meta=True)
    assert isinstance(one["meta"], dict)
    assert "n = 60 x 2 seeds" in words


def test_what_does_not_belong_together_is_not_pooled(tmp_path: Path) -> None:
    first = kept(tmp_path / "a", values(0))
    second = kept(tmp_path / "b", values(1))
    pool, settings = read_pool([first, second])
    assert [one["seed"] for one in settings] == ["a", "b"]
    assert len(pool.runs) == 2
    fewer = values(2)
    other = Values(
        tuple(name.replace("student", "other") for name in ENTRIES),
        *(3, fewer.metrics, fewer.table, fewer.failed, fewer.blank),
        {name.replace("student", "other"): 1.0 for name in ENTRIES},
        {},
    )
    mistakes = {
        "has other images than": kept(tmp_path / "c", values(2), images=["print", [0, 2]]),
        "has another --of than": kept(tmp_path / "d", values(2), of="student"),
        "named before": kept(tmp_path / "e", values(2), seed="a"),
        "'other#1' is in one of": kept(tmp_path / "f", other),
        "run that evaluation again": tmp_path / "old",
        "but none: name a finished": tmp_path / "nowhere",
        "isn't whole": tmp_path / "partly",
    }
    (tmp_path / "old").mkdir()
    np.savez(tmp_path / "old" / "values.npz", ids=np.arange(3))
    (tmp_path / "partly" / "partial").mkdir(parents=True)
    for told_of, folder in mistakes.items():
        with pytest.raises(UserError, match=told_of):
            read_pool([first, folder])
    with pytest.raises(UserError, match="1 folders to pool"):
        read_pool([first])


def test_seeds_of_two_explainers_must_be_as_many() -> None:
    demand_pairs(["a", "b#1", "b#2", "c#1", "c#2"])
    with pytest.raises(UserError, match="b 2, c 3"):
        demand_pairs(["b#1", "b#2", "c#1", "c#2", "c#3"])
