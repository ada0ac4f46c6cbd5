"""`camdistill claims`: from the command line to the files, quick and small."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camdistill.claims.networks import backbones
from camdistill.cli import main
from camdistill.report.tensorboard import read_tags

ROOT = Path(__file__).parents[2]
LEAST = ["claims", "--count", "16", "--seed", "5"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one with the shipped networks, in which little networks train for a moment."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backbones, "IMAGES", 128)
    monkeypatch.setattr(backbones, "EPOCHS", 1)
    return tmp_path


def test_rows_reach_the_terminal_the_file_the_chart_and_tensorboard(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LEAST, "--rows", "1", "2", "4", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert "  1  pass  Grad-CAM generalizes CAM" in printed
    assert "AlexNet" in printed
    results = json.loads(Path("out/results.json").read_text())
    assert list(results["rows"]) == ["1", "2", "4"]
    assert (results["n"], results["seeds"]) == (16, [5])
    assert set(results["sha256"]) == {"teacher", "student"}
    assert {"machine", "versions", "seconds"} <= set(results)
    error = results["rows"]["4"]["row"]["ours"][0]
    assert error["low"] <= error["value"] <= error["high"]
    assert error["n"] == 16
    assert len(list(Path("out/networks").glob("flattened0-*.safetensors"))) == 1
    with Image.open("out/claims_localization.png") as picture:
        assert np.asarray(picture).std() > 10
    cards = read_tags(Path("out/tensorboard"))
    assert cards["0_evaluation/claims"] == "text"
    assert cards["0_evaluation/claims_localization"] == "images"

    made = Path("out/networks").stat().st_mtime_ns
    assert main([*LEAST, "--rows", "4", "1", "--out", "out"]) == 0
    again = capsys.readouterr().out
    assert again.index("Grad-CAM generalizes") < again.index("AlexNet")
    assert json.loads(Path("out/results.json").read_text())["rows"] == results["rows"]
    assert Path("out/networks").stat().st_mtime_ns == made
    assert "needs no other architecture" not in again
    assert "needs no other architecture" in Path("out/table.txt").read_text()


@pytest.mark.slow
def test_every_row_of_the_shipped_networks_is_made(folder: Path) -> None:
    numbers = [*"12345", "5b", *"678", "11", "12", "22", "23", "24", "25", "26"]
    assert main([*LEAST, "--rows", *numbers, "--out", "out"]) == 0
    rows = json.loads(Path("out/results.json").read_text())["rows"]
    assert list(rows) == numbers
    for number, entry in rows.items():
        assert entry["error"] == ""
        assert entry["row"]["number"] == number
        assert entry["row"]["passed"] in (True, False)
        assert entry["row"]["ours"]
    for chart in ("localization", "faithfulness"):
        assert Path(f"out/claims_{chart}.png").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rows", "99"], "no row '99'"),
        (["--count", "3"], "count is 3; give 16 or more"),
        (["--seed", "-1"], "seed is -1"),
        (["--teacher", "nothing.safetensors"], "no file 'nothing.safetensors'"),
        (
            ["--student", "checkpoints/cifar10-student-seed0.safetensors"],
            "tells 10 classes apart, Shapes has 8",
        ),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    rows = [] if "--rows" in options else ["--rows", "1"]
    assert main([*LEAST, *rows, "--out", "out", *options]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert says in told[0]
    assert not Path("out").exists()


def test_a_folder_of_other_settings_is_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--rows", "1", "--out", "out"]
    assert main([*LEAST, *line]) == 0
    before = Path("out/results.json").read_bytes()
    assert main(["claims", "--count", "17", "--seed", "5", *line]) == 2
    assert "count 16, now 17" in capsys.readouterr().err
    assert Path("out/results.json").read_bytes() == before
