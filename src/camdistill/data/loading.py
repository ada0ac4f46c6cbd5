"""Batches in an order that depends on (seed, epoch) alone, for one process or several."""

from collections.abc import Iterator
from typing import TypedDict

import numpy as np
import torch.distributed
from numpy.typing import NDArray

from camdistill.data.datasets import ImageSet
from camdistill.errors import UserError
from camdistill.types import Batch


class LoaderState(TypedDict):
    """Where a loader stands: what a checkpoint in the middle of an epoch needs."""

    epoch: int
    batches: int


def process_rank() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class BatchSampler:
    """The positions of each batch, for this process: the sampler of a loader.

    Each global batch is cut into as many contiguous parts as there are processes. Training shuffles
    by (seed, epoch) and drops the last incomplete batch (unless it is the only one); evaluation
    keeps the order and fills up the last batch's parts with images that don't count.

    Args:
        length: Number of images.
        batch_size: Images in a global batch, all processes together.
        train: Whether to shuffle and to drop.
        seed: Seed of the order.
    """

    def __init__(self, length: int, batch_size: int, *, train: bool, seed: int = 0) -> None:
        self.length = length
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch, after a resume too."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.train and self.length >= self.batch_size:
            return self.length // self.batch_size
        return -(-self.length // self.batch_size)

    def process_part(self, number: int, order: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """This process's part of a global batch, and how many of its images count."""
        rank, world = process_rank()
        if self.batch_size % world:
            raise UserError(
                f"batch_size {self.batch_size} can't be shared by {world} processes; "
                f"give a multiple of {world}"
            )
        batch = order[number * self.batch_size : (number + 1) * self.batch_size]
        if self.train:
            share = len(batch) // world
            if not share:
                raise UserError(f"{self.length} images can't be shared by {world} processes")
            return batch[rank * share : (rank + 1) * share], share
        share = -(-len(batch) // world)
        padded = np.resize(batch, share * world)
        counted = min(max(len(batch) - rank * share, 0), share)
        return padded[rank * share : (rank + 1) * share], counted

    def permutation(self) -> NDArray[np.int64]:
        """All positions in the order of this epoch."""
        if not self.train:
            return np.arange(self.length, dtype=np.int64)
        generator = np.random.default_rng([self.seed, self.epoch])
        return generator.permutation(self.length)

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        order = self.permutation()
        for number in range(len(self)):
            positions, counted = self.process_part(number, order)
            yield positions, np.arange(len(positions)) < counted


class Loader:
    """Batches of a set in an order; resumable in the middle of an epoch.

    It is no `torch.utils.data.DataLoader`: the images lie in memory, where one gather makes a
    batch, and Lightning, which replaces a DataLoader's sampler (several processes, predict), leaves
    this alone.
    Lightning finds `sampler.set_epoch`, `state_dict` and `load_state_dict` by their names.
    """

    batch_sampler = None  # Lightning asks for it when it looks for shuffled validation data

    def __init__(self, images: ImageSet, sampler: BatchSampler) -> None:
        self.images = images
        self.sampler = sampler
        self._progress: LoaderState = {"epoch": 0, "batches": 0}
        self._resume: LoaderState | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # Lightning makes the iterator before it tells the epoch: a generator reads it at the
        # first batch, which is later
        epoch = self.sampler.epoch
        resume, self._resume = self._resume, None
        start = resume["batches"] if resume and resume["epoch"] == epoch else 0
        for number, (positions, counted) in enumerate(self.sampler):
            if number >= start:
                self._progress = {"epoch": epoch, "batches": number + 1}
                yield self.images.batch(positions, counted)

    def state_dict(self) -> LoaderState:
        """The running epoch, and how many of its batches have been given out."""
        return self._progress

    def load_state_dict(self, state: LoaderState) -> None:
        """Leave out the batches that were given out, if it is that epoch that goes on."""
        self._progress = self._resume = state
