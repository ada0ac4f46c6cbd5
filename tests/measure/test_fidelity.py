"""Fidelity against scipy and numpy, its rules for blank maps, several processes, and intervals."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, multiprocessing

from camdistill.explain.maps import resize
from camdistill.measure.fidelity import FidelityMeter, FidelityTable, flatten, intervals, summary
from camdistill.measure.intervals import (
    bootstrap_interval,
    bootstrap_means,
    paired_interval,
    seed_interval,
    skill_of_means,
    two_way_interval,
)
from camdistill.measure.scores import agreement, correct, divergence, map_scores

PAIRS = {"stage2": "layer2", "stage5": "layer3"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Batches:
    """Made-up students and teachers: logits, labels and maps of a number of images."""

    def __init__(self, count: int, labeled: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        self.student, self.teacher = normal(count, 5, seed=1), normal(count, 5, seed=2)
        self.labels = torch.randint(0, 5, (count,), generator=generator)
        if not labeled:
            self.labels = torch.full((count,), -1)
        self.student_maps = {"stage2": normal(count, 8, 8, seed=4), "stage5": normal(count, 4, 4)}
        self.teacher_maps = {
            "layer2": normal(count, 8, 8, seed=5) + 0.5,
            "layer3": self.student_maps["stage5"] + normal(count, 4, 4, seed=6),
        }
        self.means = {layer: maps.clamp_min(0).mean(0) for layer, maps in self.teacher_maps.items()}

    def feed(self, meter: FidelityMeter, rows: Tensor, counted: Tensor | None = None) -> None:
        meter.update(
            self.student[rows],
            self.teacher[rows],
            self.labels[rows],
            {layer: maps[rows] for layer, maps in self.student_maps.items()},
            {layer: maps[rows] for layer, maps in self.teacher_maps.items()},
            torch.ones(len(rows), dtype=torch.bool) if counted is None else counted,
            rows + 100,
        )


def measured(data: Batches, size: int = 7) -> FidelityTable:
    meter = FidelityMeter(PAIRS, data.means)
    for rows in torch.arange(len(data.labels)).split(size):
        data.feed(meter, rows)
    return meter.table()


# Per image


def test_map_scores_are_scipys_on_rectified_maps() -> None:
    student, teacher = normal(6, 5, 7, seed=1), normal(6, 5, 7, seed=2)
    scores = map_scores(student, teacher)
    for row in range(6):
        p = student[row].clamp_min(0).double().numpy().ravel()
        t = teacher[row].clamp_min(0).double().numpy().ravel()
        assert scores.pearson[row] == pytest.approx(scipy.stats.pearsonr(p, t)[0], abs=1e-5)
        assert scores.spearman[row] == pytest.approx(scipy.stats.spearmanr(p, t)[0], abs=1e-5)
        cosine = p @ t / math.sqrt(p @ p) / math.sqrt(t @ t)
        assert scores.cosine[row] == pytest.approx(cosine, abs=1e-5)


def test_student_maps_are_rectified_before_they_come_to_the_teachers_grid() -> None:
    student, teacher = normal(3, 8, 8, seed=1), normal(3, 4, 4, seed=2)
    pooled = student.clamp_min(0).reshape(3, 4, 2, 4, 2).mean((2, 4))
    torch.testing.assert_close(map_scores(student, teacher), map_scores(pooled, teacher))
    coarse = map_scores(teacher, student)
    torch.testing.assert_close(coarse, map_scores(resize(teacher.clamp_min(0), (8, 8)), student))


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3])
def test_blank_or_constant_student_map_scores_0(value: float) -> None:
    for grid in ((4, 4), (8, 8), (3, 5)):
        scores = map_scores(torch.full((2, *grid), value), normal(2, 4, 4))
        assert [column.tolist() for column in scores] == [[0, 0]] * 3


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3])
def test_blank_or_constant_teacher_map_is_not_scored(value: float) -> None:
    teacher = normal(3, 4, 4)
    teacher[1] = value
    for column in map_scores(normal(3, 4, 4, seed=1), teacher):
        assert column.isnan().tolist() == [False, True, False]


def test_scores_under_autocast_are_the_same() -> None:
    student, teacher = normal(4, 8, 8, seed=1), normal(4, 4, 4, seed=2)
    plain = map_scores(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        cast = map_scores(student, teacher)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_divergence_is_the_relative_entropy_of_the_teacher_in_nats() -> None:
    student, teacher = normal(5, 7, seed=1), normal(5, 7, seed=2)
    p, q = (scipy.special.softmax(z.double().numpy(), 1) for z in (teacher, student))
    np.testing.assert_allclose(
        divergence(student, teacher), scipy.special.rel_entr(p, q).sum(1), rtol=1e-4
    )


def test_agreement_and_accuracy_are_of_the_top_class() -> None:
    student = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 1.0]])
    teacher = torch.tensor([[9.0, 1.0], [8.0, 3.0], [1.0, 2.0]])
    assert agreement(student, teacher).tolist() == [1, 0, 0]
    hits = correct(student, torch.tensor([0, 0, -1]))
    assert hits[:2].tolist() == [1, 0]
    assert hits[2].isnan()


# Over a loop


def test_table_holds_each_images_values_in_the_order_of_ids() -> None:
    data = Batches(20)
    meter = FidelityMeter(PAIRS, data.means)
    for rows in torch.randperm(20, generator=torch.Generator().manual_seed(1)).split(6):
        data.feed(meter, rows)
    table = meter.table()
    assert table.ids.tolist() == list(range(100, 120))
    assert len(table) == 20
    expected = map_scores(data.student_maps["stage2"], data.teacher_maps["layer2"])
    np.testing.assert_array_equal(table.columns["student.layers.stage2.spearman"], expected[1])
    mean = data.means["layer3"].expand(20, 4, 4)
    control = map_scores(mean, data.teacher_maps["layer3"]).cosine
    np.testing.assert_allclose(
        table.columns["controls.mean_map.layers.stage5.cosine"], control, rtol=1e-6
    )
    assert all(column.dtype == np.float32 for column in table.columns.values())


def test_padding_and_repeated_images_do_not_count() -> None:
    data = Batches(10)
    meter = FidelityMeter(PAIRS, data.means)
    data.feed(meter, torch.arange(6))
    data.feed(
        meter,
        torch.tensor([6, 7, 8, 9, 0, 3]),
        torch.tensor([True, True, True, True, False, True]),
    )
    assert meter.summary() == summary(measured(data))


def test_batch_sizes_do_not_matter() -> None:
    data = Batches(23)
    assert summary(measured(data, 4)) == summary(measured(data, 23))


def test_summary_has_the_keys_of_the_results_and_their_means() -> None:
    data = Batches(40)
    table = measured(data)
    values = flatten(summary(table))
    layers = [f"layers.{layer}." for layer in PAIRS]
    maps = ("pearson", "spearman", "cosine", "skill", "scored")
    assert set(values) == {
        "n",
        "student.accuracy",
        "student.agreement",
        "student.kl",
        *(f"student.{layer}{name}" for layer in ["", *layers] for name in maps),
        *(f"controls.mean_map.{layer}{name}" for layer in ["", *layers] for name in maps),
    }
    assert values["n"] == 40
    assert values["student.accuracy"] == pytest.approx(
        (data.student.argmax(1) == data.labels).float().mean().item()
    )
    own = map_scores(data.student_maps["stage5"], data.teacher_maps["layer3"])
    base = map_scores(data.means["layer3"].expand(40, 4, 4), data.teacher_maps["layer3"])
    assert values["student.pearson"] == pytest.approx(own.pearson.mean().item(), rel=1e-5)
    assert values["student.pearson"] == values["student.layers.stage5.pearson"]
    assert values["controls.mean_map.spearman"] == pytest.approx(base.spearman.mean().item())
    gone = 1 - (1 - own.cosine.mean().item()) / (1 - base.cosine.mean().item())
    assert values["student.skill"] == pytest.approx(gone, rel=1e-4)
    assert values["controls.mean_map.skill"] == 0
    json.dumps(summary(table), allow_nan=False)


def test_perfect_student_has_skill_1_and_the_mean_map_0() -> None:
    data = Batches(12)
    data.student_maps = {
        "stage2": data.teacher_maps["layer2"] * 3,
        "stage5": 2 * data.teacher_maps["layer3"],
    }
    student = summary(measured(data))["student"]
    assert student["skill"] == pytest.approx(1, abs=1e-5)
    assert student["pearson"] == pytest.approx(1, abs=1e-5)
    data.student_maps = {own: data.means[layer].expand(12, -1, -1) for own, layer in PAIRS.items()}
    assert summary(measured(data))["student"]["skill"] == pytest.approx(0, abs=1e-6)


def test_blank_student_maps_count_and_blank_teacher_maps_are_reported() -> None:
    data = Batches(10)
    data.student_maps["stage5"][:5] = -1
    data.teacher_maps["layer3"][8:] = -1
    table = measured(data)
    student = summary(table)["student"]
    known = table.columns["student.layers.stage5.pearson"][:8]
    assert (known[:5] == 0).all()
    assert student["pearson"] == pytest.approx(known.mean())
    assert student["scored"] == 8
    assert student["layers"]["stage2"]["scored"] == 10


def test_accuracy_is_none_without_labels_and_agreement_is_not() -> None:
    table = measured(Batches(9, labeled=False))
    found = summary(table)
    assert found["student"]["accuracy"] is None
    assert "student.accuracy" not in flatten(found)
    assert "student.accuracy" not in intervals(table, resamples=20)
    assert found["student"]["agreement"] is not None


def test_without_mean_maps_there_is_neither_skill_nor_control() -> None:
    data = Batches(9)
    meter = FidelityMeter(PAIRS)
    data.feed(meter, torch.arange(9))
    found = meter.summary()
    assert found["student"]["skill"] is None
    assert found["controls"] == {}
    assert found["student"]["cosine"] is not None
    with pytest.raises(ValueError, match="layer3"):
        FidelityMeter(PAIRS, {"layer2": data.means["layer2"]})


def test_without_layers_there_is_still_agreement() -> None:
    meter = FidelityMeter({})
    logits, labels = normal(4, 3), torch.tensor([0, 1, 2, -1])
    meter.update(logits, logits, labels, {}, {}, labels > -2, torch.arange(4))
    found = meter.summary()
    assert found["student"]["agreement"] == 1
    assert found["student"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["student"]["pearson"] is None
    assert set(intervals(meter.table(), resamples=10)) == {
        "student.accuracy",
        "student.agreement",
        "student.kl",
    }


def test_empty_and_reset_meters_have_an_empty_table() -> None:
    data = Batches(5)
    meter = FidelityMeter(PAIRS, data.means)
    data.feed(meter, torch.arange(5))
    meter.reset()
    found = meter.summary()
    assert found["n"] == 0
    assert found["student"]["agreement"] is None
    assert found["student"]["scored"] == 0
    assert intervals(meter.table()) == {}


def _process(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    data = Batches(11)
    meter = FidelityMeter(PAIRS, data.means)
    shard = torch.arange(rank, 12, world)
    padded = shard.clamp(max=10)
    if len(shard):
        data.feed(meter, padded, shard < 11)
    Path(folder, f"{rank}.json").write_text(json.dumps(meter.summary()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_several_processes_give_the_summary_of_one(tmp_path: Path) -> None:
    world = 2
    multiprocessing.spawn(_process, (world, str(tmp_path)), nprocs=world)
    expected = json.loads(json.dumps(summary(measured(Batches(11)))))
    for rank in range(world):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


# Intervals


def test_bootstrap_interval_of_a_mean_is_the_normal_one_for_many_images() -> None:
    values = np.random.default_rng(0).normal(2, 3, 4000)
    found = bootstrap_interval(values, seed=1, resamples=4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.08 * half)


def test_bootstrap_interval_is_scipys_percentile_interval() -> None:
    values = np.random.default_rng(0).exponential(1, 60)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    found = bootstrap_interval(values, seed=2, resamples=20_000)
    assert found.low == pytest.approx(theirs.low, abs=0.01)
    assert found.high == pytest.approx(theirs.high, abs=0.01)


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    hits = 0
    for trial in range(300):
        found = bootstrap_interval(
            generator.uniform(0, 1, 80), seed=trial, resamples=300, level=0.9
        )
        hits += found.low <= 0.5 <= found.high
    assert 0.84 <= hits / 300 <= 0.95


def test_paired_interval_is_narrow_where_images_vary_together() -> None:
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 1, 500)
    first, second = hard + 0.1 + generator.normal(0, 0.05, 500), hard
    paired = paired_interval(first, second, seed=1)
    assert paired.low > 0.08
    assert paired.high < 0.12
    alone = bootstrap_interval(first, seed=1)
    assert alone.high - alone.low > 10 * (paired.high - paired.low)
    with pytest.raises(ValueError, match="other images"):
        paired_interval(first, second[:-1])


def test_images_without_a_value_are_left_out_of_intervals() -> None:
    values = np.random.default_rng(0).normal(size=50)
    holes = np.concatenate([values, [np.nan] * 7])
    assert bootstrap_interval(holes, seed=1) == bootstrap_interval(values, seed=1)
    assert paired_interval(holes, np.zeros(57), seed=1) == bootstrap_interval(values, seed=1)
    with pytest.raises(ValueError, match="no value"):
        bootstrap_interval(np.array([np.nan]))


def test_resampling_in_chunks_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(37, 2))
    whole = bootstrap_means(values, 3, 100)
    monkeypatch.setattr("camdistill.measure.intervals.DRAWS", 37 * 7)
    # a product of another shape may add in another order: the last digit, no other draw
    np.testing.assert_allclose(bootstrap_means(values, 3, 100), whole, rtol=0, atol=1e-15)


def test_resampled_means_leave_holes_out_of_each_column() -> None:
    values = np.random.default_rng(0).normal(size=(30, 2))
    values[::3, 1] = np.nan
    drawn = bootstrap_means(values, 0, 50)
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 30, (50, 30))
    np.testing.assert_allclose(drawn, np.nanmean(values[rows], axis=1))


def test_skill_is_1_for_perfect_0_for_the_mean_map() -> None:
    assert skill_of_means(1.0, 0.85) == pytest.approx(1)
    assert skill_of_means(0.85, 0.85) == pytest.approx(0)
    assert skill_of_means(0.925, 0.85) == pytest.approx(0.5)
    assert skill_of_means(0.7, 0.85) == pytest.approx(-1)


def test_intervals_of_skill_share_the_resamples_of_both_cosines() -> None:
    generator = np.random.default_rng(0)
    base = generator.uniform(0.7, 0.95, 400)
    cosines = 1 - 0.5 * (1 - base)  # half of the error of every image is gone
    columns = {"student.layers.a.cosine": cosines, "controls.mean_map.layers.a.cosine": base}
    found = intervals(FidelityTable(np.arange(400), columns, ("a",)), seed=1)["student.skill"]
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5)


def test_intervals_hold_every_mean_of_the_summary() -> None:
    data = Batches(60)
    data.teacher_maps["layer3"][5] = -1
    table = measured(data)
    values = flatten(summary(table))
    found = intervals(table, seed=1, resamples=400)
    assert found.keys() == {
        key
        for key in values
        if key != "n"
        and not key.endswith("scored")
        and not (key.startswith("controls") and key.endswith("skill"))
    }
    for key, value in found.items():
        assert value.mean == pytest.approx(values[key], rel=1e-6), key
        assert value.low <= value.mean <= value.high, key
    assert found["student.pearson"] == found["student.layers.stage5.pearson"]


def test_seed_interval_is_students() -> None:
    runs = [88.4, 88.9, 88.6]
    found = seed_interval(runs)
    theirs = scipy.stats.t.interval(0.95, 2, np.mean(runs), scipy.stats.sem(runs))
    np.testing.assert_allclose(found[1:], theirs)
    assert found.mean == pytest.approx(np.mean(runs))
    assert seed_interval([3.0, 3.0]) == (3, 3, 3)
    assert math.isnan(seed_interval([3.0]).low)
    with pytest.raises(ValueError, match="no seed"):
        seed_interval([])


@pytest.mark.parametrize(
    ("by_seed", "by_image", "rest"), [(0, 1, 0.3), (0.3, 0, 1), (0.2, 2, 1), (1, 1, 0.1)]
)
def test_crossed_interval_covers_whichever_factor_varies(
    by_seed: float, by_image: float, rest: float
) -> None:
    generator = np.random.default_rng(3)
    hits, trials = 0, 2000
    for _ in range(trials):
        values = (
            by_seed * generator.standard_normal((3, 1))
            + by_image * generator.standard_normal((1, 40))
            + rest * generator.standard_normal((3, 40))
        )
        found = two_way_interval(values)
        hits += found.low <= 0 <= found.high
    assert 0.935 <= hits / trials <= 0.995


def test_crossed_interval_is_the_known_one_where_a_single_factor_varies() -> None:
    generator = np.random.default_rng(0)
    runs, images = generator.normal(0, 1, 4), generator.normal(0, 1, 30)
    seeds_alone = two_way_interval(np.repeat(runs[:, None], 30, 1))
    np.testing.assert_allclose(seeds_alone, seed_interval(runs))
    images_alone = two_way_interval(np.repeat(images[None], 4, 0))
    theirs = scipy.stats.t.interval(0.95, 29, images.mean(), scipy.stats.sem(images))
    np.testing.assert_allclose(images_alone[1:], theirs)
    assert two_way_interval(images[None], seed=5) == bootstrap_interval(images, 5)
    assert two_way_interval(runs[:, None]) == seed_interval(runs)
    assert two_way_interval(np.ones((3, 5))) == (1, 1, 1)
    holes = np.stack([images, images + generator.normal(0, 0.1, 30)])
    holes[1, :3] = np.nan
    assert two_way_interval(holes) == two_way_interval(holes[:, 3:])
    with pytest.raises(ValueError, match="no image has a value"):
        two_way_interval(np.array([[1.0, np.nan], [np.nan, 1.0]]))


def test_a_single_value_has_no_bounds() -> None:
    assert bootstrap_interval(np.array([0.5, np.nan])).mean == 0.5
    assert math.isnan(bootstrap_interval(np.array([0.5])).high)


# Whether maps depend on the class


def _second(data: Batches, meter: FidelityMeter, student: dict[str, Tensor]) -> FidelityTable:
    teacher = {layer: normal(*maps.shape, seed=9) for layer, maps in data.teacher_maps.items()}
    count = len(data.labels)
    meter.update(
        data.student,
        data.teacher,
        data.labels,
        data.student_maps,
        data.teacher_maps,
        torch.ones(count, dtype=torch.bool),
        torch.arange(count),
        (student, teacher),
    )
    return meter.table()


def test_runner_up_is_scipys_pearson_of_signed_maps_and_its_control_the_top_classes_map() -> None:
    data = Batches(9)
    student = {layer: normal(*maps.shape, seed=8) for layer, maps in data.student_maps.items()}
    student["stage2"][4] = 0.25  # a constant map is like nothing
    table = _second(data, FidelityMeter(PAIRS, data.means, runner_up=True), student)
    for layer, its in PAIRS.items():
        teacher = normal(*data.teacher_maps[its].shape, seed=9)
        for who, maps in (("student", student), ("controls.same_map", data.student_maps)):
            values = table.columns[f"{who}.layers.{layer}.runner_up"]
            for image in range(9):
                own, other = maps[layer][image].flatten(), teacher[image].flatten()
                blank = own.max() == own.min()
                expected = 0 if blank else scipy.stats.pearsonr(own, other).statistic
                assert values[image] == pytest.approx(expected, abs=1e-5)
    found = summary(table)
    assert found["student"]["runner_up"] == pytest.approx(
        table.columns["student.layers.stage5.runner_up"].mean(dtype=float)
    )
    assert found["controls"]["same_map"]["pearson"] is None
    assert "student.runner_up" in intervals(table)
    assert "controls.same_map.runner_up" in intervals(table)


def test_a_student_with_one_map_for_all_classes_is_its_own_control() -> None:
    data = Batches(12)
    table = _second(data, FidelityMeter(PAIRS, runner_up=True), data.student_maps)
    found = summary(table)
    assert found["student"]["runner_up"] == found["controls"]["same_map"]["runner_up"]


def test_maps_of_the_runner_up_come_always_or_never() -> None:
    data = Batches(4)
    with pytest.raises(ValueError, match="with every batch, or with none"):
        data.feed(FidelityMeter(PAIRS, runner_up=True), torch.arange(4))
