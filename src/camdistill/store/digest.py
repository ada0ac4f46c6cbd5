"""Digests: the one way in which keys of caches, runs and files are made."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path


def digest_of(parts: Mapping[str, object]) -> str:
    """Returns the SHA-256 of named values, in hexadecimal; their order does not matter.

    Args:
        parts: Values that JSON can hold.

    Raises:
        TypeError: A value is nothing that JSON can hold.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal; the file is read piece by piece.

    Raises:
        OSError: The file can't be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
