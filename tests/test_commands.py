"""Every command of the README's table runs to its end, from the command line that documents it."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_study
import yaml
from PIL import Image

from camdistill.cli import COMMANDS, LOOPS, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SMALL = {
    "explain": "--count 2",
    "analyze": "--count 8 --cards 1 --steps 2 --pictures 1 --layers stage4 layer3",
    "evaluate": "--count 2 --metrics deletion_mean gini",
    "claims": "--count 16",
}


def documented() -> list[str]:
    """All command lines of README and pages, without comments and prompts."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = [
            line
            for block in re.findall(r"```bash\n(.*?)```", text, re.S)
            for line in block.splitlines()
        ]
        lines += [" ".join(one.split()) for one in re.findall(r"`(camdistill [^`]*)`", text)]
        found += [line.split(" # ")[0].strip() for line in lines]
    return [" ".join(line.split()) for line in found if line.startswith("camdistill ")]


def line_of(pattern: str) -> str:
    """The first documented command line that has a pattern."""
    return next(line for line in documented() if re.search(pattern, line))


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """A shipped config, made so small that it runs in seconds."""
    data = config.get("data", {}).get("init_args", {})
    if "train" in data:
        data.update(train=64, val=24, test=32, batch_size=16)
    if "size" in data:
        data.update(size=32, batch_size=8)
    if "trainer" in config:
        config["trainer"] = {"max_epochs": 1, "accelerator": "cpu"}
    if "arms" in config:
        config["seeds"] = [0, 1]
    if "recipe" in config and "n" in config:
        config.update(n=[16], seeds=[0, 1], recipe={"steps": 2, "batch_size": 8})
        config["tuning"] = {"betas": [1.0], "seeds": [7]}
    if "methods" in config:
        kinds = {name.partition("@")[0]: name for name in config["methods"]}
        config.update(methods=["mask:parts", *list(kinds.values())[-4:]], controls=["random"])
        config.update(shares=[0.5], controls_of=["mask:parts"])
    if "objective" in config:
        config.update(seeds=[0], start={"epochs": 1}, recipe={"epochs": 1, "images": 16})
        config.update(arms=["objective", "ce"], also={})
        config["judging"] = {"images": 8, "held_out": [], "road": [0.5]}
    if "studies" in config:  # measuring explanations by hand takes minutes of a larger network
        study = tiny_study.study(
            methods=["mask:parts", "grad_cam@stage2", "gradient", "eigen_cam@stage2"],
            controls=["random"],
            shares=[],
        )
        other = {**study, "teacher": {**study["teacher"], "weights": "other.safetensors"}}
        config = {"images": 2, "studies": {"one": study, "other": other}}
        config["fit"] = {"steps": 2, "images": 2, "members": 2, "units": 3}
        return config
    if "adaptation" in config:
        config["adaptation"]["rounds"] = 1
    return config


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A clone whose configs are small, and a folder of images with class folders."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "checkpoints", folder / "checkpoints")
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.yaml"):
        config = shrunk(yaml.safe_load(path.read_text()))
        (folder / "configs" / path.name).write_text(yaml.safe_dump(config, sort_keys=False))
    for seed, name in enumerate(("teacher", "other")):
        tiny_study.save_teacher(folder / f"{name}.safetensors", seed)
    pixels = np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 8)):
        for number in range(count):
            path = folder / "FOLDER" / split / f"c{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CAMDISTILL_RUN_FOLDER", "")
        yield folder


@pytest.fixture
def run(clone: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a documented command line, with what makes it small; returns what it prints."""

    def start(line: str, more: str = "") -> str:
        name, *words = shlex.split(line)[1:]
        capsys.readouterr()
        assert main([name, *words, *shlex.split(SMALL.get(name, "")), *shlex.split(more)]) == 0
        return capsys.readouterr().out

    return start


def results(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "results.json").read_text())
    return found


def test_every_command_is_documented_by_a_command_line() -> None:
    table = (ROOT / "README.md").read_text().partition("| command |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert named >= {*LOOPS, *COMMANDS}
    lines = documented()
    for command in (*LOOPS, *COMMANDS):
        assert any(line.startswith(f"camdistill {command} ") for line in lines), command


@pytest.mark.slow
def test_own_images_are_trained_tested_predicted_and_explained(
    run: Callable[..., str], clone: Path
) -> None:
    teacher = line_of("^camdistill fit -c configs/own-teacher").replace(
        "weights DEFAULT", "args {}"
    )
    assert "network.safetensors" in run(teacher)
    assert "student.safetensors" in run(line_of("^camdistill fit -c configs/own-student"))
    folder = "runs/own-student/version_0"
    assert "8 test images" in run(line_of("^camdistill test -c configs/own-student"))
    assert results(folder)["n"] == 8
    assert "agreement" in run(line_of("^camdistill validate"))
    assert "predictions.npz" in run(line_of("^camdistill predict"))
    with np.load(Path(folder, "predictions.npz"), allow_pickle=False) as predicted:
        assert predicted["student_logits"].shape == (8, 2)
    assert "overview.png" in run(line_of("^camdistill explain --checkpoint runs/own-student"))
    table = run(line_of("^camdistill study -c configs/own-study"))
    assert "student minus" in table
    assert results("runs/own-study")["seeds"] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "written"),
    [
        ("explain", "runs/explain/results.json"),
        ("evaluate", "runs/evaluate/values.npz"),
        ("export", "runs/export/explainer.onnx"),
        ("claims", "runs/claims/results.json"),
        ("rank", "runs/rank/results.json"),
        ("refine", "runs/refine/results.json"),
        ("adapt", "runs/adapt-shapes/results.json"),
        ("learn", "runs/learn-shapes/metric.safetensors"),
    ],
)
def test_the_documented_line_runs_to_its_end(
    command: str,
    written: str,
    run: Callable[..., str],
    clone: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if command == "learn":
        monkeypatch.setattr("camdistill.experiments.learned_metric.metric_baselines.RESAMPLES", 50)
    studies = command in ("rank", "refine", "adapt", "learn")
    line = line_of(rf"^camdistill {command} .*{'--out' if command in ('adapt', 'learn') else ''}")
    line = line.replace("--rows 1 7 13 16", "--rows 1")  # the others take minutes
    assert run(line, "--workers 0 --device cpu" if studies else "")
    assert (clone / written).is_file()


@pytest.mark.slow
def test_an_analysis_is_shown_by_report(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    assert "report.md" in run(line_of("^camdistill analyze"))
    # Its server would outlive the test.
    launch = "camdistill.commands.report.program.TensorBoard.launch"
    monkeypatch.setattr(launch, lambda self: "http://localhost:6006/")
    events = SimpleNamespace(Event=lambda: SimpleNamespace(wait=stopped))
    monkeypatch.setattr("camdistill.commands.report.threading", events)
    assert "pinnedCards" in run(line_of("^camdistill report --run runs/analyze"))


@pytest.mark.slow
def test_evaluations_of_several_seeds_are_pooled(run: Callable[..., str]) -> None:
    line = line_of("^camdistill pool --runs runs/student-0")
    evaluate = line_of("^camdistill evaluate")
    for folder in re.findall(r"runs/student-\d", line):
        run(evaluate, f"--out {folder} --seed {folder[-1]} --explainers grad_cam")
    assert "grad_cam" in run(line)
