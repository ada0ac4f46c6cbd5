"""What the teacher says of a study's images, asked once: answers, and maps of every method.

Each piece lies in a folder of its own that is named after everything that decides its content and
is checked when it is opened, so a study that is widened asks for what is new alone.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camdistill.data.datasets import ImageSet
from camdistill.distill.answers import teacher_sha256
from camdistill.distill.cache_files import (
    CacheError,
    Draft,
    Key,
    locked,
    pack,
    read_arrays,
    told,
    unpack,
)
from camdistill.distill.training import as_images
from camdistill.explain.maps import relu, resize
from camdistill.networks.teachers import Teacher
from camdistill.studies.explanations import Asked, Source
from camdistill.studies.lessons import Pool
from camdistill.types import Logits, Pixels

VERSION = 1
CHUNK = 128  # images in one forward of the teacher
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Piece:
    """A folder of finished arrays.

    Attributes:
        folder: Where it lies.
        sha256: Of what is in its files.
    """

    folder: Path
    sha256: str

    def arrays(self) -> dict[str, Tensor]:
        """The memory-mapped arrays; every file is checked the first time."""
        return opened(self)


@lru_cache(maxsize=8)
def opened(piece: Piece) -> dict[str, Tensor]:
    """A piece's arrays, kept for the next run."""
    key = json.loads((piece.folder / "meta.json").read_text())["key"]
    return read_arrays(piece.folder, key)


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


def answers(
    root: Path, teacher: Teacher, sets: Sets, *, on_progress: Progress | None = None
) -> Piece:
    """Pixels and the teacher's logits of all sets, those of mirrored images too for the pool."""
    parts = {"pool": sets.pool, "val": sets.val, "test": sets.test}
    key: Key = {
        "version": VERSION,
        "teacher": teacher_sha256(teacher),
        **{name: [one.fingerprint, _sha256(one.ids)] for name, one in parts.items()},
    }

    def write(draft: Draft) -> None:
        done, total = 0, sum(map(len, parts.values()))
        for name, images in parts.items():
            views = 2 if name == "pool" else 1
            pixels = np.dtype(np.uint8)
            draft.allocate(f"{name}/pixels", tuple(images.pixels.shape), pixels)
            shape = (len(images), views, teacher.classes)
            draft.allocate(f"{name}/logits", shape, np.dtype(np.float32))
            draft.allocate(f"{name}/ids", (len(images),), np.dtype(np.int64))
            draft.arrays[f"{name}/ids"][:] = images.ids
            for start in range(0, len(images), CHUNK):
                rows = slice(start, min(start + CHUNK, len(images)))
                batch = images.batch(np.arange(rows.start, rows.stop))
                draft.arrays[f"{name}/pixels"][rows] = batch.pixels.numpy()
                for view in range(views):
                    own = batch.pixels.flip(-1) if view else batch.pixels
                    draft.arrays[f"{name}/logits"][rows, view] = _logits(teacher, own).numpy()
                done += rows.stop - rows.start
                if on_progress is not None:
                    on_progress("teacher's answers", done, total)

    return _piece(root, "answers", key, write)


def maps(
    root: Path,
    teacher: Teacher,
    known: Piece,
    source: Source,
    *,
    on_progress: Progress | None = None,
) -> Piece:
    """A method's raw maps of the pool and its mirror images, for the teacher's own top class.

    Args:
        root: Folder of pieces.
        teacher: Whom the method explains: `known`'s, or a randomised one.
        known: The answers: they say which class.
        source: The method.
        on_progress: Told what is being made, and how many images are done of how many.
    """
    key: Key = {
        "version": VERSION,
        "teacher": teacher_sha256(teacher) if source.of_teacher else None,
        "answers": known.sha256,
        "source": dict(source.key),
    }

    def write(draft: Draft) -> None:
        pool = pool_of(known)
        count, device = len(pool.pixels), teacher.mean.device
        for start in range(0, count, CHUNK):
            rows = slice(start, min(start + CHUNK, count))
            for view in range(2):
                pixels = pool.pixels[rows].flip(-1) if view else pool.pixels[rows]
                asked = Asked(
                    as_images(pixels.to(device)),
                    pool.logits[rows, view].argmax(1).to(device),
                    pool.ids[rows],
                    bool(view),
                )
                packed, scale = pack(source.maps(teacher, asked).cpu())
                for name, part in (("maps", packed), ("maps/scale", scale)):
                    value = part.numpy()
                    if name not in draft.arrays:
                        draft.allocate(name, (count, 2, *value.shape[1:]), value.dtype)
                    draft.arrays[name][rows, view] = value
            if on_progress is not None:
                on_progress(f"maps: {source.name}", rows.stop, count)

    return _piece(root, "maps", key, write)


def pool_of(known: Piece, count: int | None = None) -> Pool:
    """The first images of the pool with the teacher's answers; None for all."""
    arrays = known.arrays()
    return Pool(*(arrays[f"pool/{name}"][:count] for name in ("pixels", "ids", "logits")))


def held_out(known: Piece, name: str) -> tuple[Pixels, Logits]:
    """Pixels and logits of "val" or "test"."""
    arrays = known.arrays()
    return arrays[f"{name}/pixels"], arrays[f"{name}/logits"][:, 0]


def targets(
    stored: Piece, count: int, grid: tuple[int, int]
) -> Float[Tensor, "batch 2 rows columns"]:
    """Rectified maps of the first images of the pool on the students' grid."""
    arrays = stored.arrays()
    raw = unpack(arrays["maps"][:count], arrays["maps/scale"][:count])
    return resize(relu(raw), grid)


def _logits(teacher: Teacher, pixels: Pixels) -> Logits:
    with torch.no_grad():
        found: Tensor = teacher(as_images(pixels.to(teacher.mean.device)))
    return found.float().cpu()


def _piece(root: Path, kind: str, key: Key, write: Callable[[Draft], None]) -> Piece:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = root / f"{kind}-{digest[:24]}"
    with told(folder):
        root.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            try:
                read_arrays(folder, key)
            except CacheError:
                shutil.rmtree(folder, ignore_errors=True)
                draft = Draft(folder, key)
                try:
                    write(draft)
                    draft.finish({})
                except BaseException:
                    draft.discard()
                    raise
    meta: Mapping[str, Mapping[str, str]] = json.loads((folder / "meta.json").read_text())
    return Piece(folder, digest_of(meta["sha256"]))


def digest_of(parts: Mapping[str, object]) -> str:
    """A sha256 of named values, in whatever order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sha256(ids: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids, dtype=np.int64).tobytes()).hexdigest()
