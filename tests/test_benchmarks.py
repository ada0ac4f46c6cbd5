"""The benchmarks run, small: they assert that what they compare is the same."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_four_engines_give_the_same_maps() -> None:
    pytest.importorskip("captum")
    pytest.importorskip("torchcam")
    pytest.importorskip("pytorch_grad_cam")
    small = ["--networks", "resnet56", "--batch", "2", "--rounds", "1", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "cam_engines.py"), *small],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith("| resnet56")]
    jobs = [row.split("|")[1].strip() for row in rows]
    assert jobs == [
        f"resnet56, {layers}, {classes}"
        for layers in ("last stage", "3 stages")
        for classes in ("1 class", "10 classes")
    ]
    cells = [cell for row in rows for cell in row.strip("| ").split("|")[5:]]
    megabytes_and_ratios = [float(cell) for cell in cells]
    # One class: at most half of any peer's memory.
    for row in (megabytes_and_ratios[:4], megabytes_and_ratios[8:12]):
        assert min(row[1:]) > 2


@pytest.mark.slow
def test_at_least_seven_of_the_readmes_eight_units_exceed_random_images(tmp_path: Path) -> None:
    checkpoint = BENCHMARKS.parent / "checkpoints" / "shapes-student.safetensors"
    done = subprocess.run(
        [
            sys.executable,
            str(BENCHMARKS / "made_images.py"),
            *("--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=BENCHMARKS.parent,
    )
    words = done.stdout.splitlines()[-1].split()
    assert int(words[0]) >= 7
    assert int(words[2]) == 8


def test_a_split_sweep_differs_where_nan_meets_a_number() -> None:
    place = BENCHMARKS / "layer_sweep_split.py"
    spec = importlib.util.spec_from_file_location("layer_sweep_split", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    nan, infinite = torch.nan, torch.inf
    for one, two, expected in (
        ([1.0, nan, -infinite], [1.0, nan, -infinite], 0.0),
        ([1.0, nan], [1.0, 2.0], infinite),
        ([1.0, 2.0], [1.0, nan], infinite),
        ([1.0, infinite], [1.0, 4.0], infinite),
        ([1.0, 3.0], [1.0, 4.0], 0.25),
        ([1e-9], [0.0], infinite),
        ([], [], 0.0),
    ):
        assert module.relative_gap(torch.tensor(one), torch.tensor(two)) == expected, (one, two)


@pytest.mark.slow
def test_every_report_of_a_training_is_on_the_clock() -> None:
    small = ["--epochs", "1", "--limit", "64"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "logging_cost.py"), *small],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = {
        line[:18].strip(): float(line[18:].split()[0])
        for line in done.stdout.splitlines()
        if " s an epoch of " in line
    }
    assert list(seconds) == ["pictures of maps", "layers", "text", "throughput", "together"]
    assert seconds["pictures of maps"] > 0
    assert seconds["layers"] > 0
    parts = sum(value for name, value in seconds.items() if name != "together")
    assert seconds["together"] == pytest.approx(parts, abs=0.03)


@pytest.mark.slow
def test_commands_that_are_killed_go_on_and_leave_what_unbroken_ones_do() -> None:
    only = ["--only", "fit with ema", "study", "evaluate", "cache"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "kills.py"), "--kills", "12", *only],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line][2:]
    assert [row[0] for row in rows] == only[1:]
    assert all(int(row[1]) >= 3 and row[4] == "0" for row in rows)
