"""Evaluations side by side: pairs, intervals over seeds and images, and what may be pooled."""

from pathlib import Path

import numpy as np
import pytest

from camdistill.errors import UserError
from camdistill.experiments.evaluation.evaluation_tables import summarize_pool
from camdistill.experiments.evaluation.evaluation_values import Values, read_values, save_values
from camdistill.experiments.evaluation.meta_evaluation import list_defeats
from camdistill.experiments.evaluation.pooling import (
    EvaluationPool,
    check_pairs,
    difference_table,
    mean_table,
    read_pool,
    seed_and_image_interval,
)
from camdistill.measure.intervals import bootstrap_interval

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
    metrics = ("road", "deletion_gray")
    return Values(ENTRIES, 3, metrics, table, flags, flags, seconds, curves)


def kept(folder: Path, found: Values, **changes: object) -> Path:
    explainers = [{"name": name, "kind": "k", "digest": name} for name in found.real]
    settings = {
        **{"images": ["print", [0, 1]], "of": "teacher", "seed": folder.name, "network": "n"},
        **{"explainers": explainers, **changes},
    }
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
    pool = EvaluationPool((values(0), values(1)))
    assert (pool.real, pool.controls) == (("grad_cam", "student"), ("random",))
    assert pool.scores("student", "road").shape == (4, 60)
    assert pool.count_flags("failed", "student") == 4
    assert pool.count_flags("blank", "grad_cam") == 0
    assert pool.seconds("grad_cam") == pytest.approx(0.0015)
    curve = pool.curve("grad_cam", "insertion_blur")
    assert curve is not None
    assert curve[:, 0].tolist() == [0] * 60 + [1] * 60
    assert pool.curve("student", "insertion_blur") is None


def test_differences_are_taken_image_by_image_within_each_evaluation() -> None:
    pool = EvaluationPool((values(0), values(1, shift=0.2)))
    gains = pool.gains("student", "grad_cam", "road")
    first, second = pool.runs
    np.testing.assert_allclose(gains[1], first.table[2, 0] - first.table[0, 0], atol=1e-6)
    np.testing.assert_allclose(gains[2], second.table[1, 0] - second.table[0, 0], atol=1e-6)
    found = difference_table(EvaluationPool((values(0),)), 0)["student"]
    assert found["road"].mean == pytest.approx(-0.15, abs=0.02)
    assert found["deletion_gray"].mean == pytest.approx(0.15, abs=0.02)
    # Two seeds whose means differ by 0.1: their spread decides, not the images'.
    assert found["road"].high - found["road"].low > 0.5
    alone = mean_table(EvaluationPool((values(0),)), 0)
    assert alone["grad_cam"]["road"] == bootstrap_interval(values(0).table[0, 0])


def test_controls_stand_above_only_beyond_the_interval_over_seeds_and_images() -> None:
    weak = EvaluationPool(tuple(values(seed, shift=-1.0) for seed in range(2)))
    for metric in weak.metrics:
        assert list_defeats(weak, metric, 0) == ["random > student"]
        assert list_defeats(EvaluationPool((values(0),)), metric, 0) == []


def test_text_and_results_tell_of_seeds_differences_and_the_metrics_own_test() -> None:
    pool = EvaluationPool((values(0), values(1), values(2)))
    results, table, text = summarize_pool(pool, 0, meta=True)
    assert results["n"] == 60
    assert results["seeds"] == {"grad_cam": 3, "student": 6}
    assert "student (6 seeds)" in text
    assert "student (6 seeds) minus grad_cam" in text
    assert "student: 6 of 360 maps failed" in text
    assert set(table) == {"grad_cam", "student", "random"}
    by_run = results["meta"]
    assert isinstance(by_run, list)
    ladders = [one["road"]["ladder"].mean for one in by_run]
    shown = f"{np.mean(ladders):.2f} [{min(ladders):.2f}, {max(ladders):.2f}]"
    assert shown in text
    one, _, words = summarize_pool(EvaluationPool((values(0),)), 0, meta=True)
    assert isinstance(one["meta"], dict)
    assert "student (2 seeds)" in words


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
        "compares other explainers than": kept(tmp_path / "f", other),
        "has another version of the metrics": kept(tmp_path / "v", values(2), measured_as=1),
        "has another --layer": kept(tmp_path / "g", values(2), layer="stage2"),
        "has another --batch": kept(tmp_path / "h", values(2), batch=3),
        "has other --metrics": kept(tmp_path / "i", values(2), metrics=["gini"]),
        "run that evaluation again": tmp_path / "old",
        "nowhere': name a finished": tmp_path / "nowhere",
        "is a file": tmp_path / "a" / "values.npz",
        "isn't whole": tmp_path / "partly",
    }
    (tmp_path / "old").mkdir()
    np.savez(tmp_path / "old" / "values.npz", ids=np.arange(3))
    (tmp_path / "partly" / "partial").mkdir(parents=True)
    for told_of, folder in mistakes.items():
        with pytest.raises(UserError, match=told_of):
            read_pool([first, folder])
    with pytest.raises(UserError, match="1 folder to pool"):
        read_pool([first])


def test_the_same_map_measured_again_is_no_other_seed(tmp_path: Path) -> None:
    """Three students, each measured with two seeds of the random choices: three, not six."""
    folders = [kept(tmp_path / name, values(place)) for place, name in enumerate("ab")]
    pool, _ = read_pool(folders)
    assert (pool.seeds("grad_cam"), pool.seeds("student"), pool.maps("student")) == (1, 2, 4)
    first, second = pool.runs
    np.testing.assert_allclose(
        pool.scores("student", "road")[1], (first.table[2, 0] + second.table[2, 0]) / 2, atol=1e-6
    )
    gains = pool.gains("random", "student", "road")
    assert gains.shape == (2, 60)
    other = kept(tmp_path / "c", values(2), network="m")
    assert read_pool([*folders, other])[0].seeds("student") == 4


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    whole = kept(tmp_path / "a", values(0)) / "values.npz"
    for name, content in {"cut": whole.read_bytes()[:900], "empty": b""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "values.npz").write_bytes(content)
        with pytest.raises(UserError, match="is not what `camdistill evaluate` writes"):
            read_values(tmp_path / name)


def test_a_seed_without_a_value_takes_no_other_with_it() -> None:
    found = values(0)
    found.table[1, 0] = np.nan  # the first student by the first metric
    found.table[2, 0, :5] = np.nan
    pool = EvaluationPool((found,))
    told_of = mean_table(pool, 0)["student"]["road"]
    assert told_of == bootstrap_interval(found.table[2, 0, 5:].astype(np.float64))
    _, _, text = summarize_pool(pool, 0, meta=False)
    assert "student: 1 of 2 seeds have no value of road" in text
    assert "student: road is over 55 of 60 images" in text
    apart = seed_and_image_interval(np.array([[1.0, np.nan], [np.nan, 2.0]]), 0)
    assert apart is not None
    assert apart.mean == 1.5
    assert seed_and_image_interval(np.full((2, 3), np.nan), 0) is None


def test_a_control_of_the_first_map_stands_beside_that_map_alone() -> None:
    entries = ("student#1", "student#2", "blurred_copy", "random")
    table = np.array([[0.0, 9.0, 1.0, 2.0]]).T[..., None] + np.zeros(4)
    flags = np.zeros((4, 4), bool)
    one = Values(entries, 2, ("road",), table.astype(np.float32), flags, flags, {}, {})
    pool = EvaluationPool((one,))
    assert pool.gains("blurred_copy", "student", "road").tolist() == [[1.0] * 4]
    assert pool.gains("random", "student", "road").tolist() == [[2.0] * 4, [-7.0] * 4]


def test_seeds_of_two_explainers_must_be_as_many() -> None:
    check_pairs(["a", "b#1", "b#2", "c#1", "c#2"])
    with pytest.raises(UserError, match="b 2, c 3"):
        check_pairs(["b#1", "b#2", "c#1", "c#2", "c#3"])
