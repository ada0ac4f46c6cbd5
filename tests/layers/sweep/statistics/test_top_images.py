import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camdistill.errors import UserError
from camdistill.layers.sweep.statistics.top_images import TopKeys


def merged_in(state: TopKeys, values: torch.Tensor, ids: torch.Tensor) -> TopKeys:
    sound = torch.isfinite(values).flatten(1).all(1)
    return state.merge(TopKeys.of(values, values.amax((2, 3)).double(), ids, sound, state))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.integers(1, 11), max_size=4),
    st.integers(1, 15),
    st.booleans(),
)
def test_the_strongest_images_and_places_are_those_of_a_full_sort(
    seed: int, cuts: list[int], top: int, shuffled: bool
) -> None:
    random = np.random.default_rng(seed)
    # Whole numbers, so that there are ties between images and within them.
    stored = random.integers(-4, 5, (12, 3, 2, 4)).astype(np.float32)
    ids = random.choice(1000, 12, replace=False) if shuffled else np.arange(12)
    state = TopKeys.empty(3, top)
    for part in np.split(np.arange(12), sorted(cuts)):
        if len(part):
            values = torch.from_numpy(stored[part])
            state = merged_in(state, values, torch.from_numpy(ids[part]))
    found = state.top_images(4)
    for channel in range(3):
        peaks = stored[:, channel].reshape(12, -1).max(1)
        order = sorted(range(12), key=lambda image: (-peaks[image], ids[image]))[:top]
        count = len(order)
        assert found.images[channel, :count].tolist() == ids[order].tolist()
        assert found.values[channel, :count].tolist() == peaks[order].tolist()
        places = [int(stored[image, channel].argmax()) for image in order]
        assert found.rows[channel, :count].tolist() == [place // 4 for place in places]
        assert found.columns[channel, :count].tolist() == [place % 4 for place in places]
        assert found.images[channel, count:].tolist() == [-1] * (top - count)
        assert found.values[channel, count:].isnan().all()


def test_a_broken_image_is_never_among_the_strongest() -> None:
    values = torch.ones(3, 1, 2, 2)
    values[1, 0, 0, 1] = torch.inf
    found = merged_in(TopKeys.empty(1, 3), values, torch.arange(3)).top_images(2)
    assert found.images.tolist() == [[0, 2, -1]]


def test_image_numbers_that_do_not_fit_are_refused() -> None:
    for number in (-1, 1 << 32):
        with pytest.raises(UserError, match="number images from 0"):
            merged_in(TopKeys.empty(1, 3), torch.ones(1, 1, 2, 2), torch.tensor([number]))


def test_the_largest_image_number_comes_back() -> None:
    number = (1 << 32) - 1
    found = merged_in(TopKeys.empty(1, 1), -torch.ones(1, 1, 1, 1), torch.tensor([number]))
    assert found.top_images(1).images.item() == number
    assert found.top_images(1).values.item() == -1
