"""Mistakes of the user, told in one line: what was given, what is true, what to do."""

import difflib
import errno
import os
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake whose message tells the cure; the command line prints it and exits with 2."""


_SPACE = "free some and start the command again"
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
    errno.EEXIST: _PATH,
    errno.ENOTDIR: _PATH,
    errno.EISDIR: _PATH,
    errno.ENOTEMPTY: _PATH,
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links lead in a circle; name another path",
    errno.EMFILE: "raise the limit (`ulimit -n`), or give fewer --workers",
    errno.ENFILE: "close other programs, or give fewer --workers",
    errno.ENOMEM: "give fewer images at once, or fewer --workers",
    errno.EBUSY: "another program uses it; wait for that, or name another",
    errno.ETXTBSY: "another program uses it; wait for that, or name another",
    errno.EIO: _DISK,
    errno.ENXIO: _DISK,
    errno.ENODEV: _DISK,
    errno.ESTALE: _DISK,
    errno.ENOTCONN: _DISK,
    errno.ETIMEDOUT: _DISK,
}


def disk_mistake(error: OSError) -> str | None:
    """What a user can do about a file or disk that fails; None where the system said no reason.

    Args:
        error: As Python raises it.
    """
    cure = CURES.get(error.errno or 0)
    if cure is None or (error.errno == errno.ENOENT and not error.filename):
        return None
    name = error.filename
    where = os.fsdecode(name) if isinstance(name, bytes | str) and name else "the disk"
    if cure == _SPACE:
        return f"no space left writing to {where}; {cure}"
    return f"{where}: {error.strerror or 'it fails'}; {cure}"


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
    shown = ", ".join(repr(option) for option in known[:8])
    return f"there are: {shown}" + (", ..." if len(known) > 8 else "")
