"""The three data modules as the command line and the trainer use them."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from camdistill.data.modules import CIFARData, FolderData, ImageData, ShapesData
from camdistill.errors import UserError
from camdistill.types import Batch


def save(root: Path, **counts: int) -> Path:
    rng = np.random.default_rng(0)
    for place, count in counts.items():
        path = root.joinpath(*place.split("__"))
        path.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / f"{index:02d}.png")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMDISTILL_CACHE", str(tmp_path / "cache"))


def names(data: ImageData) -> dict[str, set[str]]:
    data.setup("fit")
    data.setup("test")
    sets = {"train": data.train_set, "val": data.val_set, "test": data.test_set}
    return {split: set(images.names) for split, images in sets.items() if images is not None}


def test_shapes_give_batches_of_three_different_splits() -> None:
    data = ShapesData(train=50, val=20, test=30, batch_size=16)
    data.setup("fit")
    assert data.test_set is None
    data.setup("test")
    assert data.size == (32, 32)
    assert len(data.classes) == 8
    assert len(set(data.fingerprints.values())) == 3
    assert [len(b.ids) for b in data.train_dataloader()] == [16, 16, 16]
    assert [len(b.ids) for b in data.val_dataloader()] == [16, 4]
    assert sum(len(b.ids) for b in data.test_dataloader()) == 30
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, Batch)
    assert data.train_set is not None
    assert np.array_equal(batch.pixels, data.train_set.pixels[batch.ids.numpy()])


def test_cifar_is_downloaded_by_one_process_before_the_others_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("camdistill.data.modules.load_cifar", lambda *a, **k: asked.append((a, k)))
    CIFARData("cifar100", tmp_path, download=True).prepare_data()
    assert asked == [(("cifar100", tmp_path, "train"), {"download": True})]


def test_shapes_with_an_impossible_size_are_told_at_once() -> None:
    with pytest.raises(UserError, match="size"):
        ShapesData(size=33)


@pytest.mark.parametrize(
    ("counts", "val_folder", "test_folder"),
    [
        (
            {"train__a": 10, "train__b": 10, "val__a": 2, "val__b": 2, "test__a": 3, "test__b": 3},
            "val",
            "test",
        ),
        ({"train__a": 10, "train__b": 10, "test__a": 3, "test__b": 3}, "train", "test"),
        ({"train__a": 10, "train__b": 10, "val__a": 3, "val__b": 3}, "train", "val"),
        ({"train__a": 10, "train__b": 10}, "train", "train"),
    ],
)
def test_splits_come_from_their_folders_or_are_carved(
    tmp_path: Path, counts: dict[str, int], val_folder: str, test_folder: str
) -> None:
    found = names(FolderData(save(tmp_path / "d", **counts), val_fraction=0.2, split_seed=1))
    assert not found["train"] & found["val"]
    assert not found["train"] & found["test"]
    assert not found["val"] & found["test"]
    assert {name.split("/")[0] for name in found["val"]} == {val_folder}
    assert {name.split("/")[0] for name in found["test"]} == {test_folder}
    assert sum(map(len, found.values())) == sum(counts.values())


def test_the_test_set_does_not_depend_on_how_validation_is_carved(tmp_path: Path) -> None:
    root = save(tmp_path / "d", a=20, b=20)
    few, many = (names(FolderData(root, val_fraction=f)) for f in (0.1, 0.5))
    assert few["test"] == many["test"]
    assert len(few["val"]) < len(many["val"])
    assert names(FolderData(root, split_seed=1))["test"] != few["test"]


def test_fitting_never_reads_the_test_folder(tmp_path: Path) -> None:
    root = save(tmp_path / "d", train__a=5, train__b=5, test__a=1, test__b=1)
    (root / "test" / "a" / "00.png").write_bytes(b"broken")
    data = FolderData(root)
    data.prepare_data()
    data.setup("fit")
    with pytest.raises(UserError, match=r"test/a/00\.png"):
        data.setup("test")


def test_a_flat_folder_trains_without_labels(tmp_path: Path) -> None:
    data = FolderData(save(tmp_path / "flat", **{"": 40}), batch_size=8)
    found = names(data)
    assert {split: len(members) for split, members in found.items()} == {
        "train": 32,
        "val": 4,
        "test": 4,
    }
    assert data.classes == ()
    assert all((batch.labels == -1).all() for batch in data.train_dataloader())


def test_ids_name_images_of_the_whole_also_after_carving_and_limiting(tmp_path: Path) -> None:
    root = save(tmp_path / "d", train__a=20, train__b=20, test__a=1, test__b=1)
    data, whole = FolderData(root, limit=6, batch_size=3), FolderData(root, val_fraction=0.0)
    data.setup("fit")
    whole.setup("fit")
    assert data.train_set is not None
    assert whole.train_set is not None
    assert len(data.train_set) == 6
    assert np.bincount(data.train_set.labels).tolist() == [3, 3]
    assert data.fingerprints["train"] == data.fingerprints["val"] == whole.fingerprints["train"]
    for batch in data.train_dataloader():
        assert np.array_equal(batch.pixels, whole.train_set.pixels[batch.ids.numpy()])


def test_mistakes_in_numbers_are_told(tmp_path: Path) -> None:
    root = save(tmp_path / "d", train__a=5, train__b=5)
    with pytest.raises(UserError, match="batch_size is 0"):
        FolderData(root, batch_size=0)
    with pytest.raises(UserError, match="seed is -1"):
        FolderData(root, seed=-1)
    with pytest.raises(UserError, match="limit is 0"):
        CIFARData(limit=0)
    with pytest.raises(UserError, match=r"val_fraction is 1\.5"):
        FolderData(root, val_fraction=1.5).setup("fit")
    with pytest.raises(UserError, match=r"val_fraction 9\.0 asks for 9 of 9"):
        FolderData(root, val_fraction=9.0).setup("fit")


def test_arguments_are_documented_and_parsed(tmp_path: Path) -> None:
    for kind in (ShapesData, CIFARData, FolderData):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(kind, "data")
        text = parser.format_help()
        assert "Images in a batch" in text
        assert "--data.batch_size" in text
    config = parser.parse_args(
        [
            "--data.root",
            str(tmp_path),
            "--data.size",
            "32",
            "--data.labeled",
            "null",
            "--data.val_fraction",
            "20",
            "--data.on_broken",
            "skip",
        ]
    )
    data = parser.instantiate(config).data
    assert isinstance(data, FolderData)
    assert data.val_fraction == 20


class Counter(pl.LightningModule):
    """Counts the images that count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.counted = 0

    def predict_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.counted += int(batch.counted.sum())
        return batch.ids

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.counted += int(batch.counted.sum())


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_test_and_predict_see_every_test_image_once() -> None:
    data = ShapesData(train=10, val=10, test=45, batch_size=16)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    model = Counter()
    trainer.test(model, data, verbose=False)
    assert model.counted == 45
    predicted = trainer.predict(model, data)
    assert predicted is not None
    assert torch.cat(predicted).tolist() == list(range(45))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.data
def test_cifar_folder_holds_the_published_images_and_opens_fast() -> None:
    root = os.environ.get("CAMDISTILL_DATA")
    if not root or not (Path(root) / "cifar10").is_dir():
        pytest.skip("CAMDISTILL_DATA names no folder with cifar10")
    data = FolderData(Path(root) / "cifar10")
    data.prepare_data()
    data.setup("fit")
    assert data.train_set is not None
    assert data.val_set is not None
    assert (len(data.train_set), len(data.val_set)) == (45_000, 5_000)
    again = FolderData(Path(root) / "cifar10")
    start = time.perf_counter()
    again.prepare_data()
    again.setup("fit")
    batch = next(iter(again.train_dataloader()))
    assert time.perf_counter() - start < 3
    assert batch.pixels.shape == (128, 3, 32, 32)
