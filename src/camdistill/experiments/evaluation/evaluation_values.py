"""The values of an evaluation: one for each map, metric and image."""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from camdistill.errors import UserError
from camdistill.measure.metrics import metric_of
from camdistill.store.atomic_files import read_arrays, write_atomically

CURVES = ("insertion_blur", "deletion_gray")  # whose curves are kept, where they are measured
ORACLE, LADDER = "oracle", "ladder"
CONTROLS = (
    *("random", "smooth_random", "edges", "center", "mean_map", "inverted", "blurred_copy"),
    *("distractor", ORACLE),
)
FILE = "values.npz"
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # a damaged .npz


@dataclass(frozen=True)
class Values:
    """One value for each map, metric and image.

    Attributes:
        entries: Explainers, controls, rungs of the ladder, in this order. Explainers of one name
            are its seeds, `name#1`, `name#2`.
        explainers: How many of them are explainers.
        metrics: Names.
        table: NaN where a metric has nothing to say of an image, or the map was a failure.
        failed: Maps with NaN or infinity.
        blank: Maps that are constant.
        seconds: Seconds of making one map, the median over images; NaN where maps are stored or no
            explainer's. Forwards of a batch are shared by its images.
        curves: By entry and metric, at `removal.LEVELS`.
    """

    entries: tuple[str, ...]
    explainers: int
    metrics: tuple[str, ...]
    table: Float[np.ndarray, "entries metrics images"]
    failed: Bool[np.ndarray, "entries images"]
    blank: Bool[np.ndarray, "entries images"]
    seconds: dict[str, float]
    curves: dict[tuple[str, str], Float[np.ndarray, "images levels"]]

    def of(self, entry: str, metric: str) -> Float[np.ndarray, "images"]:
        """One map's values by one metric."""
        place = self.entries.index(entry)
        values: NDArray[np.float32] = self.table[place, self.metrics.index(metric)]
        return values

    @property
    def real(self) -> tuple[str, ...]:
        """The explainers."""
        return self.entries[: self.explainers]

    @property
    def controls(self) -> tuple[str, ...]:
        """Maps that must lose, and the oracle, which must win."""
        return tuple(e for e in self.entries[self.explainers :] if not e.startswith(LADDER))

    @property
    def rungs(self) -> tuple[str, ...]:
        """The ladder, best first."""
        return tuple(e for e in self.entries if e.startswith(LADDER))


def group_of(entry: str) -> str:
    """The name that an explainer shares with its other seeds."""
    return entry.partition("#")[0]


def finite_mean(rows: Float[np.ndarray, "rows images"]) -> Float[np.ndarray, "images"]:
    """Of each image the mean of the values that are known, NaN where none is."""
    count = (~np.isnan(rows)).sum(0)
    total = np.nansum(rows, 0, dtype=np.float64)
    mean: NDArray[np.float64] = np.where(count, total / np.maximum(count, 1), np.nan)
    return mean


def save_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Writes arrays to a file, whole or not at all."""
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    write_atomically(path, content.getvalue())


def save_values(
    folder: Path, values: Values, ids: NDArray[np.int64], settings: Mapping[str, object]
) -> None:
    """Writes what was found: `<entry>/<metric>` an image, and what else there is to know."""
    arrays: dict[str, NDArray[np.generic]] = {
        f"{entry}/{metric}": values.of(entry, metric)
        for entry in values.entries
        for metric in values.metrics
    }
    curves = {f"curves/{entry}/{metric}": curve for (entry, metric), curve in values.curves.items()}
    about = {
        "entries": np.array(values.entries),
        "explainers": np.array(values.explainers),
        "metrics": np.array(values.metrics),
        "failed": values.failed,
        "blank": values.blank,
        "seconds": np.array([values.seconds[entry] for entry in values.entries]),
        "settings": np.array(json.dumps(settings, sort_keys=True)),
    }
    save_arrays(folder / FILE, {"ids": ids, **arrays, **curves, **about})


def read_values(folder: Path) -> tuple[Values, dict[str, object]]:
    """What `save_values` wrote, and the settings of that evaluation.

    Raises:
        UserError: There is no such file, or it isn't one.
    """
    path = folder / FILE
    try:
        arrays = read_arrays(path)
        entries, metrics = arrays["entries"].tolist(), arrays["metrics"].tolist()
        table = [[arrays[f"{entry}/{metric}"] for metric in metrics] for entry in entries]
        values = Values(
            entries=tuple(entries),
            explainers=int(arrays["explainers"]),
            metrics=tuple(metrics),
            table=np.asarray(table, np.float32),
            failed=arrays["failed"],
            blank=arrays["blank"],
            seconds=dict(zip(entries, arrays["seconds"].tolist(), strict=True)),
            curves={
                (parts[1], parts[2]): one
                for name, one in arrays.items()
                if len(parts := name.split("/")) == 3
            },
        )
        settings: dict[str, object] = json.loads(str(arrays["settings"]))
    except FileNotFoundError:
        begun = " (an evaluation there isn't whole)" if (folder / "partial").is_dir() else ""
        raise UserError(
            f"no {FILE} in '{folder}'{begun}: name a finished folder of `camdistill evaluate`"
        ) from None
    except NotADirectoryError:
        raise UserError(f"'{folder}' is a file: name the folder that it lies in") from None
    except UserError:  # a ValueError too
        raise
    except UNREADABLE:
        raise UserError(
            f"'{path}' is not what `camdistill evaluate` writes, or was written before evaluations "
            "could be pooled; run that evaluation again"
        ) from None
    return values, settings


def join_values(paths: Sequence[Path], metrics: Sequence[str], explainers: int) -> Values:
    """The values of all batches, each in its file; metrics that nothing was measured by go."""
    parts: list[dict[str, NDArray[np.generic]]] = []
    for path in paths:
        with np.load(path, allow_pickle=False) as file_arrays:
            parts.append(dict(file_arrays))
    joined_arrays = {
        name: np.concatenate([part[name] for part in parts], -1)
        for name in parts[0]
        if not name.startswith("curves/")
    }
    names = tuple(
        name.removeprefix("values/") for name in joined_arrays if name.startswith("values/")
    )
    table = np.stack([joined_arrays[f"values/{name}"] for name in names]).astype(np.float32)
    measured = [place for place in range(table.shape[1]) if not np.isnan(table[:, place]).all()]
    curves = {
        (name.split("/")[1], name.split("/")[2]): np.concatenate([part[name] for part in parts])
        for name in parts[0]
        if name.startswith("curves/")
    }
    return Values(
        entries=names,
        explainers=explainers,
        metrics=tuple(metrics[place] for place in measured),
        table=table[:, measured],
        failed=np.stack([joined_arrays[f"failed/{name}"] for name in names]),
        blank=np.stack([joined_arrays[f"blank/{name}"] for name in names]),
        seconds={name: float(np.median(joined_arrays[f"seconds/{name}"])) for name in names},
        curves={key: np.asarray(curve, np.float32) for key, curve in curves.items()},
    )


def sign_of(metric: str) -> int:
    """1 where higher is better, else -1."""
    return 1 if metric_of(metric).higher else -1
