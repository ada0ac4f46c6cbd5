"""A run that is killed again and again ends with the numbers of the run that was not."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from camdistill import tags
from camdistill.cli import main
from camdistill.experiments.training.lightning_cli import read_table
from camdistill.report.results import read_results
from camdistill.report.tensorboard import read_scalars

Config = Callable[..., Path]

EPOCHS, STEPS, KILLS = 14, 5, 6
# Needs torch's random state, and is slow enough to be killed in the middle of an epoch.
STUDENT = """
import time
from torch import nn

class Dropping(nn.Module):
    def __init__(self, classes: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout2d(0.3)
        self.linear = nn.Linear(8, classes)

    def forward(self, images):
        if self.training:
            time.sleep(0.05)
        hidden = self.drop(self.bn(self.conv(images)).relu())
        return self.linear(hidden.mean((2, 3)))
"""


def started(config: Path, run: Path, *more: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(config.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "default",
    }
    command = [sys.executable, "-m", "camdistill", "fit", "-c", str(config), "--run", str(run)]
    log = (config.parent / f"{run.name}.log").open("ab")
    with log:
        return subprocess.Popen([*command, *more], env=environment, stdout=log, stderr=log)


def finished(process: subprocess.Popen[bytes], log: Path) -> None:
    assert process.wait(timeout=120) == 0, log.read_text()[-3000:]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, "nothing happens"
        time.sleep(0.0005)


def stamp(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


@pytest.mark.slow
def test_killed_and_resumed_run_equals_the_unbroken_one_bit_for_bit(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dropping_student.py").write_text(STUDENT)
    path = config(
        data={"train": 16 * STEPS},
        trainer={"max_epochs": EPOCHS, "log_every_n_steps": 2},
        student={"name": "dropping_student.Dropping"},
        transfer={"pairs": [{"student": "conv"}]},
        augment={"crop": "pad", "flip": True},
        ema=0.9,
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    log = tmp_path / "broken.log"
    unbroken = started(path, whole)
    chance = random.Random(7)
    last = broken / "version_0" / "checkpoints" / "last.ckpt"
    killed_writing = 0
    for kill in range(KILLS):
        before = stamp(last)
        process = started(path, broken, *(["--ckpt_path", "last"] if kill else []))
        if kill % 3 == 2:  # while a checkpoint is written
            partial = f".{last.name}.{process.pid}.partial"
            wait_for(lambda name=partial: (last.parent / name).exists(), process, log)  # type: ignore[misc]
        else:
            wait_for(lambda old=before: stamp(last) != old, process, log)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, log.read_text()[-3000:]
        killed_writing += any(last.parent.glob("*.partial"))
        if last.exists():  # whole, whenever it was
            assert torch.load(last, weights_only=True)["global_step"] % STEPS == 0
    finished(started(path, broken, "--ckpt_path", "last"), log)
    finished(unbroken, tmp_path / "whole.log")
    assert killed_writing, "no kill hit a checkpoint that was being written"
    assert sorted(file.name for file in broken.iterdir()) == ["version_0"]
    left = sorted(file.name for file in last.parent.iterdir())
    assert left == ["last.ckpt"]

    folders = [whole / "version_0", broken / "version_0"]
    students = [load_file(folder / "student.safetensors") for folder in folders]
    for name, weight in students[0].items():
        assert torch.equal(weight, students[1][name]), name
    assert (folders[0] / "config.yaml").read_text().replace("whole", "broken") == (
        folders[1] / "config.yaml"
    ).read_text()

    curves = [read_scalars(folder) for folder in folders]
    for curve in curves:
        curve.pop(tags.IMAGES_PER_SECOND, None)
    assert curves[0].keys() == curves[1].keys() >= {tags.LOSS_TRAIN, tags.SKILL, tags.LEARNING_RATE}
    for tag, points in curves[0].items():
        steps = [step for step, _ in curves[1][tag]]
        assert all(a < b for a, b in itertools.pairwise(steps)), tag
        assert curves[1][tag] == points, tag
    assert len(curves[0][tags.SKILL]) == EPOCHS
    assert len(curves[0][tags.LOSS_TRAIN]) == EPOCHS * STEPS // 2

    monkeypatch.syspath_prepend(str(tmp_path))
    results, tables = [], []
    for folder in folders:
        arguments = ["-c", str(folder / "config.yaml")]
        checkpoint = str(folder / "checkpoints" / "last.ckpt")
        assert main(["test", *arguments, "--ckpt_path", checkpoint]) == 0
        found = read_results(folder / "results.json")
        results.append(json.dumps({name: found[name] for name in ("n", "student", "controls")}))
        tables.append(read_table(folder))
    assert results[0] == results[1]
    for name, column in tables[0].columns.items():
        np.testing.assert_array_equal(column, tables[1].columns[name], err_msg=name)
