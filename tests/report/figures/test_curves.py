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
