"""A panel of methods shows every map, as a share of its own maximum."""

import numpy as np
import pytest

from camdistill.report.figures.maps import overlay
from camdistill.report.figures.methods import MethodMap, method_panel

IMAGE = np.random.default_rng(0).random((3, 16, 16))
RAMP = np.arange(16.0).reshape(4, 4)


def holds(page: np.ndarray, tile: np.ndarray) -> int:
    """How often a picture stands in a page, pixel for pixel."""
    tall, wide, _ = tile.shape
    windows = np.lib.stride_tricks.sliding_window_view(page, (1, wide, 3))[:, :, 0, 0]
    places = np.argwhere((windows == tile[0]).all((2, 3)))
    return sum(np.array_equal(page[y : y + tall, x : x + wide], tile) for y, x in places)


@pytest.mark.parametrize("across", [7, 2])
def test_every_map_stands_in_the_panel_as_a_share_of_its_maximum(across: int) -> None:
    blocks = {
        "teacher: a": [MethodMap("one", "layer1", 5 * RAMP), MethodMap("two", "input", RAMP.T)],
        "student: a": [MethodMap("one", "stage1", RAMP - 15, "r 0.10")] * 3,
    }
    page = method_panel(IMAGE, blocks, title="x.png", across=across)
    assert holds(page, overlay(IMAGE, RAMP / 15, 96, 96)) == 1
    assert holds(page, overlay(IMAGE, RAMP.T / 15, 96, 96)) == 1
    assert holds(page, overlay(IMAGE, RAMP * 0, 96, 96)) == 3  # nothing positive: blank


def test_a_map_that_is_not_a_number_is_shown_so() -> None:
    broken = np.full((4, 4), np.nan)
    page = method_panel(IMAGE, {"teacher": [MethodMap("one", "layer1", broken)]})
    assert holds(page, overlay(IMAGE, broken, 96, 96)) == 1
    with pytest.raises(ValueError, match="at least one map"):
        method_panel(IMAGE, {"teacher": []})
