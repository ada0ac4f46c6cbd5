import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camdistill.layers.sweep.reduction import reduce_output
from camdistill.layers.sweep.statistics.unit_activity import UnitSums, correlation


def sums(values: torch.Tensor, *, rectified: bool = False, bound: float | None = None):
    return UnitSums.of(reduce_output(values, rectified=rectified, bound=bound))


def activations(seed: int, shape: tuple[int, ...] = (9, 4, 3, 5)) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).relu()
    values[:, 1] = 0
    values[:, 2] += 0.1
    return values


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 8), max_size=3), st.booleans(), st.booleans())
def test_streaming_equals_numpy_on_everything_stored(
    seed: int, cuts: list[int], rectified: bool, channels_last: bool
) -> None:
    values = activations(seed) if rectified else activations(seed) - 0.4
    if channels_last:
        values = values.contiguous(memory_format=torch.channels_last)
    parts = torch.tensor_split(values, sorted(cuts))
    state = UnitSums.empty(4)
    for part in parts:
        state = state.merge(sums(part, rectified=rectified, bound=1.0))
    stored = values.numpy().astype(np.float64)
    by_channel = np.moveaxis(stored, 1, 0).reshape(4, -1)
    units = state.units(gated=rectified, bounded=True)
    assert units.images == 9
    assert units.cells == 15
    np.testing.assert_allclose(units.mean, by_channel.mean(1), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(units.variance, by_channel.var(1), rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(units.largest, by_channel.max(1))
    np.testing.assert_array_equal(units.active, (by_channel > 0).mean(1))
    np.testing.assert_array_equal(units.saturated, (abs(by_channel) >= 0.99).mean(1))
    in_image = (stored > 0).any((2, 3)).mean(0)
    np.testing.assert_array_equal(units.image_active, in_image)
    assert units.dead == ((1,) if rectified else ())
    assert units.always_on == ((2,) if rectified else ())
    np.testing.assert_allclose(units.bound, 3 / 9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 8), st.booleans())
def test_sparsity_equals_its_definitions(seed: int, cut: int, signed: bool) -> None:
    values = activations(seed) - (0.4 if signed else 0.0)
    values[3] = 0
    state = sums(values[:cut]).merge(sums(values[cut:]))
    stored = values.numpy().astype(np.float64)
    means = abs(stored.mean((2, 3)))

    def treves_rolls(r: np.ndarray) -> float:
        return (1 - r.mean() ** 2 / (r**2).mean()) / (1 - 1 / len(r))

    sparsity = state.sparsity()
    population = [treves_rolls(row) for row in means if row.any()]
    np.testing.assert_allclose(sparsity.population, np.mean(population), rtol=1e-6)
    for channel in range(4):
        if means[:, channel].any():
            expected = treves_rolls(means[:, channel])
            np.testing.assert_allclose(sparsity.lifetime[channel], expected, rtol=1e-6)
        else:
            assert sparsity.lifetime[channel].isnan()
    n, ones = stored.size, abs(stored).sum()
    hoyer = (n**0.5 - ones / (stored**2).sum() ** 0.5) / (n**0.5 - 1)
    np.testing.assert_allclose(sparsity.hoyer, hoyer, rtol=1e-6)
    assert sparsity.blank == 1


def test_one_hot_is_1_and_even_is_0() -> None:
    one_hot = torch.zeros(2, 5, 1, 1)
    one_hot[0, 1] = one_hot[1, 2] = 3
    assert sums(one_hot).sparsity().population == pytest.approx(1)
    assert sums(torch.ones(2, 5, 1, 1)).sparsity().population == pytest.approx(0)
    assert sums(torch.ones(2, 5, 1, 1)).sparsity().hoyer == pytest.approx(0, abs=1e-6)


def test_rank_equals_that_of_the_centered_matrix(generator: torch.Generator) -> None:
    mixing = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    means = torch.randn(50, 6, generator=generator, dtype=torch.float64) @ mixing
    values = means[:, :, None, None].expand(-1, -1, 2, 2).contiguous()
    rank = sums(values[:20]).merge(sums(values[20:])).rank()
    singular = np.linalg.svd((means - means.mean(0)).numpy(), compute_uv=False)
    shares, power = singular / singular.sum(), singular**2
    assert rank.effective == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())))
    assert rank.participation == pytest.approx(power.sum() ** 2 / (power**2).sum())
    needed = int(np.searchsorted(power.cumsum() / power.sum(), 0.99)) + 1
    assert rank.saturation == needed / 4
    assert rank.possible == 4
    np.testing.assert_allclose(rank.eigenvalues, power / 50)


def test_a_layer_that_varies_in_one_direction_has_rank_1(generator: torch.Generator) -> None:
    along = torch.rand(40, 1, 1, 1, generator=generator)
    rank = sums(along * torch.rand(1, 8, 3, 3, generator=generator) + 5).rank()
    assert rank.effective == pytest.approx(1, abs=0.01)
    assert rank.saturation == 1 / 8


def test_a_layer_that_does_not_vary_has_no_rank() -> None:
    rank = sums(torch.full((10, 3, 2, 2), 0.1)).rank()
    assert np.isnan(rank.effective)
    assert np.isnan(rank.participation)


def test_duplicated_channels_are_told(generator: torch.Generator) -> None:
    values = torch.rand(30, 5, 2, 2, generator=generator)
    values[:, 4] = 2 * values[:, 1]
    ((first, second, alike),) = sums(values).units(gated=True, bounded=False).duplicates
    assert (first, second) == (1, 4)
    assert alike == pytest.approx(1)


def test_all_duplicates_are_counted_and_rare_units_hide_none(generator: torch.Generator) -> None:
    """80 units are active in the same one image and correlate at 1; 20 units are one unit."""
    values = torch.zeros(40, 100, 2, 2)
    values[7, :80] = torch.rand(80, 2, 2, generator=generator) + 1
    copies = list(range(80, 100))
    scales = torch.linspace(0.5, 2, 20)[:, None, None]
    values[:, 80:] = scales * torch.rand(40, 1, 2, 2, generator=generator)
    units = sums(values).units(gated=True, bounded=False)
    assert units.duplicate_pairs == 20 * 19 // 2
    assert units.duplicated == tuple(copies)
    assert len(units.duplicates) == 64
    assert {unit for one, two, _ in units.duplicates for unit in (one, two)} <= set(copies)


def test_an_image_with_nan_or_infinity_is_left_out_whole(generator: torch.Generator) -> None:
    values = torch.rand(6, 3, 4, 4, generator=generator)
    broken = values.clone()
    broken[1, 2, 0, 0] = torch.nan
    broken[4, 0, 1, 1] = torch.inf
    broken[4, 0, 1, 2] = -torch.inf
    expected = sums(values[[0, 2, 3, 5]]).units(gated=True, bounded=False)
    found = sums(broken).units(gated=True, bounded=False)
    assert found.images == 4
    for name in ("mean", "variance", "largest", "active", "image_active"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)


def test_sums_beyond_float32_are_still_right() -> None:
    values = torch.full((2, 1, 4, 4), 3e38)
    units = sums(values, rectified=True).units(gated=True, bounded=False)
    assert units.images == 2
    assert float(units.mean) == pytest.approx(3e38, rel=1e-6)


def test_half_precision_sums_are_made_in_float32() -> None:
    values = torch.full((1, 1, 64, 64), 100.0, dtype=torch.float16)
    units = sums(values.float(), rectified=True).units(gated=True, bounded=False)
    assert float(units.mean) == 100


def test_no_image_tells_nothing() -> None:
    state = UnitSums.empty(3)
    units = state.units(gated=True, bounded=True)
    assert units.mean.isnan().all()
    assert units.dead == ()
    assert np.isnan(state.rank().effective)
    assert np.isnan(state.sparsity().hoyer)


@settings(deadline=None)
@given(st.permutations(range(3)), st.booleans())
def test_merging_is_associative_and_counts_are_exact(order: list[int], left: bool) -> None:
    states = [sums(activations(seed), rectified=True) for seed in range(3)]
    a, b, c = (states[place] for place in order)
    merged = a.merge(b).merge(c) if left else a.merge(b.merge(c))
    reference = states[0].merge(states[1]).merge(states[2])
    for name in ("images", "cells", "active", "image_active", "largest", "saturated"):
        assert torch.equal(getattr(merged, name), getattr(reference, name))
    for name in ("total", "outer", "squares", "magnitudes", "population"):
        torch.testing.assert_close(
            getattr(merged, name), getattr(reference, name), rtol=1e-14, atol=1e-14
        )


def test_correlations_equal_numpys(generator: torch.Generator) -> None:
    first = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    second = torch.randn(20, 2, generator=generator, dtype=torch.float64) + first[:, :2]
    centered = [one - one.mean(0) for one in (first, second)]
    found = correlation(
        centered[0].T @ centered[1] / 20,
        *(one.square().mean(0) for one in (first, second)),
        *(one.square().mean(0) for one in centered),
    )
    expected = np.corrcoef(first.numpy().T, second.numpy().T)[:3, 3:]
    np.testing.assert_allclose(found, expected)
