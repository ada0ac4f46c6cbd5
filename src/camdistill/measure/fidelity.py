"""Fidelity of a student to its teacher: agreement, divergence and maps, per image and as means.

Maps are compared rectified, on the teacher's grid, for the teacher's top class. A blank or constant
student map scores 0 and counts. A blank or constant teacher map has no shape to compare with. Its
image is left out of the map scores (NaN in the table), and every summary has the number of scored
images.

`runner_up` measures whether the student's maps depend on the class. It is the Pearson correlation
of the *signed* maps of the teacher's second likeliest class. Its control `same_map` uses the
student's map of the top class instead. A student that is no better than that has one map for all
classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, distributed

from camdistill.measure.intervals import (
    FloatArray,
    Interval,
    bootstrap_means,
    percentile_interval,
    skill_of_means,
)
from camdistill.measure.scores import agreement, correct, divergence, map_scores, signed_pearson
from camdistill.types import Labels, Logits

IntArray = NDArray[np.int64]
MapsByLayer = Mapping[str, Float[Tensor, "batch _ _"]]  # each layer has its own grid

MEASURES = ("pearson", "spearman", "cosine")
RUNNER_UP = "runner_up"
SAME_MAP = "controls.same_map"


class MapSummary(TypedDict):
    """Means over the `scored` images.

    A mean is None where no image could be scored, or where it wasn't measured.
    """

    pearson: float | None
    spearman: float | None
    cosine: float | None
    skill: float | None
    runner_up: float | None
    scored: int


class ControlSummary(MapSummary):
    """Means of a control, at the last layer pair and at each layer."""

    layers: dict[str, MapSummary]


class StudentSummary(ControlSummary):
    """Means of the student; `accuracy` is None without labels, `kl` is in nats."""

    accuracy: float | None
    agreement: float | None
    kl: float | None


class FidelitySummary(TypedDict):
    """The entry of one student in `results.json`; `flatten` gives its dotted keys."""

    n: int
    student: StudentSummary
    controls: dict[str, ControlSummary]


@dataclass(frozen=True)
class FidelityTable:
    """Values of each image, one row per image, in the order of the ids.

    Attributes:
        ids: The images' numbers in their data set.
        columns: float32 values by their key in the results: `student.accuracy` (0 or 1; NaN without
            a label), `student.agreement`, `student.kl`, `student.layers.<name>.pearson` and so on,
            `controls.mean_map.layers.<name>.pearson` and so on.
        layers: The student's layers, the main one last.
    """

    ids: IntArray
    columns: dict[str, FloatArray]
    layers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


class FidelityMeter:
    """Accumulates fidelity over a loop of batches, and over processes.

    Values stay on their device, as one small float32 row for each image, until `table` is called.

    Args:
        pairs: The teacher's layer by the student's layer. The last pair is the main one, whose
            values stand directly under `student`.
        mean_map_by_layer: The mean ReLU map of the training split by the teacher's layer, for the
            mean-map control and the skill. Without it neither is measured.
        runner_up: Whether each batch has maps of the runner-up class.

    Raises:
        ValueError: If a paired layer of the teacher has no mean map.
    """

    def __init__(
        self,
        pairs: Mapping[str, str],
        mean_map_by_layer: Mapping[str, Float[Tensor, "_ _"]] | None = None,
        *,
        runner_up: bool = False,
    ) -> None:
        self.pairs = dict(pairs)
        self.runner_up = runner_up
        self.mean_map_by_layer = dict(mean_map_by_layer or {})
        if self.mean_map_by_layer:
            missing = sorted(set(self.pairs.values()) - set(self.mean_map_by_layer))
            if missing:
                raise ValueError(f"no mean map of the teacher's layers {missing}")
        self.names = _column_names(list(self.pairs), bool(self.mean_map_by_layer), runner_up)
        self.reset()

    def reset(self) -> None:
        """Discards all accumulated values."""
        self._rows: list[Tensor] = []
        self._ids: list[Tensor] = []

    def update(
        self,
        student_logits: Logits,
        teacher_logits: Logits,
        labels: Labels,
        student_maps_by_layer: MapsByLayer,
        teacher_maps_by_layer: MapsByLayer,
        counted: Bool[Tensor, "batch"],
        ids: Labels,
        runner_up: tuple[MapsByLayer, MapsByLayer] | None = None,
    ) -> None:
        """Adds the values of one batch.

        Args:
            student_logits: The student's logits.
            teacher_logits: The teacher's logits of the same classes.
            labels: Class indices, -1 where there is none.
            student_maps_by_layer: The student's raw maps of the teacher's top class.
            teacher_maps_by_layer: The teacher's raw maps of its top class.
            counted: False for images that only fill up a shard; they are dropped.
            ids: The images' numbers; an image that occurs twice counts once.
            runner_up: The student's and the teacher's raw maps of the teacher's second likeliest
                class, by layer. Required if and only if the meter has `runner_up`.

        Raises:
            ValueError: If maps of the runner-up are missing or unexpected.
        """
        if (runner_up is not None) != self.runner_up:
            raise ValueError("maps of the runner-up come with every batch, or with none")
        columns = [
            correct(student_logits, labels),
            agreement(student_logits, teacher_logits),
            divergence(student_logits, teacher_logits),
        ]
        for student_layer, teacher_layer in self.pairs.items():
            teacher_maps = teacher_maps_by_layer[teacher_layer]
            columns += map_scores(student_maps_by_layer[student_layer], teacher_maps)
            if self.mean_map_by_layer:
                mean = self.mean_map_by_layer[teacher_layer].to(teacher_maps.device)
                columns += map_scores(mean.expand(len(teacher_maps), -1, -1), teacher_maps)
            if runner_up is not None:
                second = runner_up[1][teacher_layer]
                for class_maps in (runner_up[0], student_maps_by_layer):
                    columns.append(signed_pearson(class_maps[student_layer], second))
        # Selecting by a mask waits for the device; a training loop's validation can afford it.
        self._rows.append(torch.stack([column.detach().float() for column in columns], 1)[counted])
        self._ids.append(ids.detach()[counted])

    def table(self) -> FidelityTable:
        """Returns the values of all images from all processes; each process must call this."""
        rows = torch.cat(self._rows).cpu().numpy() if self._rows else None
        ids = torch.cat(self._ids).cpu().numpy() if self._ids else None
        if rows is None or ids is None:
            rows, ids = np.empty((0, len(self.names)), np.float32), np.empty(0, np.int64)
        if distributed.is_available() and distributed.is_initialized():
            parts: list[tuple[IntArray, FloatArray]] = [(ids, rows)] * distributed.get_world_size()
            distributed.all_gather_object(parts, (ids, rows))
            ids = np.concatenate([part[0] for part in parts])
            rows = np.concatenate([part[1] for part in parts])
        ids, first = np.unique(ids, return_index=True)
        columns = dict(zip(self.names, np.ascontiguousarray(rows[first].T), strict=True))
        return FidelityTable(ids.astype(np.int64), columns, tuple(self.pairs))

    def summary(self) -> FidelitySummary:
        """Returns the `summary` of the table."""
        return summary(self.table())


def summary(table: FidelityTable) -> FidelitySummary:
    """Returns means over the images, with the skill over the mean map.

    Skill is 1 - (1 - mean cos(P, T)) / (1 - mean cos(M, T)), with P the student's map, T the
    teacher's and M the teacher's mean ReLU map over the training split. 1 is a perfect student, and
    0 is one that is no better than M.
    """
    by_layer = {layer: _map_summary(table, "student", layer) for layer in table.layers}
    student = StudentSummary(
        accuracy=_mean(table.columns["student.accuracy"]),
        agreement=_mean(table.columns["student.agreement"]),
        kl=_mean(table.columns["student.kl"]),
        **_main(by_layer),
        layers=by_layer,
    )
    controls = {}
    if any(key.startswith("controls.mean_map.") for key in table.columns):
        by_layer = {
            layer: _map_summary(table, "controls.mean_map", layer) for layer in table.layers
        }
        controls["mean_map"] = ControlSummary(**_main(by_layer), layers=by_layer)
    if any(key.startswith(SAME_MAP) for key in table.columns):
        by_layer = {layer: _map_summary(table, SAME_MAP, layer) for layer in table.layers}
        controls["same_map"] = ControlSummary(**_main(by_layer), layers=by_layer)
    return FidelitySummary(n=len(table), student=student, controls=controls)


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, float | int]:
    """Returns the numbers of a nested mapping by dotted key; None is left out."""
    flat: dict[str, float | int] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = value
    return flat


def intervals(
    table: FidelityTable, *, seed: int = 0, level: float = 0.95, resamples: int = 2000
) -> dict[str, Interval]:
    """Returns bootstrap intervals over images of every mean and skill in `flatten(summary(table))`.

    All values share the resamples. The intervals are over images only; `seed_interval` is over
    seeds of training.
    """
    columns = {key: value for key, value in table.columns.items() if not np.isnan(value).all()}
    if not len(table):
        return {}
    matrix = np.stack(list(columns.values()), 1)
    resampled = dict(zip(columns, bootstrap_means(matrix, seed, resamples).T, strict=True))
    means = {key: float(np.nanmean(value, dtype=np.float64)) for key, value in columns.items()}
    for layer in table.layers:
        student_key, baseline_key = (
            f"{source}.layers.{layer}.cosine" for source in ("student", "controls.mean_map")
        )
        if student_key in means and baseline_key in means and means[baseline_key] < 1:
            key = f"student.layers.{layer}.skill"
            means[key] = float(
                skill_of_means(np.float64(means[student_key]), np.float64(means[baseline_key]))
            )
            resampled[key] = skill_of_means(resampled[student_key], resampled[baseline_key])
    intervals_by_key = {
        key: percentile_interval(means[key], resampled[key], level) for key in means
    }
    if table.layers:
        last = f".layers.{table.layers[-1]}."
        intervals_by_key |= {
            key.replace(last, "."): value for key, value in intervals_by_key.items() if last in key
        }
    return intervals_by_key


def _column_names(layers: list[str], with_mean_map: bool, runner_up: bool) -> tuple[str, ...]:
    names = ["student.accuracy", "student.agreement", "student.kl"]
    for layer in layers:
        names += [f"student.layers.{layer}.{measure}" for measure in MEASURES]
        if with_mean_map:
            names += [f"controls.mean_map.layers.{layer}.{measure}" for measure in MEASURES]
        if runner_up:
            names += [f"{source}.layers.{layer}.{RUNNER_UP}" for source in ("student", SAME_MAP)]
    return tuple(names)


def _map_summary(table: FidelityTable, source: str, layer: str) -> MapSummary:
    missing = np.full(len(table), np.nan, np.float32)
    values = {
        measure: table.columns.get(f"{source}.layers.{layer}.{measure}", missing)
        for measure in (*MEASURES, RUNNER_UP)
    }
    cosines = values["cosine"]
    baseline = table.columns.get(f"controls.mean_map.layers.{layer}.cosine")
    known = ~np.isnan(cosines)
    skill = None
    if baseline is not None and known.any() and float(baseline[known].mean(dtype=float)) < 1:
        skill = float(
            skill_of_means(cosines[known].mean(dtype=float), baseline[known].mean(dtype=float))
        )
    return MapSummary(
        pearson=_mean(values["pearson"]),
        spearman=_mean(values["spearman"]),
        cosine=_mean(cosines),
        skill=skill,
        runner_up=_mean(values[RUNNER_UP]),
        scored=int(known.sum()),
    )


def _main(by_layer: dict[str, MapSummary]) -> MapSummary:
    if by_layer:
        return by_layer[next(reversed(by_layer))]
    return MapSummary(
        pearson=None, spearman=None, cosine=None, skill=None, runner_up=None, scored=0
    )


def _mean(values: FloatArray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if len(known) else None
