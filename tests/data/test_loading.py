"""Order of training, shares of several processes, resuming in the middle of an epoch."""

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import ModelCheckpoint

from camdistill.data import loading
from camdistill.data.datasets import ImageSet
from camdistill.data.loading import BatchSampler, Loader
from camdistill.errors import UserError
from camdistill.types import Batch

# a resumed run writes into the folder of the one that was killed
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")


def numbered(count: int) -> ImageSet:
    values = np.arange(count, dtype=np.int64)
    return ImageSet(
        pixels=np.zeros((count, 3, 2, 2), dtype=np.uint8),
        labels=values,
        ids=values,
        names=[str(value) for value in values],
        classes=("a", "b"),
        fingerprint="f",
    )


def shares(order: BatchSampler, world: int) -> list[list[tuple[list[int], list[bool]]]]:
    """What each process gets: [rank][batch] -> (positions, counted)."""
    found = []
    for rank in range(world):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "process_rank", lambda rank=rank: (rank, world))
            found.append([(p.tolist(), c.tolist()) for p, c in order])
    return found


@given(
    length=st.integers(1, 80),
    parts=st.integers(1, 8),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_training_shares_put_together_are_the_single_process_batches(
    length: int, parts: int, world: int, epoch: int
) -> None:
    order = BatchSampler(length, parts * world, train=True, seed=5)
    order.set_epoch(epoch)
    if length < world:
        with pytest.raises(UserError, match="can't be shared"):
            shares(order, world)
        return
    (whole,) = shares(order, 1)
    by_rank = shares(order, world)
    assert len(whole) == len(order) == max(length // (parts * world), 1)
    for number, (positions, counted) in enumerate(whole):
        together = [p for rank in by_rank for p in rank[number][0]]
        # only a batch of fewer images than asked for may not divide
        assert together == positions[: len(positions) // world * world]
        assert all(counted)
        assert len({len(rank[number][0]) for rank in by_rank}) == 1
    seen = [p for positions, _ in whole for p in positions]
    assert len(set(seen)) == len(seen)


@given(length=st.integers(1, 80), parts=st.integers(1, 8), world=st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_evaluation_counts_every_image_once_and_fills_shares_up(
    length: int, parts: int, world: int
) -> None:
    order = BatchSampler(length, parts * world, train=False)
    by_rank = shares(order, world)
    counted = [
        position
        for rank in by_rank
        for positions, counts in rank
        for position, count in zip(positions, counts, strict=True)
        if count
    ]
    assert sorted(counted) == list(range(length))
    for batches in zip(*by_rank, strict=True):
        assert len({len(positions) for positions, _ in batches}) == 1
    if world == 1:
        assert all(all(counts) for _, counts in by_rank[0])


def test_epochs_and_seeds_have_orders_of_their_own_and_the_last_part_batch_is_dropped() -> None:
    order = BatchSampler(103, 10, train=True, seed=1)
    assert len(order) == 10
    orders = []
    for seed, epoch in [(1, 0), (1, 1), (2, 0)]:
        order = BatchSampler(103, 10, train=True, seed=seed)
        order.set_epoch(epoch)
        orders.append(tuple(p for positions, _ in order for p in positions.tolist()))
    assert len(set(orders)) == 3
    assert all(len(set(one)) == 100 for one in orders)


def test_a_batch_that_processes_cannot_share_is_told() -> None:
    with pytest.raises(UserError, match="give a multiple of 4"):
        shares(BatchSampler(100, 10, train=True), 4)


class Recorder(pl.LightningModule):
    """Keeps the ids of each epoch's batches; dies on request."""

    def __init__(self, die_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []
        self.die_at = die_at

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch, Batch)
        if self.global_step == self.die_at:
            raise KeyboardInterrupt
        self.seen.append((self.current_epoch, batch.ids.tolist()))
        return self.weight * 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert batch.ids.tolist() == list(range(batch_idx * 8, min(batch_idx * 8 + 8, 12)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def run(
    folder: Path,
    *,
    die_at: int | None = None,
    resume: bool = False,
    validate: bool = True,
    every_step: int | None = None,
    limit_train_batches: int | None = None,
) -> list[tuple[int, list[int]]]:
    """Four epochs of 5 batches of 8 images (44 images); the last checkpoint is last.ckpt."""
    model = Recorder(die_at)
    keep = ModelCheckpoint(
        folder, save_last=True, every_n_train_steps=every_step, enable_version_counter=False
    )
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        callbacks=[keep],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        limit_train_batches=limit_train_batches,
        limit_val_batches=None if validate else 0,
    )
    train = Loader(numbered(44), BatchSampler(44, 8, train=True, seed=3))
    val = Loader(numbered(12), BatchSampler(12, 8, train=False))
    path = str(folder / "last.ckpt") if resume else None
    try:
        trainer.fit(model, train, val, ckpt_path=path)
    except (KeyboardInterrupt, SystemExit):
        assert die_at is not None
    return model.seen


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("limit", [None, 3])
def test_resumed_epochs_have_the_order_of_the_unbroken_run(
    tmp_path: Path, validate: bool, limit: int | None
) -> None:
    options = {"validate": validate, "limit_train_batches": limit}
    whole = run(tmp_path / "whole", **options)
    steps = limit or 5
    assert [epoch for epoch, _ in whole] == [e for e in range(4) for _ in range(steps)]
    for epoch in range(4):
        order = BatchSampler(44, 8, train=True, seed=3)
        order.set_epoch(epoch)
        expected = [p.tolist() for p, _ in order][:steps]
        assert [ids for e, ids in whole if e == epoch] == expected
    # killed in the fourth epoch: goes on from the end of the third
    run(tmp_path / "broken", die_at=3 * steps + 1, **options)
    resumed = run(tmp_path / "broken", resume=True, **options)
    assert resumed == whole[3 * steps :]


@pytest.mark.parametrize("die_at", [1, 4, 5, 6, 12, 19])
@pytest.mark.parametrize("every_step", [1, 2, 5])
def test_a_run_killed_in_an_epoch_goes_on_with_its_next_batch(
    tmp_path: Path, die_at: int, every_step: int
) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "broken", die_at=die_at, every_step=every_step)
    saved = die_at // every_step * every_step
    if not saved:
        return
    assert run(tmp_path / "broken", resume=True, every_step=every_step) == whole[saved:]


def _report(rank: int, folder: str, attempt: int) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{attempt}", rank=rank, world_size=2
    )
    loader = Loader(numbered(7), BatchSampler(7, 4, train=False))
    torch.save([(b.ids, b.counted) for b in loader], f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_rank_and_world_are_those_of_torch_distributed(tmp_path: Path) -> None:
    # On a busy machine gloo's handshake itself fails now and then; that is not what is tested.
    for attempt in range(3):
        try:
            torch.multiprocessing.spawn(_report, (str(tmp_path), attempt), nprocs=2)
            break
        except torch.multiprocessing.ProcessRaisedException as error:
            if attempt == 2 or "connectFullMesh" not in str(error):
                raise
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [[ids.tolist() for ids, _ in rank] for rank in found] == [
        [[0, 1], [4, 5]],
        [[2, 3], [6, 4]],
    ]
    assert found[1][1][1].tolist() == [True, False]
