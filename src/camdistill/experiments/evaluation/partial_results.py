"""Stores the batches of an unfinished evaluation, so that it can be resumed."""

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camdistill.errors import UserError
from camdistill.experiments.evaluation.evaluation_values import Values, read_values, save_arrays
from camdistill.store.atomic_files import write_atomically

Arrays = dict[str, NDArray[np.generic]]
PARTIAL = "partial"


def read_finished(folder: Path, settings: Mapping[str, object]) -> Values | None:
    """The values in a folder, if they are whole and were measured with exactly these settings."""
    try:
        values, stored_settings = read_values(folder)
    except (UserError, zipfile.BadZipFile, EOFError):
        return None
    return values if _text(stored_settings) == _text(settings) else None


def partial_folder(folder: Path, settings: Mapping[str, object]) -> Path:
    """The folder of this evaluation's batches: another one's stay beside it until it goes on."""
    text = _text(settings)
    path = folder / PARTIAL / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not (path / "settings.json").is_file():
        write_atomically(path / "settings.json", text.encode())
    return path


def load_or_compute(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """Arrays from their file; made, and the file with them, where it is missing or damaged."""
    try:
        # From memory: numpy leaves a file that is no archive open.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file_arrays:
            return dict(file_arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        arrays = make()
        save_arrays(path, arrays)
        return arrays


def clear(folder: Path, settings: Mapping[str, object]) -> None:
    """Removes this evaluation's batches, and the folder of all if there are no others."""
    shutil.rmtree(partial_folder(folder, settings))
    if not any((folder / PARTIAL).iterdir()):
        (folder / PARTIAL).rmdir()


def _text(settings: Mapping[str, object]) -> str:
    return json.dumps(settings, sort_keys=True)
