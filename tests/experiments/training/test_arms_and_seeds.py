"""Arms times seeds: nothing runs twice, nothing stale stays, and the table equals numpy's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from scipy.stats import t

from camdistill.errors import UserError
from camdistill.experiments.training.arms_and_seeds import (
    TrainingStudy,
    gain_intervals,
    mean_intervals,
    result_rows,
    run_study,
    summarize_study,
)
from camdistill.experiments.training.checkpoint_io import AtomicCheckpointIO
from camdistill.experiments.training.lightning_cli import Experiment, read_table, save_table
from camdistill.measure.fidelity import FidelityTable
from camdistill.networks.weights import save_safetensors
from camdistill.report.results import read_results

Config = Callable[..., Path]
ARMS = {"maps": {}, "kd": {"model.beta": 0}}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were really made, as run folders."""
    made: list[str] = []
    fit_and_test = Experiment.fit_and_test

    def counted(self: Experiment) -> dict[str, object]:
        made.append(f"{self.folder.parts[-3]}/{self.folder.parts[-2]}/{self.folder.name}")
        return fit_and_test(self)

    monkeypatch.setattr(Experiment, "fit_and_test", counted)
    return made


def test_a_study_runs_what_is_missing_and_what_changed(
    config: Config, tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, told = config(), []
    study = TrainingStudy(path, ARMS, [0, 1], tmp_path / "study")
    first = run_study(study, on_run=lambda *what: told.append(what))
    expected = [f"{arm}/seed_{seed}/version_0" for seed in (0, 1) for arm in ARMS]
    assert ran == expected
    assert told == [(arm, seed, 2 * seed + n, 4) for seed in (0, 1) for n, arm in enumerate(ARMS)]
    assert first["seeds"] == [0, 1]
    assert read_results(tmp_path / "study" / "results.json")["n"] == 20

    ran.clear()
    again = run_study(study)
    assert ran == []
    assert again["student"] == first["student"]

    # another argument of one arm: that arm anew, and not on from its old checkpoint
    changed = TrainingStudy(
        path, ARMS | {"kd": {"model.beta": 0, "model.kd": 0.5}}, [0, 1], study.folder
    )
    run_study(changed)
    assert ran == ["kd/seed_0/version_1", "kd/seed_1/version_1"]

    # one more seed: only that
    ran.clear()
    run_study(TrainingStudy(path, changed.arms, [0, 1, 2], study.folder))
    assert ran == ["maps/seed_2/version_0", "kd/seed_2/version_0"]

    # another config under the same name: everything anew
    ran.clear()
    path.write_text(path.read_text().replace("lr: 0.05", "lr: 0.01"))
    run_study(TrainingStudy(path, {"maps": {}}, [0], study.folder))
    assert ran == ["maps/seed_0/version_1"]


def test_a_study_of_a_classifier_is_refused_before_it_trains(
    config: Config, tmp_path: Path, ran: list[str]
) -> None:
    path = config()
    whole = yaml.safe_load(path.read_text())
    whole["model"] = {
        "class_path": "camdistill.distill.classifier.Classifier",
        "init_args": {"network": {"name": "resnet20"}},
    }
    path.write_text(yaml.safe_dump(whole))
    with pytest.raises(UserError, match="trains a Classifier; a study compares students"):
        run_study(TrainingStudy(path, {"a": {}}, [0], tmp_path / "study"))
    assert ran == []


def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint(
    config: Config, tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(trainer={"max_epochs": 3})
    whole = run_study(TrainingStudy(path, {"a": {}}, [0], tmp_path / "whole"))
    study, seen = TrainingStudy(path, {"a": {}}, [0], tmp_path / "cut"), []

    class KilledError(Exception):
        pass

    save = AtomicCheckpointIO.save_checkpoint

    def killed_after_two(self, checkpoint, path, storage_options=None):  # type: ignore[no-untyped-def]
        save(self, checkpoint, path, storage_options)
        seen.append(checkpoint["epoch"])
        if len(seen) == 2:
            raise KilledError

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", killed_after_two)
    with pytest.raises(KilledError):
        run_study(study)
    assert not (study.folder / "results.json").exists()
    found = run_study(study)
    assert seen == [0, 1, 2]  # no epoch twice
    assert ran[1:] == ["a/seed_0/version_0", "a/seed_0/version_0"]
    assert found["student"] == whole["student"]


def table_of(seed: int, shift: float = 0.0, n: int = 30) -> FidelityTable:
    generator = np.random.default_rng(seed)
    columns = {
        "student.accuracy": (generator.random(n) < 0.8).astype(np.float32),
        "student.agreement": (generator.random(n) < 0.7).astype(np.float32),
        "student.kl": generator.random(n, np.float32),
    }
    for who, level in (("student", 0.6 + shift), ("controls.mean_map", 0.4)):
        for name in ("pearson", "spearman", "cosine"):
            column = level + 0.1 * generator.standard_normal(n).astype(np.float32)
            column[3] = np.nan  # a blank map of the teacher
            columns[f"{who}.layers.a.{name}"] = column
    return FidelityTable(np.arange(n), columns, ("a",))


def students_t(values: list[float]) -> tuple[float, float, float]:
    mean = float(np.mean(values))
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return mean, mean - half, mean + half


def test_intervals_over_seeds_are_students_t_of_the_seeds_means() -> None:
    tables = [table_of(seed) for seed in range(3)]
    found = mean_intervals(tables, "student")
    for name, key in (("accuracy", "accuracy"), ("pearson", "layers.a.pearson")):
        means = [float(np.nanmean(table.columns[f"student.{key}"])) for table in tables]
        assert tuple(found[name]) == pytest.approx(students_t(means), abs=1e-6)
    skills = []
    for table in tables:
        own = np.nanmean(table.columns["student.layers.a.cosine"])
        base = np.nanmean(table.columns["controls.mean_map.layers.a.cosine"])
        skills.append(1 - (1 - own) / (1 - base))
    assert tuple(found["skill"]) == pytest.approx(students_t(skills), abs=1e-5)
    control = mean_intervals(tables, "controls.mean_map")
    assert set(control) == {"pearson", "spearman", "cosine"}


def test_gains_are_paired_by_seed_or_by_image() -> None:
    own, other = [table_of(s, 0.1) for s in range(4)], [table_of(s + 10) for s in range(4)]
    key = "student.layers.a.pearson"
    differences = [
        float(np.nanmean(a.columns[key] - b.columns[key])) for a, b in zip(own, other, strict=True)
    ]
    assert tuple(gain_intervals(own, other, "student")["pearson"]) == pytest.approx(
        students_t(differences), abs=1e-6
    )
    single = gain_intervals(own[:1], other[:1], "student")["pearson"]
    by_image = own[0].columns[key] - other[0].columns[key]
    kept = by_image[~np.isnan(by_image)].astype(np.float64)
    assert single.mean == pytest.approx(kept.mean(), abs=1e-7)
    spread = 1.96 * kept.std(ddof=1) / np.sqrt(len(kept))  # what a bootstrap tends to
    assert single.low == pytest.approx(kept.mean() - spread, abs=0.25 * spread)
    assert single.high == pytest.approx(kept.mean() + spread, abs=0.25 * spread)
    base = gain_intervals(own[:1], own[:1], "controls.mean_map")["cosine"]
    columns = own[0].columns
    expected = columns["student.layers.a.cosine"] - columns["controls.mean_map.layers.a.cosine"]
    assert base.mean == pytest.approx(float(np.nanmean(expected)), abs=1e-6)


def test_summary_compares_the_first_arm_with_all_others(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("{}")
    study = TrainingStudy(tmp_path / "base.yaml", {"x": {}, "y": {"a": 1}}, [0, 1], tmp_path)
    made: dict[str, dict[str, dict[str, object]]] = {}
    for number, arm in enumerate(("x", "y")):
        for seed in (0, 1):
            folder = tmp_path / arm / str(seed)
            save_table(folder / "test_images.npz", table_of(seed + 5 * number, 0.1 * number))
            made.setdefault(arm, {})[str(seed)] = {"folder": str(folder)}
    found = summarize_study(study, made)
    tables = {arm: [read_table(tmp_path / arm / str(seed)) for seed in (0, 1)] for arm in made}
    assert found["n"] == 30
    assert found["student"] == mean_intervals(tables["x"], "student")
    assert found["controls"] == {
        "y": mean_intervals(tables["y"], "student"),
        "mean_map": mean_intervals(tables["x"], "controls.mean_map"),
    }
    assert found["gain_over"]["y"] == gain_intervals(tables["x"], tables["y"], "student")  # type: ignore[index]
    rows = result_rows({"student": {"pearson": 0.5, "kl": 1}, "controls": {"m": {"cosine": None}}})
    assert rows == {"student": {"pearson": 0.5}, "m": {}}


def test_mistakes_are_told(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("{}")
    with pytest.raises(UserError, match="has no arms"):
        TrainingStudy(tmp_path / "base.yaml", {}, [0], tmp_path)
    for seeds in ([], [1, 1]):
        with pytest.raises(UserError, match="at least one, each once"):
            TrainingStudy(tmp_path / "base.yaml", ARMS, seeds, tmp_path)
    with pytest.raises(UserError, match=r"bases\.yaml; nearest: .*base\.yaml"):
        TrainingStudy(tmp_path / "bases.yaml", ARMS, [0], tmp_path)


def test_students_of_two_teachers_dont_share_a_table(
    config: Config, tmp_path: Path, ran: list[str]
) -> None:
    study = TrainingStudy(config(), {"student": {}}, [0], tmp_path / "study")
    run_study(study)
    file = tmp_path / "teacher.safetensors"
    state = {name: value * 2 for name, value in load_file(file).items()}
    save_safetensors(file, state, {})
    with pytest.raises(
        UserError, match=r"\(student, seed 0\) had a teacher whose file has changed"
    ):
        run_study(replace(study, seeds=[0, 1]))
    assert len(ran) == 1


def test_the_mean_maps_skill_is_said_to_be_zero_by_definition() -> None:
    """Skill is measured from the mean map, so its own would be 0.000 whatever was trained."""
    rows = result_rows(
        {
            "student": {"skill": 0.25},
            "controls": {"mean_map": {"cosine": 0.5, "skill": 0.0}},
            "intervals": {},
        }
    )
    assert rows["mean_map"] == {"cosine": 0.5, "skill": "0 by definition"}
    assert rows["student"] == {"skill": 0.25}
