"""How a teacher is trained: its loss, its accuracy, its head."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from scipy.stats import norm

from camdistill import tags
from camdistill.data.modules import ShapesData
from camdistill.data.views import Augment, draw_view, view_images
from camdistill.distill.checkpoints import load, write_checkpoint
from camdistill.distill.classifier import Classifier
from camdistill.distill.optimization import Optimization
from camdistill.errors import UserError
from camdistill.networks.teachers import NetworkSpec
from camdistill.report.tensorboard import TensorBoardLogger, read_scalars

Data = Callable[..., ShapesData]
Trainers = Callable[..., Trainer]
SMALL = NetworkSpec("shallow_cnn", args={"channels": [6, 8, 12], "strides": [1, 2, 2]})


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_of_a_step_is_cross_entropy_with_smoothed_labels(
    shapes: Data, trainer_of: Trainers, recorder, smoothing: float
) -> None:
    module = Classifier(
        SMALL, label_smoothing=smoothing, augment=Augment("pad", padding=2, flip=True), seed=4
    )
    trainer_of(recorder, limit_train_batches=2, limit_val_batches=0).fit(module, shapes())
    for before, batch, loss in zip(
        recorder.befores, recorder.batches, recorder.losses, strict=True
    ):
        view = draw_view(module.augment, batch.ids, (32, 32), seed=4, epoch=0)
        images = view_images(batch.pixels, view).float() / 255
        with torch.no_grad():
            logits = before.network.train()(images).double().numpy()
        shifted = logits - logits.max(1, keepdims=True)
        likely = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        target = np.full((16, 8), smoothing / 8)
        target[np.arange(16), batch.labels] += 1 - smoothing
        assert loss == pytest.approx(-(target * likely).sum(1).mean(), rel=1e-5)


def test_it_learns_and_its_numbers_are_those_of_the_network(
    shapes: Data, trainer_of: Trainers, tmp_path: Path
) -> None:
    data = shapes(train=256, batch_size=32, test=37)
    module = Classifier(SMALL, optimization=Optimization(lr=0.2))
    logger = TensorBoardLogger(tmp_path, version="run")
    trainer = trainer_of(logger=logger, max_epochs=3, log_every_n_steps=1)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    results = module.results()
    assert results["n"] == 37
    module.eval()

    def truth(images) -> tuple[float, float]:  # type: ignore[no-untyped-def]
        batch = images.batch(np.arange(len(images)))
        with torch.no_grad():
            logits = module.network(batch.pixels.float() / 255)
        loss = torch.nn.functional.cross_entropy(logits, batch.labels)
        return float((logits.argmax(1) == batch.labels).float().mean()), float(loss)

    accuracy, _ = truth(data.test_set)
    assert results["network"] == {"accuracy": pytest.approx(accuracy)}
    found = read_scalars(tmp_path / "run")
    accuracy, loss = truth(data.val_set)
    assert found[tags.ACCURACY_VAL][-1] == (23, pytest.approx(accuracy))
    assert found[tags.LOSS_VAL][-1] == (23, pytest.approx(loss, rel=1e-5))
    assert len(found[tags.LEARNING_RATE]) == len(found[tags.ACCURACY_TRAIN]) == 24
    losses = [value for _, value in found[tags.LOSS_TRAIN]]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


def test_interval_is_wilsons(shapes: Data, trainer_of: Trainers) -> None:
    module, data = Classifier(SMALL), shapes()
    trainer_of().test(module, data, verbose=False)
    n, p = 20, module.results()["network"]["accuracy"]  # type: ignore[index]
    z = norm.ppf(0.975)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    interval = module.results()["intervals"]["network.accuracy"]  # type: ignore[index]
    assert interval.low == pytest.approx(max(middle - half, 0), abs=1e-6)
    assert interval.high == pytest.approx(min(middle + half, 1), abs=1e-6)


def test_weights_for_other_classes_get_a_new_head(
    shapes: Data, trainer_of: Trainers, tmp_path: Path
) -> None:
    data = shapes()
    first = Classifier(SMALL)
    trainer_of().fit(first, data)
    write_checkpoint(first, tmp_path / "first.safetensors")
    spec = NetworkSpec("shallow_cnn", str(tmp_path / "first.safetensors"), SMALL.args)
    second = Classifier(spec, optimization=Optimization(lr=1e-9))
    trainer_of(limit_train_batches=1).fit(second, shapes(classes=6))
    assert second.network.network.linear.out_features == 6  # type: ignore[union-attr]
    kept, new = first.network.network.state_dict(), second.network.network.state_dict()
    torch.testing.assert_close(new["stage1.conv.weight"], kept["stage1.conv.weight"])
    same = Classifier(spec)
    trainer_of().test(same, data, verbose=False)
    assert torch.equal(same.network.network.state_dict()["linear.bias"], kept["linear.bias"])


def test_what_is_saved_is_what_loads(shapes: Data, trainer_of: Trainers, tmp_path: Path) -> None:
    module, data = Classifier(SMALL), shapes()
    trainer_of().fit(module, data)
    write_checkpoint(module, tmp_path / "a.safetensors")
    found = load(tmp_path / "a.safetensors")
    images = data.val_set.batch(np.arange(8)).pixels.float() / 255  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(found(images), module.eval().network(images))
    assert found.classes == data.classes
    assert found.teacher is None


def test_checkpoint_tells_its_images_size_and_one_that_does_not_still_works(
    shapes: Data, trainer_of: Trainers, tmp_path: Path
) -> None:
    """A network trained at 64 pixels was explained at 224."""
    data, whole = shapes(size=64), tmp_path / "whole.ckpt"
    module = Classifier(SMALL)
    trainer = trainer_of(max_epochs=1)
    trainer.fit(module, data)
    trainer.save_checkpoint(whole)
    write_checkpoint(module, tmp_path / "a.safetensors")
    for file in (tmp_path / "a.safetensors", whole):
        assert load(file).settings["size"] == [64, 64]
    older = torch.load(whole, weights_only=True)
    told = json.loads(older["camdistill"])
    del told["size"]
    torch.save({**older, "camdistill": json.dumps(told)}, tmp_path / "older.ckpt")
    assert "size" not in load(tmp_path / "older.ckpt").settings
    again = Classifier(SMALL)
    trainer_of(max_epochs=2).fit(again, data, ckpt_path=tmp_path / "older.ckpt")
    assert again.experiment()["size"] == [64, 64]
    trainer_of().test(again, data, ckpt_path=tmp_path / "older.ckpt", verbose=False)


def test_mistakes_are_told(shapes: Data, trainer_of: Trainers) -> None:
    with pytest.raises(UserError, match="label_smoothing is 1"):
        Classifier(SMALL, label_smoothing=1.0)
    with pytest.raises(UserError, match="nothing was tested"):
        Classifier(SMALL).results()
    data = shapes()
    data.setup("fit")

    data.train_set = dataclasses.replace(data.train_set, classes=())
    with pytest.raises(UserError, match="a folder for each class"):
        trainer_of().fit(Classifier(SMALL), data)
