import math

import numpy as np
import pytest
import torch

from camdistill.measure.complexity import entropy, gini, mean_size


def test_gini_is_the_mean_difference_of_all_pairs(generator: torch.Generator) -> None:
    maps = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    for values, found in zip(maps.flatten(1).abs().numpy(), gini(maps), strict=True):
        pairs = np.abs(values[:, None] - values[None]).mean()
        assert found.item() == pytest.approx(pairs / (2 * values.mean()))


def test_entropy_equals_numpy_and_quantus(generator: torch.Generator) -> None:
    quantus = pytest.importorskip("quantus")
    maps = torch.rand(4, 6, 6, generator=generator, dtype=torch.float64) + 0.01
    shares = maps.flatten(1).numpy() / maps.sum((1, 2)).numpy()[:, None]
    expected = -(shares * np.log(shares)).sum(1)
    np.testing.assert_allclose(entropy(maps).numpy(), expected)
    options = {"normalise": False, "abs": False, "disable_warnings": True}
    images, numbers = np.zeros((4, 1, 6, 6)), np.zeros(4, int)
    # Quantus adds 1e-7 to the caller's own array; give it a copy
    for peer, ours in ((quantus.Complexity, entropy), (quantus.Sparseness, gini)):
        metric = peer(return_aggregate=False, **options)
        theirs = metric(None, images, numbers, maps.numpy()[:, None].copy())
        np.testing.assert_allclose(ours(maps).numpy(), theirs, atol=1e-5)


def test_extremes() -> None:
    constant, pixel = torch.full((1, 8, 8), 0.3), torch.zeros(1, 8, 8)
    pixel[0, 3, 3] = 5.0
    assert gini(constant).item() == pytest.approx(0, abs=1e-6)
    assert gini(pixel).item() == pytest.approx(63 / 64)
    assert entropy(constant).item() == pytest.approx(math.log(64))
    assert entropy(pixel).item() == 0
    assert mean_size(pixel).item() == pytest.approx(1 / 64)
    blank = torch.zeros(1, 8, 8)
    assert (gini(blank).item(), mean_size(blank).item(), mean_size(constant).item()) == (0, 1, 1)
    assert entropy(blank).item() == pytest.approx(math.log(64))


def test_the_caller_keeps_its_maps_and_scale_changes_nothing(generator: torch.Generator) -> None:
    maps = torch.randn(3, 8, 8, generator=generator)
    before = maps.clone()
    for metric in (gini, entropy, mean_size):
        torch.testing.assert_close(metric(1e-35 * maps), metric(maps), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="have NaN"):
            metric(maps / 0)
    assert torch.equal(maps, before)
