"""What errors check: numbers, lists, names of folders."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camdistill.errors import UserError, check_each_once, check_folder_name, check_number, shorten

NUMBERS = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-3, 3)


@given(value=NUMBERS, low=st.integers(-2, 0), high=st.integers(1, 3))
@pytest.mark.parametrize("ends", ["[]", "[)", "(]", "()"])
def test_number_is_refused_where_mathematics_has_it_outside(
    ends: str, value: float, low: int, high: int
) -> None:
    inside = {
        "[]": low <= value <= high,
        "[)": low <= value < high,
        "(]": low < value <= high,
        "()": low < value < high,
    }[ends]
    interval = f"{ends[0]}{low}, {high}{ends[1]}"
    if inside:
        check_number("it", value, interval)
    else:
        with pytest.raises(UserError, match=r"it is .*; give a number in"):
            check_number("it", value, interval)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_lies_in_no_open_interval(value: float) -> None:
    with pytest.raises(UserError, match="it is"):
        check_number("it", value, "(-inf, inf)")


@given(values=st.lists(st.integers(0, 5)))
def test_lists_are_refused_where_a_set_is_smaller(values: list[int]) -> None:
    if len(set(values)) == len(values):
        check_each_once("seeds", values)
    else:
        with pytest.raises(UserError, match=r"seeds has '\d' twice; give each once"):
            check_each_once("seeds", values)


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "a/b", "/a", "~", ".a", "a\\b", "a\0b", "x" * 201]
)
def test_names_that_are_no_folders_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"can't name a folder|has 201 bytes"):
        check_folder_name("arm", name)


@pytest.mark.parametrize("name", ["kd", "beta=3, no kd", "straße", "x" * 200])
def test_names_of_folders_pass(name: str) -> None:
    check_folder_name("arm", name)


@given(text=st.text(), longest=st.integers(10, 80))
def test_shortened_text_is_no_longer_than_asked(text: str, longest: int) -> None:
    assert len(shorten(text, longest)) <= longest
