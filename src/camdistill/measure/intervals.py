"""Intervals of means: over images (bootstrap, paired or not), over seeds (Student's t), or both."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

FloatArray = NDArray[np.floating]

DRAWS = 4_000_000  # resampled rows that a bootstrap has in memory at once: 32 MB per array


class Interval(NamedTuple):
    """A mean and the bounds of its interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: FloatArray, seed: int = 0, *, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """Returns the percentile bootstrap interval of a mean over images (Efron 1979).

    NaN is left out. The bounds of a single value are NaN.

    Raises:
        ValueError: If no value is left.
    """
    sample = np.asarray(values, np.float64)
    sample = sample[~np.isnan(sample)]
    if not len(sample):
        raise ValueError("no value to take the interval of")
    if len(sample) == 1:
        return Interval(float(sample[0]), float("nan"), float("nan"))
    means = bootstrap_means(sample[:, None], seed, resamples)[:, 0]
    return percentile_interval(float(sample.mean()), means, level)


def paired_interval(
    first: FloatArray,
    second: FloatArray,
    seed: int = 0,
    *,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Returns the percentile bootstrap interval of the mean of first - second over the same images.

    Raises:
        ValueError: If the shapes differ, or no value is left.
    """
    if np.shape(first) != np.shape(second):
        raise ValueError(f"{np.shape(first)} values against {np.shape(second)}: other images")
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return bootstrap_interval(difference, seed, level=level, resamples=resamples)


def seed_interval(values: FloatArray | list[float], *, level: float = 0.95) -> Interval:
    """Returns Student's t-interval of a mean over seeds; the bounds of a single seed are NaN.

    Raises:
        ValueError: If there is no seed.
    """
    runs = np.asarray(values, np.float64)
    if not runs.size:
        raise ValueError("no seed to take the interval of")
    mean = float(runs.mean())
    if runs.size == 1:
        return Interval(mean, float("nan"), float("nan"))
    half = float(stdtrit(runs.size - 1, (1 + level) / 2) * runs.std(ddof=1) / np.sqrt(runs.size))
    return Interval(mean, mean - half, mean + half)


def two_way_interval(values: FloatArray, seed: int = 0, *, level: float = 0.95) -> Interval:
    """Returns the interval of a mean over seeds and images, both of which are samples.

    Every seed has a value for every image. Each factor's mean square of the two-way layout gives
    its part of the half width, with a t of its own degrees of freedom. The parts are added in
    squares (as in Howe 1974, for sums of variances). Where only images differ, the interval is that
    over images alone; where only seeds differ, that over seeds alone. It is never narrower than
    `level` promises. Where both hardly differ next to the residual, it is too wide: about twice
    with three seeds, five times with two. Images without a value for some seed are left out. A
    single seed is bootstrapped over its images.

    Args:
        values: Values [seeds, images]; NaN where there is none.
        seed: Seed of the bootstrap.
        level: How often the interval contains the mean, at least.

    Raises:
        ValueError: If no image has a value for every seed.
    """
    known = np.asarray(values, np.float64)
    known = known[:, ~np.isnan(known).any(0)]
    seeds, images = known.shape
    if not known.size:
        raise ValueError("no image has a value by every seed")
    if seeds == 1:
        return bootstrap_interval(known[0], seed, level=level)
    if images == 1:
        return seed_interval(known[:, 0], level=level)
    mean = float(known.mean())
    by_factor = [known.mean(1), known.mean(0)]
    parts = [
        stdtrit(len(factor_means) - 1, (1 + level) / 2) ** 2
        * factor_means.var(ddof=1)
        / len(factor_means)
        for factor_means in by_factor
    ]
    half = float(np.sqrt(sum(parts)))
    return Interval(mean, mean - half, mean + half)


def bootstrap_means(values: FloatArray, seed: int, resamples: int) -> FloatArray:
    """Returns column means of bootstrap resamples of the rows, [resamples, columns].

    NaN is left out of the means.
    """
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
        row_counts = weights.astype(np.float64)
        total = row_counts @ known if not complete else float(count)
        with np.errstate(invalid="ignore"):
            means.append(row_counts @ filled / total)
    return np.concatenate(means)


def skill_of_means(
    cosine_mean: FloatArray | float, baseline_mean: FloatArray | float
) -> FloatArray:
    """Returns the skill from means: 1 - (1 - mean cosine) / (1 - mean cosine of the baseline)."""
    return np.asarray(1 - (1 - cosine_mean) / (1 - baseline_mean))


def percentile_interval(mean: float, resampled: FloatArray, level: float) -> Interval:
    """Returns the central interval of resampled values, with the given mean."""
    low, high = np.nanpercentile(resampled, [50 * (1 - level), 50 * (1 + level)])
    return Interval(mean, float(low), float(high))
