"""`adapt` from the command line: it runs, goes on, and its explainer is taken by file elsewhere."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny_study import HERE, TINY, save_teacher, study

from camdistill.cli import main
from camdistill.experiments.adaptation.adaptation_run import shorten_arm
from camdistill.explain.learnable import LearnableCAM, load_explainer
from camdistill.networks.students import ShallowCNN
from camdistill.networks.weights import save_safetensors

CONFIG = study(
    students={
        "tiny": TINY,
        "other": {"name": "shallow_cnn", "args": {"channels": [5, 7], "strides": [2, 2]}},
    },
    adaptation={"layers": ["stage1", "stage2"], "rounds": 2, "judges": [50], "lr": 0.05},
    recipe={"steps": 3, "batch_size": 8},
    **HERE,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_teacher(tmp_path / "teacher.safetensors")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.setattr("camdistill.experiments.ranking.leakage.STEPS", 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_it_adapts_judges_on_fresh_students_and_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["adapt", "-c", "tiny.yaml", "--out", "out"]) == 0
    told = capsys.readouterr().out
    assert "other n=16: " in told
    for name in ("results.json", "table.txt", "gains.png", "runs.jsonl", "adapted.safetensors"):
        assert (folder / "out" / name).is_file()
    runs = (folder / "out/runs.jsonl").read_text()
    assert len(runs.splitlines()) == 2 * 2 * 4  # families, seeds, arms
    rounds = {path.name: path.read_bytes() for path in (folder / "out/rounds").iterdir()}
    assert len(rounds) == 2 * 3
    results = json.loads((folder / "out/results.json").read_text())
    whole = results["explainers"]["teacher"]
    assert [one["number"] for one in whole["rounds"]] == [0, 1, 2]
    best = min(whole["rounds"], key=lambda one: one["kl"])["number"]
    assert whole["best_round"] == best
    assert set(results["students"]["tiny n=16"]) == {"none", "grad_cam", "adapted", "randomized"}
    assert results["arms"]["adapted"] == "out/adapted.safetensors"
    assert set(results["differences"]["tiny n=16"]) >= {"adapted - grad_cam", "adapted - none"}

    # again: nothing is learned or taught a second time, and the numbers are the same
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was done before")

    monkeypatch.setattr("camdistill.experiments.adaptation.adaptation_rounds.adapt_once", never)
    monkeypatch.setattr("camdistill.experiments.adaptation.adaptation_rounds.train_students", never)
    assert main(["adapt", "-c", "tiny.yaml", "--out", "out"]) == 0
    assert (folder / "out/runs.jsonl").read_text() == runs
    again = json.loads((folder / "out/results.json").read_text())
    assert again["differences"] == results["differences"]
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    # one round more goes on from the two; another learning rate is another explainer
    assert main(["adapt", "-c", "tiny.yaml", "--out", "out", "--adaptation.rounds", "3",
                 "--adaptation.patience", "3"]) == 0  # fmt: skip
    after = {path.name: path.read_bytes() for path in (folder / "out/rounds").iterdir()}
    assert len(after) == 2 * 4
    assert all(after[name] == content for name, content in rounds.items())


def test_arms_are_called_the_same_wherever_the_study_lies() -> None:
    names = {"grad_cam": "grad_cam@stage2", "adapted": "some/where/adapted.safetensors"}
    assert shorten_arm("some/where/adapted.safetensors", names) == "adapted"
    assert shorten_arm("grad_cam@stage2 random", names) == "grad_cam random"
    assert shorten_arm("grad_cam@stage21", names) == "grad_cam@stage21"
    assert shorten_arm("none", names) == "none"


@pytest.mark.slow
def test_rank_and_evaluate_take_an_explainer_by_file(folder: Path) -> None:
    assert main(["adapt", "-c", "tiny.yaml", "--out", "out", "--seeds", "0"]) == 0
    explainer = load_explainer("out/adapted.safetensors")
    assert list(explainer.units) == ["stage1", "stage2"]
    config = {name: value for name, value in CONFIG.items() if name != "adaptation"}
    config |= {"methods": ["out/adapted.safetensors", "grad_cam"], "controls": ["randomized"]}
    (folder / "rank.yaml").write_text(yaml.safe_dump(config | {"shares": [], "seeds": [0]}))
    assert main(["rank", "-c", "rank.yaml", "--out", "ranked"]) == 0
    arms = json.loads((folder / "ranked/results.json").read_text())["students"]["tiny"]["n=16"]
    assert "out/adapted.safetensors randomized" in arms
    # `evaluate` builds a network from its name alone
    with torch.random.fork_rng():
        torch.manual_seed(1)
        save_safetensors(folder / "default.safetensors", ShallowCNN(8).state_dict(), {})
    words = ["--teacher", "shallow_cnn", "--weights", "default.safetensors"]
    LearnableCAM({"stage5": 192}).save(folder / "untouched.safetensors")
    more = ["--data", "shapes", "--size", "32", "--count", "6", "--metrics", "gini", "road"]
    names = ["--explainers", "grad_cam", "untouched.safetensors"]
    assert main(["evaluate", *words, *more, *names, "--out", "judged"]) == 0
    found = json.loads((folder / "judged/results.json").read_text())["explainers"]
    for metric in ("gini", "road"):
        wanted, own = (found[name][metric]["mean"] for name in ("grad_cam", "untouched"))
        assert own == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--adaptation.rounds 0", "rounds 0 and patience 2; give 1 or more"),
        ("--adaptation.lr 0", "give one above 0"),
        ("--adaptation.judges []", "give one or more seeds"),
        ("--adaptation.judges [50,50]", "give each once"),
        ("--adaptation.judges [3001]", "seed 3001 is in adaptation.judges and of a round"),
        ("--adaptation.seed 0", "seed 0 is in both seeds and the adaptation's"),
        ("--adaptation.judges [7]", "seed 7 is in both tuning.seeds and the adaptation's"),
        ("--adaptation.n 30", "adaptation.n is 30; its students need 8 images or more, and the"),
        ("--adaptation.layers [stage9]", "no layer 'stage9'"),
        ("--adaptation.layer [stage2]", "nearest: 'adaptation.layers'"),
        ("--data.init_args.val 2", "give at least 4"),
        ("--methods grad_cm", "no method 'grad_cm'"),
        ("--teacher.weights absent.pt", "no file 'absent.pt'"),
        ("--recipe.optimization.lr 1e30", "is not a number"),
    ],
    ids=lambda value: value[:30],
)
def test_mistakes_are_one_line_and_exit_with_2(
    folder: Path, capsys: pytest.CaptureFixture[str], options: str, says: str
) -> None:
    assert main(["adapt", "-c", "tiny.yaml", "--out", "out", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert says in error


def test_wrong_methods_are_told_before_anything_is_learned(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was learned for nothing")

    monkeypatch.setattr("camdistill.experiments.adaptation.adaptation_run.run_rounds", never)
    for name, says in (("grad_cm", "no method 'grad_cm'"), ("grad_cam@stage9", "no layer")):
        assert main(["adapt", "-c", "tiny.yaml", "--out", "out", "--methods", name]) == 2
        assert says in capsys.readouterr().err


def test_a_file_that_is_no_explainer_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {name: value for name, value in CONFIG.items() if name != "adaptation"}
    (folder / "rank.yaml").write_text(yaml.safe_dump(config | {"methods": ["teacher.safetensors"]}))
    assert main(["rank", "-c", "rank.yaml", "--out", "ranked"]) == 2
    assert "'teacher.safetensors' holds no explainer" in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", "--help"]) == 0
    told = capsys.readouterr().out
    for option in ("--adaptation.layers", "--adaptation.eta", "--students", "--recipe.steps N"):
        assert option in told
