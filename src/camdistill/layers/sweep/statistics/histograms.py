"""Exact histograms without a range: the bins are a part of the bits of a float.

The upper twelve bits of a float32 (sign, exponent, three bits of the fraction) are its bin, so
that no pass for the extremes is needed, two histograms merge by addition, and one outlier squeezes
nothing. Eight bins an octave: a bin is 7 to 12.5 % wide, from 1.5e-39 to 3.4e38 on either side of
zero. What is smaller than 1.5e-39 counts as zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camdistill.layers.sweep.sweep_summary import Histogram, Point

BITS = 20  # of the fraction that a bin doesn't tell
ALL_BINS = 1 << (32 - BITS)  # raw: by bits, non-finite values among them
HALF = ALL_BINS // 2
FIRST_INFINITE = 0x7F800000 >> BITS
SIDE = FIRST_INFINITE - 1  # bins of positive values, and of negative ones
BINS = 2 * SIDE + 1


@dataclass(frozen=True)
class HistogramCounts:
    """How often which bits occur; counts add up.

    Attributes:
        raw: By the upper twelve bits.
        infinite: Plus and minus infinity, which share their bins with NaN.
    """

    raw: Int[Tensor, "all_bins"]
    infinite: Int[Tensor, "2"]

    @classmethod
    def empty(cls) -> "HistogramCounts":
        """Of nothing."""
        return cls(torch.zeros(ALL_BINS, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))

    @classmethod
    def of(cls, values: Float[Tensor, "..."]) -> "HistogramCounts":
        """Of a tensor in any layout; other precisions count as the nearest float32."""
        values = values.detach().float()
        raw = torch.bincount(_bins(values), minlength=ALL_BINS)
        infinite = raw.new_zeros(2)
        if raw[FIRST_INFINITE:HALF].any() or raw[HALF + FIRST_INFINITE :].any():
            infinite = torch.stack([torch.isposinf(values).sum(), torch.isneginf(values).sum()])
        return cls(raw, infinite)

    def merge(self, other: "HistogramCounts") -> "HistogramCounts":
        """Of both."""
        return HistogramCounts(self.raw + other.raw, self.infinite + other.infinite)

    def apply_relu(self) -> "HistogramCounts":
        """What ReLU makes of it: every negative value, minus infinity too, is 0."""
        raw, infinite = self.raw.clone(), self.infinite.clone()
        not_numbers = raw[HALF + FIRST_INFINITE :].sum() - infinite[1]
        raw[0] += raw[HALF:].sum() - not_numbers
        raw[HALF:] = 0
        raw[FIRST_INFINITE] += not_numbers
        infinite[1] = 0
        return HistogramCounts(raw, infinite)

    def histogram(self, point: Point) -> Histogram:
        """As people read it: from the most negative bin over zero to the largest."""
        raw = self.raw.cpu()
        negative = raw[HALF + 1 : HALF + FIRST_INFINITE].flip(0)
        zero = raw[:1] + raw[HALF : HALF + 1]
        special = raw[FIRST_INFINITE:HALF].sum() + raw[HALF + FIRST_INFINITE :].sum()
        above, below = (int(count) for count in self.infinite)
        return Histogram(
            point,
            torch.cat([negative, zero, raw[1:FIRST_INFINITE]]),
            nan=int(special) - above - below,
            below=below,
            above=above,
        )


def bin_edges() -> Float[Tensor, "bins_plus_one"]:
    """Where a `Histogram`'s bins end, ascending, float64.

    A bin holds what is at least its edge nearer to zero and less than the farther one, in
    magnitude: for positive values that is NumPy's rule, for negative ones its mirror image.
    """
    positive = (torch.arange(1, FIRST_INFINITE, dtype=torch.int32) << BITS).view(torch.float32)
    limits = torch.cat([positive.double(), torch.tensor([2.0**128], dtype=torch.float64)])
    return torch.cat([-limits.flip(0), limits])


def quantile(histogram: Histogram, share: float) -> tuple[float, float]:
    """The bin in which a quantile lies: (lower edge, upper edge); zero's bin is (0, 0).

    It is the bin of the value in place floor(share (n - 1)) of the sorted finite values; NaN
    without any.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a quantile's share is in [0, 1], not {share}")
    total = histogram.finite
    if total == 0:
        return float("nan"), float("nan")
    place = int(share * (total - 1))
    index = int(torch.searchsorted(histogram.counts.cumsum(0), place, right=True))
    if index == SIDE:
        return 0.0, 0.0
    bin_limits = bin_edges()[index : index + 2].tolist()
    return bin_limits[0], bin_limits[1]


def interpolate_quantile(histogram: Histogram, share: float) -> float:
    """A quantile, linear inside its bin: off by less than the bin, 12.5 %."""
    low, high = quantile(histogram, share)
    if low == high or low != low:
        return low
    index = int(torch.searchsorted(bin_edges(), low))
    before = int(histogram.counts[:index].sum())
    inside = (share * (histogram.finite - 1) - before + 0.5) / int(histogram.counts[index])
    return low + min(max(inside, 0.0), 1.0) * (high - low)


def log10_bins(histogram: Histogram) -> tuple[Float[Tensor, "kept_plus_one"], Int[Tensor, "kept"]]:
    """Positive values on a log axis: edges in log10 units and counts, empty ends cut off.

    Zeros are not among them: tell `zero_share` beside it.
    """
    counts = histogram.counts[SIDE + 1 :]
    used = counts.nonzero().flatten()
    if not len(used):
        return torch.zeros(1, dtype=torch.float64), counts[:0]
    first, last = int(used[0]), int(used[-1])
    limits = bin_edges()[SIDE + 1 :][first : last + 2]
    return limits.log10(), counts[first : last + 1]


def rebin(
    histogram: Histogram, limits: Float[Tensor, "wanted_plus_one"] | Sequence[float]
) -> Float[Tensor, "wanted"]:
    """Counts in other bins, each of ours spread evenly over its width; zeros stay whole."""
    new_edges = torch.as_tensor(limits, dtype=torch.float64)
    old_edges, used = bin_edges(), histogram.counts.nonzero().flatten()
    lows, highs, counts = old_edges[used], old_edges[used + 1], histogram.counts[used].double()
    overlap = (
        torch.minimum(highs[:, None], new_edges[1:]) - torch.maximum(lows[:, None], new_edges[:-1])
    ).clamp_min(0)
    shares = overlap / (highs - lows)[:, None]
    at_zero = used == SIDE
    shares[at_zero] = 0
    place = int(torch.searchsorted(new_edges, 0.0, right=True)) - 1
    # As NumPy has it: the last bin holds its upper edge too.
    place -= place == shares.shape[1] and float(new_edges[-1]) == 0
    if 0 <= place < shares.shape[1]:
        shares[at_zero, place] = 1
    return counts @ shares


def _bins(values: Float[Tensor, "..."]) -> Int[Tensor, "values"]:
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)  # the order doesn't matter, a copy would
    bits = values.reshape(-1).view(torch.int32) >> BITS
    return bits.bitwise_and_(ALL_BINS - 1)
