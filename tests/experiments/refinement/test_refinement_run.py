"""A refinement: matched epochs, parts that add up, claims that need the map, exact resuming."""

import base64
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from camdistill.data.modules import FolderData, ShapesData
from camdistill.distill.checkpoints import load
from camdistill.distill.optimization import Optimization
from camdistill.distill.refinement_targets import Objective
from camdistill.distill.training import as_images
from camdistill.errors import UserError
from camdistill.experiments.refinement import refinement_config
from camdistill.experiments.refinement.refinement_analysis import (
    compare_arm,
    estimate_gain,
    gain_within_starts,
    independent_metrics,
    refinement_verdict,
    training_metrics,
)
from camdistill.experiments.refinement.refinement_config import (
    START,
    JudgingOptions,
    RefinementPlan,
    RefineRecipe,
    StartRecipe,
    StudentRecipe,
)
from camdistill.experiments.refinement.refinement_hypotheses import answer_hypotheses
from camdistill.experiments.refinement.refinement_measurement import (
    Column,
    Judge,
    objective_metrics,
)
from camdistill.experiments.refinement.refinement_records import Job, RefinementRecord, pack_columns
from camdistill.experiments.refinement.refinement_report import refinement_results, refinement_text
from camdistill.experiments.refinement.refinement_run import (
    RUN_LOG,
    RefinementRuns,
    list_arm_jobs,
    run_refinement,
)
from camdistill.experiments.refinement.refinement_training import EpochSelector
from camdistill.experiments.refinement.refinement_worker import RefinementWorker
from camdistill.explain.methods import image_explainer
from camdistill.measure.learned import LearnedMetric
from camdistill.measure.panel import measure, prepare_batch
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import NetworkSpec, Preprocessed
from camdistill.store.digest import sha256_of
from camdistill.store.run_log import RunLog

TINY = NetworkSpec("shallow_cnn", args={"channels": [4, 6], "strides": [2, 2]})
JUDGING = JudgingOptions(images=6, held_out=("gradient",), road=(0.5,))


def shapes(**options: object) -> ShapesData:
    sizes = {"train": 48, "val": 20, "test": 12, "batch_size": 16}
    return ShapesData(**(sizes | options))  # type: ignore[arg-type]


def plan_in(folder: Path, **options: object) -> RefinementPlan:
    known: dict[str, object] = {
        "data": shapes(),
        "objective": Objective(shares=(0.5,)),
        "network": TINY,
        "seeds": [0, 1],
        "start": StartRecipe(epochs=1, precision="float32"),
        "recipe": RefineRecipe(epochs=2, optimization=Optimization("adamw", 3e-3)),
        "judging": JUDGING,
        "folder": folder,
    }
    return RefinementPlan(**(known | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> RefinementRuns:
    also = {"energy": Objective(kind="energy")}
    return run_refinement(plan_in(tmp_path_factory.mktemp("refine"), also=also))


# Whole runs


def test_gains_are_the_sum_of_the_answers_and_the_maps_part(found: RefinementRuns) -> None:
    for arm in found.arms:
        for explainer in ("map", "gradient"):
            for metric in found.metrics(explainer):
                if not found.has_parts(metric, explainer):
                    continue
                whole = found.total_gain(arm, metric, explainer)
                parts = found.by_answers(arm, metric, explainer)
                parts = parts + found.by_map(arm, metric, explainer)
                np.testing.assert_allclose(whole, parts, atol=1e-6)


def test_every_arm_runs_from_every_start(found: RefinementRuns) -> None:
    arms = ["ce", "insertion_deletion", "detached", "random", "shuffled", "energy"]
    assert found.arms == arms
    starts = ("seed0", "seed1")
    assert set(found.records) == {(start, arm) for start in starts for arm in [START, *arms]}


def test_a_refined_network_has_the_accuracy_that_its_record_tells(found: RefinementRuns) -> None:
    workshop = RefinementWorker(found.plan)
    test = workshop.image_sets().test
    batch = test.batch(np.arange(len(test)))
    for key, record in found.records.items():
        with torch.no_grad():
            top = load(record.checkpoint).network(as_images(batch.pixels)).argmax(1)
        expected = (top == batch.labels).float().mean()
        assert record.values("accuracy").mean() == pytest.approx(float(expected)), key


def test_killed_and_started_again_it_does_what_is_missing_and_gets_the_same_numbers(
    found: RefinementRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (found.plan.folder / RUN_LOG).read_text().splitlines()
    (tmp_path / RUN_LOG).write_text("\n".join(lines[:-3]) + '\n{"key": "cut')
    networks = tmp_path / "networks"
    networks.mkdir()
    for file in (found.plan.folder / "networks").iterdir():
        (networks / file.name).write_bytes(file.read_bytes())
    done: list[Job] = []
    work = RefinementWorker.__call__

    def counted(self: RefinementWorker, job: Job) -> RefinementRecord:
        done.append(job)
        return work(self, job)

    monkeypatch.setattr(RefinementWorker, "__call__", counted)
    again = run_refinement(replace(found.plan, folder=tmp_path, data=shapes()))
    assert len(done) == 3
    for key, record in found.records.items():
        assert again.records[key].columns == record.columns
        assert again.records[key].accuracies == record.accuracies
        assert Path(again.records[key].checkpoint).parent == networks  # the folder was moved


def test_finished_runs_of_other_settings_are_counted(found: RefinementRuns, tmp_path: Path) -> None:
    shutil.copytree(found.plan.folder, tmp_path / "copy")
    plan = replace(found.plan, folder=tmp_path / "copy", data=shapes())
    counts: list[int] = []
    run_refinement(plan, on_unused=counts.append)
    assert counts == []  # all are its own, those that are matched to another's accuracy too
    run_refinement(replace(plan, seeds=[1], arms=["random"], also={}), on_unused=counts.append)
    assert counts == [2 * 7 - 3]


def test_a_network_that_is_gone_is_made_again(found: RefinementRuns, tmp_path: Path) -> None:
    plan = plan_in(tmp_path, seeds=[0], arms=["objective"])
    first = run_refinement(plan)
    gone = Path(first.records["seed0", "ce"].checkpoint)
    gone.unlink()
    again = run_refinement(plan)
    assert gone.exists()
    assert again.records["seed0", "ce"].columns == first.records["seed0", "ce"].columns
    assert len(RunLog(plan.folder / RUN_LOG, RefinementRecord).records) == 3


def test_start_networks_may_be_checkpoints_and_stay_as_they_are(
    found: RefinementRuns, tmp_path: Path
) -> None:
    files = [Path(found.records[f"seed{seed}", START].checkpoint) for seed in (0, 1)]
    before = [file.read_bytes() for file in files]
    plan = plan_in(tmp_path, network=None, checkpoints=files, arms=["objective"])
    again = run_refinement(plan)
    assert [file.read_bytes() for file in files] == before
    own = again.records[plan.starts[0], "ce"]
    assert own.accuracies == found.records["seed0", "ce"].accuracies
    assert own.columns == found.records["seed0", "ce"].columns


def test_without_labels_the_starts_answers_are_kept_and_matched(
    found: RefinementRuns, tmp_path: Path
) -> None:
    files = [Path(found.records[f"seed{seed}", START].checkpoint) for seed in (0, 1)]
    recipe = replace(found.plan.recipe, keep="start")
    plan = plan_in(tmp_path, network=None, checkpoints=files, arms=["objective"], recipe=recipe)
    again = run_refinement(plan)
    assert again.retention_metric == "agreement"
    assert min(again.records[again.plan.starts[0], "ce"].accuracies) > 0.9
    by_labels = found.records["seed0", "ce"].accuracies
    assert again.records[again.plan.starts[0], "ce"].accuracies != by_labels
    assert "agreement over ce" in refinement_text(again)


def test_images_of_other_classes_have_agreement_alone(
    found: RefinementRuns, tmp_path: Path
) -> None:
    files = [Path(found.records[f"seed{seed}", START].checkpoint) for seed in (0, 1)]
    recipe = replace(found.plan.recipe, keep="start", epochs=1)
    options = {"network": None, "checkpoints": files, "arms": [], "recipe": recipe}
    again = run_refinement(plan_in(tmp_path, data=shapes(classes=6), **options))
    assert not again.has("accuracy")
    assert again.retention_metric == "agreement"
    assert "agreement" in refinement_text(again)


def test_a_flat_folder_without_labels_or_masks_is_refined(
    found: RefinementRuns, tmp_path: Path
) -> None:
    (tmp_path / "flat").mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "flat" / f"{number}.png")
    files = [Path(found.records[f"seed{seed}", START].checkpoint) for seed in (0, 1)]
    data = FolderData(tmp_path / "flat", batch_size=16, val_fraction=0.2, test_fraction=0.2)
    options = {"network": None, "checkpoints": files, "arms": ["objective", "random"]}
    again = run_refinement(plan_in(tmp_path / "out", data=data, **options))
    assert again.retention_metric == "agreement"
    assert "rank_accuracy" not in again.metrics()
    assert "road" in again.metrics()
    assert "agreement over ce" in refinement_text(again)
    assert answers_of(again)["H4"] == "not asked"
    assert refinement_results(again)["n"] == 6


def metric_in(folder: Path, seed: int = 0) -> str:
    path = folder / "metric.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        metric = LearnedMetric(members=1, units=4)
    for weight in metric.parameters():  # untrained it hardly tells maps apart
        weight.data *= 3
    metric.save(path)
    return str(path)


def test_a_learned_metric_is_refined_and_everything_else_is_held_out(
    found: RefinementRuns, tmp_path: Path
) -> None:
    file = metric_in(tmp_path)
    wanted = Objective(kind="learned", weight=10.0, file=file)
    start = [Path(found.records["seed0", START].checkpoint)]
    many = Optimization("adamw", 2e-2)
    recipe = replace(found.plan.recipe, epochs=8, tolerance=0.99, optimization=many)
    plan = plan_in(tmp_path, network=None, checkpoints=start, objective=wanted, recipe=recipe)
    again = run_refinement(plan)
    assert again.arms == ["ce", "learned", "random", "shuffled"]
    name = plan.starts[0]
    score = {arm: again.maps(arm, "learned").mean() for arm in again.arms}
    assert score["learned"] > max(score[arm] for arm in ("ce", "random", "shuffled")) + 0.1
    assert refinement_results(again)["trained"] == {"learned": ["learned"]}
    assert independent_metrics(again, "learned") == [
        "road", "faithfulness_correlation", "insertion_blur", "deletion_blur",
    ]  # fmt: skip
    told = load(again.records[name, "learned"].checkpoint).settings
    assert told["metric_sha256"] == sha256_of(Path(file))
    assert "learned (trained by learned)" in refinement_text(again)


def test_what_a_metrics_file_holds_tells_runs_apart_and_not_where_it_lies(tmp_path: Path) -> None:
    files = []
    for number, seed in enumerate((0, 0, 1)):
        (tmp_path / str(number)).mkdir()
        files.append(metric_in(tmp_path / str(number), seed))
    keys = []
    for file in files:
        workshop = RefinementWorker(
            plan_in(tmp_path, objective=Objective(kind="learned", file=file))
        )
        keys.append([workshop.key(Job("seed0", arm, 0.5)) for arm in ("learned", "ce", START)])
    assert keys[0] == keys[1]
    assert all(one != other for one, other in zip(keys[0], keys[2], strict=True))


def test_a_seeds_runs_are_its_own_whatever_seeds_stand_beside_it(tmp_path: Path) -> None:
    jobs = [Job("seed2", START), Job("seed2", "ce"), Job("seed2", "random", 0.5)]
    alone, last = (RefinementWorker(plan_in(tmp_path, seeds=seeds)) for seeds in ([2], [0, 1, 2]))
    assert [alone.key(job) for job in jobs] == [last.key(job) for job in jobs]


@pytest.mark.slow
def test_students_are_taught_by_both_networks_and_answer_h3(tmp_path: Path) -> None:
    students = StudentRecipe(TINY, epochs=1)
    plan = plan_in(tmp_path, arms=["objective"], students=students)
    found = run_refinement(plan)
    arm = "student of insertion_deletion"
    for start in found.plan.starts:
        student = load(found.records[start, arm].checkpoint)
        told_teacher = student.settings["teacher"]["weights"]
        assert told_teacher == found.records[start, "insertion_deletion"].checkpoint
    h3 = answer_hypotheses(found)[2]
    assert h3.name == "H3"
    assert h3.answer != "not asked"
    assert (
        run_refinement(plan).records[found.plan.starts[0], arm].key
        == found.records["seed0", arm].key
    )


def test_students_that_inherit_the_maps_part_are_told(tmp_path: Path) -> None:
    found = planted(tmp_path, {}, {})
    rng = np.random.default_rng(3)
    records = dict(found.records)
    for start in found.plan.starts:
        for arm, effect in (("student of ce", 0.0), ("student of insertion_deletion", 0.05)):
            before = rng.normal(0.3, 0.05, IMAGES)
            own = before + effect + rng.normal(0, 0.004, IMAGES)
            columns = {"accuracy": np.ones(IMAGES), "map|before|road": before, "map|own|road": own}
            records[start, arm] = replace(
                records[start, START], arm=arm, columns=pack_columns(columns)
            )
    assert answers_of(RefinementRuns(found.plan, records, True))["H3"] == "yes"


def test_the_report_tells_parts_verdict_and_every_hypothesis(found: RefinementRuns) -> None:
    text = refinement_text(found)
    for words in ("by answers", "by map", "Verdict", "2 starts are few", "gradient: road"):
        assert words in text
    assert [one.name for one in answer_hypotheses(found)] == ["H1", "H2", "H3", "H4", "H5", "H6"]
    whole = refinement_results(found)
    assert whole["n"] == 6
    assert set(whole["arms"]) == set(found.arms)  # type: ignore[call-overload]


# The epoch


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.none() | st.floats(0, 1))
def test_the_last_epoch_that_is_accurate_enough_is_chosen_else_the_most_accurate(
    accuracies: list[float], floor: float | None
) -> None:
    chosen = EpochSelector(floor)
    for accuracy in accuracies:
        chosen.consider_epoch(accuracy, {})
    enough = [n for n, one in enumerate(accuracies, 1) if floor is None or one >= floor]
    expected = enough[-1] if enough else accuracies.index(max(accuracies)) + 1
    assert chosen.epoch == expected
    assert chosen.matched == bool(enough)


# Judging


def network(seed: int) -> Preprocessed:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inner = ShallowCNN(8, (4, 6), (2, 2))
    return Preprocessed(inner).eval()


def test_a_judge_measures_what_the_panel_measures() -> None:
    data = shapes()
    data.setup("test")
    images = data.test_set
    assert images is not None
    net = network(0)
    found = Judge(images, Objective(), JudgingOptions(held_out=()), 0)(net, net)
    pictures = as_images(images.batch(np.arange(12)).pixels)
    assert images.masks is not None
    masks = torch.from_numpy(np.asarray(images.masks[np.arange(12)]) > 0)
    names = ["insertion_blur", "deletion_blur", "rank_accuracy", "energy_share"]
    asked = prepare_batch(net, pictures, names, "any", masks=masks)
    maps = image_explainer("grad_cam")(net, pictures, asked.classes)
    expected = measure(asked, maps, names).values
    for name in names:
        own = found[Column("map", "own", name).name]
        np.testing.assert_allclose(own, expected[name].numpy(), atol=1e-5)
    assert not any("before" in name for name in found)


def test_a_judge_tells_the_learned_score_that_the_panel_tells(tmp_path: Path) -> None:
    data, net = shapes(), network(0)
    data.setup("test")
    images = data.test_set
    assert images is not None
    file = metric_in(tmp_path)
    wanted = Objective(kind="learned", file=file)
    found = Judge(images, wanted, JudgingOptions(held_out=(), road=(0.5,)), 0)(net, network(1))
    pictures = as_images(images.batch(np.arange(12)).pixels)
    asked = prepare_batch(net, pictures, [file], "any")
    for whose, explained in (("own", net), ("before", network(1))):
        maps = image_explainer("grad_cam")(explained, pictures, asked.classes)
        expected = measure(asked, maps, [file]).values[file]
        own = found[Column("map", whose, "learned").name]
        np.testing.assert_allclose(own, expected.numpy(), atol=1e-5)


def test_a_network_that_did_not_change_gains_nothing() -> None:
    data = shapes()
    data.setup("test")
    assert data.test_set is not None
    found = Judge(data.test_set, Objective(), JUDGING, 0)(network(0), network(0))
    assert found["agreement"].min() == 1
    for name, value in found.items():
        if "|own|" in name and name != Column("map", "own", "view_cosine").name:
            np.testing.assert_array_equal(value, found[name.replace("|own|", "|before|")])


def test_start_maps_are_the_starts_asked_of_the_new_network() -> None:
    data = shapes()
    data.setup("test")
    images = data.test_set
    assert images is not None
    new, start = network(0), network(1)
    found = Judge(images, Objective(), JudgingOptions(held_out=()), 0)(new, start)
    pictures = as_images(images.batch(np.arange(12)).pixels)
    asked = prepare_batch(new, pictures, ["insertion_blur"], "any")
    maps = image_explainer("grad_cam")(start, pictures, asked.classes)
    expected = measure(asked, maps, ["insertion_blur"]).values["insertion_blur"]
    own = found[Column("map", "before", "insertion_blur").name]
    np.testing.assert_allclose(own, expected.numpy(), atol=1e-3)  # rounding turns near ties


@pytest.mark.parametrize("kind", ["insertion_deletion", "faithfulness", "consistency", "energy"])
def test_what_an_objective_is_trained_on_is_measured(kind: str) -> None:
    data = shapes()
    data.setup("test")
    assert data.test_set is not None
    objective = Objective(kind=kind)  # type: ignore[arg-type]
    found = Judge(data.test_set, objective, JudgingOptions(held_out=(), road=(0.5,)), 0)(
        network(0), network(1)
    )
    for metric in objective_metrics(objective):
        assert np.isfinite(found[Column("map", "own", metric).name]).all()


def test_what_a_further_objective_is_trained_on_is_measured(found: RefinementRuns) -> None:
    """Of consistency too: its column is everyone's, so that it may be added later."""
    assert "view_cosine" in found.metrics()
    assert np.isfinite(found.total_gain("energy", "view_cosine")).all()


# What may be claimed


STARTS, IMAGES = 5, 40


def planted(
    folder: Path,
    by_map: Mapping[str, float | np.ndarray],
    by_answers: Mapping[str, float],
    **options: object,
) -> RefinementRuns:
    """Records in which each arm has a known map's part and answers' part of every metric."""
    plan = plan_in(folder, seeds=list(range(STARTS)), **options)
    rng = np.random.default_rng(0)
    records = {}
    for start in plan.starts:
        base = rng.normal(0.3, 0.05, IMAGES)
        for arm in [START, *plan.objectives_by_arm]:
            columns = {"accuracy": np.ones(IMAGES), "agreement": np.ones(IMAGES)}
            for explainer in ("map", "gradient"):
                for metric in ("road", "faithfulness_correlation", "rank_accuracy"):
                    answers = base + by_answers.get(arm, 0) + rng.normal(0, 0.004, IMAGES)
                    part = by_map.get(f"{arm} {explainer} {metric}", by_map.get(arm, 0))
                    part = part if explainer == "map" else by_map.get(f"{arm} gradient", 0)
                    own = answers + part + rng.normal(0, 0.004, IMAGES)
                    columns[f"{explainer}|before|{metric}"] = answers
                    columns[f"{explainer}|own|{metric}"] = base if arm == START else own
            records[start, arm] = RefinementRecord(
                "k", start, arm, [0.9, 0.9], 2, True, pack_columns(columns), IMAGES, "", 0.0
            )
    return RefinementRuns(plan, records, True)


def answers_of(found: RefinementRuns) -> dict[str, str]:
    return {one.name: one.answer for one in answer_hypotheses(found)}


def test_a_gain_of_the_map_above_all_controls_is_claimed(tmp_path: Path) -> None:
    found = planted(tmp_path, {"insertion_deletion": 0.05}, {"insertion_deletion": 0.02})
    said = refinement_verdict(found)
    assert said[0] == "insertion_deletion: accuracy over ce +0.000 [+0.000, +0.000]"
    assert "of road (held out): +0.05" in said[1]
    assert "Claimed: above ce, detached, random, shuffled" in said[1]
    one = compare_arm(found, "insertion_deletion", "road")
    assert one.by_map is not None
    assert one.by_answers is not None
    assert one.by_map.mean == pytest.approx(0.05, abs=0.005)
    assert one.by_answers.mean == pytest.approx(0.02, abs=0.005)
    assert one.total_gain.mean == pytest.approx(0.07, abs=0.005)
    assert answers_of(found) == {
        "H1": "not asked", "H2": "yes", "H3": "not asked", "H4": "not asked", "H5": "yes",
        "H6": "yes",
    }  # fmt: skip


def test_a_gain_of_the_answers_alone_is_a_null(tmp_path: Path) -> None:
    found = planted(tmp_path, {}, {"insertion_deletion": 0.2})
    said = refinement_verdict(found)
    assert not any("Claimed" in line for line in said)
    assert "A null" in said[1] or "Worse" in said[1]
    answers = answers_of(found)
    assert answers["H2"] != "yes"
    assert answers["H5"] == answers["H6"] == "undecided"


def test_a_gain_that_random_targets_have_too_is_not_claimed(tmp_path: Path) -> None:
    found = planted(tmp_path, {"insertion_deletion": 0.05, "random": 0.05}, {})
    assert "not shown above random: not claimed" in refinement_verdict(found)[1]
    assert answers_of(found)["H5"] == "no"


def test_a_gain_that_moves_to_the_gradient_is_said(tmp_path: Path) -> None:
    effects = {"insertion_deletion": 0.05, "insertion_deletion gradient": 0.04}
    assert answers_of(planted(tmp_path, effects, {}))["H6"] == "no"


def test_an_arm_that_is_less_accurate_claims_nothing(tmp_path: Path) -> None:
    found = planted(tmp_path, {"insertion_deletion": 0.05}, {})
    records = dict(found.records)
    records["seed0", "insertion_deletion"] = replace(
        records["seed0", "insertion_deletion"], matched=False
    )
    said = refinement_verdict(RefinementRuns(found.plan, records, True))
    assert "not matched: nothing is claimed" in said[0]
    assert "at a lower accuracy: not claimed" in said[1]
    assert not any("Claimed" in line for line in said)


def test_a_second_objective_without_controls_of_its_own_claims_nothing(tmp_path: Path) -> None:
    also = {"faithful": Objective(kind="faithfulness")}
    said = refinement_verdict(planted(tmp_path, {"faithful": 0.05}, {}, also=also))
    assert "its own controls did not run" in said[-1]


def test_energy_that_localizes_without_faithfulness_is_told_from_energy_that_does_both(
    tmp_path: Path,
) -> None:
    also = {"energy": Objective(kind="energy")}
    place = {"energy map rank_accuracy": 0.05}
    assert answers_of(planted(tmp_path, place, {}, also=also))["H4"] == "yes"
    both = place | {"energy map road": 0.05}
    assert answers_of(planted(tmp_path, both, {}, also=also))["H4"] == "no"
    assert answers_of(planted(tmp_path, {}, {}, also=also))["H4"] == "undecided"
    unknown = place | {"energy map road": np.tile([0.3, -0.3], IMAGES // 2)}  # a null is no proof
    assert answers_of(planted(tmp_path, unknown, {}, also=also))["H4"] == "undecided"


def test_one_start_says_nothing_of_others(tmp_path: Path) -> None:
    five = planted(tmp_path, {"insertion_deletion": 0.05}, {})
    found = RefinementRuns(replace(five.plan, seeds=[0]), five.records, True)
    assert (
        "from one start, which says nothing of others: not claimed" in refinement_verdict(found)[1]
    )
    assert set(answers_of(found).values()) == {"undecided", "not asked"}
    text = refinement_text(found)
    assert "intervals over images alone" in text
    assert "Claimed" not in text


def test_without_its_controls_an_objective_claims_nothing(tmp_path: Path) -> None:
    found = planted(tmp_path, {"insertion_deletion": 0.05}, {}, arms=["objective", "detached"])
    assert (
        "Above ce, detached; random, shuffled did not run: not claimed"
        in refinement_verdict(found)[1]
    )


def test_a_control_that_is_not_matched_is_told(tmp_path: Path) -> None:
    found = planted(tmp_path, {"insertion_deletion": 0.05}, {})
    records = dict(found.records)
    records["seed0", "random"] = replace(records["seed0", "random"], matched=False)
    said = refinement_verdict(RefinementRuns(found.plan, records, True))
    assert "Claimed: above ce, detached, random (not matched), shuffled" in said[1]


def test_insertion_with_another_fill_holds_no_insertion_out(tmp_path: Path) -> None:
    also = {"gray": Objective(replacement="gray")}
    found = planted(tmp_path, {}, {}, also=also)
    assert training_metrics(found, "gray") == ("insertion_blur", "deletion_blur")


def test_h2_tells_the_whole_gain_beside_the_maps(tmp_path: Path) -> None:
    found = planted(tmp_path, {"insertion_deletion": 0.05}, {"insertion_deletion": 0.02})
    (h2,) = (one for one in answer_hypotheses(found) if one.name == "H2")
    whole = re.search(r"with the answers' part \+(\S+) .*, over ce \+(\S+) ", h2.says)
    assert whole is not None
    assert [float(one) for one in whole.groups()] == pytest.approx([0.07, 0.07], abs=0.004)


def test_images_without_ground_truth_are_left_out_of_its_intervals() -> None:
    values = np.random.default_rng(0).normal(0.5, 1, (4, 30))
    gaps = values.copy()
    gaps[2, 5] = np.nan
    kept = np.delete(values, 5, 1)
    assert estimate_gain(gaps) == estimate_gain(kept)
    assert np.isnan(estimate_gain(np.full((2, 3), np.nan)).mean)


def test_intervals_of_these_starts_have_the_width_of_images_alone() -> None:
    """Against the standard error of a mean; starts that differ don't widen it."""
    rng = np.random.default_rng(1)
    values = np.array([[-1.0], [1.0]]) + rng.normal(0, 0.5, (2, 400))
    found = gain_within_starts(values)
    assert found.se == pytest.approx(values.mean(0).std(ddof=1) / 20, rel=0.1)
    assert estimate_gain(values).se > 5 * found.se


@pytest.mark.parametrize("alone", [float(np.float32(k / 2000)) for k in range(1900, 2001, 7)])
def test_an_arm_exactly_the_tolerance_below_is_matched(tmp_path: Path, alone: float) -> None:
    """20 of 2000 images are 0.01, also in float32."""
    record = RefinementRecord("k", "seed0", "ce", [alone], 1, True, {}, 0, "", 0.0)
    (job, *_) = list_arm_jobs(plan_in(tmp_path), record)
    chosen = EpochSelector(job.floor)
    count = round(alone * 2000)
    chosen.consider_epoch(float(np.float32((count - 21) / 2000)), {})
    assert not chosen.matched
    chosen.consider_epoch(float(np.float32((count - 20) / 2000)), {})
    assert chosen.matched


def test_values_come_back_from_the_file_as_they_were() -> None:
    values = np.linspace(-1, 1, 7).astype(np.float32)
    record = RefinementRecord("k", "s", "ce", [], 0, True, pack_columns({"a": values}), 7, "", 0.0)
    np.testing.assert_array_equal(record.values("a"), values)
    assert base64.b64decode(record.columns["a"])[:4] == values[:1].tobytes()


# Mistakes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"network": None}, "no start network"),
        ({"checkpoints": [Path("a")]}, "either checkpoints, or a network"),
        ({"network": replace(TINY, weights="w")}, "network has weights"),
        ({"arms": ["objective", "objective"]}, "give each once"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [-1]}, "a seed is -1"),
        ({"also": {"random": Objective()}}, "another arm's name"),
        ({"also": {"early": Objective(layer="stage1")}}, "judged by the objective's map"),
        ({"judging": JudgingOptions(held_out=("gradient", "gradient"))}, "give each once"),
        (
            {
                "objective": Objective(cam="hires_cam"),
                "judging": JudgingOptions(held_out=("hires_cam",)),
            },
            "hires_cam, which is what is refined",
        ),
        (
            {"network": None, "checkpoints": [Path("a/x.ckpt"), Path("a/x.safetensors")]},
            "give each once",
        ),
    ],
)
def test_a_plan_that_means_nothing_is_refused(
    tmp_path: Path, options: dict[str, object], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        plan_in(tmp_path, **options)


def test_checkpoints_of_equal_folders_are_starts_of_their_own(tmp_path: Path) -> None:
    """As Lightning's are called: RUN/checkpoints/last.ckpt."""
    given = [Path(f"runs/{seed}/checkpoints/last.ckpt") for seed in ("a", "b")]
    plan = plan_in(tmp_path, network=None, checkpoints=given)
    assert plan.starts == ["a-checkpoints-last", "b-checkpoints-last"]


def test_a_network_given_twice_is_no_second_start(found: RefinementRuns, tmp_path: Path) -> None:
    first = Path(found.records["seed0", START].checkpoint)
    second = tmp_path / "copy.safetensors"
    shutil.copy(first, second)
    plan = plan_in(tmp_path / "out", network=None, checkpoints=[first, second])
    with pytest.raises(UserError, match="are the same file"):
        run_refinement(plan)


@pytest.mark.parametrize("name", ["grad_cam@stage2", "hires_cam"])
def test_an_explainer_that_gives_the_refined_map_is_not_held_out(tmp_path: Path, name: str) -> None:
    """Of the layer before the pooling HiResCAM is Grad-CAM."""
    with pytest.raises(UserError, match="the very map that is refined"):
        run_refinement(plan_in(tmp_path, judging=replace(JUDGING, held_out=(name,))))
    assert not (tmp_path / "networks").exists()


def test_an_objective_that_cant_be_asked_is_refused_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    also = {"fine": Objective(kind="faithfulness", cells=64)}
    with pytest.raises(UserError, match=r"fine can't be asked about these images.* 64 cells"):
        run_refinement(plan_in(tmp_path, also=also))
    teacher = NetworkSpec("shallow_cnn", args={"classes": 8})
    wanted = Objective(kind="fidelity", teacher=teacher, teacher_layer="stage9")
    with pytest.raises(UserError, match="stage9"):
        run_refinement(plan_in(tmp_path, objective=wanted))
    assert not (tmp_path / "networks").exists()


def test_a_run_that_diverges_is_told_by_name_with_options_of_this_command(tmp_path: Path) -> None:
    start = StartRecipe(1, Optimization("sgd", 1e30), precision="float32")
    says = r"in start of seed0; try a third of it \(--start\.optimization\.lr\), or --start\.prec"
    with pytest.raises(UserError, match=says):
        run_refinement(plan_in(tmp_path, start=start))


def test_students_without_a_judged_layer_are_refused_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    students = StudentRecipe(NetworkSpec("shallow_cnn", args={"channels": [4], "strides": [2]}))
    judging = replace(JUDGING, held_out=("layer_cam@stage2",))
    with pytest.raises(UserError, match="stage2"):
        run_refinement(plan_in(tmp_path, students=students, judging=judging))
    assert not (tmp_path / "networks").exists()


def test_a_layer_that_is_not_there_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, objective=Objective(layer="stage9"))
    with pytest.raises(UserError, match="stage9"):
        run_refinement(plan)
    assert not (tmp_path / "networks").exists()


def test_what_decides_a_run_is_what_is_in_a_teachers_file(tmp_path: Path) -> None:
    file = tmp_path / "teacher.safetensors"
    told_of, measured_of = [], []
    for content in (b"one", b"two"):
        file.write_bytes(content)
        teacher = NetworkSpec("resnet20", str(file))
        objective = Objective(kind="fidelity", teacher=teacher, teacher_layer="layer3")
        plan = refinement_config.RefinementPlan(
            ShapesData(), objective, network=NetworkSpec("shallow_cnn"), folder=tmp_path
        )
        told_of.append(json.dumps(refinement_config.identify_objective(objective)))
        measured_of.append(json.dumps(refinement_config.identify_maps(plan)))
    assert told_of[0] != told_of[1]
    assert measured_of[0] != measured_of[1]
    moved = file.rename(tmp_path / "elsewhere.safetensors")
    again = Objective(
        kind="fidelity", teacher=NetworkSpec("resnet20", str(moved)), teacher_layer="layer3"
    )
    assert json.dumps(refinement_config.identify_objective(again)) == told_of[1]
