"""Decoded images, once, in a verified memory-mapped file.

One file holds the pixels, the images' original sizes, a header (JSON) and a footer. It is written
beside its name and moved there when it is whole, so a reader sees all of it or nothing. Opening it
checks the footer, the header, the length and the digests of sampled blocks; anything wrong, or
another list of files, and it is built again.
"""

import concurrent.futures
import hashlib
import json
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from camdistill.data import decode
from camdistill.data.folders import ImageFiles
from camdistill.errors import UserError, writing_mistake
from camdistill.store.atomic_files import expand_home

_log = logging.getLogger(__name__)

MAGIC = b"camdistill"
# sha256 of the header (hex), its length in 12 digits, the magic
FOOTER_BYTES = 64 + 12 + len(MAGIC)
# Blocks read when a cache is opened: 16 of 64 KB, the first and the last among them
SAMPLES, SAMPLE_BYTES = 16, 65536
# Files a thread decodes at a time, if they have so many bytes at most, and chunks held in memory
CHUNK, CHUNK_BYTES, PENDING_CHUNKS = 64, 64 << 20, 16
FileKind = Literal["image", "mask"]
OnBroken = Literal["raise", "skip"]
# One decoded file: pixels, width, height; or why there are none
Outcome = tuple[NDArray[np.uint8], int, int] | UserError


class Header(TypedDict):
    """What a cache file says about itself."""

    key: str
    shape: list[int]
    skipped: list[int]
    samples: list[str]
    sizes: str
    digest: str


@dataclass(frozen=True)
class DecodedImages:
    """Decoded images.

    Attributes:
        pixels: uint8 [N, 3, H, W] (or [N, 1, H, W] for masks), read-only memory map.
        sizes: int32 [N, 2], width and height of the upright originals.
        positions: int64 [N], position of each image in the list of files; skipped ones are missing.
        digest: sha256 of the pixels.
        path: The cache file.
    """

    pixels: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    positions: NDArray[np.int64]
    digest: str
    path: Path


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Where caches lie: the argument, else CAMDISTILL_CACHE, else ~/.cache/camdistill."""
    chosen = cache_dir or os.environ.get("CAMDISTILL_CACHE")
    if chosen:
        return expand_home(chosen)
    try:
        return Path.home() / ".cache" / "camdistill"
    except RuntimeError:
        raise UserError(
            "no folder for caches: this user has no home folder; name one with CAMDISTILL_CACHE or "
            "cache_dir"
        ) from None


def load_or_decode(
    files: ImageFiles,
    size: int | None = None,
    cache_dir: Path | None = None,
    on_broken: OnBroken = "raise",
    *,
    kind: FileKind = "image",
    check: Literal["sampled", "full"] = "sampled",
) -> DecodedImages:
    """The images of some files, from the cache or into it.

    Args:
        files: The files; another list, size in bytes or modification time is another key.
        size: See `decode.decode`; None requires files of one size.
        cache_dir: See `cache_folder`.
        on_broken: `raise` names the first broken file; `skip` goes on and says how many.
        kind: Images or masks.
        check: `full` reads the whole cache and compares its digest.

    Raises:
        UserError: A broken file, files of different sizes, no room on the disk.
    """
    if size is not None:
        decode.check_side("size", size)
    options = f"{decode.VERSION} {kind} {size} {on_broken} {sys.byteorder}"
    location = f"{files.folder.resolve()}\0{options}".encode("utf-8", "surrogateescape")
    # shortened, so that a folder whose name is as long as can be has a cache too
    name = f"{files.folder.name[:50]}-{hashlib.sha256(location).hexdigest()[:16]}.pixels"
    path = cache_folder(cache_dir) / name
    key = hashlib.sha256(f"{options} {files.digest()}".encode()).hexdigest()
    images = _open_cache(path, key, check)
    if images is None:
        _build(path, key, files, size, on_broken, kind)
        images = _open_cache(path, key, check)
    if images is None:
        raise UserError(f"{path} changed while it was written; run the command again")
    skipped = len(files) - len(images.positions)
    if skipped:
        _log.warning("%d of %d files in %s are broken: skipped", skipped, len(files), files.folder)
    return images


def _open_cache(path: Path, key: str, check: Literal["sampled", "full"]) -> DecodedImages | None:
    """The cache if it is whole and has this key, else None."""
    try:
        with path.open("rb") as file:
            header = _read_header(file)
            if header["key"] != key:
                _log.info("%s is of other files or options: building it again", path)
                return None
            shape = tuple(header["shape"])
            length = math.prod(shape)
            if _sample_digests(file, length) != header["samples"]:
                raise ValueError("changed pixels")
            file.seek(length)
            tail = file.read(8 * shape[0])
            if hashlib.sha256(tail).hexdigest() != header["sizes"]:
                raise ValueError("changed sizes")
        # a plain array over the map: np.memmap's own subclass costs time at every index
        pixels = np.asarray(np.memmap(path, dtype=np.uint8, mode="r", shape=shape))
        if check == "full" and hashlib.sha256(pixels.data).hexdigest() != header["digest"]:
            raise ValueError("changed pixels")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is damaged (%s): building it again", path, error)
        return None
    positions = np.delete(np.arange(shape[0] + len(header["skipped"])), header["skipped"])
    sizes = np.frombuffer(tail, dtype=np.int32).reshape(-1, 2)
    return DecodedImages(pixels, sizes, positions, header["digest"], path)


def _read_header(file: BinaryIO) -> Header:
    end = file.seek(0, os.SEEK_END)
    if end < FOOTER_BYTES:
        raise ValueError("too short")
    file.seek(end - FOOTER_BYTES)
    footer = file.read()
    digest, length = footer[:64], int(footer[64:76])
    if footer[76:] != MAGIC or length > end - FOOTER_BYTES:
        raise ValueError("no footer")
    start = end - FOOTER_BYTES - length
    file.seek(start)
    text = file.read(length)
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ValueError("changed header")
    header = cast(Header, json.loads(text))
    if start != math.prod(header["shape"]) + 8 * header["shape"][0]:
        raise ValueError("wrong length")
    return header


def _sample_digests(file: BinaryIO, length: int) -> list[str]:
    last = max(length - SAMPLE_BYTES, 0)
    digests = []
    for offset in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}):
        file.seek(offset)
        digests.append(hashlib.sha256(file.read(min(SAMPLE_BYTES, length))).hexdigest())
    return digests


def _build(
    path: Path, key: str, files: ImageFiles, size: int | None, on_broken: OnBroken, kind: FileKind
) -> None:
    """Decode all files into a temporary file and move it to its name."""
    _log.info("decoding %d files of %s", len(files), files.folder)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "w+b") as file, warnings.catch_warnings():
            # Pillow's remarks on damaged metadata: the pixels are right or the file is broken
            warnings.simplefilter("ignore")
            _write(file, key, files, _decode_in_order(files, size, kind), on_broken)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        cure = "name another folder with CAMDISTILL_CACHE or cache_dir"
        mistake = writing_mistake(error, "write the image cache", path, cure)
        raise (mistake if cure in str(mistake) else UserError(f"{mistake}; or {cure}")) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """What a killed process left; an hour old, so that nobody writes it any more."""
    for leftover in path.parent.glob(f"{path.name}.*.part"):
        if time.time() - leftover.stat().st_mtime > 3600:
            leftover.unlink(missing_ok=True)


def _write(
    file: BinaryIO, key: str, files: ImageFiles, outcomes: Iterator[Outcome], on_broken: OnBroken
) -> None:
    digest = hashlib.sha256()
    shape: tuple[int, ...] | None = None
    sizes: list[tuple[int, int]] = []
    skipped: list[int] = []
    for position, outcome in enumerate(outcomes):
        if isinstance(outcome, UserError):
            if on_broken == "raise":
                raise outcome
            _log.info("%s", outcome)
            skipped.append(position)
            continue
        pixels, width, height = outcome
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise UserError(
                f"{str(files.path(position))!r} has {width}x{height} pixels, images before it have "
                f"{shape[2]}x{shape[1]}; set size, for instance {min(shape[1:])}, to bring all to "
                "one size"
            )
        block = pixels.tobytes()
        digest.update(block)
        file.write(block)
        sizes.append((width, height))
    if shape is None:
        raise UserError(f"all {len(files)} files in {files.folder} are broken; replace them")
    tail = np.array(sizes, dtype=np.int32).tobytes()
    file.flush()
    samples = _sample_digests(file, len(sizes) * math.prod(shape))
    file.seek(0, os.SEEK_END)
    header = Header(
        key=key,
        shape=[len(sizes), *shape],
        skipped=skipped,
        samples=samples,
        sizes=hashlib.sha256(tail).hexdigest(),
        digest=digest.hexdigest(),
    )
    text = json.dumps(header).encode()
    footer = hashlib.sha256(text).hexdigest().encode() + b"%012d" % len(text) + MAGIC
    file.write(tail + text + footer)


def _decode_in_order(files: ImageFiles, size: int | None, kind: FileKind) -> Iterator[Outcome]:
    """Decoded files in order, by threads (Pillow's codecs release the interpreter's lock)."""
    bytes_per_image = decode.size_in_bytes(files.path(0), size) if len(files) else 1
    step = max(1, min(CHUNK, CHUNK_BYTES // bytes_per_image))

    def decode_chunk(start: int) -> list[Outcome]:
        outcomes: list[Outcome] = []
        shape: tuple[int, ...] | None = None
        for position in range(start, min(start + step, len(files))):
            try:
                pixels, frame = decode.decode(files.path(position), size, kind)
            except UserError as error:
                outcomes.append(error)
            else:
                outcomes.append((pixels, frame.width, frame.height))
                if pixels.shape != (shape := shape or pixels.shape):
                    break  # images of two sizes: `_write` ends at this one
        return outcomes

    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        starts = iter(range(0, len(files), step))
        pending = [
            pool.submit(decode_chunk, start)
            for _, start in zip(range(PENDING_CHUNKS), starts, strict=False)
        ]
        try:
            while pending:
                yield from pending.pop(0).result()
                following = next(starts, None)
                if following is not None:
                    pending.append(pool.submit(decode_chunk, following))
        finally:
            pool.shutdown(cancel_futures=True)
