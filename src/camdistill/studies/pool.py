"""Evaluations of the same explainers on the same images, side by side: seeds, or networks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from camdistill.errors import UserError
from camdistill.measure.intervals import Interval, crossed_interval
from camdistill.studies.values import Values, group_of, read_values

Table = dict[str, dict[str, Interval]]


@dataclass(frozen=True)
class Pool:
    """One evaluation, or several that differ in their seeds or in the network that is explained.

    Explainers of one name are its seeds, within an evaluation and across them.

    Attributes:
        runs: The evaluations: same names, same images in the same order.
    """

    runs: tuple[Values, ...]

    @property
    def real(self) -> tuple[str, ...]:
        """The explainers' names."""
        return tuple(dict.fromkeys(group_of(entry) for entry in self.runs[0].real))

    @property
    def controls(self) -> tuple[str, ...]:
        """Maps that must lose, and the oracle, which must win."""
        return self.runs[0].controls

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that every evaluation measured."""
        first, *others = self.runs
        return tuple(name for name in first.metrics if all(name in one.metrics for one in others))

    @property
    def images(self) -> int:
        """How many."""
        return len(self.runs[0].table[0, 0])

    def scores(self, name: str, metric: str) -> Float[np.ndarray, "seeds images"]:
        """One explainer's or control's values, by seed."""
        return np.concatenate([_members(run, name, metric) for run in self.runs])

    def gains(self, name: str, base: str, metric: str) -> Float[np.ndarray, "seeds images"]:
        """How far one stands above another: seed by seed, or above the only one in its run."""
        found = [_members(run, name, metric) - _members(run, base, metric) for run in self.runs]
        return np.concatenate(found)

    def seconds(self, name: str) -> float:
        """Of making one map: the median over seeds."""
        return float(np.median([run.seconds[e] for run in self.runs for e in _entries(run, name)]))

    def counted(self, flags: Literal["failed", "blank"], name: str) -> int:
        """How many maps `failed`, or were `blank`, over all seeds."""
        return sum(
            int(_flags(run, flags)[run.entries.index(entry)].sum())
            for run in self.runs
            for entry in _entries(run, name)
        )

    def curve(self, name: str, metric: str) -> Float[np.ndarray, "rows levels"] | None:
        """Curves of all images and seeds, where they were kept."""
        found = [
            run.curves[entry, metric]
            for run in self.runs
            for entry in _entries(run, name)
            if (entry, metric) in run.curves
        ]
        return np.concatenate(found) if found else None


def read_pool(folders: Sequence[Path]) -> tuple[Pool, list[dict[str, object]]]:
    """Finished evaluations, and their settings.

    Raises:
        UserError: Fewer than two, or they don't belong together: other images, another side of the
            distillation explained, other explainers, or the same evaluation twice.
    """
    if len(folders) < 2:
        raise UserError(
            f"{len(folders)} folders to pool; give two or more: --runs runs/one runs/other"
        )
    read = [read_values(folder) for folder in folders]
    for place, (values, settings) in enumerate(read):
        first = read[0]
        for name, what in (("images", "other images"), ("of", "another --of")):
            if settings.get(name) != first[1].get(name):
                raise UserError(
                    f"'{folders[place]}' has {what} than '{folders[0]}': pool evaluations that "
                    "differ in their seed or their networks alone"
                )
        if settings in [earlier for _, earlier in read[:place]]:
            raise UserError(
                f"'{folders[place]}' is an evaluation that was named before: give each once, with "
                "another --seed or another network"
            )
        if different := sorted(set(values.entries) ^ set(first[0].entries)):
            raise UserError(
                f"'{different[0]}' is in one of '{folders[0]}' and '{folders[place]}' alone: "
                "evaluate the same explainers; NAME=FILE names one"
            )
    pool = Pool(tuple(values for values, _ in read))
    if not pool.metrics:
        raise UserError("these evaluations have no metric in common; evaluate them alike")
    return pool, [settings for _, settings in read]


def means(pool: Pool, seed: int) -> Table:
    """Of explainers and controls, where a metric has something to say of them."""
    return {
        name: {
            metric: crossed_interval(scores, seed)
            for metric in pool.metrics
            if not np.isnan(scores := pool.scores(name, metric)).any(0).all()
        }
        for name in (*pool.real, *pool.controls)
    }


def differences(pool: Pool, seed: int) -> Table:
    """Every explainer minus the first one, image by image."""
    first, *others = pool.real
    return {
        name: {
            metric: crossed_interval(gains, seed)
            for metric in pool.metrics
            if not np.isnan(gains := pool.gains(name, first, metric)).any(0).all()
        }
        for name in others
    }


def demand_pairs(names: Sequence[str]) -> None:
    """Checks that explainers with several seeds have as many as each other, before any is asked."""
    counts = {
        name: sum(group_of(other) == name for other in names) for name in map(group_of, names)
    }
    several = {name: count for name, count in counts.items() if count > 1}
    if len(set(several.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in several.items())
        raise UserError(
            f"explainers of several seeds must have as many as each other, these have {told}: name "
            "them apart"
        )


def _entries(run: Values, name: str) -> list[str]:
    return [entry for entry in run.entries if group_of(entry) == name]


def _members(run: Values, name: str, metric: str) -> Float[np.ndarray, "members images"]:
    return np.stack([run.of(entry, metric) for entry in _entries(run, name)]).astype(np.float64)


def _flags(run: Values, kind: Literal["failed", "blank"]) -> Bool[np.ndarray, "entries images"]:
    return run.failed if kind == "failed" else run.blank
