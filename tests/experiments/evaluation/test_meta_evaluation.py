import numpy as np
import pytest
import scipy.stats

from camdistill.experiments.evaluation.evaluation_values import Values
from camdistill.experiments.evaluation.meta_evaluation import (
    kendall,
    list_defeats,
    verdict_rows,
    verdicts,
)
from camdistill.experiments.evaluation.pooling import EvaluationPool

REAL = ("first", "second", "third")
CONTROLS = ("random", "inverted", "oracle")
RUNGS = tuple(f"ladder_{number}" for number in range(6))


def values(columns: dict[str, np.ndarray], count: int = 200) -> Values:  # type: ignore[type-arg]
    """Means by metric, one for each of the twelve maps, and noise of 0.1."""
    generator = np.random.default_rng(0)
    means = np.stack([np.asarray(column, float) for column in columns.values()], 1)
    table = means[:, :, None] + 0.1 * generator.standard_normal((*means.shape, count))
    entries = (*REAL, *CONTROLS, *RUNGS)
    flags = np.zeros((len(entries), count), bool)
    return Values(entries, 3, tuple(columns), table.astype(np.float32), flags, flags, {}, {})


GOOD = [0.6, 0.5, 0.4, 0.0, -0.6, 1.0, *np.linspace(1, 0, 6)]


def test_kendall_equals_scipy_with_ties() -> None:
    generator = np.random.default_rng(1)
    first, second = generator.integers(0, 5, (2, 30, 9)).astype(float)
    first[3] = 1.0
    found = kendall(first, second)
    for a, b, tau in zip(first, second, found, strict=True):
        expected = scipy.stats.kendalltau(a, b).statistic
        assert tau == pytest.approx(0 if np.isnan(expected) else expected)


def test_a_good_metric_and_its_opposite() -> None:
    lower = [-mean for mean in GOOD]
    found = verdicts(
        values(
            {"road": GOOD, "deletion_gray": lower, "rank_accuracy": GOOD, "insertion_blur": lower}
        ),
        0,
    )
    for metric in ("road", "deletion_gray"):  # higher and lower are better
        verdict = found[metric]
        assert verdict.ladder is not None
        assert verdict.ladder.mean > 0.9
        assert verdict.tau["rank_accuracy"].mean == 1
        assert verdict.tau_real["rank_accuracy"].mean == 1
        assert verdict.reliability > 0.95
        assert (verdict.oracle, verdict.beats) == (1, [])
    bad = found["insertion_blur"]
    assert bad.ladder is not None
    assert bad.ladder.mean < -0.9
    assert bad.tau["rank_accuracy"].mean == -1
    assert bad.oracle == 6
    assert set(bad.beats) == {
        *("random > first", "random > second", "random > third", "inverted > first"),
    }
    # the reference knows better about all of them
    assert bad.wrongly == bad.beats
    table = verdict_rows(found)
    assert table["insertion_blur"]["controls above"] == 4


def test_a_control_above_an_explainer_is_no_mistake_where_the_reference_agrees() -> None:
    weak = [0.6, 0.5, -0.4, 0.0, -0.6, 1.0, *GOOD[6:]]  # the third is worse than chance
    fooled = [-0.2, *weak[1:]]
    found = verdicts(values({"road": weak, "iou": fooled, "rank_accuracy": weak}), 0)
    assert (found["road"].beats, found["road"].wrongly) == (["random > third"], [])
    assert found["iou"].wrongly == ["random > first"]
    assert verdicts(values({"road": weak}), 0)["road"].wrongly is None


def test_noise_finds_no_order_and_agrees_with_nothing() -> None:
    found = verdicts(values({"road": [0.0] * 12, "rank_accuracy": GOOD}), 0)["road"]
    assert found.ladder is not None
    assert abs(found.ladder.mean) < 0.15
    assert found.reliability < 0.5
    # 95 % intervals of 7 pairs: one is beyond its own in about a quarter of such cases
    assert len(found.beats) <= 1


def test_ladder_is_the_mean_of_the_images_rank_correlations() -> None:
    whole = values({"road": GOOD})
    rungs = np.stack([whole.of(rung, "road") for rung in whole.rungs], 1)
    expected = [scipy.stats.spearmanr(row, np.arange(6)[::-1]).statistic for row in rungs]
    found = verdicts(whole, 0)["road"].ladder
    assert found is not None
    assert found.mean == pytest.approx(np.mean(expected))


def test_a_control_counts_only_beyond_its_noise_and_the_oracle_never() -> None:
    means = [0.500, 0.4, 0.3, 0.502, 0.0, 1.0, *GOOD[6:]]
    assert list_defeats(EvaluationPool((values({"road": means}),)), "road", 0) == [
        "random > second",
        "random > third",
    ]
