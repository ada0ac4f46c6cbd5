"""`refine` from the command line: it runs, its files are what others take, mistakes are a line."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from camdistill.cli import main
from camdistill.measure.learned import LearnedMetric
from camdistill.networks.students import ShallowCNN
from camdistill.networks.training_facts import EXPERIMENT, dump_experiment
from camdistill.networks.weights import save_safetensors
from camdistill.report.tensorboard import read_tags

CONFIG = {
    "data": {
        "class_path": "camdistill.data.modules.ShapesData",
        "init_args": {"train": 32, "val": 16, "test": 12, "batch_size": 16, "classes": 6},
    },
    "objective": {"shares": [0.5]},
    "network": {"name": "shallow_cnn", "args": {"channels": [4, 6], "strides": [2, 2]}},
    "seeds": [0, 1],
    "start": {"epochs": 1},
    "recipe": {"epochs": 1},
    "judging": {"images": 6, "held_out": ["gradient"], "road": [0.5]},
    "workers": 0,
    "device": "cpu",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    given = {key: value for key, value in CONFIG.items() if key not in ("network", "seeds")}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(given))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_it_runs_and_every_other_command_takes_what_it_made(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["refine", "-c", "tiny.yaml", "--out", "out"]) == 0
    told = capsys.readouterr().out
    assert "Verdict" in told
    results = json.loads((folder / "out/results.json").read_text())
    assert results["n"] == 6
    assert results["seeds"] == [0, 1]
    assert {"machine", "versions", "seconds"} <= set(results)
    part = results["arms"]["insertion_deletion"]["explainers"]["map"]["road"]["by_map"]
    assert set(part) == {"mean", "low", "high", "se", "p", "mde"}
    assert (folder / "out/table.txt").read_text() in told
    assert (folder / "out/map_parts.png").stat().st_size > 1000
    assert (folder / "out/maps-0.png").stat().st_size > 1000
    cards = read_tags(folder / "out/tensorboard/study")
    assert {"0_evaluation/map_parts", "2_maps/refined", "0_evaluation/table"} <= set(cards)
    refined = results["checkpoints"]["seed0/insertion_deletion"]
    assert main(["explain", "--checkpoint", refined, "--data", "shapes", "--count", "1"]) == 0
    again = main(["refine", "-c", "tiny.yaml", "--out", "more", "--checkpoints", refined])
    assert again == 2  # the config trains networks, and here are some
    assert "either checkpoints, or a network" in capsys.readouterr().err
    assert main(["refine", "-c", "given.yaml", "--out", "more", "--checkpoints", refined]) == 0


@pytest.mark.slow
def test_killed_outright_it_goes_on(folder: Path) -> None:
    command = [sys.executable, "-m", "camdistill", "refine", "-c", "tiny.yaml", "--out", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    runs, deadline = folder / "out/runs.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and (not runs.exists() or runs.read_text().count("\n") < 3):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = runs.read_text().splitlines()[:3]
    assert (
        subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    )
    assert runs.read_text().splitlines()[:3] == before
    assert (folder / "out/results.json").exists()


def prepare(folder: Path) -> None:
    """Checkpoints of other classes, and a flat folder of images without labels or masks."""
    save_safetensors(folder / "three.safetensors", ShallowCNN(3, (4, 6), (2, 2)).state_dict(), {})
    network = {"name": "shallow_cnn", "args": {"channels": [4, 6], "strides": [2, 2]}}
    told = {EXPERIMENT: dump_experiment({"network": network, "classes": 7})}
    state = ShallowCNN(7, (4, 6), (2, 2)).state_dict()
    save_safetensors(folder / "seven.safetensors", state, told)
    LearnedMetric(members=1, units=2).save(folder / "metric.safetensors")
    (folder / "flat").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "flat" / f"{number}.png")
    flat = {"class_path": "camdistill.data.modules.FolderData", "init_args": {"root": "flat"}}
    given = yaml.safe_load((folder / "given.yaml").read_text())
    (folder / "flat.yaml").write_text(yaml.safe_dump(given | {"data": flat}))
    (folder / "flat-train.yaml").write_text(yaml.safe_dump(CONFIG | {"data": flat}))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("-c tiny.yaml --objective.weight -1", r"weight is -1.0; a weight .* 0 or more"),
        ("-c tiny.yaml --objective.kind enrgy", r"objective\.kind.*energy"),
        ("-c tiny.yaml --objective.layer stage7", r"no layer 'stage7'.*nearest"),
        ("-c tiny.yaml --objective.kind fidelity", r"no objective\.teacher; name it"),
        (
            "-c tiny.yaml --objective.kind fidelity --objective.teacher "
            "'{name: shallow_cnn, args: {classes: 9}}'",
            r"teacher has 9 classes, a start network 6",
        ),
        ("-c tiny.yaml --objective.kind learned", r"no objective\.file; a learned objective"),
        (
            "-c tiny.yaml --objective.kind learned --objective.file lost.safetensors",
            r"no file 'lost\.safetensors'",
        ),
        (
            "-c tiny.yaml --objective.kind learned --objective.file three.safetensors",
            r"'three\.safetensors' holds no metric; give a file that `camdistill learn` wrote",
        ),
        (
            "-c given.yaml --checkpoints seven.safetensors --objective.kind learned "
            "--objective.file metric.safetensors",
            r"6 classes, a start network 7",
        ),
        (
            "-c tiny.yaml --students.network.name shallow_cnn --students.beta 0",
            r"beta is 0.0; give",
        ),
        ("-c tiny.yaml --arms '[objective, objective]'", r"give each once"),
        ("-c tiny.yaml --arms '[reversed]'", r"arms.*reversed"),
        ("-c tiny.yaml --seeds '[]'", r"seeds is empty"),
        ("-c tiny.yaml --recipe.epochs 0", r"recipe\.epochs is 0; give 1 or more"),
        ("-c tiny.yaml --recipe.tolerance 2", r"tolerance is 2.*in \[0, 1\)"),
        ("-c tiny.yaml --judging.held_out '[grad_cm]'", r"no method 'grad_cm'; nearest"),
        ("-c tiny.yaml --judging.held_out '[grad_cam]'", r"grad_cam, which is what is refined"),
        ("-c given.yaml", r"no start network: give --checkpoints FILE"),
        ("-c given.yaml --checkpoints lost.safetensors", r"no file 'lost\.safetensors'"),
        ("-c given.yaml --checkpoints three.safetensors", r"no experiment of camdistill in it"),
        ("-c given.yaml --checkpoints seven.safetensors", r"6 classes, a start network 7"),
        (
            "-c flat.yaml --checkpoints seven.safetensors --objective.kind energy",
            r"no masks and no boxes\.csv",
        ),
        ("-c flat-train.yaml", r"no labels, so no start network can be trained"),
    ],
)
def test_a_mistake_is_one_line_with_a_cure(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    prepare(folder)
    assert main(["refine", *shlex.split(line), "--out", "out"]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(says, told), told
    assert not (folder / "out/networks").exists()


def test_help_is_short_and_tells_what_stands_in_the_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["refine", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 95
    assert all(len(line) <= 100 for line in lines)
    assert main(["refine", "--help", "recipe"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "--recipe.optimization.lr NUMBER The highest learning rate. Default: 0.0003." in told


@pytest.mark.parametrize(
    ("command", "config", "says"),
    [
        ("refine", "rank-quick", r"is a config of `camdistill .*rank`; refine has no option 'c"),
        ("rank", "refine-quick", r"is a config of `camdistill refine`; rank has no option 'also'"),
        ("refine", "shapes", r"is a config of `camdistill fit`; refine has no option 'model'"),
        ("adapt", "learn-shapes", r"is a config of `camdistill learn`; adapt has no option 'imag"),
    ],
)
def test_a_config_of_another_command_is_told_by_its_name(
    capsys: pytest.CaptureFixture[str], command: str, config: str, says: str
) -> None:
    path = Path(__file__).parents[2] / "configs" / f"{config}.yaml"
    assert main([command, "-c", str(path)]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(says, told), told
