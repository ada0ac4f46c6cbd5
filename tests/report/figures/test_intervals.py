import numpy as np
import pytest

from camdistill.measure.intervals import Interval
from camdistill.report.figures.intervals import interval_chart


def test_a_chart_without_arms_is_a_programmers_mistake() -> None:
    with pytest.raises(ValueError, match="at least one arm"):
        interval_chart({})


def test_interval_chart_draws_longer_lines_for_wider_intervals() -> None:
    def ink(half: float) -> int:
        table = {
            "CE": {"accuracy": Interval(0.5, 0.5 - half, 0.5 + half)},
            "KD": {"accuracy": Interval(0.5, 0.1, 0.9)},
        }
        picture = interval_chart(table, title="t", references={"accuracy": 0.7})
        return int((np.abs(picture.astype(int) - (0x3B, 0x52, 0x8B)) < 40).all(-1).sum())

    assert ink(0.3) > ink(0.1) > ink(0.01)


def test_interval_chart_takes_unknown_intervals_and_missing_measures() -> None:
    table = {
        "one seed": {"accuracy": Interval(0.5, float("nan"), float("nan"))},
        "KD": {"accuracy": Interval(0.6, 0.5, 0.7), "skill": Interval(0.1, 0.0, 0.2)},
    }
    assert interval_chart(table).shape[2] == 3


def test_a_long_title_is_not_cut() -> None:
    table = {"a": {"gain": Interval(0.5, 0.4, 0.6)}}
    picture = interval_chart(table, title="Simulatability gain, 95 % intervals over images, 1 seed")
    assert (picture[:, -4:] == 255).all(), "nothing reaches the right edge"


def test_dollars_in_titles_and_names_are_dollars() -> None:
    name = r"a$ \b $c"  # as a formula it can't be parsed
    interval_chart({name: {name: Interval(0.5, 0.4, 0.6)}}, title=name)
