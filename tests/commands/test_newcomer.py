"""What somebody sees who starts for the first time, and what a wrong guess is answered with."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from camdistill import tags
from camdistill.cli import main
from camdistill.commands.loops import _arrays_by_name
from camdistill.distill.comparison import Comparison
from camdistill.report.tensorboard import read_scalars

RUN = Path("runs/tiny/version_1")
CLASSIFIER = "camdistill.distill.classifier.Classifier"


def line(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistaken command gives."""
    capsys.readouterr()
    assert main(command.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def classifier(folder: Path) -> None:
    """A config of a classifier of the same images."""
    config = yaml.safe_load((folder / "tiny.yaml").read_text())
    network = config["model"]["init_args"]["student"]
    config["model"] = {"class_path": CLASSIFIER, "init_args": {"network": network}}
    (folder / "classifier.yaml").write_text(yaml.safe_dump(config))


def test_fit_says_what_it_trains_and_ends_with_numbers_and_a_command(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", "tiny.yaml", "--trainer.max_epochs", "2"]) == 0
    said = capsys.readouterr().out
    assert f"Run: {RUN}\n" in said
    assert "36 images to train, 36 images to validate, 6 classes, 2 epochs, on cpu" in said
    assert f"camdistill report --run {RUN}" in said
    row = next(one for one in said.splitlines() if one.startswith("last validation"))
    curve = read_scalars(RUN)
    measures = (tags.ACCURACY_STUDENT, tags.AGREEMENT, tags.PEARSON, tags.SKILL)
    assert row.split()[2:] == [f"{curve[tag][-1][1]:.3f}" for tag in measures]


def test_every_epoch_has_its_line_in_a_file_also_after_resuming(folder: Path) -> None:
    options = ["fit", "-c", "tiny.yaml", "--trainer.check_val_every_n_epoch", "2"]
    assert main([*options, "--trainer.max_epochs", "2"]) == 0
    assert main([*options, "--trainer.max_epochs", "3", "--ckpt_path", "last"]) == 0
    lines = (RUN / "training.log").read_text().splitlines()
    epochs = [found[1] for one in lines if (found := re.search(r"epoch (\d/\d) ", one))]
    assert epochs == ["1/2", "2/2", "3/3"]
    assert "36 images to train" in lines[0]
    assert "goes on after epoch 2" in lines[3]


@pytest.mark.parametrize(
    ("options", "validated"),
    [
        ("--trainer.max_epochs 4 --trainer.check_val_every_n_epoch 5", [23]),
        ("--trainer.max_epochs 4 --trainer.check_val_every_n_epoch 3", [17, 23]),
        ("--trainer.max_steps 8 --trainer.check_val_every_n_epoch 5", [7]),
        ("--trainer.max_epochs 2 --trainer.check_val_every_n_epoch 1", [5, 11]),
    ],
)
def test_the_end_of_a_training_is_always_validated(
    options: str, validated: list[int], folder: Path
) -> None:
    whole = "--trainer.max_epochs null" if "max_epochs" not in options else ""
    assert main(["fit", "-c", "tiny.yaml", *whole.split(), *options.split()]) == 0
    assert [step for step, _ in read_scalars(RUN)[tags.AGREEMENT]] == validated


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("fit -c tiny.yaml --root images", r"no option 'root' here; give --data\.root"),
        ("fit -c tiny.yaml --lr 1", r"give --model\.optimization\.lr"),
        ("fit -c tiny.yaml --epochs 3", r"give --trainer\.max_epochs"),
        ("fit -c tiny.yaml --model.padding 3", r"give --model\.augment\.padding"),
        ("report --logdir runs", r"no option 'logdir' here; give --run"),
        ("report runs", r"a run stands after --run: --run runs"),
        ("fit tiny.yaml", r"a config stands after -c: -c tiny\.yaml"),
        ("study study.yaml", r"a config stands after -c: -c study\.yaml"),
        ("study -c tiny.yaml", r"tiny\.yaml is a config of `camdistill fit`"),
        ("fit -c study.yaml", r"study\.yaml is a config of `camdistill study`"),
        ("study --base study.yaml --arms {}", r"study has no arms|give it after -c"),
        ("evaluate --root images", r"no option 'root' here; give --data$"),
        ("explain --data.root images", r"data has no option 'root' of its own; give --data images"),
    ],
)
def test_a_wrong_guess_is_answered_with_what_to_type(
    command: str, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = {"base": "tiny.yaml", "arms": {"a": {}}, "seeds": [0]}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    assert re.search(says, line(command, capsys))


def test_a_study_of_a_study_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "study.yaml").write_text("base: tiny.yaml\narms: {a: {}}\n")
    said = line('study --base study.yaml --arms {"a":{}}', capsys)
    assert "study.yaml is a config of a study" in said


def predicted(command: str, run: str) -> dict[str, np.ndarray]:
    assert main(command.split()) == 0
    with np.load(Path(run, "predictions.npz"), allow_pickle=False) as file:
        return dict(file)


def test_predictions_are_those_of_the_test(folder: Path) -> None:
    run = "runs/tiny/version_0"
    found = predicted("predict -c tiny.yaml --ckpt_path last", run)
    labels = np.array([int(Path(name).parent.name[1:]) for name in found["names"]])
    assert main(["test", "-c", "tiny.yaml", "--ckpt_path", "last"]) == 0
    student = json.loads(Path(run, "results.json").read_text())["student"]
    answers, teachers = found["student_logits"].argmax(1), found["teacher_logits"].argmax(1)
    assert (answers == labels).mean() == pytest.approx(student["accuracy"])
    assert (answers == teachers).mean() == pytest.approx(student["agreement"])
    maps = [np.maximum(found[f"{who}_maps_by_layer/stage2"], 0) for who in ("student", "teacher")]
    own, its = (one.reshape(36, -1).astype(np.float64) for one in maps)
    pearson = [np.corrcoef(a, b)[0, 1] if a.std() and b.std() else 0 for a, b in zip(own, its)]  # noqa: B905
    assert np.mean(pearson) == pytest.approx(student["pearson"], abs=1e-5)
    assert {found[name].dtype for name in found if "logits" in name} == {np.dtype("float32")}


@pytest.mark.parametrize(
    "options",
    [
        "--model.cached true",
        "--model.beta 0",
        "--data.labeled false --model.ce 0",
        "--return_predictions false",
        "--trainer.limit_predict_batches 2",
        "--trainer.precision 64-true",
    ],
)
def test_predict_works_in_every_setting(options: str, folder: Path) -> None:
    shutil.rmtree("runs")
    given = [word for word in options.split() if "predict" not in word]
    fit = options if len(given) == len(options.split()) and "return" not in options else ""
    assert main(["fit", "-c", "tiny.yaml", *fit.split()]) == 0
    command = f"predict -c tiny.yaml --ckpt_path last {options}"
    found = predicted(command, "runs/tiny/version_0")
    count = 12 if "limit" in options else 36
    assert found["student_logits"].shape == (count, 6)
    assert len(found["names"]) == count


def test_a_classifier_predicts_logits_alone(folder: Path) -> None:
    classifier(folder)
    assert main(["fit", "-c", "classifier.yaml"]) == 0
    command = "predict -c classifier.yaml --ckpt_path last"
    found = predicted(command, "runs/classifier/version_0")
    assert set(found) == {"logits", "names"}
    assert found["logits"].shape == (36, 6)


def test_predicted_values_of_any_form_have_a_name() -> None:
    two = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    whole = Comparison(two[:, None], two[:, None], torch.tensor([0, 1]), {}, {"a": two[:, None]})  # type: ignore[arg-type]
    assert set(_arrays_by_name(whole)) == {
        "teacher_logits",
        "student_logits",
        "classes",
        "student_maps_by_layer/a",
    }
    assert _arrays_by_name(whole)["classes"].dtype == np.int64
    nested = _arrays_by_name({"a": (two, [None, {"b": torch.tensor(3)}]), "c": 1.5})
    assert {name: value.tolist() for name, value in nested.items()} == {
        "a/0": [1.0, 2.0],
        "a/1/1/b": [3],
        "c": [1.5],
    }
    assert _arrays_by_name(None) == {}
    assert _arrays_by_name(two)["logits"].dtype == np.float32


def test_a_missing_test_folder_is_told_with_the_folder_in_its_place(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move("images/test", "elsewhere")
    said = line("explain --teacher shallow_cnn --images images/test", capsys)
    assert "no file or folder 'images/test'; in 'images' there are: 'train', 'val'" in said
    fits = ["fit", "-c", "tiny.yaml", "--data.val_fraction", "12"]
    assert main(fits) == 0
    assert "24 images to train, 12 images to validate" in capsys.readouterr().out


def kept_files(run: Path) -> dict[str, bytes]:
    """What a test and a prediction left."""
    return {one: (run / one).read_bytes() for one in FILES if (run / one).is_file()}


FILES = ("results.json", "test_images.npz", "predictions.npz", "student.safetensors")


def test_a_part_of_a_test_or_a_prediction_never_replaces_the_whole_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("runs/tiny/version_0")
    last = "-c tiny.yaml --ckpt_path last"
    for command in ("test", "predict"):
        assert main([command, *last.split()]) == 0
    whole = kept_files(run)
    assert set(whole) == set(FILES)
    for option in ("fast_dev_run 1", "limit_test_batches 1", "limit_predict_batches 0.5"):
        for command in ("test", "predict"):
            if option[6:8] in ("te", "pr") and not option.startswith(f"limit_{command}"):
                continue
            capsys.readouterr()
            assert main(f"{command} {last} --trainer.{option}".split()) == 0
            assert "not written" in capsys.readouterr().out
            assert kept_files(run) == whole
    assert main(f"test {last} --trainer.limit_test_batches 6".split()) == 0  # all of them
    assert "not written" not in capsys.readouterr().out


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_a_loop_of_no_batches_is_refused(
    loop: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"--trainer.limit_{loop.removesuffix('idate')}_batches"
    said = line(f"{loop} -c tiny.yaml --ckpt_path last {name} 0", capsys)
    assert f"{name} is 0, so there is nothing to {loop}; give 1 or more" in said


def test_a_trial_run_leaves_nothing_and_says_that_it_was_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.is_file() and path.read_bytes() for path in Path("runs").rglob("*")}
    trial = "--trainer.fast_dev_run 2 --trainer.max_epochs 5"
    assert main(f"fit -c tiny.yaml {trial}".split()) == 0
    said = capsys.readouterr().out
    assert "trial run (fast_dev_run) of 2 batches; nothing of it is kept" in said
    assert "Trained" not in said
    after = {path: path.is_file() and path.read_bytes() for path in Path("runs").rglob("*")}
    assert {path.name for path in after if path not in before} == set()
    assert all(after[path] == kept for path, kept in before.items())


def test_going_on_without_checkpoints_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "--trainer.max_epochs 9 --trainer.enable_checkpointing false"
    said = line(f"fit -c tiny.yaml --ckpt_path last {more}", capsys)
    assert "would leave a last.ckpt that is older than the student" in said
    said = line("fit -c tiny.yaml --ckpt_path last --trainer.fast_dev_run true", capsys)
    assert "a trial that starts afresh and keeps nothing" in said


@pytest.mark.parametrize("where", ["arms", "base", "overrides"])
@pytest.mark.parametrize(
    "option", [("fast_dev_run", True), ("max_epochs", 0), ("limit_test_batches", 0)]
)
def test_a_study_of_runs_that_train_or_test_nothing_is_refused_before_anything_is_written(
    option: tuple[str, object], where: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, value = option
    base = yaml.safe_load((folder / "tiny.yaml").read_text())
    if where == "base":
        base["trainer"][name] = value
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    last_arm = {f"trainer.{name}": value} if where == "arms" else {"model.beta": 0}
    study = {"base": "base.yaml", "arms": {"a": {}, "b": last_arm}, "seeds": [0], "out": "s"}
    if where == "overrides":
        study["overrides"] = [f"--trainer.{name}={value}"]
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    said = line("study -c study.yaml", capsys)
    assert f"trainer.{name}" in said
    assert not list(Path().glob("s/**/*.safetensors"))
