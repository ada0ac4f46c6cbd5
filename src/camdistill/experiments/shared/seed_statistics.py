"""Statistics of arms that share seeds and test images: bootstrap, sign-flip test, Holm.

Scores are [seeds, images]: image i was judged with every seed, so seeds and images are crossed
factors and both are resampled (Owen 2007, https://arxiv.org/abs/0712.1111).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.special import ndtr, stdtr, stdtrit
from scipy.stats import kendalltau

from camdistill.measure.intervals import DRAWS, FloatArray

Floats = NDArray[np.float64]
Draw = tuple[NDArray[np.float32], NDArray[np.int64]]
RESAMPLES = 2000
KEPT = 2_000_000  # numbers of a draw that is kept, 8 MB
POWER = 0.8


class Gain(NamedTuple):
    """The mean of paired differences, with what can be said of it.

    Attributes:
        mean: Over seeds and images.
        low: Lower bound of the 95 % interval.
        high: Upper bound.
        se: Standard error.
        p: Two-sided, of no difference.
        mde: Minimum detectable effect: a true difference of that size would be found (p < 0.05,
            before any correction) in 80 of 100 such studies.
    """

    mean: float
    low: float
    high: float
    se: float
    p: float
    mde: float


def resample_means(
    scores: Float[np.ndarray, "arms seeds images"], seed: int = 0, *, resamples: int = RESAMPLES
) -> Float[np.ndarray, "resamples arms seeds"]:
    """Two-level bootstrap: means over resampled images, for resampled seeds.

    Every resample takes the same images and the same seeds for all arms, which keeps them paired.

    Args:
        scores: One value a test image, of each seed of each arm.
        seed: Seed of the resampling.
        resamples: How many.
    """
    arms, seeds, images = scores.shape
    flat = np.asarray(scores, np.float32).reshape(arms * seeds, images)
    small = resamples * images <= KEPT
    resampled_means = []
    for weights, chosen in (_cached_draws if small else _draws)(seeds, images, seed, resamples):
        by_arm = (weights @ flat.T).astype(np.float64) / images
        means = by_arm.reshape(len(weights), arms, seeds)
        resampled_means.append(np.take_along_axis(means, chosen[:, None, :], 2))
    return np.concatenate(resampled_means)


def _draws(seeds: int, images: int, seed: int, resamples: int) -> Iterator[Draw]:
    """How often each image was drawn, and which seeds, some resamples at a time."""
    generator = np.random.default_rng(seed)
    chunk = max(1, DRAWS // max(images, 1))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        rows = generator.integers(0, images, (size, images))
        rows += np.arange(size)[:, None] * images
        weights = np.bincount(rows.ravel(), minlength=size * images).reshape(size, images)
        yield weights.astype(np.float32), generator.integers(0, seeds, (size, seeds))


@lru_cache(maxsize=4)
def _cached_draws(seeds: int, images: int, seed: int, resamples: int) -> list[Draw]:
    """The same, once: a report asks for a thousand intervals of scores of the same shape."""
    return list(_draws(seeds, images, seed, resamples))


class Bootstrap:
    """Arms with the same seeds and images, resampled together once; any comparison is then quick.

    Intervals are mean +- t se with t of seeds - 1 degrees of freedom, and se the deviation of the
    two-level bootstrap times sqrt(S / (S - 1)): percentiles of a bootstrap over five seeds cover
    far less than they say (Hesterberg 2015, https://arxiv.org/abs/1411.5279, section 3.3). That is
    right where seeds vary most and wide where images do. One seed is bootstrapped over images
    alone and says nothing about other seeds.

    Args:
        scores: By arm; seeds and images in the same order.
        seed: Seed of the resampling.
        resamples: How many.
    """

    def __init__(
        self, scores: Mapping[str, FloatArray], seed: int = 0, *, resamples: int = RESAMPLES
    ) -> None:
        shapes = {arm_scores.shape for arm_scores in scores.values()}
        if len(shapes) != 1:
            raise ValueError(f"scores of shapes {sorted(shapes)}: not paired")
        (self._shape,) = shapes
        all_scores = np.stack(
            [np.asarray(arm_scores, np.float64) for arm_scores in scores.values()]
        )
        self._means = dict(zip(scores, all_scores.mean(2), strict=True))
        resampled_means = resample_means(all_scores, seed, resamples=resamples)
        self._drawn = {name: resampled_means[:, place] for place, name in enumerate(scores)}

    def __contains__(self, name: str) -> bool:
        return name in self._means

    def gain(self, first: str, base: str) -> Gain:
        """How much one arm scores above another, seed by seed and image by image."""
        mean = float((self._means[first] - self._means[base]).mean())
        return _gain_of_draws(mean, (self._drawn[first] - self._drawn[base]).mean(1), self._shape)

    def specific_gain(self, first: str, controls: Sequence[str]) -> Gain:
        """SSG: how much an arm scores above the best control of each seed, averaged over seeds.

        The best of several noisy controls is better than any of them, so this is conservative. Of
        an arm against itself it is 0.
        """
        best = np.max([self._means[name] for name in controls], axis=0)
        resampled_controls = np.max([self._drawn[name] for name in controls], axis=0)
        mean = float((self._means[first] - best).mean())
        return _gain_of_draws(mean, (self._drawn[first] - resampled_controls).mean(1), self._shape)


def _gain_of_draws(mean: float, draws: Floats, shape: tuple[int, ...]) -> Gain:
    seeds, images = shape
    freedom = seeds - 1 if seeds > 1 else images - 1
    inflation = seeds / (seeds - 1) if seeds > 1 else 1.0
    se = float(draws.std() * np.sqrt(inflation))
    wide, likely = (float(stdtrit(freedom, level)) for level in (0.975, POWER))
    if se == 0:
        return Gain(mean, mean, mean, 0.0, 1.0 if mean == 0 else 0.0, 0.0)
    p = float(2 * stdtr(freedom, -abs(mean) / se))
    return Gain(mean, mean - wide * se, mean + wide * se, se, p, (wide + likely) * se)


def sign_flip_p(differences: Sequence[float] | Floats) -> float:
    """Two-sided exact p-value of paired differences by seed: all 2^S choices of their signs.

    With S seeds it can't be below 2^(1 - S): five seeds give at least 0.0625. Choices of the two
    halves of the seeds are put together by a search, so that 2^(S/2) numbers are held and not 2^S;
    beyond 40 seeds the mean of as many seeds is as good as normal.
    """
    values = np.asarray(differences, np.float64)
    reached = abs(values.sum()) - 1e-12 * np.abs(values).sum()  # equal sums, but for rounding
    if len(values) > 40:
        size = np.sqrt(np.square(values).sum())
        return float(2 * ndtr(-max(reached, 0.0) / size)) if size > 0 else 1.0
    first, second = (np.sort(_signed_sums(half)) for half in np.array_split(values, 2))
    above = len(second) - np.searchsorted(second, reached - first, side="left")
    below = np.searchsorted(second, -reached - first, side="right")
    return min(1.0, float((above + below).sum()) / 2.0 ** len(values))


def _signed_sums(values: Floats) -> Floats:
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def holm(p_by_name: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number (Holm 1979): reject those below the level."""
    order = sorted(p_by_name, key=lambda name: p_by_name[name])
    corrected, largest = {}, 0.0
    for place, name in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_by_name[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_by_name}


def rank_agreement(gains: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Kendall's tau-b between the orders that every two conditions give the methods.

    Args:
        gains: By condition (a student family, an n), then by method; methods that both conditions
            have are compared. Fewer than two give NaN.

    Returns:
        By "one | other".
    """
    tau_by_pair = {}
    for one, other in itertools.combinations(gains, 2):
        shared = [name for name in gains[one] if name in gains[other]]
        values = [[gains[which][name] for name in shared] for which in (one, other)]
        tau = kendalltau(*values).statistic if len(shared) > 1 else np.nan
        tau_by_pair[f"{one} | {other}"] = float(tau)
    return tau_by_pair
