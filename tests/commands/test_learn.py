"""`learn` from the command line: rankings, a metric in a file, and its use elsewhere."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny_study import HERE, save_teacher, study

from camdistill.cli import main
from camdistill.data.modules import ShapesData
from camdistill.explain.methods import image_explainer
from camdistill.measure.learned import LearnedMetric, image_context, load_metric
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import NetworkSpec, Teacher
from camdistill.networks.weights import save_safetensors

METHODS = ["grad_cam@stage2", "grad_cam@stage1", "mask:parts", "gradient", "eigen_cam@stage2"]
ARMS = {"methods": METHODS, "controls": ["random", "mean"], "shares": []}
STUDY, OTHER = study(**ARMS), study("other.safetensors", **ARMS)
CONFIG = {
    "studies": {"one": STUDY, "other": OTHER},
    "fit": {"steps": 3, "images": 4, "members": 2, "units": 3},
    "images": 4,
    **HERE,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("teacher", "other")):
        save_teacher(tmp_path / f"{name}.safetensors", seed)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.setattr("camdistill.experiments.learned_metric.metric_baselines.RESAMPLES", 50)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_it_learns_tests_and_tells(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["learn", "-c", "tiny.yaml", "--out", "out"]) == 0
    told = capsys.readouterr().out
    assert "one, unseen method: all arms" in told
    assert "other, unseen network: methods" in told
    assert "asked about 8 images, metrics made by hand about 4 of them" in told
    results = json.loads((folder / "out/results.json").read_text())
    arms = {"random", *METHODS, "grad_cam@stage2 mean"}
    for name in ("one", "other"):
        assert set(results["gains"][name]) == arms
        answer = results["answers"][f"{name}, unseen method"]
        assert set(answer["learned"]) == arms
        assert (results["n"][name], results["n_by_hand"][name]) == (8, 4)
        assert {"learned", "road", "gini", "faithfulness_correlation", "iou"} <= set(answer["all"])
        runs = (folder / "out" / name / "runs.jsonl").read_text().splitlines()
        assert len(runs) == 2 * (len(arms) + 1)
    assert isinstance(load_metric("out/metric.safetensors"), LearnedMetric)

    # once more: no student is trained again, nothing is measured again, the metric is the same
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was measured before")

    monkeypatch.setattr("camdistill.experiments.learned_metric.metric_baselines.measure", never)
    before = (folder / "out/metric.safetensors").read_bytes()
    assert main(["learn", "-c", "tiny.yaml", "--out", "out"]) == 0
    assert (folder / "out/metric.safetensors").read_bytes() == before
    assert len((folder / "out/one/runs.jsonl").read_text().splitlines()) == 2 * (len(arms) + 1)


@pytest.mark.slow
def test_evaluate_takes_a_metric_by_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        save_safetensors(folder / "default.safetensors", ShallowCNN(8).state_dict(), {})
        LearnedMetric(2, 4).save("metric.safetensors")
    words = ["--teacher", "shallow_cnn", "--weights", "default.safetensors", "--data", "shapes"]
    more = ["--size", "32", "--count", "6", "--metrics", "metric.safetensors", "gini"]
    assert main(["evaluate", *words, *more, "--out", "judged"]) == 0
    assert "learned from what maps taught" in capsys.readouterr().out
    found = json.loads((folder / "judged/results.json").read_text())["explainers"]["grad_cam"]

    teacher = Teacher(NetworkSpec("shallow_cnn", "default.safetensors"))
    data = ShapesData()
    data.setup("test")
    assert data.test_set is not None
    rows = torch.linspace(0, len(data.test_set) - 1, 6).long().numpy()
    images = data.test_set.batch(rows).pixels.float() / 255
    classes = teacher(images).argmax(1)
    maps = image_explainer("grad_cam")(teacher, images, classes)
    wanted = load_metric("metric.safetensors")(maps, image_context(teacher, images, classes))
    assert found["metric.safetensors"]["mean"] == pytest.approx(float(wanted.mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--fit.steps 0", "fit.steps is 0; give 1 or more"),
        ("--images 1", "2 images"),
        ("--fit.stpes 3", "nearest: 'fit.steps'"),
        ("--studies {}", "there are 0 studies"),
    ],
    ids=lambda value: value[:20],
)
def test_mistakes_are_one_line_and_exit_with_2(
    folder: Path, capsys: pytest.CaptureFixture[str], options: str, says: str
) -> None:
    assert main(["learn", "-c", "tiny.yaml", "--out", "out", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert says in error


def test_a_ranking_of_too_few_methods_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"one": STUDY | {"methods": ["gradient", "mask:parts"], "controls": [], "seeds": [0]}}
    (folder / "few.yaml").write_text(yaml.safe_dump(CONFIG | {"studies": few}))
    assert main(["learn", "-c", "few.yaml", "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert "studies.one: a ranking of gradient, mask:parts is too few to learn from" in said
    assert not (folder / "out").exists(), "no student was trained for it"


def test_a_file_that_is_no_metric_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--teacher", "shallow_cnn", "--data", "shapes", "--size", "32", "--metrics"]
    for name, says in (
        ("teacher.safetensors", "'teacher.safetensors' holds no metric"),
        ("absent.safetensors", "no file 'absent.safetensors'"),
        ("gni", "no metric 'gni'; nearest: 'gini'; or give FILE.safetensors"),
    ):
        assert main(["evaluate", *words, name, "--out", "judged"]) == 2
        assert says in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learn", "--help"]) == 0
    told = capsys.readouterr().out
    for option in ("--studies", "--fit.steps N", "--images N", "--out PATH"):
        assert option in told
