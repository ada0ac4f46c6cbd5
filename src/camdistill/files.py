"""Writing files whole or not at all, and folders that one process at a time works in."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from camdistill.errors import UserError

_LOCKS: set[int] = set()  # descriptors that hold a folder's lock


def write_atomically(path: Path, content: bytes) -> None:
    """Puts a file in place whole or not at all.

    Raises:
        UserError: It can't be written (full disk, no permission); what was there is intact.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "free some space and start again" if full else "name another folder"
        raise UserError(f"can't write {path}: {reason}; {cure}") from None
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
    made = make_folders(folder)
    try:
        lock = take_lock(folder, cure)
        try:
            yield
        finally:
            remove_empty(made)
            release_lock(lock)
    finally:
        remove_empty(made)


def make_folders(folder: Path) -> list[Path]:
    """Makes a folder and those above it; returns those that were not there, innermost first.

    Raises:
        UserError: One can't be made.
    """
    made: list[Path] = []
    for path in reversed((folder, *folder.parents)):
        if path.exists():
            continue
        try:
            path.mkdir()
        except FileExistsError:  # another process was faster
            continue
        except OSError as error:
            remove_empty(made)
            reason = error.strerror or str(error)
            raise UserError(f"can't make the folder {path}: {reason}; name another") from None
        made.insert(0, path)
    return made


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
    _LOCKS.add(lock)
    return lock


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
