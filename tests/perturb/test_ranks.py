import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camdistill.perturb.ranks import first_pixels, level_counts, ranks


def test_ranks_without_ties_are_the_descending_order(generator: torch.Generator) -> None:
    maps = torch.randn(5, 6, 7, generator=generator)
    found = ranks(maps, generator).flatten(1).numpy()
    for values, places in zip(maps.flatten(1).numpy(), found, strict=True):
        expected = [int((values > value).sum()) for value in values]
        assert places.tolist() == expected


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.5, -1.0]), min_size=12, max_size=12),
    st.integers(0, 12),
    st.integers(0, 99),
)
def test_exactly_k_pixels_whatever_the_ties(values: list[float], count: int, seed: int) -> None:
    maps = torch.tensor(values).view(1, 3, 4)
    order = ranks(maps, torch.Generator().manual_seed(seed))
    for least in (False, True):
        taken = first_pixels(order, [count], least=least)[0, 0]
        assert int(taken.sum()) == count
        if 0 < count < 12:
            inside, outside = maps[0][taken], maps[0][~taken]
            if least:
                assert inside.max() <= outside.min()
            else:
                assert inside.min() >= outside.max()


def test_the_most_and_the_least_relevant_share_the_image(generator: torch.Generator) -> None:
    order = ranks(torch.zeros(3, 5, 5), generator)
    first, last = first_pixels(order, [10]), first_pixels(order, [15], least=True)
    assert torch.equal(first, ~last)


def test_ties_are_broken_evenly_and_only_by_the_generator() -> None:
    maps = torch.zeros(4000, 2, 3)
    found = ranks(maps, torch.Generator().manual_seed(1))
    assert torch.equal(found, ranks(maps, torch.Generator().manual_seed(1)))
    assert not torch.equal(found, ranks(maps, torch.Generator().manual_seed(2)))
    counts = torch.stack([(found.flatten(1) == place).sum(0) for place in range(6)]).numpy()
    # each pixel has each place 4000 / 6 times, sd 24
    np.testing.assert_allclose(counts, 4000 / 6, atol=5 * 24)


def test_numbers_of_pixels_are_rounded_fractions() -> None:
    assert level_counts([0.0, 0.1, 0.5, 1.0], 25) == [0, 2, 12, 25]
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        level_counts([10.0], 25)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_maps_without_an_order_are_refused(wrong: float, generator: torch.Generator) -> None:
    maps = torch.zeros(4, 3, 3)
    maps[2, 1, 1] = wrong
    with pytest.raises(ValueError, match=r"1 of 4 maps have NaN or infinity.*map 2"):
        ranks(maps, generator)
