"""A network with a single logit, a sigmoid's, through the commands."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from camdistill.cli import main
from camdistill.networks.students import ShallowCNN
from camdistill.networks.weights import read_weights, save_safetensors

STUDENT = "runs/tiny/version_0/student.safetensors"


@pytest.fixture
def one_logit(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a teacher with one logit and its student, on images of two classes."""
    for split in ("train", "val", "test"):
        for name in ("c0", "c1"):
            shutil.copytree(trained / "images" / split / name, tmp_path / "images" / split / name)
    old = read_weights(trained / "teacher.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        state = ShallowCNN(1, (4, 6), (1, 2)).state_dict()
        # Both answers occur.
        state["linear.weight"] *= 30
    save_safetensors(tmp_path / "teacher.safetensors", state, dict(old.metadata))
    shutil.copy(trained / "tiny.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAMDISTILL_RUN_FOLDER", "")
    assert main(["fit", "-c", "tiny.yaml"]) == 0
    return tmp_path


def test_fit_explain_and_evaluate_take_one_logit_for_a_sigmoid(
    one_logit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"--checkpoint {STUDENT} --data images"
    assert main(["explain", *line.split(), "--out", "shown", "--count", "12"]) == 0
    rows = json.loads(Path("shown/results.json").read_text())["images"]
    said = [row["student"]["probability"] for row in rows.values()]
    assert len(set(said)) > 1
    assert all(0 < value < 1 for value in said)

    capsys.readouterr()
    assert main(["evaluate", *line.split(), "--out", "out", "--batch", "4", "--count", "8"]) == 0
    assert "random_logit is left out: the network has a single logit" in capsys.readouterr().out
    with np.load("out/values.npz") as values:
        assert values["grad_cam/insertion_blur"].std() > 0
