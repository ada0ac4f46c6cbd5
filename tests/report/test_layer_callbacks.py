from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor
from torch.utils.data import DataLoader

from camdistill import tags
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Preprocessed, Teacher
from camdistill.report.layer_callbacks import LayerMonitor
from camdistill.report.tensorboard import TensorBoardLogger, read_scalars
from camdistill.types import Batch

TRAIN, VAL = 4, 5


def _loader(count: int) -> DataLoader:
    generator = torch.Generator().manual_seed(count)
    batches = [
        Batch(
            torch.randint(0, 256, (6, 3, 16, 16), generator=generator, dtype=torch.uint8),
            torch.arange(6) % 3,
            torch.arange(6) + 6 * number,
            torch.ones(6, dtype=torch.bool),
        )
        for number in range(count)
    ]
    return DataLoader(batches, batch_size=None)


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = Preprocessed(ShallowCNN(3, (4, 6), (1, 2)))

    @property
    def fitted(self) -> Preprocessed:
        return self.network

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self.network(batch.pixels / 255), batch.labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log(tags.ACCURACY_VAL, 0.5, batch_size=6)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Taught(Tiny):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.teacher = Teacher.from_network(ShallowCNN(3, (8, 4), (1, 2)))


def _fit(
    folder: Path, callbacks: list, epochs: int = 3, logger=None, module=Tiny, **options
) -> Tiny:
    tiny = module()
    checkpoint = options.pop("checkpoint", None)
    save = options.pop("save", None)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=TensorBoardLogger(folder, version="run") if logger is None else logger,
        callbacks=callbacks,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "num_sanity_val_steps": 2, **options},
    )
    trainer.fit(tiny, _loader(TRAIN), _loader(VAL), ckpt_path=checkpoint, weights_only=True)
    if save is not None:
        trainer.save_checkpoint(save)
    return tiny


def _events(folder: Path, run: str = "run") -> EventAccumulator:
    found = EventAccumulator(str(folder / run), size_guidance={"tensors": 0})
    found.Reload()
    return found


def test_histograms_and_numbers_stand_at_the_step_of_the_scalars(tmp_path: Path) -> None:
    _fit(tmp_path, [LayerMonitor(images=12)])
    read = read_scalars(tmp_path / "run")
    steps = [step for step, _ in read[tags.ACCURACY_VAL]]
    assert steps == [3, 7, 11], "none of the sanity check"
    for statistic in tags.OF_LAYERS:
        for layer in ("00.stage1", "01.stage2"):
            assert [step for step, _ in read[tags.of_layer(statistic, layer)]] == steps
    events = _events(tmp_path)
    for tag in (
        *(tags.log10("00.stage1"), tags.log10("01.stage2"), tags.FORMING),
        *(tags.weights("00.stage1.conv"), tags.weights("02.linear"), tags.norms("01.stage2.conv")),
    ):
        assert [event.step for event in events.Tensors(tag)] == steps


def test_histogram_is_of_the_same_images_and_of_the_weights_of_that_epoch(tmp_path: Path) -> None:
    tiny = _fit(tmp_path, [LayerMonitor(images=10)])
    shares = [batch.pixels[:2] for batch in _loader(VAL)]
    images = torch.cat(shares)[:10] / 255
    network = tiny.fitted.eval()
    with torch.no_grad():
        stage = network.network.stage1(network.normalize(images)).numpy()
    event = _events(tmp_path).Tensors(tags.log10("00.stage1"))[-1]
    left, _, counts = make_ndarray(event.tensor_proto).T
    positive = stage[stage > 0]
    assert counts.sum() == len(positive)
    assert 10 ** left[0] <= positive.min() * (1 + 1e-6)
    read = read_scalars(tmp_path / "run")[tags.of_layer("active", "00.stage1")]
    assert read[-1][1] == pytest.approx((stage > 0).mean(), rel=1e-6)
    weights = make_ndarray(
        _events(tmp_path).Tensors(tags.weights("00.stage1.conv"))[-1].tensor_proto
    )
    own = network.network.stage1.conv.weight.detach().numpy()
    assert weights[:, 2].sum() == pytest.approx(own.size)
    assert weights[-1, 1] <= np.abs(own).max() * (1 + 1e-6)


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    plain = _fit(tmp_path / "a", []).state_dict()
    watched = _fit(tmp_path / "b", [LayerMonitor(images=12)]).state_dict()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_dead_layer_while_training_keeps_its_steps(tmp_path: Path) -> None:
    class Dead(LayerMonitor):
        def on_validation_epoch_end(self, trainer, pl_module) -> None:
            pl_module.network.network.stage1.bn.bias.data.fill_(-1e3)
            super().on_validation_epoch_end(trainer, pl_module)

    _fit(tmp_path, [Dead(images=12)], epochs=1)
    (event,) = _events(tmp_path).Tensors(tags.log10("00.stage1"))
    assert np.isfinite(make_ndarray(event.tensor_proto)).all()
    assert read_scalars(tmp_path / "run")[tags.of_layer("dead", "00.stage1")] == [(3, 1.0)]


def test_resumed_run_keeps_the_epochs_before_in_its_picture(tmp_path: Path) -> None:

    class Killed(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    _fit(tmp_path, [first := LayerMonitor(images=6), Killed()], 3, save=tmp_path / "last.ckpt")
    resumed = LayerMonitor(images=6)
    _fit(tmp_path, [resumed], 3, checkpoint=tmp_path / "last.ckpt")
    assert [past["label"] for past in first._history] == ["epoch 1", "epoch 2"]
    assert [past["label"] for past in resumed._history] == ["epoch 1", "epoch 2", "epoch 3"]


def test_at_most_so_many_pictures(tmp_path: Path) -> None:
    _fit(tmp_path, [LayerMonitor(images=6, pictures=2)], epochs=5)
    assert len(_events(tmp_path).Tensors(tags.FORMING)) == 2


def test_teacher_stands_beside_its_student_on_the_same_images(tmp_path: Path) -> None:
    taught = _fit(tmp_path, [LayerMonitor(images=10)], module=Taught)
    images = torch.cat([batch.pixels[:2] for batch in _loader(VAL)])[:10] / 255
    teacher = taught.teacher
    with torch.no_grad():
        stage = teacher.network.stage1(teacher.normalize(images)).numpy()
    events = _events(tmp_path, "run/teacher")
    (once,) = events.Tensors(tags.log10("00.stage1"))
    assert once.step == 3
    assert make_ndarray(once.tensor_proto)[:, 2].sum() == (stage > 0).sum()
    (weights,) = events.Tensors(tags.weights("00.stage1.conv"))
    assert make_ndarray(weights.tensor_proto)[:, 2].sum() == pytest.approx(8 * 3 * 9)
    assert len(events.Tensors(tags.norms("01.stage2.conv"))) == 1
    level = read_scalars(tmp_path / "run" / "teacher")[tags.of_layer("active", "00.stage1")]
    assert level == [(step, pytest.approx((stage > 0).mean(), rel=1e-6)) for step in (3, 7, 11)]
    own = read_scalars(tmp_path / "run")[tags.of_layer("active", "00.stage1")]
    assert own[-1][1] != level[-1][1], "the student's own"
    assert not (tmp_path / "run" / "teacher" / "hparams.yaml").exists()


def test_resumed_run_looks_at_the_teacher_no_second_time(tmp_path: Path, monkeypatch) -> None:
    def killed(trainer, pl_module) -> None:
        trainer.should_stop = True

    stop = Callback()
    stop.on_train_epoch_end = killed
    _fit(tmp_path, [LayerMonitor(images=6), stop], 3, save=tmp_path / "last.ckpt", module=Taught)
    looked = []
    sweep = LayerMonitor._sweep
    monkeypatch.setattr(
        LayerMonitor,
        "_sweep",
        lambda self, name, network: looked.append(name) or sweep(self, name, network),
    )
    resumed = LayerMonitor(images=6)
    _fit(tmp_path, [resumed], 3, checkpoint=tmp_path / "last.ckpt", module=Taught)
    assert looked == ["student", "student"]
    level = read_scalars(tmp_path / "run" / "teacher")[tags.of_layer("active", "00.stage1")]
    assert [step for step, _ in level] == [3, 7, 11]
    assert len({value for _, value in level}) == 1


def test_other_loggers_and_modules_are_left_alone(tmp_path: Path) -> None:
    _fit(tmp_path, [watching := LayerMonitor(images=6)], 1, logger=CSVLogger(tmp_path))
    assert not watching._history


def test_a_config_switches_it_on(trained: Path, tmp_path: Path, monkeypatch) -> None:
    from camdistill.cli import main

    monkeypatch.chdir(trained)
    run = tmp_path / "run"
    callbacks = (
        "[{class_path: camdistill.report.layer_callbacks.LayerMonitor, init_args: {images: 8}}]"
    )
    given = ["fit", "-c", "tiny.yaml", "--run", f"{run}/x", "--trainer.callbacks", callbacks]
    assert main(given) == 0
    (folder,) = run.rglob("version_0")
    assert tags.of_layer("active", "00.stage1") in read_scalars(folder)
