"""Named arrays in a folder that is whole or not there: written elsewhere, checked, then renamed.

A process that is killed while it writes leaves a folder that the next one goes on with.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from camdistill.errors import UserError, writing_mistake

CacheKey = dict[str, object]

log = logging.getLogger(__name__)


class CacheError(Exception):
    """A cache that can't be used; the message says why."""


class ArrayWriter:
    """A folder of memory-mapped arrays in the making.

    Attributes:
        arrays: By name, [images, orientations, ...].
        done: Images whose rows are written.
    """

    def __init__(self, folder: Path, key: CacheKey) -> None:
        self._folder = folder.with_suffix(".part")
        self._final = folder
        self._key = key
        self.arrays: dict[str, NDArray[np.generic]] = {}
        self.done = 0
        try:
            progress = json.loads((self._folder / "progress.json").read_text())
            if progress["key"] == key:
                for name in progress["arrays"]:
                    self.arrays[name] = np.load(array_path(self._folder, name), mmap_mode="r+")
                self.done = int(progress["done"])
        except (OSError, ValueError, KeyError, TypeError):
            self.arrays = {}
        if not self.done:
            self.discard()
            self._folder.mkdir()

    def allocate(self, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
        """Add an array whose blocks exist: writing to a hole on a full disk kills the process.

        Raises:
            OSError: When the disk has no room for it.
        """
        path = array_path(self._folder, name)
        needed = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if shutil.disk_usage(self._folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.arrays[name] = open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if sys.platform == "linux":
            with path.open("r+b") as file:
                try:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise

    def save_progress(self) -> None:
        """Write down where to go on from."""
        self._flush()
        progress = {"key": self._key, "done": self.done, "arrays": sorted(self.arrays)}
        _write(self._folder / "progress.json", json.dumps(progress))

    def finish(self, small_arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """Add small arrays, the sums of all files, and give the folder its name."""
        self._flush()
        for name, array in small_arrays.items():
            np.save(array_path(self._folder, name), array)
        names = sorted((*self.arrays, *small_arrays))
        digests = {name: _sha256(array_path(self._folder, name)) for name in names}
        (self._folder / "progress.json").unlink(missing_ok=True)
        _write(self._folder / "meta.json", json.dumps({"key": self._key, "sha256": digests}))
        self._folder.rename(self._final)

    def discard(self) -> None:
        """Remove the folder and what is in it."""
        self.arrays = {}
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def _flush(self) -> None:
        for array in self.arrays.values():
            if isinstance(array, np.memmap):
                array.flush()


def open_arrays(folder: Path, key: CacheKey) -> dict[str, Tensor]:
    """The memory-mapped arrays of a finished folder, after checking every file's sha256.

    Raises:
        CacheError: When the folder was made of something else, or a file is missing or damaged.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["key"] != key:
            raise CacheError("it was made of something else")
        for name, expected in meta["sha256"].items():
            if _sha256(array_path(folder, name)) != expected:
                raise CacheError(f"{array_path(folder, name).name} is damaged")
        # Copy-on-write, because torch warns of arrays that can't be written.
        return {
            name: torch.from_numpy(np.load(array_path(folder, name), mmap_mode="c"))
            for name in meta["sha256"]
        }
    except FileNotFoundError as error:
        raise CacheError(f"{Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"it can't be read ({error})") from None


def pack(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps as float16 in [-1, 1], and each one's largest absolute value in float32."""
    wide = maps.float()
    scale = wide.abs().amax((-2, -1), keepdim=True)
    return (wide / torch.where(scale > 0, scale, torch.ones_like(scale))).half(), scale


def unpack(packed: Tensor, scale: Tensor) -> Tensor:
    """What was packed, in float32, to within 2^-12 of each map's largest absolute value."""
    return packed.float() * scale


def array_path(folder: Path, name: str) -> Path:
    """Where an array lies."""
    return folder / f"{name.replace('/', '-')}.npy"


@contextlib.contextmanager
def lock_cache(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """One process at a time; the system takes the lock back when a process dies.

    Raises:
        UserError: Another process has it, and `wait` is False.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with folder.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(
                    f"another process works in {folder.parent}; wait for it, or name another --out"
                ) from None
            log.info("teacher cache %s: waiting for the process that makes it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def report_write_errors(
    folder: Path, cure: str = "name another folder with CAMDISTILL_CACHE"
) -> Iterator[None]:
    """A full disk, or a folder that can't be written, as a user's mistake with its cure."""
    try:
        yield
    except OSError as error:
        mistake = writing_mistake(error, "write the teacher cache", folder, cure)
        raise (mistake if cure in str(mistake) else UserError(f"{mistake}; or {cure}")) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)
