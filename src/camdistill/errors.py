"""Mistakes of the user, told in one line: what was given, what is true, what to do."""

import difflib
import errno
import math
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable


class UserError(ValueError):
    """A mistake whose message tells the cure; the command line prints it and exits with 2."""


def nearest(name: str, options: Iterable[str], count: int = 3) -> str:
    """The options most like a name, ready to end an error's sentence.

    Returns:
        `"nearest: 'layer4', 'layer3'"`, or all options when there are few and none is alike.
    """
    known = list(options)
    alike = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if alike:
        return "nearest: " + ", ".join(repr(option) for option in alike)
    if not known:
        return "there is none"
    listing = ", ".join(repr(option) for option in known[:8])
    return f"there are: {listing}" + (", ..." if len(known) > 8 else "")


def check_number(name: str, value: int | float, interval: str, cure: str = "") -> None:
    """Checks that a number lies in an interval.

    Args:
        name: Of the option, as it is written.
        value: What was given.
        interval: As mathematics writes it: "[0, 1)", "(0, inf)". NaN lies in none.
        cure: What to do; the interval by default.

    Raises:
        UserError: It does not.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if math.isnan(value) or not (above and below):
        raise UserError(f"{name} is {value}; {cure or f'give a number in {interval}'}")


def check_each_once(name: str, values: Iterable[Hashable]) -> None:
    """Checks that nothing stands twice in a list.

    Raises:
        UserError: Something does.
    """
    twice = next((value for value, count in Counter(values).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{name} has {shorten(str(twice))!r} twice; give each once")


def check_folder_name(what: str, name: str) -> None:
    """Checks that a folder can have a name, and that it lies where it is made.

    Raises:
        UserError: The name is empty, hidden, a path, a version's, null's, or too long.
    """
    has_odd_letter = (
        not name.isprintable() or name != name.strip() or any(sign in name for sign in FORBIDDEN)
    )
    if (
        has_odd_letter
        or not name
        or name[0] in "-.~"
        or name[-1] == "."
        or _RESERVED_NAMES.fullmatch(name)
    ):
        raise UserError(
            f"{what} {shorten(name)!r} can't name a folder; give letters, digits and - _ @, no "
            "path, no version_0 and no null"
        )
    if (count := len(name.encode("utf-8", "surrogateescape"))) > LONGEST_NAME:
        raise UserError(f"{what} {shorten(name)!r} has {count} bytes; give {LONGEST_NAME} or less")


_RESERVED_NAMES = re.compile(r"version_\d+|null")  # of a run's versions, and of nothing
FORBIDDEN = '/\\:*?"<>|'  # in names of files, on one system or another
LONGEST_NAME = 200  # bytes of a name that is made into a file's: 255 less what stands around it


def shorten(text: str, longest: int = 60) -> str:
    """A text that fits into a line: its beginning and its end."""
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]}...{text[-(longest // 2) + 3 :]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, as Python or as torch says it."""
    words = ("can't allocate memory", "not enough memory")  # torch's on a CPU, and on Windows
    # torch.OutOfMemoryError by its name: importing torch takes seconds.
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or named or any(word in str(error) for word in words)


def mistake_of_system(error: OSError) -> UserError | None:
    """A path that can't be what it is given as, as one line; None for other troubles."""
    path = shorten(str(error.filename or "a path"), 120)
    match error.errno:
        case errno.ENAMETOOLONG:
            return UserError(
                f"'{path}': a name in it is longer than the 255 bytes of file systems; shorten it"
            )
        case errno.ENOTDIR | errno.EEXIST:
            return UserError(f"'{path}': a file stands where a folder is meant; name another")
        case errno.EISDIR:
            return UserError(f"'{path}' is a folder where a file is meant; name a file")
        case errno.ELOOP:
            return UserError(f"'{path}' is a link that leads back to itself; give the file itself")
        case errno.ENXIO | errno.ENODEV:
            return UserError(f"'{path}' is a pipe, a socket or a device; give a file")
    return None


_SPACE = "free some space and start the command again"
_PERMISSION = "change its permissions, or name another"
_PATH = "name another path"
_DISK = "check that disk, or name a folder on another"
CURES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "raise the limit (`ulimit -f`), or name a folder on another file system",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: _PERMISSION,
    errno.ENOENT: "it was moved or removed meanwhile; bring it back, or name another",
    errno.ENOTEMPTY: _PATH,
    errno.EMFILE: "raise the limit (`ulimit -n`), or give fewer --workers",
    errno.ENFILE: "close other programs, or give fewer --workers",
    errno.ENOMEM: "give fewer images at once, or fewer --workers",
    errno.EBUSY: "another program uses it; wait for that, or name another",
    errno.ETXTBSY: "another program uses it; wait for that, or name another",
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
    errno.ENOTCONN: _DISK,
    errno.ETIMEDOUT: _DISK,
}


def writing_mistake(error: OSError, what: str, path: os.PathLike[str], cure: str) -> UserError:
    """Why something can't be written, with the cure of its kind.

    Args:
        error: As Python raises it.
        what: "write", "make the folder": what was tried.
        path: What was to be written.
        cure: What to do where the kind of error has no cure of its own.
    """
    reason = error.strerror or str(error)
    if (mistake := mistake_of_system(error)) and error.filename:
        return mistake
    remedy = CURES.get(error.errno or 0, cure)
    return UserError(f"can't {what} {shorten(str(path), 160)}: {reason}; {remedy}")


def disk_mistake(error: OSError) -> UserError | None:
    """What a user can do about a file or disk that fails; None where the system said no reason.

    Args:
        error: As Python raises it.
    """
    cure = CURES.get(error.errno or 0)
    if cure is None or (error.errno == errno.ENOENT and not error.filename):
        return None
    name = error.filename
    location = os.fsdecode(name) if isinstance(name, bytes | str) and name else "the disk"
    if cure == _SPACE:
        return UserError(f"no space left writing to {location}; {cure}")
    return UserError(f"{location}: {error.strerror or 'it fails'}; {cure}")
