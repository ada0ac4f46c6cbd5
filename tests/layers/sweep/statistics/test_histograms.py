import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camdistill.layers.sweep.statistics.histograms import (
    BINS,
    SIDE,
    HistogramCounts,
    bin_edges,
    interpolate_quantile,
    log10_bins,
    quantile,
    rebin,
)
from camdistill.layers.sweep.sweep_summary import Point

HERE = Point("teacher", "relu", 0, "post")
FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def told(values: torch.Tensor):
    return HistogramCounts.of(values).histogram(HERE)


def numpys(values: np.ndarray) -> np.ndarray:
    """numpy.histogram on the same edges: of positive values, and of negated negative ones."""
    limits = bin_edges().numpy()[SIDE + 1 :]
    positive = np.histogram(values[values > 0].astype(np.float64), limits)[0]
    negative = np.histogram(-values[values < 0].astype(np.float64), limits)[0]
    small = len(values) - positive.sum() - negative.sum()
    return np.concatenate([negative[::-1], [small], positive])


@settings(deadline=None)
@given(st.lists(FINITE, max_size=60))
def test_counts_equal_numpys_bin_for_bin(values: list[float]) -> None:
    array = np.array(values, np.float32)
    assert told(torch.from_numpy(array)).counts.tolist() == numpys(array).tolist()


def test_counts_of_a_layer_equal_numpys_in_every_layout(generator: torch.Generator) -> None:
    values = torch.randn(3, 5, 7, 6, generator=generator).exp() - 1.2
    expected = numpys(values.numpy().ravel()).tolist()
    for layout in (
        values,
        values.contiguous(memory_format=torch.channels_last),
        values.transpose(0, 3),
        values[:, ::1],
    ):
        assert told(layout).counts.tolist() == expected


@settings(deadline=None)
@given(st.lists(FLOATS, max_size=40), st.lists(FLOATS, max_size=40))
def test_merging_is_counting_together_and_nothing_is_lost(
    first: list[float], second: list[float]
) -> None:
    one, two = torch.tensor(first), torch.tensor(second)
    merged = HistogramCounts.of(one).merge(HistogramCounts.of(two))
    together = torch.cat([one, two])
    whole = HistogramCounts.of(together)
    assert torch.equal(merged.raw, whole.raw)
    assert torch.equal(merged.infinite, whole.infinite)
    histogram = merged.histogram(HERE)
    assert histogram.total == len(together)
    assert histogram.nan == int(together.isnan().sum())
    assert histogram.above == int(torch.isposinf(together).sum())
    assert histogram.below == int(torch.isneginf(together).sum())


@settings(deadline=None)
@given(st.lists(FLOATS, max_size=60))
def test_the_histogram_before_a_relu_tells_the_one_after_it(values: list[float]) -> None:
    given_values = torch.tensor(values)
    expected = HistogramCounts.of(given_values.relu()).histogram(HERE)
    found = HistogramCounts.of(given_values).apply_relu().histogram(HERE)
    assert torch.equal(found.counts, expected.counts)
    assert (found.nan, found.below, found.above) == (expected.nan, expected.below, expected.above)


def test_zeros_of_both_signs_are_zeros() -> None:
    histogram = told(torch.tensor([0.0, -0.0, 1.0, -2.0]))
    assert (histogram.zeros, histogram.negatives, histogram.zero_share) == (2, 1, 0.5)


def test_edges_are_symmetric_eighths_of_octaves() -> None:
    limits = bin_edges().numpy()
    assert len(limits) == BINS + 1
    np.testing.assert_array_equal(limits, -limits[::-1])
    normal = limits[limits >= 2.0**-126]
    ratios = normal[1:] / normal[:-1]
    assert ratios.min() == pytest.approx(16 / 15)
    assert ratios.max() == pytest.approx(9 / 8)
    assert {1.0, 1.125, 1.25, 1.875, 2.0} <= set(limits.tolist())


@settings(max_examples=50, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=50), st.floats(0, 1))
def test_a_quantile_lies_in_the_bin_told(values: list[float], share: float) -> None:
    ordered = np.sort(np.array(values, np.float32)).astype(np.float64)
    true = ordered[math.floor(share * (len(ordered) - 1))]
    low, high = quantile(told(torch.tensor(values)), share)
    if abs(true) < 2e-39:
        assert (low, high) == (0, 0)
    else:
        assert low <= true <= high
        assert low <= interpolate_quantile(told(torch.tensor(values)), share) <= high


def test_quantiles_of_nothing_are_nan() -> None:
    assert all(math.isnan(edge) for edge in quantile(told(torch.tensor([torch.nan])), 0.5))


def test_octaves_hold_the_positive_values(generator: torch.Generator) -> None:
    values = torch.rand(500, generator=generator) * 3 - 1
    limits, counts = log10_bins(told(values))
    expected = np.histogram(np.log10(values[values > 0].double().numpy()), limits.numpy())[0]
    assert counts.tolist() == expected.tolist()
    assert counts[0] > 0
    assert counts[-1] > 0


def test_rebinning_on_our_own_edges_changes_nothing(generator: torch.Generator) -> None:
    histogram = told(torch.randn(300, generator=generator))
    torch.testing.assert_close(rebin(histogram, bin_edges()), histogram.counts.double())
    limits = torch.linspace(-5, 5, 21)
    assert float(rebin(histogram, limits).sum()) == pytest.approx(300)


def test_rebinned_zeros_are_in_the_bin_that_numpy_puts_them_in() -> None:
    histogram = told(torch.zeros(7))
    for limits in ([-1.0, 0.0, 1.0], [-2.0, -1.0, 0.0], [0.0, 2.0], [1.0, 2.0], [-2.0, -1.0]):
        expected = np.histogram(np.zeros(7), limits)[0]
        assert rebin(histogram, limits).tolist() == expected.tolist()
