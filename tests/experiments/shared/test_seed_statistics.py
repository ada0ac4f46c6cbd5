"""Intervals cover what they say, nulls are rarely rejected, corrections equal their definitions."""

import numpy as np
import pytest
from scipy import stats

from camdistill.experiments.shared import seed_statistics
from camdistill.experiments.shared.seed_statistics import (
    Bootstrap,
    Gain,
    holm,
    rank_agreement,
    resample_means,
    sign_flip_p,
)


def gain(first: np.ndarray, base: np.ndarray, seed: int = 0, resamples: int = 2000) -> Gain:
    both = Bootstrap({"first": first, "base": base}, seed, resamples=resamples)
    return both.gain("first", "base")


def specific_gain(
    first: np.ndarray, controls: np.ndarray, seed: int = 0, resamples: int = 2000
) -> Gain:
    names = {str(number): one for number, one in enumerate(controls)}
    whole = Bootstrap({"first": first, **names}, seed, resamples=resamples)
    return whole.specific_gain("first", list(names))


def scores(
    rng: np.random.Generator,
    effects: list[float],
    *,
    seeds: int = 5,
    images: int = 400,
    by_seed: float = 0.01,
    by_image: float = 0.2,
) -> np.ndarray:
    """Arms whose true rates are 0.7 + effect; run-to-run noise of an arm, images of own difficulty.

    Rates stay inside (0, 1), so that their mean is exactly what is asked for.
    """
    difficulty = rng.uniform(-by_image, by_image, images)
    found = []
    for effect in effects:
        rate = 0.7 + effect + difficulty[None] + rng.normal(0, by_seed, (seeds, 1))
        found.append(rng.random((seeds, images)) < np.clip(rate, 0, 1))
    return np.array(found, dtype=np.float32)


def test_gain_is_the_mean_difference_and_its_own_mirror() -> None:
    one, other = scores(np.random.default_rng(0), [0.05, 0.0])
    found, mirror = gain(one, other), gain(other, one)
    assert found.mean == pytest.approx(float((one - other).mean()))
    assert mirror.mean == pytest.approx(-found.mean)
    assert mirror.low == pytest.approx(-found.high)
    assert found.low < found.mean < found.high
    assert found.mde > 0


def test_gain_of_equal_arms_is_zero_and_certain() -> None:
    (one,) = scores(np.random.default_rng(0), [0.0])
    assert gain(one, one) == (0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    assert specific_gain(one, one[None]) == (0.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def test_with_many_images_the_interval_is_students_t_over_seeds() -> None:
    rng = np.random.default_rng(1)
    means = rng.normal(0.1, 0.3, 6)
    one = np.repeat(means[:, None], 50, 1)
    found = gain(one, np.zeros_like(one), resamples=20_000)
    low, high = stats.t.interval(0.95, 5, means.mean(), stats.sem(means))
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)
    assert found.p == pytest.approx(stats.ttest_1samp(means, 0).pvalue, abs=0.02)


def test_a_single_seed_is_bootstrapped_over_images() -> None:
    one, other = scores(np.random.default_rng(2), [0.05, 0.0], seeds=1, images=2000)
    found = gain(one, other, resamples=10_000)
    spread = (one - other)[0].std() / 2000**0.5
    assert found.high - found.mean == pytest.approx(1.96 * spread, rel=0.05)


def test_resamples_keep_arms_paired_and_take_seeds_and_images() -> None:
    values = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    both = np.concatenate([values, values + 100])
    drawn = resample_means(both, 0, resamples=3000)
    assert drawn.shape == (3000, 2, 3)
    np.testing.assert_allclose(drawn[:, 1] - drawn[:, 0], 100, atol=1e-3)
    # of 3 rows 0..2 with step 4 and 4 columns: crossed variances add up
    expected = (16 * 2 / 3) / 3 + 1.25 / 4
    assert drawn[:, 0].mean(1).var() == pytest.approx(expected, rel=0.1)
    assert np.array_equal(drawn, resample_means(both, 0, resamples=3000))


@pytest.mark.parametrize("seeds", [1, 4])
def test_draws_that_are_kept_are_the_draws(seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, because the second time they come from memory."""
    scores = np.random.default_rng(3).normal(0, 1, (2, seeds, 30))
    kept = [resample_means(scores, 7, resamples=200) for _ in range(2)]
    monkeypatch.setattr(seed_statistics, "KEPT", 0)
    for one in kept:
        np.testing.assert_array_equal(one, resample_means(scores, 7, resamples=200))


def test_specific_gain_is_over_the_best_control_of_each_seed() -> None:
    first = np.array([[1.0, 1, 0, 1], [1, 0, 0, 1]])
    controls = np.array([[[1.0, 0, 0, 0], [1, 1, 1, 1]], [[0, 1, 0, 1], [0, 0, 0, 1]]])
    found = specific_gain(first, controls)
    assert found.mean == pytest.approx(((0.75 - 0.5) + (0.5 - 1.0)) / 2)


def test_holm_equals_its_definition() -> None:
    values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    found = holm(values)
    assert list(found) == ["a", "b", "c", "d"]
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("seed", range(4))
def test_sign_flips_of_many_seeds_are_those_of_all_choices(seed: int) -> None:
    # thirds repeat, so that many choices have equal sums that rounding tells apart
    values = np.random.default_rng(seed).integers(-3, 6, 15) / 3
    signs = 2 * ((np.arange(2**15)[:, None] >> np.arange(15)) & 1) - 1
    thirds = np.abs(signs @ np.round(values * 3).astype(int))
    assert sign_flip_p(values) == pytest.approx((thirds >= thirds[-1]).mean(), abs=1e-12)
    assert sign_flip_p([0.1, 0.2, -0.3]) == 1.0
    assert sign_flip_p(np.zeros(5)) == 1.0
    assert sign_flip_p(np.zeros(50)) == 1.0


def test_sign_flips_of_more_seeds_than_can_be_told_one_by_one() -> None:
    # one third of 36 seeds against: 2 P(at most 12 of 36 heads)
    values = np.repeat([1.0, -1.0], [24, 12])
    assert sign_flip_p(values) == pytest.approx(2 * stats.binom.cdf(12, 36, 0.5))
    wide = np.repeat([1.0, -1.0], [130, 90])
    assert sign_flip_p(wide) == pytest.approx(2 * stats.binom.cdf(90, 220, 0.5), rel=0.2)


@pytest.mark.parametrize("seed", range(4))
def test_sign_flips_equal_scipys_permutation_test(seed: int) -> None:
    values = np.random.default_rng(seed).normal(0.5, 1, 6)
    wanted = stats.permutation_test(
        (values, np.zeros(6)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert sign_flip_p(values) == pytest.approx(wanted.pvalue)
    assert sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 32)


def test_rank_agreement_is_kendalls_tau_over_shared_methods() -> None:
    found = rank_agreement(
        {
            "n=250": {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.0},
            "n=1000": {"a": 0.1, "b": 0.2, "c": 0.3},
            "wide": {"a": 0.5},
        }
    )
    tau = stats.kendalltau([0.1, 0.3, 0.2], [0.1, 0.2, 0.3]).statistic
    assert found["n=250 | n=1000"] == pytest.approx(tau)
    assert np.isnan(found["n=250 | wide"])


def test_unpaired_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="not paired"):
        gain(np.zeros((2, 5)), np.zeros((3, 5)))


@pytest.mark.parametrize(
    ("by_seed", "seeds"), [(0.02, 5), (0.005, 5), (0.0, 5), (0.02, 3)], ids=str
)
def test_intervals_cover_a_known_effect_and_nulls_are_rarely_rejected(
    by_seed: float, seeds: int
) -> None:
    """500 studies each; 95 % +- 2.9 standard errors of a share of 500 is [0.922, 0.978]."""
    covered, alarms, powers, found_mde = 0, 0, 0, []
    rounds = 500
    for number in range(rounds):
        rng = np.random.default_rng(number)
        arms = scores(rng, [0.06, 0.0, 0.0], seeds=seeds, by_seed=by_seed)
        effect, null = (gain(arms[k], arms[2], number, resamples=400) for k in (0, 1))
        covered += effect.low <= 0.06 <= effect.high
        alarms += null.p < 0.05
        powers += effect.p < 0.05
        found_mde.append(effect.mde)
    assert covered / rounds >= 0.922
    assert alarms / rounds <= 0.078
    # what the study calls detectable it does detect, and the reverse
    if np.median(found_mde) < 0.06:
        assert powers / rounds > 0.7
    else:
        assert powers / rounds < 0.9


def test_specific_gain_over_equal_controls_is_conservative() -> None:
    alarms = 0
    for number in range(300):
        arms = scores(np.random.default_rng(number), [0.0] * 5, by_seed=0.02)
        found = specific_gain(arms[0], arms[1:], number, resamples=400)
        alarms += found.low > 0
    assert alarms / 300 <= 0.025
