"""Files: their names as text, writing them whole, and folders of one process at a time."""

import contextlib
import errno
import hashlib
import math
import os
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from camdistill.errors import LONGEST_NAME, UserError, mistake_of_system, shorten, writing_mistake


def printable(name: str) -> str:
    r"""A file's name as text that every file format takes: a byte that is not UTF-8 is `\xe9`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def folder_name(text: str) -> str:
    """A text as the name of a folder; one that would be too long is cut, with its digest."""
    name = "".join(
        letter if letter.isalnum() or letter in "._-@" else "_" for letter in printable(text)
    )
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{name.encode()[: LONGEST_NAME - 17].decode(errors='ignore')}-{digest}"


def expand_home(path: str | Path) -> Path:
    """A path with the home folder for its `~` or `~user`.

    A path that is there as it is written stays.

    Raises:
        UserError: That user, or this one, has no home folder.
    """
    path = Path(path)
    if not str(path).startswith("~") or os.path.lexists(path):
        return path
    try:
        return path.expanduser()
    except RuntimeError:
        if len(path.parts) == 1 and path.suffix:
            return path  # the name of a file, ~backup.png, which isn't there
        whose = f"there is no user '{path.parts[0][1:]}'" if len(path.parts[0]) > 1 else "no HOME"
        raise UserError(
            f"'{shorten(str(path), 120)}' begins with {path.parts[0]}, but {whose} with a home "
            "folder here; write the whole path"
        ) from None


def check_regular(path: Path) -> None:
    """Checks that a path that is there is a file: a pipe, a socket or a device may never end.

    Raises:
        UserError: It is something else.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe, a socket or a device"
        raise UserError(f"'{path}' is {kind}; give a file")


def check_memory(size: int, what: str) -> None:
    """Checks that so many bytes have room in a quarter of the machine's memory.

    As float32, pixels take four times as much. Where the system doesn't say how much memory there
    is (Windows), nothing is refused.

    Raises:
        UserError: They have not.
    """
    if not hasattr(os, "sysconf"):
        return
    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > total_memory / 4:
        raise UserError(
            f"{what} take {size / 1e9:,.1f} GB, and this machine has {total_memory / 1e9:,.1f} "
            "GB of "
            "memory; give fewer or smaller ones"
        )


def read_arrays(
    path: Path, check: Callable[[str, tuple[int, ...]], object] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of an .npz, after a look at how large it says that they are.

    A few bytes of an archive may stand for any number of zeros, so what has no room isn't read.

    Args:
        path: The file.
        check: Told each array's name and shape before any is read; it may refuse by raising.

    Raises:
        UserError: It is no file, or its arrays don't fit into memory.
        OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile: It is damaged, or not one.
    """
    try:
        check_regular(path)
        return _load_arrays(path, check)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) and (
            mistake := mistake_of_system(error)
        ):
            raise mistake from error
        raise
    except (
        *(zlib.error, struct.error, RuntimeError, OverflowError, MemoryError),
        *(SyntaxError, tokenize.TokenError),  # numpy reads a damaged header as Python
    ) as error:
        raise ValueError(str(error) or "too large") from error


def _load_arrays(
    path: Path, check: Callable[[str, tuple[int, ...]], object] | None
) -> dict[str, np.ndarray]:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            shape, needed_bytes = _read_header(archive, entry)
            if needed_bytes > entry.file_size:
                raise ValueError(f"'{entry.filename}' announces more than it holds")
            if check is not None:
                check(entry.filename.removesuffix(".npy"), shape)
        total = sum(entry.file_size for entry in archive.infolist())
        check_memory(total, f"the arrays of '{path}'")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)


def _read_header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], int]:
    """The shape that an array's header tells, and the bytes that it needs."""
    with archive.open(entry) as member:
        version = np.lib.format.read_magic(member)
        if version == (1, 0):
            shape, _, kind = np.lib.format.read_array_header_1_0(member)
        elif version == (2, 0):
            shape, _, kind = np.lib.format.read_array_header_2_0(member)
        else:
            raise ValueError(f"an array of format {version}")
    if kind.hasobject:
        raise ValueError("an array of Python objects")
    return shape, math.prod(shape) * kind.itemsize


_LOCKS: set[int] = set()  # descriptors that hold a folder's lock


def write_atomically(path: Path, content: bytes) -> None:
    """Puts a file in place whole or not at all.

    Raises:
        UserError: It can't be written (full disk, no permission); what was there is intact.
    """
    partial = path.with_name(f".{path.name[:50]}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise writing_mistake(error, "write", path, "name another folder") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_folder(folder: Path, cure: str = "wait for it, or name another --out") -> Iterator[None]:
    """Lets one process at a time work in a folder, which is made for it.

    The system takes the lock back when a process dies. A folder that was made here and stayed
    empty, because a check failed, is removed.

    Args:
        folder: Where the work goes.
        cure: What the second process's user can do.

    Raises:
        UserError: Another process works there, or the folder can't be made.
    """
    created = make_folders(folder)
    lock = take_lock(folder, cure)
    try:
        yield
    finally:
        remove_empty(created)  # while it is locked: afterward it may be another process's
        release_lock(lock)


def make_folders(folder: Path) -> list[Path]:
    """Makes a folder and those above it; returns those that were not there, innermost first.

    Raises:
        UserError: One can't be made.
    """
    created: list[Path] = []
    for path in reversed((folder, *folder.parents)):
        if path.exists():
            continue
        try:
            path.mkdir()
        except FileExistsError:  # another process was faster
            continue
        except OSError as error:
            remove_empty(created)
            raise writing_mistake(error, "make the folder", path, "name another") from None
        created.insert(0, path)
    return created


def remove_empty(folders: list[Path]) -> None:
    """Removes folders, innermost first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def take_lock(folder: Path, cure: str) -> int | None:
    """Locks a folder for this process; returns what `release_lock` takes.

    Raises:
        UserError: Another process has it.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    busy = f"another process works in {folder}; {cure}"
    try:
        lock = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # it was made by one that gave up and removed it
        raise UserError(busy) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise UserError(busy) from None
        return None  # a file system that can't lock folders
    if not _is_at(lock, folder):  # removed by the one that had the lock until a moment ago
        os.close(lock)
        raise UserError(busy)
    _LOCKS.add(lock)
    return lock


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether what was opened is still what lies there."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def release_lock(lock: int | None) -> None:
    """Lets others work in a folder that was locked here."""
    if lock in _LOCKS:
        import fcntl

        _LOCKS.discard(lock)
        fcntl.flock(lock, fcntl.LOCK_UN)  # also where a process was forked a moment ago
        os.close(lock)


def _forget_locks() -> None:
    """Closes a forked process's copies: they would hold the locks longer than their owner lives."""
    while _LOCKS:
        os.close(_LOCKS.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
