"""Pairs a student's units with the teacher's units that they follow most clearly."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from camdistill.layers.sweep.statistics.similarity import Match


@dataclass(frozen=True)
class UnitPair:
    """A unit of the teacher and the student's unit that follows it.

    Attributes:
        teacher: (layer, unit).
        student: (layer, unit).
        correlation: Correlation of their spatial means over images.
        images: How many.
    """

    teacher: tuple[str, int]
    student: tuple[str, int]
    correlation: float
    images: int


def clearest_pairs(
    matches: Sequence[Match],
    student: str,
    count: int,
    *,
    among: Collection[str] | None = None,
) -> tuple[UnitPair, ...]:
    """The pairs of one layer of the student that correlate most, the strongest first.

    Its units are paired one to one with the units of the teacher's layer that they follow best on
    average, so that no unit of the teacher is shown twice.

    Args:
        matches: Matches of a sweep.
        student: Name of the student's layer.
        count: At most so many; fewer where fewer correlate at all.
        among: The teacher's layers that may be taken; None for all.
    """
    candidates = [
        match
        for match in matches
        if match.student == student and (among is None or match.teacher in among)
    ]
    if not candidates:
        return ()
    best = max(candidates, key=_mean_correlation)
    pairs = [
        UnitPair((best.teacher, partner), (student, unit), value, best.images)
        for unit, (partner, value) in enumerate(
            zip(best.partner.tolist(), best.partner_correlation.tolist(), strict=True)
        )
        if partner >= 0 and value > 0
    ]
    return tuple(sorted(pairs, key=lambda pair: -pair.correlation)[:count])


def _mean_correlation(match: Match) -> float:
    mean = float(match.correlation.double().nanmean())
    return mean if math.isfinite(mean) else -math.inf
