"""`rank` from the command line: it runs, says what it found, and every mistake in one line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_study import HERE, save_teacher, study

from camdistill.cli import main
from camdistill.networks.students import ShallowCNN
from camdistill.networks.weights import save_safetensors

CONFIG = study(
    methods=["grad_cam@stage2", "mask:parts"], controls=["random", "mean"], shares=[], **HERE
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_teacher(tmp_path / "teacher.safetensors")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    np.savez(tmp_path / "maps.npz", maps=np.random.default_rng(0).random((40, 4, 4)))
    (tmp_path / "taught_maps.py").write_text(
        "def brightness(network, images, classes):\n    return images.mean(1)\n"
    )
    monkeypatch.setattr("camdistill.experiments.ranking.leakage.STEPS", 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_it_runs_says_what_it_found_and_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rank", "-c", "tiny.yaml", "--out", "out"]) == 0
    told = capsys.readouterr().out
    assert told.index("Sanity gates, tiny n=16") < told.index("grad_cam@stage2 ")
    for name in ("results.json", "table.txt", "gains.png", "runs.jsonl"):
        assert (folder / "out" / name).is_file()
    runs = (folder / "out/runs.jsonl").read_text().splitlines()
    assert len(runs) == 2 * 5
    results = json.loads((folder / "out/results.json").read_text())
    assert set(results["students"]["tiny"]["n=16"]) == {
        "none", "random", "grad_cam@stage2", "grad_cam@stage2 mean", "mask:parts",
    }  # fmt: skip
    assert results["runs"] == 10
    assert results["leakage"]["mask:parts"]["accuracy"]["mean"] <= 1

    # wider: stored maps, a function, a third seed; what was done stays
    wider = ["--methods", "grad_cam@stage2", "mask:parts", "maps.npz", "taught_maps.brightness"]
    more = [*wider, "--trust", "taught_maps", "--seeds", "0", "1", "2", "--out", "out"]
    assert main(["rank", "-c", "tiny.yaml", *more]) == 0
    lines = (folder / "out/runs.jsonl").read_text().splitlines()
    assert lines[:10] == runs
    assert len(lines) == 3 * 7
    assert "taught_maps.brightness" in (folder / "out/table.txt").read_text()
    assert "other settings" not in capsys.readouterr().out

    # narrower: what isn't asked for is told
    assert main(["rank", "-c", "tiny.yaml", "--seeds", "0", "1", "--out", "out"]) == 0
    told = capsys.readouterr().out
    assert "11 finished runs of other settings in out/runs.jsonl: not used and kept" in told


def test_a_teacher_of_one_class_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = ShallowCNN(6, (4, 6), (2, 2)).state_dict()
    state["linear.bias"][2] = 1000
    save_safetensors(folder / "teacher.safetensors", state, {})
    assert main(["rank", "-c", "tiny.yaml", "--out", "out"]) == 0
    told = capsys.readouterr()
    assert "The teacher names class 2 for all 30 test images" in told.out
    assert "nan" not in told.out
    assert told.err == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--methods grad_cm@stage2", "no method 'grad_cm'; nearest: 'grad_cam'"),
        ("--methods grad_cam@stage9", "no layer 'stage9'"),
        ("--methods map.npz", "no file map.npz; nearest: 'maps.npz'"),
        ("--methods taught_maps.brightness", "--trust taught_maps"),
        ("--methods mask:part", "no mask 'part'; nearest: 'parts'"),
        ("--controls randm", "nearest: 'random'"),
        ("--controls_of grad_cam", "controls_of has 'grad_cam'"),
        ("--n 4", "8 images or more"),
        ("--n 100", "n is 100, but there are 40 training images"),
        ("--seeds 7", "seed 7 is in both seeds and tuning.seeds"),
        ("--recipe.steps 0", "recipe.steps 0"),
        ("--recipe.stpes 3", "no option 'recipe.stpes'; nearest: 'recipe.steps'"),
        ("--recipe.optimization.lr 1e30", "loss is not a number"),
        ("--tuning.betas [0]", "tuning.betas is [0.0]"),
        ("--students {vgg: {name: vgg11}}", "don't end in global average pooling"),
        ("--students {t: {name: shallow_cn}}", "no network 'shallow_cn'; nearest: 'shallow_cnn'"),
        ("--teacher.weights absent.pt", "no file 'absent.pt'"),
        ("--workers -1", "workers is -1; give 0"),
        ("--stack 0", "stack is 0; give 1 or more"),
        ("--tuning.n 4", "tuning.n is 4; students need 8 images or more"),
        ("--workrs 2", "nearest: 'workers'"),
        ("--device cuda", "torch finds no GPU"),
    ],
    ids=lambda value: value[:30],
)
def test_mistakes_are_one_line_and_exit_with_2(
    folder: Path, capsys: pytest.CaptureFixture[str], options: str, says: str
) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    name, _, rest = options.partition(" ")
    words = [name, rest] if rest.startswith(("{", "[")) else [name, *rest.split()]
    assert main(["rank", "-c", "tiny.yaml", "--out", "out", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert says in error


def test_an_interrupted_study_says_how_to_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("camdistill.commands.rank.run_ranking", interrupted)
    assert main(["rank", "-c", "tiny.yaml", "--out", "out"]) == 130
    assert "start the same command again" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_that_is_killed_outright_goes_on(folder: Path) -> None:
    path, command = folder / "out/runs.jsonl", ["rank", "-c", "tiny.yaml", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = subprocess.Popen(
        [sys.executable, "-m", "camdistill", *command, "--workers", "1", "--recipe.steps", "60"],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 300
        while not (path.is_file() and path.read_bytes().count(b"\n") >= 2):
            assert running.poll() is None, "it ended before it was killed"
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        running.kill()
        running.wait()
    done = path.read_bytes()
    kept = done[: done.rindex(b"\n") + 1]
    assert main([*command, "--recipe.steps", "60"]) == 0
    after = path.read_bytes()
    assert after.startswith(kept)
    assert len({json.loads(line)["key"] for line in after.splitlines()}) == 2 * 5
    assert len(after.splitlines()) == 2 * 5


def test_help_is_short_and_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rank", "--help"]) == 0
    told = capsys.readouterr().out
    for option in (
        "--methods TEXT ...",
        "--tuning.betas",
        "--recipe.steps N",
        "--trust",
        "--stack",
    ):
        assert option in told
    assert len(told.splitlines()) < 110
