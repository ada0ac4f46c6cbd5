"""Caches the teacher's logits, and the maps of every method, for the images of a study.

Each piece lies in a folder of its own that is named after everything that decides its content and
is checked when it is opened, so a study that is widened asks for what is new alone.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camdistill.data.datasets import ImageSet
from camdistill.distill.teacher_maps_plan import teacher_sha256
from camdistill.distill.training import as_images
from camdistill.errors import UserError
from camdistill.experiments.ranking.map_sources import MapRequest, MapSource
from camdistill.experiments.ranking.student_task import ImagePool
from camdistill.explain.maps import relu, resize
from camdistill.networks.teachers import Teacher
from camdistill.store.array_files import (
    ArrayWriter,
    CacheError,
    CacheKey,
    lock_cache,
    open_arrays,
    pack,
    report_write_errors,
    unpack,
)
from camdistill.store.digest import digest_of
from camdistill.types import Logits, Pixels

VERSION = 1
CHUNK = 128  # images in one forward of the teacher
PAUSE = 10.0  # seconds between the points from which a killed build goes on
AT_ONCE = 2**27  # values of raw maps that are brought to the students' grid together: 512 MB
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CachedPart:
    """A folder of finished arrays.

    Attributes:
        folder: Where it lies.
        sha256: SHA-256 of what is in its files.
    """

    folder: Path
    sha256: str

    def arrays(self) -> dict[str, Tensor]:
        """The memory-mapped arrays; every file is checked the first time."""
        return open_part(self)


@lru_cache(maxsize=128)  # of memory maps; a study's runs go through all of its pieces
def open_part(part: CachedPart) -> dict[str, Tensor]:
    """A piece's arrays, kept for the next run."""
    key = json.loads((part.folder / "meta.json").read_text())["key"]
    return open_arrays(part.folder, key)


@dataclass(frozen=True)
class Sets:
    """The images of a study.

    Attributes:
        pool: What students learn from, in the order in which a larger n takes in more.
        val: For choosing beta.
        test: For the scores.
    """

    pool: ImageSet
    val: ImageSet
    test: ImageSet

    def first(self, count: int) -> "Sets":
        """With a pool of so many images."""
        return Sets(self.pool.subset(np.arange(count)), self.val, self.test)


def list_answered_sizes(root: Path, teacher: Teacher, sets: Sets) -> list[int]:
    """Of how many first images of a pool there are answers already, in studies of other n."""
    sizes = []
    for path in root.glob("answers-*/pool-ids.npy"):
        with contextlib.suppress(OSError, ValueError, EOFError):  # damaged: it is made anew
            count = len(np.load(path, mmap_mode="r"))
            if count <= len(sets.pool):
                key = _key_of_answers(teacher, sets.first(count))
                sizes += [count] * (_folder(root, "answers", key) == path.parent)
    return sorted(sizes)


def cache_answers(
    root: Path, teacher: Teacher, sets: Sets, *, on_progress: Progress | None = None
) -> CachedPart:
    """Pixels and the teacher's logits of all sets, those of mirrored images too for the pool."""
    parts = _parts(sets)

    def write(draft: ArrayWriter) -> None:
        done, total = 0, sum(map(len, parts.values()))
        for name, images in parts.items():
            for rows in _chunks(draft, len(images), before=done):
                _compute_answers(draft, name, images, rows, teacher)
                if on_progress is not None:
                    on_progress("teacher's answers", done + rows.stop, total)
            done += len(images)

    return _cached_part(root, "answers", _key_of_answers(teacher, sets), write)


def _parts(sets: Sets) -> dict[str, ImageSet]:
    return {"pool": sets.pool, "val": sets.val, "test": sets.test}


def _key_of_answers(teacher: Teacher, sets: Sets) -> CacheKey:
    parts = _parts(sets).items()
    return {
        "version": VERSION,
        "teacher": teacher_sha256(teacher),
        **{name: [images.fingerprint, _sha256(images.ids)] for name, images in parts},
    }


def _compute_answers(
    draft: ArrayWriter, name: str, images: ImageSet, rows: slice, teacher: Teacher
) -> None:
    """Writes down what the teacher says of some images of a set, and with the first their ids."""
    views = 2 if name == "pool" else 1
    if rows.start == 0:
        shape = (len(images), views, teacher.classes)
        draft.allocate(f"{name}/pixels", tuple(images.pixels.shape), np.dtype(np.uint8))
        draft.allocate(f"{name}/logits", shape, np.dtype(np.float32))
        draft.allocate(f"{name}/ids", (len(images),), np.dtype(np.int64))
        draft.arrays[f"{name}/ids"][:] = images.ids
    batch = images.batch(np.arange(rows.start, rows.stop))
    draft.arrays[f"{name}/pixels"][rows] = batch.pixels.numpy()
    for view in range(views):
        view_pixels = batch.pixels.flip(-1) if view else batch.pixels
        draft.arrays[f"{name}/logits"][rows, view] = _logits(teacher, view_pixels).numpy()


def _chunks(draft: ArrayWriter, count: int, *, before: int = 0) -> Iterator[slice]:
    """The rows that a draft lacks, some at a time; what is done is noted in between.

    Args:
        draft: It goes on from where it was killed.
        count: Number of rows.
        before: Number of rows of the same draft that come first.
    """
    noted = time.monotonic()
    for start in range(max(0, draft.done - before), count, CHUNK):
        rows = slice(start, min(start + CHUNK, count))
        yield rows
        draft.done = before + rows.stop
        if time.monotonic() - noted >= PAUSE:
            draft.save_progress()
            noted = time.monotonic()


def cache_maps(
    root: Path,
    teacher: Teacher,
    cached_answers: CachedPart,
    source: MapSource,
    *,
    on_progress: Progress | None = None,
) -> CachedPart:
    """A method's raw maps of the pool and its mirror images, for the teacher's own top class.

    Args:
        root: Folder of pieces.
        teacher: Whom the method explains: `cached_answers`'s, or a randomized one.
        cached_answers: The answers: they say which class.
        source: The method.
        on_progress: Told what is being made, and how many images are done of how many.
    """
    key: CacheKey = {
        "version": VERSION,
        "teacher": teacher_sha256(teacher) if source.of_teacher else None,
        "answers": cached_answers.sha256,
        "source": dict(source.key),
    }

    def write(draft: ArrayWriter) -> None:
        pool = pool_of(cached_answers)
        count, device = len(pool.pixels), teacher.mean.device
        for rows in _chunks(draft, count):
            for view in range(2):
                pixels = pool.pixels[rows].flip(-1) if view else pool.pixels[rows]
                request = MapRequest(
                    as_images(pixels.to(device)),
                    pool.logits[rows, view].argmax(1).to(device),
                    pool.ids[rows],
                    bool(view),
                )
                packed, scale = pack(source.maps(teacher, request).cpu())
                for name, part in (("maps", packed), ("maps/scale", scale)):
                    value = part.numpy()
                    if name not in draft.arrays:
                        draft.allocate(name, (count, 2, *value.shape[1:]), value.dtype)
                    draft.arrays[name][rows, view] = value
            if on_progress is not None:
                on_progress(f"maps: {source.name}", rows.stop, count)

    return _cached_part(root, "maps", key, write)


def pool_of(cached_answers: CachedPart, count: int | None = None) -> ImagePool:
    """The first images of the pool with the teacher's answers; None for all."""
    arrays = cached_answers.arrays()
    return ImagePool(*(arrays[f"pool/{name}"][:count] for name in ("pixels", "ids", "logits")))


def load_held_out(cached_answers: CachedPart, name: str) -> tuple[Pixels, Logits]:
    """Pixels and logits of "val" or "test"."""
    arrays = cached_answers.arrays()
    return arrays[f"{name}/pixels"], arrays[f"{name}/logits"][:, 0]


def targets(
    stored: CachedPart, count: int, grid: tuple[int, int]
) -> Float[Tensor, "batch 2 rows columns"]:
    """Rectified maps of the first images of the pool on the students' grid."""
    arrays = stored.arrays()
    packed, scale = (arrays[name][:count] for name in ("maps", "maps/scale"))
    size = max(1, AT_ONCE // packed[0].numel())
    parts = zip(torch.split(packed, size), torch.split(scale, size), strict=True)
    return torch.cat([resize(relu(unpack(*part)), grid) for part in parts])


def _logits(teacher: Teacher, pixels: Pixels) -> Logits:
    with torch.no_grad():
        logits: Tensor = teacher(as_images(pixels.to(teacher.mean.device)))
    return logits.float().cpu()


def _cached_part(
    root: Path, kind: str, key: CacheKey, write: Callable[[ArrayWriter], None]
) -> CachedPart:
    folder = _folder(root, kind, key)
    with report_write_errors(folder, "name another --out"):
        root.mkdir(parents=True, exist_ok=True)
        with lock_cache(folder):
            try:
                open_arrays(folder, key)
            except CacheError:
                shutil.rmtree(folder, ignore_errors=True)
                draft = ArrayWriter(folder, key)
                try:
                    write(draft)
                except UserError:
                    draft.discard()
                    raise
                draft.finish({})
    meta: Mapping[str, Mapping[str, str]] = json.loads((folder / "meta.json").read_text())
    return CachedPart(folder, digest_of(meta["sha256"]))


def _folder(root: Path, kind: str, key: CacheKey) -> Path:
    return root / f"{kind}-{digest_of(key)[:24]}"


def _sha256(ids: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids, dtype=np.int64).tobytes()).hexdigest()
