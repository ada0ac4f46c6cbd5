import numpy as np
import pytest

from camdistill.report.figures.curves import removal_chart


def test_chart_has_a_panel_for_each_way_and_shows_its_lines() -> None:
    fractions = [0.0, 0.5, 1.0]
    falling = np.array([[1.0, 0.5, 0.0]], np.float32)
    one = removal_chart({"deletion": {"cam": falling}}, fractions)
    two = removal_chart({"deletion": {"cam": falling}, "insertion": {"cam": falling}}, fractions)
    assert two.shape[1] == 2 * one.shape[1]
    other = removal_chart({"deletion": {"cam": falling[:, ::-1]}}, fractions)
    assert (one != other).any()
    dashed = removal_chart({"deletion": {"cam": falling}}, fractions, dashed=["cam"])
    blue = [(picture[..., 2] > picture[..., 0].astype(int) + 60).sum() for picture in (one, dashed)]
    assert blue[1] < blue[0]
    with pytest.raises(ValueError, match="no curve"):
        removal_chart({}, fractions)


def test_an_image_without_a_curve_is_left_out_of_the_mean_of_that_map() -> None:
    fractions = [0.0, 0.5, 1.0]
    rows = np.array([[1.0, 0.5, 0.0], [0.5, 0.4, 0.3], [np.nan] * 3], np.float32)
    alone = removal_chart(
        {"deletion": {"cam (n = 2)": rows[:2], "all": rows[[0, 1, 1]]}}, fractions
    )
    with_it = removal_chart({"deletion": {"cam": rows, "all": rows[[0, 1, 1]]}}, fractions)
    # the same line and legend; the axis counts the images that were asked
    np.testing.assert_array_equal(alone[:, 60:], with_it[:, 60:])
    nothing = removal_chart({"deletion": {"cam": rows[2:], "all": rows[:2]}}, fractions)
    np.testing.assert_array_equal(
        nothing[:, 60:], removal_chart({"deletion": {"all": rows[:2]}}, fractions)[:, 60:]
    )
    assert removal_chart({"deletion": {"cam": rows[2:]}}, fractions).shape == alone.shape


def test_dollars_in_titles_and_names_are_dollars() -> None:
    name = r"a$ \b $c"  # as a formula it can't be parsed
    removal_chart({name: {name: np.array([[1.0, 0.5]], np.float32)}}, [0.0, 1.0])
