"""The benchmarks run, small: they assert that what they compare is the same."""

import subprocess
import sys
from pathlib import Path

import pytest

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
