"""Removes results of an earlier student from a run's folder."""

import contextlib
from pathlib import Path

RESULTS = "results.json"
TABLE = "test_images.npz"
PREDICTIONS = "predictions.npz"
EVENTS = ("test", "validate", "predict")  # folders of TensorBoard's files


def remove_earlier_results(folder: Path) -> list[str]:
    """Removes what was measured of a student that another one is about to replace.

    Returns:
        Names of what was removed.
    """
    files = [folder / name for name in (RESULTS, TABLE, PREDICTIONS)]
    removed = []
    for file in files:
        if file.is_file():
            file.unlink()
            removed.append(file.name)
    for name in EVENTS:
        events = list((folder / name).glob("events.out.tfevents.*"))
        for file in events:
            file.unlink()
        if events:
            removed.append(f"{name}/")
            with contextlib.suppress(OSError):  # it holds something else too
                (folder / name).rmdir()
    return removed
