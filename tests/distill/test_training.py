"""What makes a run exact: seeds, averages, finite losses, checkpoints that fit."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from camdistill.data.modules import ShapesData
from camdistill.distill.classifier import Classifier
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.distill.optimization import Optimization
from camdistill.distill.training import as_images, build_with_seed, to_plain_data
from camdistill.distill.transfer import LayerPair, Transfer
from camdistill.errors import UserError
from camdistill.networks.teachers import NetworkSpec

Explainer = Callable[..., DistilledExplainer]
Data = Callable[..., ShapesData]
Trainers = Callable[..., Trainer]
SMALL = NetworkSpec("shallow_cnn", args={"channels": [6, 8], "strides": [2, 2]})


class Dropping(nn.Module):
    """A student that needs torch's random state."""

    def __init__(self, classes: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.drop = nn.Dropout2d(0.3)
        self.linear = nn.Linear(8, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.drop(self.conv(images).relu())
        return self.linear(hidden.mean((2, 3)))


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


@pytest.mark.parametrize("cached", [False, True])
def test_two_runs_of_one_config_agree_bit_for_bit(
    explainer: Explainer, shapes: Data, trainer_of: Trainers, cached: bool
) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(5)  # what the command line does with seed_everything
        module = explainer(cached=cached, ema=0.9, student=SMALL)
        trainer, data = trainer_of(max_epochs=2, precision="bf16-mixed"), shapes()
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
        found.append((module.state_dict(), module.table))
    assert equal(found[0][0], found[1][0])
    for name, column in found[0][1].columns.items():  # type: ignore[union-attr]
        np.testing.assert_array_equal(column, found[1][1].columns[name])  # type: ignore[union-attr]


class Seen(Callback):
    """The order of the ids, and the first images of each epoch as the network got them."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.views: list[Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        self.ids += batch.ids.tolist()
        order = batch.ids.argsort()
        view = pl_module.training_view(batch)[1]
        self.views.append(torch.cat([view.flip[order, None].float(), view.box[order]], 1))


def test_seeds_change_order_views_and_start_but_not_what_is_validated(
    explainer: Explainer, shapes: Data, trainer_of: Trainers
) -> None:
    seen, starts, validated = [], [], []
    for seed in (0, 1):
        module, watch = explainer(seed=seed, student=SMALL), Seen()
        starts.append(copy.deepcopy(module.state_dict()))
        data = shapes(seed=seed, batch_size=64)  # one batch an epoch: sorted ids are all ids
        trainer_of(watch, max_epochs=2).fit(module, data)
        seen.append(watch)
        validated.append(data.val_set)
    assert sorted(seen[0].ids[:64]) == sorted(seen[1].ids[:64]) == sorted(seen[0].ids[64:])
    assert seen[0].ids[:64] != seen[1].ids[:64] != seen[1].ids[64:]
    assert not torch.equal(seen[0].views[0], seen[1].views[0])
    assert not torch.equal(seen[0].views[0], seen[0].views[1])  # each epoch anew
    assert not equal(*starts)
    np.testing.assert_array_equal(validated[0].ids, validated[1].ids)
    everything = np.arange(len(validated[0]))
    np.testing.assert_array_equal(validated[0].pixels[everything], validated[1].pixels[everything])


def test_the_start_of_the_student_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = build_with_seed(7, lambda: nn.Linear(3, 3))
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(99)
    assert equal(first.state_dict(), build_with_seed(7, lambda: nn.Linear(3, 3)).state_dict())


@pytest.mark.parametrize("kind", ["student", "classifier"])
def test_the_running_average_is_what_is_kept_and_tested(
    kind: str, explainer: Explainer, shapes: Data, trainer_of: Trainers, tmp_path: Path
) -> None:
    decay, data = 0.8, shapes()
    module: DistilledExplainer | Classifier
    if kind == "student":
        module = explainer(ema=decay, student=SMALL)
    else:
        module = Classifier(SMALL, ema=decay, optimization=Optimization(lr=0.05))
    expected: dict[str, Tensor] = {}

    class Average(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, *rest: object
        ) -> None:
            for name, value in pl_module.state_dict().items():
                mean = expected.get(name, value)
                mean = (
                    decay * mean + (1 - decay) * value if expected.get(name) is not None else mean
                )
                expected[name] = mean.clone().to(value.dtype)

    class Saver(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    trainer = trainer_of(Average(), Saver(), max_epochs=2)
    trainer.fit(module, data)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == expected.keys() == module.state_dict().keys()
    for name, value in expected.items():
        if "num_batches" not in name:
            torch.testing.assert_close(saved[name], value)
            torch.testing.assert_close(module.state_dict()[name], value)
    trainer.test(module, data, verbose=False)
    tested = module.results()
    again = (
        explainer(ema=decay, student=SMALL) if kind == "student" else Classifier(SMALL, ema=decay)
    )
    trainer_of().test(again, data, ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    assert to_plain_data(again.results()) == to_plain_data(tested)


def test_a_checkpoint_of_an_epoch_goes_on_to_the_same_end(
    explainer: Explainer, shapes: Data, trainer_of: Trainers, tmp_path: Path
) -> None:
    spec = NetworkSpec(f"{__name__}.Dropping")
    transfer = Transfer(pairs=[LayerPair("conv")])

    class Saver(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def fitted(path: str | None) -> dict[str, Tensor]:
        torch.manual_seed(0 if path is None else 1234)
        module = explainer(student=spec, ema=0.9, transfer=transfer)
        trainer_of(Saver(), max_epochs=3).fit(module, shapes(), ckpt_path=path, weights_only=True)
        return module.state_dict()

    whole = fitted(None)
    for epoch in (1, 0):  # the later first, as going on writes the later ones anew
        assert equal(fitted(str(tmp_path / f"{epoch}.ckpt")), whole)


class Poison(Callback):
    """Makes a weight NaN before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == self.step:
            with torch.no_grad():
                next(iter(pl_module.fitted.network.parameters())).fill_(math.nan)


@pytest.mark.parametrize("step", [0, 5, 7])
def test_a_loss_that_is_not_a_number_stops_and_leaves_the_last_checkpoint(
    explainer: Explainer, shapes: Data, trainer_of: Trainers, step: int, tmp_path: Path
) -> None:
    last, kept = tmp_path / "last.ckpt", b""

    class Saver(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            nonlocal kept
            pl_module.stop_if_bad()
            trainer.save_checkpoint(last)
            kept = last.read_bytes()

    module = explainer(student=SMALL)
    with pytest.raises(UserError, match=r"not a number by step .* try a third of it"):
        trainer_of(Saver(), Poison(step), max_epochs=3).fit(module, shapes())
    assert last.exists() == (step >= 4)
    if last.exists():
        assert last.read_bytes() == kept
        saved = torch.load(last, weights_only=True)
        assert saved["global_step"] == 4
        assert all(bool(torch.isfinite(value).all()) for value in saved["state_dict"].values())


def test_nothing_is_evaluated_with_weights_that_are_not_numbers(
    explainer: Explainer, shapes: Data, trainer_of: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = explainer(student=SMALL)
    monkeypatch.setattr(module, "validation_step", lambda *_: pytest.fail("validated"))
    with pytest.raises(UserError, match="not a number"):
        trainer_of(Poison(1)).fit(module, shapes())


def test_a_training_without_an_end_is_told(
    explainer: Explainer, shapes: Data, trainer_of: Trainers
) -> None:
    with pytest.raises(UserError, match=r"give --trainer\.max_epochs"):
        trainer_of(max_epochs=-1).fit(explainer(), shapes())


def saved(module: LightningModule, data: ShapesData, trainer: Trainer, path: Path) -> str:
    trainer.fit(module, data)
    trainer.save_checkpoint(path)
    return str(path)


def test_checkpoints_of_something_else_are_refused(
    explainer: Explainer, shapes: Data, trainer_of: Trainers, tmp_path: Path
) -> None:
    path = saved(explainer(student=SMALL), shapes(), trainer_of(), tmp_path / "a.ckpt")
    other = explainer()
    start = copy.deepcopy(other.state_dict())
    with pytest.raises(UserError, match="of another network"):
        trainer_of(max_epochs=2).fit(other, shapes(), ckpt_path=path, weights_only=True)
    assert equal(other.state_dict(), start)
    with pytest.raises(UserError, match="of another network"):
        trainer_of().test(Classifier(SMALL), shapes(), ckpt_path=path, weights_only=True)
    faster = explainer(student=SMALL, optimization=Optimization(lr=0.1))
    with pytest.raises(UserError, match="trained with optimization"):
        trainer_of(max_epochs=2).fit(faster, shapes(), ckpt_path=path, weights_only=True)
    trainer_of().test(faster, shapes(), ckpt_path=path, weights_only=True, verbose=False)


def test_going_on_with_another_teacher_is_refused(
    explainer: Explainer, shapes: Data, trainer_of: Trainers, tmp_path: Path
) -> None:
    path = saved(explainer(student=SMALL), shapes(), trainer_of(), tmp_path / "a.ckpt")
    module = explainer(student=SMALL)
    module.teacher.sha256 = "f" * 64
    with pytest.raises(UserError, match="bring that one back"):
        trainer_of(max_epochs=2).fit(module, shapes(), ckpt_path=path, weights_only=True)


def test_a_checkpoint_says_its_experiment_in_plain_json(
    explainer: Explainer, shapes: Data, trainer_of: Trainers, tmp_path: Path
) -> None:
    module = explainer(student=SMALL, transfer=Transfer(distance="cosine"))
    path = saved(module, shapes(), trainer_of(), tmp_path / "a.ckpt")
    told = json.loads(torch.load(path, weights_only=True)["camdistill"])
    assert told["student"] == to_plain_data(SMALL)
    assert told["transfer"]["distance"] == "cosine"
    assert told["pairs"] == [["stage2", "layer3", 1.0]]
    assert told["classes"] == 8
    assert told["size"] == [32, 32]
    np.testing.assert_array_equal(
        np.float32(told["mean_map_by_layer"]["layer3"]), module.mean_map_by_layer["layer3"]
    )


def test_pixels_become_images_between_0_and_1_and_floats_stay() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(as_images(pixels).flatten(), torch.tensor([0.0, 0.2, 1.0]))
    assert torch.equal(pixels.flatten(), torch.tensor([0, 51, 255], dtype=torch.uint8))
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(as_images(images), images)
    assert as_images(images).is_contiguous(memory_format=torch.channels_last)
