"""Writing files: whole or not at all."""

import contextlib
import errno
import os
from pathlib import Path

from camdistill.errors import UserError


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
