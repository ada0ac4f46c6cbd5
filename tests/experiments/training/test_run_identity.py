"""What makes two configs two runs: every option that changes numbers, and no other."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from camdistill.cli import main
from camdistill.distill.transfer import Transfer
from camdistill.experiments.training.checkpoint_io import LAST
from camdistill.experiments.training.run_identity import FREE_OPTIONS, config_differences

Config = dict[str, object]


def trained_with(**trainer: object) -> Config:
    return {"seed_everything": 0, "trainer": trainer}


@pytest.mark.parametrize(
    ("name", "there", "here"),
    [
        ("precision", "bf16-mixed", "32-true"),
        ("precision", "bf16-mixed", None),
        ("accumulate_grad_batches", 1, 2),
        ("gradient_clip_val", None, 1.0),
        ("gradient_clip_val", 0.5, 1),
        ("limit_train_batches", None, 0.5),
        ("limit_train_batches", 1.0, 1),  # all batches, and one of them
        ("overfit_batches", 0.0, 2),
        ("overfit_batches", 1, 1.0),
        ("sync_batchnorm", False, True),
        ("reload_dataloaders_every_n_epochs", 0, 1),
    ],
)
def test_a_trainer_option_that_changes_numbers_makes_another_run(
    name: str, there: object, here: object
) -> None:
    for one, other in ((there, here), (here, there)):
        found = config_differences(
            trained_with(**{name: one}), trained_with(**{name: other}), FREE_OPTIONS
        )
        assert list(found) == [f"trainer.{name}"]


def test_how_gradients_are_clipped_matters_where_they_are() -> None:
    by_norm, by_value = ({"gradient_clip_algorithm": kind} for kind in ("norm", "value"))
    assert config_differences(trained_with(**by_norm), trained_with(**by_value), FREE_OPTIONS) == {}
    clipped = {"gradient_clip_val": 1.0}
    found = config_differences(
        trained_with(**by_norm, **clipped), trained_with(**by_value, **clipped), FREE_OPTIONS
    )
    assert found == {"trainer.gradient_clip_algorithm": ("norm", "value")}


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({}, {"precision": "32-true"}),
        ({"precision": None}, {"precision": 32}),
        ({"precision": "bf16"}, {"precision": "bf16-mixed"}),
        ({}, {"accumulate_grad_batches": 1, "sync_batchnorm": False}),
        ({"gradient_clip_val": None}, {"gradient_clip_val": 0}),
        ({"gradient_clip_val": 1}, {"gradient_clip_val": 1.0}),
        ({"limit_train_batches": None}, {"limit_train_batches": 1.0}),
        ({}, {"overfit_batches": 0, "reload_dataloaders_every_n_epochs": 0}),
        ({"max_epochs": 1, "max_steps": -1}, {"max_epochs": 2, "max_steps": 9}),
        ({"devices": 1, "strategy": "auto"}, {"devices": 2, "strategy": "ddp"}),
        ({"logger": None, "callbacks": None}, {"logger": False, "callbacks": []}),
    ],
)
def test_defaults_and_what_may_change_make_no_other_run(there: Config, here: Config) -> None:
    assert config_differences(trained_with(**there), trained_with(**here), FREE_OPTIONS) == {}
    assert config_differences(trained_with(**here), trained_with(**there), FREE_OPTIONS) == {}


def distilled(transfer: Config, **student: object) -> Config:
    options = {"transfer": transfer, "student": {"name": "shallow_cnn", "args": student}}
    path = "camdistill.distill.distilled_explainer.DistilledExplainer"
    return {"model": {"class_path": path, "init_args": options}}


def test_a_new_option_within_an_option_makes_no_older_run_another() -> None:
    now = asdict(Transfer())
    older = {name: value for name, value in now.items() if name != "pool"}
    older["pairs"] = [{"student": None, "teacher": None}]  # before pairs had weights
    assert config_differences(distilled(older), distilled(now), FREE_OPTIONS) == {}
    assert config_differences(distilled(now), distilled(older), FREE_OPTIONS) == {}
    changed = older | {"classes": 3, "pairs": [{"student": "stage1", "teacher": None}]}
    assert config_differences(distilled(changed), distilled(now), FREE_OPTIONS) == {
        "model.transfer.classes": (3, 1),
        "model.transfer.pairs[0].student": ("stage1", None),
    }


def test_an_argument_that_only_one_network_has_makes_another_run() -> None:
    there, here = distilled({}, channels=[6, 8]), distilled({}, channels=[6, 8], strides=[2, 2])
    found = config_differences(there, here, FREE_OPTIONS)
    assert found == {"model.student.args.strides": (None, [2, 2])}


def test_resuming_refuses_other_numerics_and_testing_does_not(
    config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAMDISTILL_RUN_FOLDER", raising=False)
    path, run = str(config(cached=False)), Path("runs/tiny/version_0")
    assert main(["fit", "-c", path]) == 0
    before = (run / LAST).read_bytes()
    more = ["-c", path, "--trainer.max_epochs", "2", "--ckpt_path"]
    clip = ["--trainer.gradient_clip_val", "0.1"]
    for wanted in ("last", str(run / LAST)):
        capsys.readouterr()
        assert main(["fit", *more, wanted, *clip]) == 2
        assert "has trainer.gradient_clip_val 0.0 (here 0.1)" in capsys.readouterr().err
    assert (run / LAST).read_bytes() == before
    precise = ["--trainer.precision", "bf16-mixed"]
    assert main(["test", "-c", path, "--ckpt_path", "last", *precise]) == 0
    assert [folder.name for folder in run.parent.iterdir()] == ["version_0"]
    assert main(["fit", *more, "last", "--trainer.accumulate_grad_batches", "1"]) == 0
    assert torch.load(run / LAST, weights_only=True)["epoch"] == 1
