"""Pools evaluations of the same explainers and images over seeds or networks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from camdistill.errors import UserError
from camdistill.experiments.evaluation.evaluation_values import (
    Values,
    finite_mean,
    group_of,
    read_values,
)
from camdistill.measure.intervals import FloatArray, Interval, seed_interval, two_way_interval

Table = dict[str, dict[str, Interval]]
Scores = Float[np.ndarray, "seeds images"]
OF_FIRST = ("inverted", "blurred_copy")  # controls that are made of the first explainer's map


@dataclass(frozen=True)
class EvaluationPool:
    """One evaluation, or several that differ in their seeds or in the network that is explained.

    Explainers of one name are its seeds, within an evaluation and across them. The same map
    measured again, with other random choices, is no other seed: its values are averaged.

    Attributes:
        runs: The evaluations: same entries, same images in the same order.
        makers: Of each evaluation, what made an entry's map: networks and files. Empty where all
            differ.
    """

    runs: tuple[Values, ...]
    makers: tuple[Mapping[str, str], ...] = ()

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
        return tuple(name for name in first.metrics if all(name in run.metrics for run in others))

    @property
    def images(self) -> int:
        """How many."""
        return len(self.runs[0].table[0, 0])

    def seeds(self, name: str) -> int:
        """How many different maps go by a name."""
        return len(self.scores(name, self.metrics[0]))

    def maps(self, name: str) -> int:
        """How many maps an image were measured under a name."""
        return sum(len(_entries(run, name)) for run in self.runs)

    def scores(self, name: str, metric: str) -> Scores:
        """One explainer's or control's values, by seed."""
        scores_by_maker = [
            (self._maker(place, entry), run.of(entry, metric))
            for place, run in enumerate(self.runs)
            for entry in _entries(run, name)
        ]
        return _average_by_maker(scores_by_maker)

    def gains(self, name: str, base: str, metric: str) -> Scores:
        """How far one stands above another: seed by seed, or above the only one in its run.

        A control that is made of the first explainer's map stands beside that map alone.
        """
        gains_by_maker = []
        for place, run in enumerate(self.runs):
            pairs = _pairs(_entries(run, name), _entries(run, base))
            for one, other in pairs[:1] if name in OF_FIRST else pairs:
                maker = f"{self._maker(place, one)} {self._maker(place, other)}"
                gain = run.of(one, metric).astype(np.float64) - run.of(other, metric)
                gains_by_maker.append((maker, gain))
        return _average_by_maker(gains_by_maker)

    def _maker(self, place: int, entry: str) -> str:
        maker_by_entry = self.makers[place] if self.makers else {}
        return maker_by_entry.get(entry, f"{place} {entry}")

    def seconds(self, name: str) -> float:
        """Of making one map: the median over seeds."""
        return float(np.median([run.seconds[e] for run in self.runs for e in _entries(run, name)]))

    def count_flags(self, flags: Literal["failed", "blank"], name: str) -> int:
        """How many maps `failed`, or were `blank`, over all seeds."""
        return sum(
            int(_flags(run, flags)[run.entries.index(entry)].sum())
            for run in self.runs
            for entry in _entries(run, name)
        )

    def curve(self, name: str, metric: str) -> Float[np.ndarray, "rows levels"] | None:
        """Curves of all images and seeds, where they were kept."""
        curves = [
            run.curves[entry, metric]
            for run in self.runs
            for entry in _entries(run, name)
            if (entry, metric) in run.curves
        ]
        return np.concatenate(curves) if curves else None


def read_pool(folders: Sequence[Path]) -> tuple[EvaluationPool, list[dict[str, object]]]:
    """Finished evaluations, and their settings.

    Raises:
        UserError: Fewer than two, or they don't belong together: they may differ in their seed and
            in the networks, and in nothing else.
    """
    if len(folders) == 1:
        read_values(folders[0])  # says what is wrong with it
    if len(folders) < 2:
        count = "1 folder" if folders else "no folders"
        raise UserError(f"{count} to pool; give two or more: --runs runs/one runs/other")
    read = [read_values(folder) for folder in folders]
    for place, (values, settings) in enumerate(read):
        _check_comparable(folders[0], read[0], folders[place], values, settings)
        if settings in [earlier for _, earlier in read[:place]]:
            raise UserError(
                f"'{folders[place]}' is an evaluation that was named before: give each once, with "
                "another --seed or another network"
            )
    made_by = tuple(map_makers(values, settings) for values, settings in read)
    pool = EvaluationPool(tuple(values for values, _ in read), made_by)
    if not pool.metrics:
        raise UserError("these evaluations have no metric in common; evaluate them alike")
    return pool, [settings for _, settings in read]


def _check_comparable(
    first: Path,
    kin: tuple[Values, dict[str, object]],
    folder: Path,
    values: Values,
    settings: Mapping[str, object],
) -> None:
    """Refuses an evaluation that differs from the first in more than seed and networks."""
    for name, what in (
        ("measured_as", "another version of the metrics"),
        ("images", "other images"),
        ("of", "another --of"),
        ("layer", "another --layer"),
        ("batch", "another --batch"),
        ("metrics", "other --metrics"),
        ("meta", "another --meta"),
    ):
        if settings.get(name) != kin[1].get(name):
            raise UserError(
                f"'{folder}' has {what} than '{first}': pool evaluations that differ in their "
                "seed or their networks alone"
            )
    explainer_kinds = [_explainer_kinds(one) for one in (kin[1], settings)]
    if values.entries != kin[0].entries or explainer_kinds[0] != explainer_kinds[1]:
        raise UserError(
            f"'{folder}' compares other explainers than '{first}' ({', '.join(values.real)}; "
            f"{', '.join(kin[0].real)}): evaluate the same, in the same order; NAME=FILE names one"
        )


def _explainer_kinds(settings: Mapping[str, object]) -> list[tuple[str, str]]:
    explainers = settings["explainers"]
    assert isinstance(explainers, list), "as `evaluate` writes them"
    return [(explainer["name"], explainer["kind"]) for explainer in explainers]


def map_makers(values: Values, settings: Mapping[str, object]) -> dict[str, str]:
    """What made each entry's map: two evaluations that agree in it measured the same map twice."""
    explainers, network = settings["explainers"], settings["network"]
    assert isinstance(explainers, list), "as `evaluate` writes them"
    by_entry = {
        entry: f"{network} {explainer['kind']} {explainer['digest']}"
        for entry, explainer in zip(values.real, explainers, strict=True)
    }
    first = next(iter(by_entry.values()))
    return by_entry | {e: f"{e} {first}" for e in values.entries if e not in by_entry}


def mean_table(pool: EvaluationPool, seed: int) -> Table:
    """Of explainers and controls, where a metric has something to say of them."""
    return {
        name: _intervals({m: pool.scores(name, m) for m in pool.metrics}, seed)
        for name in (*pool.real, *pool.controls)
    }


def difference_table(pool: EvaluationPool, seed: int) -> Table:
    """Every explainer minus the first one, image by image."""
    first, *others = pool.real
    return {
        name: _intervals({m: pool.gains(name, first, m) for m in pool.metrics}, seed)
        for name in others
    }


def seed_and_image_interval(scores: Scores, seed: int) -> Interval | None:
    """The interval of seeds that have values, over the images that these have in common."""
    measured_scores = scores[~np.isnan(scores).all(1)]
    if not len(measured_scores):
        return None
    if np.isnan(measured_scores).any(0).all():  # no image is common to all
        return seed_interval(np.nanmean(measured_scores, 1))
    return two_way_interval(measured_scores, seed)


def _intervals(scores: Mapping[str, Scores], seed: int) -> dict[str, Interval]:
    interval_by_metric = {
        metric: seed_and_image_interval(metric_scores, seed)
        for metric, metric_scores in scores.items()
    }
    return {
        metric: metric_scores
        for metric, metric_scores in interval_by_metric.items()
        if metric_scores is not None
    }


def check_pairs(names: Sequence[str]) -> None:
    """Checks that explainers with several seeds have as many as each other, before any is asked."""
    counts = {
        name: sum(group_of(other) == name for other in names) for name in map(group_of, names)
    }
    several = {name: count for name, count in counts.items() if count > 1}
    if len(set(several.values())) > 1:
        seed_counts = ", ".join(f"{name} {count}" for name, count in several.items())
        raise UserError(
            "explainers of several seeds must have as many as each other, these have "
            f"{seed_counts}: name "
            "them apart"
        )


def _entries(run: Values, name: str) -> list[str]:
    return [entry for entry in run.entries if group_of(entry) == name]


def _pairs(names: Sequence[str], bases: Sequence[str]) -> list[tuple[str, str]]:
    """Seed by seed, or the only one of a side beside every one of the other."""
    if len(names) == len(bases):
        return list(zip(names, bases, strict=True))
    return [(one, other) for one in names for other in bases]


def _average_by_maker(values_by_maker: Sequence[tuple[str, Float[np.ndarray, "images"]]]) -> Scores:
    """Values of the same maker are one row: their mean, where any is known."""
    rows: dict[str, list[FloatArray]] = {}
    for maker, values in values_by_maker:
        rows.setdefault(maker, []).append(values)
    return np.stack([finite_mean(np.stack(repeated)) for repeated in rows.values()])


def _flags(run: Values, kind: Literal["failed", "blank"]) -> Bool[np.ndarray, "entries images"]:
    return run.failed if kind == "failed" else run.blank
