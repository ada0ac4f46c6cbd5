"""The table, the gates and the orders, from runs whose answer is known."""

from pathlib import Path

import numpy as np
import pytest

from camdistill.data.modules import ShapesData
from camdistill.experiments.ranking.leakage import Leak
from camdistill.experiments.ranking.ranking_analysis import (
    agreements,
    area,
    gates,
    ladder_correlation,
    mixtures,
    orders_agree,
    pairs,
    table,
)
from camdistill.experiments.ranking.ranking_arms import NONE, Arm, ArmTrainer, Family, arms_of
from camdistill.experiments.ranking.ranking_config import RankingStudy, Tuning
from camdistill.experiments.ranking.ranking_records import StudentRecord, pack_bits
from camdistill.experiments.ranking.ranking_report import (
    gate_text,
    log_scalars,
    ranking_chart,
    ranking_results,
    ranking_text,
)
from camdistill.experiments.ranking.ranking_run import RankingRuns
from camdistill.experiments.ranking.student_controls import CONTROLS
from camdistill.experiments.ranking.student_task import Recipe
from camdistill.experiments.ranking.teacher_outputs import CachedPart
from camdistill.experiments.shared.seed_statistics import Bootstrap
from camdistill.networks.teachers import NetworkSpec
from camdistill.report.results import read_results, write_results
from camdistill.report.tensorboard import read_scalars

METHODS = ["good", "fair", "useless"]
RATES = {
    ("good",): 0.85,
    ("fair",): 0.78,
    ("good", "class_mean"): 0.72,
    ("good", "blurred"): 0.8,
    ("good", 0.25): 0.74,
    ("good", 0.5): 0.78,
    ("good", 0.75): 0.82,
}
SPEC = NetworkSpec("shallow_cnn")


def found_with(
    rates: dict[tuple[object, ...], float], seeds: int = 4, images: int = 3000
) -> RankingRuns:
    """Every other arm agrees on 70 of 100 images, like students without maps."""
    study = RankingStudy(
        SPEC, ShapesData(), METHODS, {"tiny": SPEC, "wide": SPEC}, [100, 400],
        range(seeds), controls_n=[100], tuning=Tuning([1.0, 3.0, 9.0]),
    )  # fmt: skip
    arms = arms_of(METHODS, CONTROLS, ["good"], study.shares, {"good"})
    records, rng = {}, np.random.default_rng(0)
    for family in study.students:
        for arm in arms:
            for n in study.n_of(arm):
                for seed in study.seeds:
                    parts = (arm.method, arm.control or arm.share)
                    rate = rates.get(tuple(part for part in parts if part is not None), 0.7)
                    agrees = rng.random(images) < rate + rng.normal(0, 0.004)
                    records[family, n, arm.name, seed] = StudentRecord(
                        key="", family=family, n=n, arm=arm.name, beta=float(arm != NONE),
                        seed=seed, val=0.5, test=float(agrees.mean()), kl=1.0,
                        agrees=pack_bits(agrees),
                        images=images, seconds=1.0,
                    )  # fmt: skip
    room = ArmTrainer(
        CachedPart(Path(), ""), {}, {name: Family(SPEC, "", (8, 8)) for name in study.students},
        Recipe(), 6,
    )  # fmt: skip
    betas = {(family, arm.name): 1.0 for family in study.students for arm in arms}
    return RankingRuns(study, room, arms, records, betas)


@pytest.fixture(scope="module")
def found() -> RankingRuns:
    return found_with(RATES)


def test_table_ranks_methods_by_their_gain_over_students_without_maps(found: RankingRuns) -> None:
    rows = table(found, ("tiny", 100))
    assert list(rows)[:3] == METHODS
    assert len(rows) == 4 + 3 + 8 + 3
    for name, rate in (("good", 0.85), ("fair", 0.78), ("useless", 0.7)):
        row = rows[name]
        assert row.gain is not None
        assert row.gain.mean == pytest.approx(rate - 0.7, abs=0.015)
        assert row.p_holm is not None
        assert (row.p_holm < 0.05) == (name != "useless")
        assert row.error_reduction == pytest.approx(row.gain.mean / 0.3, rel=0.05)
    assert rows["none"].gain is None
    assert rows["random"].p_holm is None
    # three methods: the smallest p is taken three times
    assert rows["good"].gain is not None
    p_values = sorted(rows[name].gain.p for name in METHODS)  # type: ignore[union-attr]
    assert min(row.p_holm for row in rows.values() if row.p_holm is not None) == pytest.approx(
        3 * p_values[0]
    )
    assert set(table(found, ("tiny", 400))) == {"none", *METHODS}


def test_specific_gain_is_over_own_controls_and_those_of_no_method(found: RankingRuns) -> None:
    rows = table(found, ("tiny", 100))
    good, fair = rows["good"], rows["fair"]
    assert good.specific is not None
    assert fair.specific is not None
    assert good.over is not None
    assert fair.over is not None
    assert len(good.over) == 11
    assert set(fair.over) == {"random", "center", "edges"}
    assert good.specific.mean == pytest.approx(0.05, abs=0.02)
    assert good.specific.mean == pytest.approx(good.over["good blurred"].mean, abs=0.01)
    assert fair.specific.mean == pytest.approx(0.08, abs=0.02)


def test_methods_are_told_apart_where_they_differ(found: RankingRuns) -> None:
    known = pairs(found, ("tiny", 400))
    assert [(one.better, one.worse) for one in known] == [
        ("good", "fair"), ("good", "useless"), ("fair", "useless"),
    ]  # fmt: skip
    assert all(one.gain.mean > 0 and one.p_holm < 0.05 for one in known)
    assert min(one.p_holm for one in known) == pytest.approx(3 * min(one.gain.p for one in known))
    alike = pairs(found_with({}), ("tiny", 400))
    assert all(one.p_holm > 0.05 for one in alike)


def test_gates_hold_where_they_should(found: RankingRuns) -> None:
    known = gates(found, ("tiny", 100))
    assert [gate.holds for gate in known] == [True, True, True, True]
    assert "Spearman 1.00" in known[2].says


@pytest.mark.parametrize(
    ("rates", "place"),
    [
        ({("random",): 0.8}, 0),
        ({("good", "randomized"): 0.8}, 1),
        ({("good", 0.5): 0.6}, 2),
        ({("good",): 0.65, ("good", 0.75): 0.65, ("good", 0.5): 0.66, ("good", 0.25): 0.67}, 2),
    ],
    ids=["random", "randomized", "dip", "upside down"],
)
def test_gates_fail_where_they_should(rates: dict[tuple[object, ...], float], place: int) -> None:
    known = gates(found_with(RATES | rates), ("tiny", 100))
    assert [number for number, gate in enumerate(known) if gate.holds is False] == [place]


def test_gates_without_their_runs_are_not_run(found: RankingRuns) -> None:
    known = gates(found, ("tiny", 400))
    assert [gate.holds for gate in known] == [None, None, None, True]


def test_ladder_is_the_rank_correlation_of_share_and_agreement(found: RankingRuns) -> None:
    steps = mixtures(found, ("tiny", 100), Arm("good"))
    assert list(steps) == [0.0, 0.25, 0.5, 0.75, 1.0]
    means = agreements(found, ("tiny", 100), steps)
    rates = [0.7, 0.74, 0.78, 0.82, 0.85]
    assert means == pytest.approx(rates, abs=0.015)
    assert ladder_correlation(list(steps), means) == pytest.approx(1.0)
    assert ladder_correlation([0.0, 0.5, 1.0], [0.3, 0.1, 0.2]) == pytest.approx(-0.5)
    assert np.isnan(ladder_correlation([0.0, 1.0], [0.1, 0.2]))
    assert np.isnan(ladder_correlation([0.0, 0.5, 1.0], [1.0, 1.0, 1.0]))


def test_area_is_the_mean_gain_over_n(found: RankingRuns) -> None:
    whole = area(found, "tiny", Arm("good"))
    assert whole is not None
    each = [table(found, ("tiny", n))["good"].gain for n in (100, 400)]
    assert whole.mean == pytest.approx(np.mean([one.mean for one in each if one is not None]))
    assert area(found, "tiny", Arm(control="random")) is None, "it ran at one n alone"


def test_orders_of_all_conditions_are_compared(found: RankingRuns) -> None:
    tau = orders_agree(found)
    assert len(tau) == 6
    assert tau["tiny n=100 | wide n=400"] == pytest.approx(1.0)


def test_report_says_everything_and_can_be_read_back(found: RankingRuns, tmp_path: Path) -> None:
    leaks = {"good": Leak(table(found, ("tiny", 100))["good"].agreement, 0.2)}
    text = f"{gate_text(found)}\n{ranking_text(found, leaks)}"
    assert text.count("holds") == 8
    assert "FAILS" not in text
    assert "Told apart, of 3 pairs of methods (p < 0.05, Holm): good > fair; good > useless" in text
    for part in ("tiny n=100", "wide n=400", "good mixed 0.25", "Kendall's tau", "Spearman of"):
        assert part in text
    assert "Beta at the edge of what was tried: none of tiny (1), random of tiny (1)" in text
    assert "One seed" not in text
    path = write_results(tmp_path / "results.json", ranking_results(found, leaks, {"good": 0.5}))
    read = read_results(path)
    row = read["students"]["tiny"]["n=100"]["good"]  # type: ignore[index]
    scores = {
        name: np.array([found.records["tiny", 100, name, s].scores() for s in range(4)], float)
        for name in ("good", "none")
    }
    alone = Bootstrap(scores).gain("good", "none")
    assert row["gain"] == pytest.approx(alone._asdict())
    assert read["gates"]["tiny n=100"][0]["holds"] is True  # type: ignore[index]
    assert read["leakage"]["good"]["chance"] == 0.2  # type: ignore[index]
    assert read["blank"] == {"good": 0.5}
    assert ranking_chart(found).shape[2] == 3


def test_what_cannot_be_told_is_not_printed() -> None:
    every = {("good", share): 2.0 for share in (0.25, 0.5, 0.75, "shuffled")} | {("good",): 2.0}
    found = found_with(every | {("fair",): 2.0, ("useless",): 2.0}, seeds=1, images=50)
    text = f"{gate_text(found)}\n{ranking_text(found, {})}"
    assert "nan" not in text
    assert "tiny n=100, 1 seed:" in text
    assert text.endswith("over test images alone and say nothing of other students.")


def test_scalars_of_arms_that_are_gone_are_gone(found: RankingRuns, tmp_path: Path) -> None:
    (tmp_path / "tensorboard" / "tiny.old").mkdir(parents=True)
    (tmp_path / "tensorboard" / "tiny.old" / "events.out.tfevents.1.x").touch()
    folder = log_scalars(found, tmp_path)
    assert not (folder / "tiny.old").exists()
    assert (folder / "tiny.good").is_dir()


def test_scalars_have_n_as_their_step_and_are_drawn_anew(
    found: RankingRuns, tmp_path: Path
) -> None:
    log_scalars(found, tmp_path)
    folder = log_scalars(found, tmp_path)
    known = read_scalars(folder / "tiny.good")
    assert len(list((folder / "tiny.good").glob("events*"))) == 1
    rows = [table(found, ("tiny", n))["good"] for n in (100, 400)]
    told = known["1_overview/simulatability_gain"]
    assert [step for step, _ in told] == [100, 400]
    gains = [row.gain.mean for row in rows if row.gain is not None]
    assert [value for _, value in told] == pytest.approx(gains)
    assert [value for _, value in known["9_test/agreement"]] == pytest.approx(
        [row.agreement.mean for row in rows]
    )
