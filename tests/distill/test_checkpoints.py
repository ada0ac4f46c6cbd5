"""Checkpoints of ours: both kinds load alike, from anywhere, and find their teacher if they can."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from camdistill import load
from camdistill.errors import UserError
from camdistill.networks.weights import read_weights, save_safetensors

STUDENT = Path("runs/tiny/version_0/student.safetensors")
LAST = Path("runs/tiny/version_0/checkpoints/last.ckpt")


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a trained run."""
    copy = tmp_path / "here"
    shutil.copytree(trained, copy)
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=generator)


def test_both_kinds_load_alike(folder: Path, images: Tensor) -> None:
    small, whole = load(STUDENT), load(LAST)
    assert torch.equal(small(images), whole(images))
    assert small.pairs == whole.pairs == [("stage2", "stage2", 1.0)]
    assert small.classes == whole.classes == tuple(f"c{number}" for number in range(6))
    assert small.settings == whole.settings
    assert small.teacher is not None
    assert torch.equal(small.network.mean, small.teacher.mean)
    assert torch.equal(whole.network.mean, small.teacher.mean)
    assert small.mean_map_by_layer.keys() == whole.mean_map_by_layer.keys() == {"stage2"}


def test_teacher_is_found_from_anywhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load(folder / STUDENT).teacher is not None
    assert load(Path("../here") / LAST).teacher is not None


def test_another_file_of_the_teachers_name_is_passed_over(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(STUDENT, elsewhere / "teacher.safetensors")
    monkeypatch.chdir(elsewhere)
    assert load(folder / STUDENT).teacher is not None
    (folder / "teacher.safetensors").unlink()
    alone = load(folder / STUDENT)
    assert alone.teacher is None
    assert "'teacher.safetensors' is not (or no longer) the file" in alone.teacher_missing


def test_path_that_climbs_is_taken_as_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_weights(STUDENT)
    settings = json.loads(found.metadata["camdistill"])
    settings["teacher"]["weights"] = "../here/teacher.safetensors"
    save_safetensors("climbing.safetensors", found.state, {"camdistill": json.dumps(settings)})
    assert load("climbing.safetensors").teacher is not None
    monkeypatch.chdir(tmp_path)
    assert load(folder / "climbing.safetensors").teacher is None


@pytest.mark.parametrize(
    "damage",
    [
        {"student": "shallow_cnn"},
        {"teacher": None},
        {"pairs": [["stage2", "layer3"]]},
        {"pairs": 3},
        {"mean": ["a", "b", "c"]},
        {"std": [1.0]},
        {"classes": "six"},
        {"mean_map_by_layer": {"stage2": [[1.0], [1.0, 2.0]]}},
        {"mean_map_by_layer": []},
        {"class_names": 6},
    ],
)
def test_experiment_that_makes_no_sense_is_told(
    folder: Path, damage: dict[str, object], tmp_path: Path
) -> None:
    found = read_weights(STUDENT)
    settings = json.loads(found.metadata["camdistill"]) | damage
    path = tmp_path / "odd.safetensors"
    save_safetensors(path, found.state, {"camdistill": json.dumps(settings)})
    with pytest.raises(UserError, match=r"the experiment in '.*odd\.safetensors' can't be read"):
        load(path)


def test_student_works_without_its_teacher(folder: Path, images: Tensor) -> None:
    expected = load(STUDENT)(images)
    shutil.move("teacher.safetensors", "moved.safetensors")
    alone = load(STUDENT)
    assert alone.teacher is None
    assert "no file 'teacher.safetensors'" in alone.teacher_missing
    assert torch.equal(alone(images), expected)
    assert load(STUDENT, teacher="moved.safetensors").teacher is not None
    with pytest.raises(UserError, match=r"no file 'lost\.safetensors'"):
        load(STUDENT, teacher="lost.safetensors")
