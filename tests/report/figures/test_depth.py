import numpy as np
import pytest

from camdistill.report.figures.depth import (
    LogHistogram,
    ProfileLine,
    _axis_limits,
    profile_chart,
    ridge_chart,
    similarity_chart,
)


def _ink(picture: np.ndarray) -> float:
    return float((picture.min(-1) < 200).mean())


def test_profile_draws_each_network_in_its_color_and_gaps_for_nan() -> None:
    depth = np.array([0.0, 50.0, 100.0])
    both = {
        "active": {
            "teacher": ProfileLine(depth, np.array([0.1, 0.5, 0.9])),
            "student": ProfileLine(depth, np.array([0.9, 0.5, 0.1])),
        }
    }
    picture = profile_chart(both, title="t")
    blue = (np.abs(picture.astype(int) - [59, 82, 139]).max(-1) < 12).sum()
    orange = (np.abs(picture.astype(int) - [225, 98, 47]).max(-1) < 12).sum()
    assert blue > 200
    assert orange > 200
    broken = {"active": {"teacher": ProfileLine(depth, np.array([0.1, np.nan, 0.9]))}}
    whole = {"active": {"teacher": ProfileLine(depth, np.array([0.1, 0.5, 0.9]))}}
    assert _ink(profile_chart(broken)) < _ink(profile_chart(whole))


def test_what_is_compared_with_is_dashed_beside_the_stages() -> None:
    depth = np.array([0.0, 50.0, 100.0])
    stages = {
        "active": {f"epoch {n}": ProfileLine(depth, np.array([0.1, 0.5, 0.9]) / n) for n in (1, 2)}
    }
    level = {"active": {"teacher": ProfileLine(depth, np.full(3, 0.95))}}

    def orange(picture: np.ndarray) -> np.ndarray:
        line = picture[90:-60]  # without the legend
        return (np.abs(line.astype(int) - [225, 98, 47]).max(-1) < 40).any(0)

    assert not orange(profile_chart(stages, graded=True)).any()
    columns = orange(profile_chart(stages, graded=True, references=level))
    drawn = np.flatnonzero(columns)
    gaps = ~columns[drawn[0] : drawn[-1]]
    assert 0.1 < gaps.mean() < 0.6


def test_profile_of_nothing_finite_is_still_a_chart() -> None:
    depth = np.array([0.0, 100.0])
    profile_chart({"active": {"teacher": ProfileLine(depth, np.full(2, np.nan))}})


def test_ridges_end_where_the_values_end() -> None:
    edges = np.linspace(-3, 2, 51)
    counts = np.zeros(50)
    counts[20:30] = 1000
    counts[0] = 1  # one value in ten thousand does not stretch the axis
    low, high = _axis_limits({"teacher": {"a": LogHistogram(edges, counts, 0.5)}})
    assert low == pytest.approx(edges[20], abs=0.11)
    assert high == pytest.approx(edges[30] + 0.1, abs=0.11)


def test_dead_layer_and_nan_have_their_words_and_no_curve() -> None:
    edges = np.linspace(-3, 2, 51)
    dead = LogHistogram(edges, np.zeros(50), 1.0, nonfinite=3)
    picture = ridge_chart({"teacher": {"a": dead, "b": dead}}, title="t")
    red = (np.abs(picture.astype(int) - [214, 39, 40]).max(-1) < 40).sum()
    assert red > 10


def test_similarity_chart_shows_nan_as_gray() -> None:
    values = np.array([[1.0, 0.0], [np.nan, 0.5]])
    picture = similarity_chart(values, ["a", "b"], ["c", "d"], title="CKA")
    grays = (picture == 204).all(-1).sum()
    yellows = (np.abs(picture.astype(int) - [253, 231, 36]).max(-1) < 3).sum()
    assert grays > 300
    assert yellows > 300


def test_charts_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one statistic"):
        profile_chart({})
    with pytest.raises(ValueError, match="at least one network"):
        ridge_chart({})


DOLLARS = r"a$ \b $c"  # a path of the user's; as a formula it can't be parsed


def test_dollars_in_titles_and_names_are_dollars() -> None:
    depth = np.array([0.0, 100.0])
    line = ProfileLine(depth, np.array([0.1, 0.9]))
    named = {
        "title": DOLLARS,
        "notes": {DOLLARS: DOLLARS},
        "references": {DOLLARS: {DOLLARS: line}},
    }
    profile_chart({DOLLARS: {DOLLARS: line}}, **named)
    edges = np.linspace(-3, 2, 51)
    found = LogHistogram(edges, np.ones(50), 0.0, 0)
    ridge_chart({DOLLARS: {DOLLARS: found}}, title=DOLLARS, axis=DOLLARS)
    similarity_chart(
        np.full((1, 1), 0.5), [DOLLARS], [DOLLARS],
        title=DOLLARS, note=DOLLARS, row_axis=DOLLARS, column_axis=DOLLARS,
    )  # fmt: skip
