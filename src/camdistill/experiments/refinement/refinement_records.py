"""The jobs of a refinement and the records of their results."""

import base64
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from camdistill.experiments.refinement.refinement_measurement import ValuesByColumn


@dataclass(frozen=True)
class Job:
    """A start network, or an arm from one.

    Attributes:
        start: Name of the start network.
        arm: "start" for itself.
        floor: Validation accuracy that the chosen epoch must have; None takes the last.
    """

    start: str
    arm: str
    floor: float | None = None


@dataclass(frozen=True)
class RefinementRecord:
    """What came out of one job.

    Attributes:
        key: Key of everything that decides the job: equal keys, equal runs.
        start: Name of the start network.
        arm: "start", "ce", the objective's kind, a control, or "student of" one.
        accuracies: On validation images after each epoch; without labels agreement with the start.
        epoch: The chosen one, from 1; 0 for the start.
        matched: Whether it is as accurate as cross-entropy alone, within the tolerance.
        columns: By name, one value a test image, packed.
        images: How many test images.
        checkpoint: The network's file.
        seconds: Wall clock.
    """

    key: str
    start: str
    arm: str
    accuracies: list[float]
    epoch: int
    matched: bool
    columns: dict[str, str]
    images: int
    checkpoint: str
    seconds: float

    def values(self, column: str) -> Float[np.ndarray, "images"]:
        """One value a test image."""
        raw = base64.b64decode(self.columns[column])
        return np.frombuffer(raw, "<f4").astype(np.float64)


def pack_columns(values: ValuesByColumn) -> dict[str, str]:
    """Values by column as text."""
    return {
        name: base64.b64encode(np.asarray(value, "<f4").tobytes()).decode()
        for name, value in values.items()
    }
