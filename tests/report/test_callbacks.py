import io
import math
import time
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor
from torch.utils.data import DataLoader

from camdistill import tags
from camdistill.distill.comparison import MapComparison
from camdistill.report import callbacks as module
from camdistill.report.callbacks import (
    MapGrids,
    Progress,
    ResumedEvents,
    RunText,
    Throughput,
)
from camdistill.report.tensorboard import TensorBoardLogger, read_scalars
from camdistill.types import Batch

TRAIN, VAL = 4, 5  # batches an epoch


def batches(count: int, size: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            torch.randint(0, 256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8),
            torch.arange(size) % 3,
            torch.arange(size) + size * number,
            torch.ones(size, dtype=torch.bool),
        )
        for number in range(count)
    ]


def loader(count: int) -> DataLoader:
    return DataLoader(batches(count), batch_size=None)


class Tiny(LightningModule):
    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.linear = torch.nn.Linear(3 * 64, 3)
        self.shown: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.linear(batch.pixels.flatten(1).float() / 255).square().mean()
        self.log(tags.LOSS_TRAIN, loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log(tags.AGREEMENT, 0.75, batch_size=4)
        self.log(tags.PEARSON, 0.5, batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def explain_images(self, batch: Batch) -> MapComparison:
        assert not self.training
        self.shown.append(batch.ids)
        teacher = torch.rand(len(batch.ids), 4, 4, generator=torch.Generator().manual_seed(1))
        return MapComparison(
            batch.pixels / 255,
            batch.labels,
            batch.labels,
            batch.labels,
            {"layer2": teacher, "layer3": teacher},
            {"stage4": 2 * teacher, "stage5": torch.zeros_like(teacher)},
            [("stage4", "layer2"), ("stage5", "layer3")],
            3,
        )


def fit(
    folder: Path,
    callbacks: list[Callback],
    *,
    epochs: int = 3,
    logger: object = None,
    checkpoint: Path | None = None,
    **options: object,
) -> Tiny:
    tiny = Tiny()
    own = TensorBoardLogger(folder, version="run") if logger is None else logger
    progress = any(isinstance(callback, Progress) for callback in callbacks)
    Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=own,
        callbacks=callbacks,
        log_every_n_steps=1,
        enable_progress_bar=progress,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "num_sanity_val_steps": 2, **options},
    ).fit(tiny, loader(TRAIN), loader(VAL), ckpt_path=checkpoint, weights_only=True)
    return tiny


def events(folder: Path, tag: str) -> list[tuple[int, np.ndarray]]:
    found = EventAccumulator(str(folder / "run"), size_guidance={"tensors": 0})
    found.Reload()
    if tag not in found.Tags()["tensors"]:
        return []
    return [(event.step, make_ndarray(event.tensor_proto)) for event in found.Tensors(tag)]


@pytest.fixture
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of when and of what, not of how it looks."""
    monkeypatch.setattr(module, "map_panel", lambda *_, **__: np.zeros((2, 2, 3), np.uint8))


def every_callback() -> list[Callback]:
    return [MapGrids(), RunText(), ResumedEvents(), Throughput(skip=1), Progress()]


@pytest.mark.usefixtures("quick_pictures")
def test_grids_stand_at_the_step_of_the_scalars(tmp_path: Path) -> None:
    fit(tmp_path, [MapGrids()])
    steps = [step for step, _ in read_scalars(tmp_path / "run")[tags.AGREEMENT]]
    assert steps == [3, 7, 11]
    for layer in ("stage4", "stage5"):
        assert [step for step, _ in events(tmp_path, tags.grid(layer))] == steps


@pytest.mark.usefixtures("quick_pictures")
def test_grids_hold_the_same_images_each_time_spread_over_the_data(tmp_path: Path) -> None:
    tiny = fit(tmp_path, [MapGrids(images=5)])
    first, *later = tiny.shown
    assert [int(number) // 4 for number in first] == [0, 1, 2, 3, 4], "one of each batch"
    assert all(torch.equal(first, other) for other in later)


@pytest.mark.usefixtures("quick_pictures")
@pytest.mark.parametrize("images", [1, 3, 20, 33])
def test_any_number_of_images_is_found(tmp_path: Path, images: int) -> None:
    tiny = fit(tmp_path, [MapGrids(images=images)], epochs=1)
    assert len(tiny.shown[0]) == images
    assert len(set(tiny.shown[0].tolist())) == min(images, 4 * VAL)


@pytest.mark.usefixtures("quick_pictures")
@pytest.mark.parametrize(
    ("epochs", "expected"), [(1, 1), (7, 7), (13, 10), pytest.param(40, 10, marks=pytest.mark.slow)]
)
def test_a_run_draws_ten_times_at_most_and_at_its_end(
    tmp_path: Path, epochs: int, expected: int
) -> None:
    tiny = fit(tmp_path, [MapGrids(images=1)], epochs=epochs)
    steps = [step for step, _ in events(tmp_path, tags.grid("stage5"))]
    assert len(steps) == len(tiny.shown) == expected
    assert steps[-1] == TRAIN * epochs - 1
    gaps = np.diff([-1, *steps])
    assert gaps.max() <= math.ceil(epochs / 9) * TRAIN, "evenly"


@pytest.mark.usefixtures("quick_pictures")
def test_several_validations_an_epoch_draw_ten_times_at_most(tmp_path: Path) -> None:
    tiny = fit(tmp_path, [MapGrids(images=1)], epochs=8, val_check_interval=2)
    assert len(tiny.shown) == 10


@pytest.mark.usefixtures("quick_pictures")
def test_endless_run_draws_ever_less_often(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fit(tmp_path, [MapGrids(images=1), StopAfter(9 * TRAIN)], epochs=-1)
    steps = [step for step, _ in events(tmp_path, tags.grid("stage5"))]
    assert steps == [TRAIN * validation - 1 for validation in (1, 2, 4, 8)]


def test_grid_shows_the_student_blank_where_it_is(tmp_path: Path) -> None:
    fit(tmp_path, [MapGrids(images=2)], epochs=1)
    pictures = {}
    for layer in ("stage4", "stage5"):
        ((_, (_, _, content)),) = events(tmp_path, tags.grid(layer))
        pictures[layer] = np.asarray(Image.open(io.BytesIO(content))).astype(int)
    blue = {
        layer: int((picture[..., 2] - picture[..., 0] > 100).sum())
        for layer, picture in pictures.items()
    }
    assert blue["stage5"] > blue["stage4"] + 1000, "where the teacher alone looks"


def test_pages_say_how_to_read_and_what_ran(tmp_path: Path) -> None:
    fit(tmp_path, [RunText()], epochs=1)
    ((step, (page,)),) = events(tmp_path, tags.HOW_TO_READ)
    assert step == 0
    assert tags.how_to_read() in page.decode()
    assert "localhost:6006/?" in page.decode()
    ((_, (config,)),) = events(tmp_path, tags.CONFIG)
    assert config.decode() == "```yaml\nbeta: 1.0\n```"


def test_front_page_holds_the_cards_of_what_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, cards in (("student", tags.STUDENT_CARDS), ("teacher", tags.CLASSIFIER_CARDS)):
        monkeypatch.setattr(Tiny, "cards", cards, raising=False)
        fit(tmp_path / name, [RunText()], epochs=1)
        ((_, (page,)),) = events(tmp_path / name, tags.HOW_TO_READ)
        link = unquote(page.decode().partition("?")[2].partition("#")[0])
        assert all(f'"{card}"' in link for card in cards)
        assert ("loss_val" in link) == (name == "teacher")


def test_captions_name_classes_by_the_datas_names_where_these_are_the_networks() -> None:
    first = torch.tensor([1])
    found = MapComparison(torch.zeros(1, 3, 8, 8), first, first, first, {}, {}, [], 3)
    caption = module._caption
    assert caption(found, 0, ("a", "b", "c"), 0.5)[:3] == ("b", "teacher: b", "student: b")
    others = caption(found, 0, ("cat", "dog"), 0.5)
    assert others[:3] == ("dog", "teacher: class 1", "student: class 1")
    assert caption(found, 0, (), 0.5)[0] == "class 1"


def test_config_file_of_the_run_is_shown_if_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 3\n")
    fit(tmp_path, [RunText()], epochs=1)
    ((_, (config,)),) = events(tmp_path, tags.CONFIG)
    assert config.decode() == "```yaml\nseed: 3\n```"


class Stop(Exception):  # noqa: N818
    pass


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise Stop


@pytest.mark.usefixtures("quick_pictures")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("every", [{"every_n_epochs": 1}, {"every_n_train_steps": 3}])
def test_resumed_run_writes_the_lines_of_the_unbroken_one(
    tmp_path: Path, every: dict[str, int]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def reports() -> list[Callback]:
        saver = ModelCheckpoint(broken / "checkpoints", save_last=True, **every)
        return [MapGrids(images=1), RunText(), ResumedEvents(), saver]

    fit(whole, reports()[:3], epochs=4)
    torch.manual_seed(0)
    with pytest.raises(Stop):
        fit(broken, [*reports(), StopAfter(11)], epochs=4, enable_checkpointing=True)
    time.sleep(1.1)  # event files are put in order by the second
    last = broken / "checkpoints" / "last.ckpt"
    fit(broken, reports(), epochs=4, enable_checkpointing=True, checkpoint=last)
    expected, found = read_scalars(whole / "run"), read_scalars(broken / "run")
    assert set(found) == set(expected)
    for tag in expected:
        assert [step for step, _ in found[tag]] == [step for step, _ in expected[tag]], tag
    for tag in (tags.grid("stage5"), tags.CONFIG, tags.HOW_TO_READ):
        steps = [step for step, _ in events(broken, tag)]
        assert steps == [step for step, _ in events(whole, tag)], tag


def test_throughput_leaves_out_validation_and_the_first_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module, "_now", lambda _: clock[0])

    class Takes(Tiny):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            clock[0] += 10 if self.global_step < 2 else 0.5
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            clock[0] += 100
            super().validation_step(batch, batch_idx)

    monkeypatch.setitem(globals(), "Tiny", Takes)
    fit(tmp_path, [Throughput(skip=2)], epochs=2)
    assert read_scalars(tmp_path / "run")[tags.IMAGES_PER_SECOND] == [(3, 8.0), (7, 8.0)]


def test_run_shorter_than_the_skipped_steps_logs_no_speed(tmp_path: Path) -> None:
    fit(tmp_path, [Throughput(skip=100)], epochs=1)
    assert tags.IMAGES_PER_SECOND not in read_scalars(tmp_path / "run")


def test_progress_tells_the_numbers_that_matter_once_a_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, [Progress()], epochs=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 2, "none of the sanity check"
    assert lines[1].startswith("epoch 2/2  loss 0.")
    assert "agreement 0.750  pearson 0.500" in lines[1]
    assert "v_num" not in "".join(lines)


@pytest.mark.parametrize("kind", ["none", "csv", "fast_dev_run"])
def test_every_callback_tolerates_other_loggers(tmp_path: Path, kind: str) -> None:
    logger = {"none": False, "csv": CSVLogger(tmp_path), "fast_dev_run": None}[kind]
    tiny = fit(tmp_path, every_callback(), logger=logger, fast_dev_run=kind == "fast_dev_run")
    assert tiny.shown == []
    assert not list(tmp_path.rglob("*tfevents*"))


@pytest.mark.usefixtures("quick_pictures")
def test_module_that_explains_nothing_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(Tiny):
        explain_images = None

    monkeypatch.setitem(globals(), "Tiny", Plain)
    fit(tmp_path, every_callback(), epochs=1)
    assert events(tmp_path, tags.grid("stage5")) == []


@pytest.mark.usefixtures("quick_pictures")
def test_other_ranks_draw_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    tiny = fit(tmp_path, every_callback(), epochs=1)
    assert tiny.shown == []
    assert events(tmp_path, tags.CONFIG) == []


def test_standalone_validation_draws_nothing(tmp_path: Path) -> None:
    tiny = Tiny()
    trainer = Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path, version="run"),
        callbacks=every_callback(),
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.validate(tiny, loader(VAL), verbose=False)
    assert tiny.shown == []
