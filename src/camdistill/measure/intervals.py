"""Intervals of means over images (bootstrap, paired or not) and over seeds (Student's t)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

FloatArray = NDArray[np.floating]

DRAWS = 4_000_000  # resampled rows held at once by a bootstrap: 32 MB an array


class Interval(NamedTuple):
    """A mean and the bounds of its interval."""

    mean: float
    low: float
    high: float


def interval(
    values: FloatArray, seed: int = 0, *, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """Percentile bootstrap interval of a mean over images (Efron 1979); NaN rows are left out."""
    kept = np.asarray(values, np.float64)
    kept = kept[~np.isnan(kept)]
    if not len(kept):
        raise ValueError("no value to take the interval of")
    drawn = resampled_means(kept[:, None], seed, resamples)[:, 0]
    return percentiles(float(kept.mean()), drawn, level)


def paired_interval(
    first: FloatArray,
    second: FloatArray,
    seed: int = 0,
    *,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Percentile bootstrap interval of the mean of first - second, rows being the same images."""
    if np.shape(first) != np.shape(second):
        raise ValueError(f"{np.shape(first)} values against {np.shape(second)}: other images")
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return interval(difference, seed, level=level, resamples=resamples)


def seed_interval(values: FloatArray | list[float], *, level: float = 0.95) -> Interval:
    """Student's t-interval of a mean over seeds; the bounds of a single seed are NaN."""
    runs = np.asarray(values, np.float64)
    if not runs.size:
        raise ValueError("no seed to take the interval of")
    mean = float(runs.mean())
    if runs.size == 1:
        return Interval(mean, float("nan"), float("nan"))
    half = float(stdtrit(runs.size - 1, (1 + level) / 2) * runs.std(ddof=1) / np.sqrt(runs.size))
    return Interval(mean, mean - half, mean + half)


def resampled_means(values: FloatArray, seed: int, resamples: int) -> FloatArray:
    """Column means of bootstrap resamples of the rows, NaN left out: [resamples, columns]."""
    count = len(values)
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0).astype(np.float64)
    complete = bool(known.all())
    generator = np.random.default_rng(seed)
    chunk = max(1, DRAWS // max(count, 1))
    means = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        rows = generator.integers(0, count, (size, count))
        rows += np.arange(size)[:, None] * count
        weights = np.bincount(rows.ravel(), minlength=size * count).reshape(size, count)
        drawn = weights.astype(np.float64)
        total = drawn @ known if not complete else float(count)
        with np.errstate(invalid="ignore"):
            means.append(drawn @ filled / total)
    return np.concatenate(means)


def skill_of_means(
    cosine_mean: FloatArray | float, baseline_mean: FloatArray | float
) -> FloatArray:
    """Skill, 1 - (1 - mean cosine) / (1 - mean cosine of the baseline), of means already taken."""
    return np.asarray(1 - (1 - cosine_mean) / (1 - baseline_mean))


def percentiles(mean: float, drawn: FloatArray, level: float) -> Interval:
    """The central interval of resampled values around the value itself."""
    low, high = np.nanpercentile(drawn, [50 * (1 - level), 50 * (1 + level)])
    return Interval(mean, float(low), float(high))
