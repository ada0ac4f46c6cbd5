"""Row 10: judges find a planted difference, and are at chance where there is none."""

from collections.abc import Callable

import pytest
import torch

from camdistill.claims import bias, failures, trust
from camdistill.claims.claim import ClaimSetup
from camdistill.claims.trust import judge_pairs, off_center, probe, roughness


def pairs(shift: float, count: int = 400) -> list[torch.Tensor]:
    """Differences of six statistics; only the fourth tells, and the first is noise."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(count, 6, generator=generator) for _ in range(3)]
    for one in found:
        one[:, 3] += shift
    return found


def test_probe_finds_a_planted_difference_and_ignores_the_metric_column() -> None:
    told = pairs(2.0)
    direction = probe(torch.cat(told))
    assert direction[0] == 0
    assert int(direction.abs().argmax()) == 3
    # P(N(2, 1) > 0) = 0.977; the other weights blur it a little.
    assert abs(float(judge_pairs(told)["probe"].mean()) - 0.977) < 0.02


def test_judges_are_at_chance_where_networks_do_not_differ() -> None:
    for values in judge_pairs(pairs(0.0)).values():
        # Three pairs of 400 images: a standard error of 0.014.
        assert abs(float(values.mean()) - 0.5) < 0.06


def test_ties_are_a_half_and_errors_are_left_out() -> None:
    told = [torch.zeros(4, 6) for _ in range(2)]
    told[0][0] = torch.nan
    found = judge_pairs(told)["gini"]
    assert found.tolist() == [0.5, 0.5, 0.5, 0.5]
    told[1][0] = torch.nan
    assert bool(judge_pairs(told)["gini"][0].isnan())


def test_statistics_of_maps_by_hand() -> None:
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0] = 3.0
    maps[1, :, 2:] = 1.0
    # One step down and one across among 12 each; 4 steps across among 12.
    assert torch.allclose(roughness(maps), torch.tensor([1 / 12, 1 / 6]))
    assert torch.allclose(off_center(maps[:1]), torch.tensor([(2 * 0.75**2) ** 0.5]))


@pytest.mark.slow
def test_row_of_networks_that_never_trained(
    lab: Callable[..., ClaimSetup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bias, "TRAIN", 128)
    monkeypatch.setattr(bias, "EPOCHS", 1)
    monkeypatch.setattr(failures, "WEAK_EPOCHS", 1)
    monkeypatch.setattr(trust, "SEEDS", 2)
    row = trust.run_trust(lab(count=64))
    assert row.passed is False
    assert len(row.ours) == 6
