import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from camdistill import tags
from camdistill.cli import main
from camdistill.errors import UserError
from camdistill.layers.sweep.layer_sweep import LayerSweep
from camdistill.networks.capture import unwrap
from camdistill.networks.students import ShallowCNN
from camdistill.networks.weights import save_safetensors
from camdistill.report.analysis_run import AnalysisRun
from camdistill.report.tensorboard import read_scalars

QUICK = ["--count", "24", "--steps", "2", "--cards", "1", "--pictures", "1"]


@pytest.fixture
def shallow(tmp_path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ShallowCNN(8, (4, 6), (1, 2))
    arguments = {"mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]"}
    path = tmp_path / "network.safetensors"
    save_safetensors(path, network.state_dict(), arguments)
    return path


def _checkpoint(trained: Path) -> Path:
    (path,) = trained.rglob("student.safetensors")
    return path


def test_checkpoint_is_analyzed_beside_its_teacher(
    trained: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(trained)
    out = tmp_path / "out"
    images = str(trained / "images" / "test")
    given = ["--checkpoint", str(_checkpoint(trained)), "--images", images, "--out", str(out)]
    assert main(["analyze", *given, *QUICK]) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["networks"]) == {"teacher", "student"}
    assert results["n"] == 24
    assert set(results["networks"]["student"]) == {"stage1", "stage2"}
    assert set(results["units"]["student"]) == {"stage1", "stage2"}
    assert set(results["sha256"]) == {"teacher", "checkpoint"}
    for run in ("report", "teacher", "student"):
        assert list((out / run).glob("events.out.tfevents.*"))
    told = capsys.readouterr().out
    assert f"camdistill report --run {out}" in told


def test_chosen_layers_and_units_are_looked_at_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["camdistill"])
    given = ["--teacher", "resnet20", "--data", "shapes", "--out", str(tmp_path / "out")]
    chosen = ["--layers", "layer1.*.relu", "layer3", "--units", "layer3:5", "layer3:2"]
    assert main(["analyze", *given, *QUICK, *chosen]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    layers = list(results["networks"]["teacher"])
    assert layers[-1] == "layer3"
    assert layers[:2] == ["layer1.0.relu#0", "layer1.0.relu#1"]
    assert [one["unit"] for one in results["units"]["teacher"]["layer3"]] == [5, 2]


class Gray(nn.Module):
    """Takes one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU()
        )
        self.head = nn.Linear(4, 5)

    def forward(self, images):
        assert images.shape[1] == 1
        return self.head(self.features(images).mean((2, 3)))


def test_any_network_by_class_path_also_of_gray_images(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(__file__).read_text()
    body = source[source.index("class Gray") : source.index("def test_any_network")]
    (tmp_path / "gray_network.py").write_text(f"import torch\nfrom torch import nn\n\n\n{body}")
    monkeypatch.syspath_prepend(tmp_path)
    given = ["--teacher", "gray_network.Gray", "--size", "32", "--data", "shapes"]
    assert main(["analyze", *given, *QUICK, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["networks"]["teacher"]) == ["features.1", "features.3"]


def test_layers_are_listed_without_any_images(tmp_path: Path, capsys) -> None:
    assert main(["analyze", "--teacher", "resnet20", "--list-layers"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"layer1\.0\.relu#0 +16 +32x32", told)
    assert re.search(r"layer3\.2 +64 +8x8 +yes", told)


def test_layers_are_listed_where_nothing_can_be_written(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    given = ["analyze", "--teacher", "resnet20", "--out", str(tmp_path)]
    assert main([*given, "--list-layers"]) == 0
    assert "layer3.2" in capsys.readouterr().out
    assert main([*given, "--data", "shapes"]) == 2
    assert "can't write to" in capsys.readouterr().err


def test_folder_of_a_training_run_is_no_place_for_a_report(
    trained: Path, tmp_path: Path, capsys
) -> None:
    run = next(trained.rglob("events.out.tfevents.*")).parent
    there = sorted(run.rglob("*"))
    given = ["--teacher", "resnet20", "--data", "shapes", *QUICK]
    for out in (run, run.parent):
        assert main(["analyze", *given, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert f"{run} holds another run's events" in error
        assert f"give another --out, such as {out}-layers" in error
        assert error.count("\n") == 1
    assert sorted(run.rglob("*")) == there


def test_probes_stand_in_the_profile_and_need_labels(
    trained: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(trained)
    given = ["--teacher", "resnet20", "--layers", "layer3", "--steps", "0", "--cards", "0"]
    given += ["--pictures", "0", "--probes", "--out", str(tmp_path / "out"), "--count", "200"]
    assert main(["analyze", *given, "--data", "shapes"]) == 0
    row = json.loads((tmp_path / "out" / "results.json").read_text())
    found = row["networks"]["teacher"]["layer3"]
    assert 0 <= found["probe"] <= 1
    assert 0 <= found["probe_untrained"] <= 1
    assert main(["analyze", *given, "--images", str(trained / "images" / "test" / "c0")]) == 2
    assert "--probes reads labels out" in capsys.readouterr().err


def test_stopped_early_leaves_a_report_of_what_was_done(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("camdistill.report.analysis_run.through_depth", stopped)
    given = ["--teacher", "resnet20", "--data", "shapes", "--out", str(tmp_path / "out")]
    assert main(["analyze", *given, *QUICK, "--layers", "layer3"]) == 130
    assert "Partial report: stopped during the maps through depth" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["unfinished"] == "stopped during the maps through depth"
    assert results["weights"]["teacher"]
    assert not results["units"]


def test_mistake_after_the_sweep_loses_nothing_that_was_computed(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*_: object, **__: object) -> None:
        raise UserError("the logits don't depend on it")

    monkeypatch.setattr("camdistill.report.analysis_run.inspect_units", mistaken)
    given = ["--teacher", "resnet20", "--data", "shapes", "--layers", "layer3"]
    out = tmp_path / "out"
    assert main(["analyze", *given, *QUICK, "--out", str(out)]) == 2
    assert "the logits don't depend on it" in capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert results["unfinished"] == "stopped during the look at units"
    assert results["networks"]["teacher"]["layer3"]["active"] >= 0
    assert "This report is partial" in (out / "report.md").read_text()
    assert list((out / "pictures").glob("2_maps-through_depth*.png"))


@pytest.mark.parametrize(
    ("where", "code", "told"),
    [
        ("camdistill.layers.sweep.layer_sweep.summarize", 130, "start the same command again"),
        (
            "camdistill.report.layer_report.sweep_charts",
            130,
            "stopped during the charts of the sweep",
        ),
    ],
)
def test_stop_between_the_last_image_and_the_pictures_loses_no_image(
    trained: Path, tmp_path: Path, capsys, monkeypatch, where: str, code: int, told: str
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(trained)
    out = tmp_path / "out"
    images = str(trained / "images" / "test")
    given = ["--checkpoint", str(_checkpoint(trained)), "--images", images, "--out", str(out)]
    given += ["--count", "24", "--cards", "0", "--pictures", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(where, stopped)
        assert main(["analyze", *given]) == code
    said = capsys.readouterr()
    assert told in said.out + said.err
    monkeypatch.delattr(LayerSweep, "update")
    assert main(["analyze", *given]) == 0
    assert (
        f"24 images were looked at before ({out / 'sweep.safetensors'}" in capsys.readouterr().out
    )
    results = json.loads((out / "results.json").read_text())
    assert (results["n"], results["unfinished"]) == (24, "")
    assert (out / "pictures" / "1_overview-profiles.png").exists()


def test_one_image_is_enough(tmp_path: Path) -> None:
    given = ["--teacher", "resnet20", "--data", "shapes", "--layers", "layer3", "--steps", "0"]
    assert main(["analyze", *given, "--count", "1", "--out", str(tmp_path / "out")]) == 0


def test_mistake_before_the_sweep_keeps_the_earlier_report(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    given = ["--teacher", "resnet20", "--data", "shapes", "--out", str(out), "--pictures", "0"]
    given += ["--count", "8", "--cards", "0"]
    assert main(["analyze", *given, "--layers", "layer3"]) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for wrong in (["--layers", "layr3"], ["--units", "fc:1"], ["--size", "0"]):
        assert main(["analyze", *given, *wrong]) == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_networks_and_images_go_to_the_device(tmp_path: Path, monkeypatch) -> None:
    asked: list[tuple[str, str]] = []
    moved = AnalysisRun.sweep

    def sweep(opening: AnalysisRun, *, probes: bool) -> None:
        (network,) = opening.networks.values()
        weight = next(unwrap(network).parameters())
        asked.append((weight.device.type, opening.dataset.device))
        moved(opening, probes=probes)

    monkeypatch.setattr(AnalysisRun, "sweep", sweep)
    given = ["--teacher", "resnet20", "--data", "shapes", "--out", str(tmp_path / "out")]
    given += ["--layers", "layer3", "--count", "8", "--cards", "0", "--pictures", "0"]
    assert main(["analyze", *given, "--device", "cpu"]) == 0
    assert asked == [("cpu", "cpu")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_tells_what_the_processor_tells(tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        given = ["--teacher", "resnet20", "--data", "shapes", "--device", device]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            assert main(["analyze", *given, *QUICK, "--out", str(out)]) == 0
        found[device] = json.loads((out / "results.json").read_text())["networks"]["teacher"]
    for name, row in found["cpu"].items():
        assert found["cuda"][name]["active"] == pytest.approx(row["active"], abs=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_missing_is_a_mistake(tmp_path: Path, capsys) -> None:
    given = ["--teacher", "resnet20", "--data", "shapes", "--out", str(tmp_path / "out")]
    assert main(["analyze", *given, "--device", "cuda"]) == 2
    assert "device is 'cuda', but torch finds no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--teacher", "resnet20"], "give either --data"),
        (["--data", "shapes"], "give either --checkpoint FILE"),
        (["--teacher", "resnet20", "--data", "shapes", "--layers", "layr3"], "no layer 'layr3'"),
        (["--teacher", "resnet20", "--data", "shapes", "--units", "layer3"], "unit 'layer3'"),
        (
            ["--teacher", "resnet20", "--data", "shapes", "--units", "layer9:1"],
            "no layer 'layer9' is looked at",
        ),
        (
            ["--teacher", "resnet20", "--data", "shapes", "--units", "layer3.2:64"],
            "layer3.2 has no unit 64; it has 0 to 63",
        ),
        (["--teacher", "resnet20", "--data", "shapes", "--count", "0"], "count is 0"),
        (["--teacher", "resnet20", "--data", "shapes", "--cards", "-1"], "cards is -1"),
        (["--teacher", "resnet20", "--images", "nowhere"], "no file or folder 'nowhere'"),
        (["--teacher", "vit_b_32", "--size", "64", "--data", "shapes"], "give another --size"),
    ],
)
def test_mistakes_are_one_line(given: list[str], told: str, tmp_path: Path, capsys) -> None:
    quick = [word for word in QUICK if "--count" not in given or word not in ("--count", "24")]
    if "--cards" in given:
        quick = ["--count", "24"]
    assert main(["analyze", *quick, *given, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_report_of_a_folder_without_events_is_a_mistake(tmp_path: Path, capsys) -> None:
    assert main(["report", "--run", str(tmp_path)]) == 2
    assert "no TensorBoard events" in capsys.readouterr().err


def _heeding_ctrl_c() -> None:
    """A command that a script starts in the background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_ctrl_c_in_the_middle_leaves_a_readable_report_of_a_part(tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--teacher", "resnet20", "--data", "shapes", "--layers", "relu", "layer?"]
    # Images made to excite units: minutes of them, so that the signal comes in time.
    given += ["--count", "64", "--steps", "100000", "--cards", "1", "--pictures", "1"]
    command = [sys.executable, "-m", "camdistill", "analyze", *given, "--out", str(out)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heeding_ctrl_c,
    ) as running:
        try:
            for _ in range(600):
                if (out / "pictures" / "2_maps-through_depth.png").exists():
                    break
                assert running.poll() is None, running.stderr.read()
                time.sleep(0.2)
            time.sleep(3)
            running.send_signal(signal.SIGINT)
            told, error = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 130, error
    assert "Traceback" not in error
    assert "Partial report: stopped during the look at units." in told
    results = json.loads((out / "results.json").read_text())
    assert results["unfinished"] == "stopped during the look at units"
    assert list(results["networks"]["teacher"]) == ["relu", "layer1", "layer2", "layer3"]
    assert results["units"] == {}
    assert "**This report is partial" in (out / "report.md").read_text()
    with np.load(out / "numbers.npz") as arrays:
        assert arrays["teacher/layer3/unit_variance"].shape == (64,)
    read = read_scalars(out / "teacher")
    assert len(read[tags.profile("active")]) == 4
    assert main(["analyze", *given[:-6], "--steps", "0", "--cards", "0", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert not results["unfinished"], "the next report takes the part's place"


@pytest.mark.slow
def test_report_prints_the_front_page_and_stops_cleanly(trained: Path) -> None:
    command = [sys.executable, "-m", "camdistill", "report", "--run", str(trained), "--port", "0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heeding_ctrl_c,
    ) as server:
        try:
            lines = iter(server.stdout.readline, "")
            link = next(line.strip() for line in lines if "pinnedCards" in line)
            assert re.match(r"http://localhost:\d+/\?smoothing=0&pinnedCards=.*#timeseries$", link)
            assert "1_overview%2Fagreement" in link
            next(line for line in lines if "Ctrl-C" in line)
            server.send_signal(signal.SIGINT)
            out, error = server.communicate(timeout=30)
        finally:
            server.kill()
    assert server.returncode == 0
    assert "Stopped." in out
    assert "Traceback" not in error


FLAT = """
import torch
from camdistill.networks.students import ShallowCNN


class Flat(ShallowCNN):
    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(4, (4, 6), (1, 2))
        with torch.no_grad():
            self.stage2.conv.weight[3] = 0
            self.stage2.bn.bias[3] = 0.5
"""


def test_units_whose_images_failed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit without weights gives the same for every image, so nothing can excite it."""
    (tmp_path / "flat_network.py").write_text(FLAT)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    given = ["--teacher", "flat_network.Flat", "--size", "32", "--data", "shapes"]
    chosen = ["--units", "stage2:3", "stage2:4", "--layers", "stage2"]
    quick = ["--count", "24", "--steps", "20", "--cards", "0", "--pictures", "0"]
    assert main(["analyze", *given, *chosen, *quick, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    flat, other = results["units"]["teacher"]["stage2"]
    assert flat["failed"]
    assert flat["reached"] == flat["random"] == 0.5
    assert not other["failed"]
    assert other["reached"] > other["random"]
    assert any("failed for stage2:3:" in note for note in results["notes"])
    assert "failed for stage2:3:" in (out / "report.md").read_text()
