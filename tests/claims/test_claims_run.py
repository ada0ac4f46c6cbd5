"""Rows one after the other: what is done is kept, what fails is told, nothing else stops."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from camdistill.claims.claim import ClaimMeasurement, ClaimResult, ClaimSetup, exact_number
from camdistill.claims.claims_index import ROWS, select_claims
from camdistill.claims.claims_report import (
    claim_chart,
    claims_markdown,
    claims_text,
    write_claim_pictures,
)
from camdistill.claims.claims_run import Outcome, run_claims
from camdistill.errors import UserError

SETTINGS = {"count": 16, "seed": 3}


class Counted:
    """An experiment that knows how often it was made."""

    def __init__(self, number: str, ends: type[BaseException] | None = None) -> None:
        self.number, self.ends, self.made = number, ends, 0

    def __call__(self, lab: ClaimSetup) -> ClaimResult:
        self.made += 1
        if self.ends is not None:
            raise self.ends("no luck here: try another seed")
        ours = (
            ClaimMeasurement("a", 0.5, 0.25, 0.75, lab.count, "share"),
            exact_number("b", float("nan"), 2),
        )
        return ClaimResult(self.number, "it is so", "1 %", ours, "above 0", True, "a note")


def test_second_start_makes_only_what_is_missing(
    lab: Callable[..., ClaimSetup], tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    one, two = Counted("1"), Counted("2")
    first = run_claims(lab(), [("1", one)], path, SETTINGS, {})
    both = run_claims(lab(), [("1", one), ("2", two)], path, SETTINGS, {})
    assert (one.made, two.made) == (1, 1)
    row, again = first["1"].row, both["1"].row
    assert row is not None
    assert again is not None
    assert again.ours[0] == row.ours[0]  # the second is NaN, which equals nothing
    assert (again.claim, again.passed, again.note) == (row.claim, True, "a note")
    assert list(json.loads(path.read_text())["rows"]) == ["1", "2"]


def test_rows_asked_for_later_do_not_push_out_earlier_ones(
    lab: Callable[..., ClaimSetup], tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    run_claims(lab(), [("11", Counted("11"))], path, SETTINGS, {})
    found = run_claims(lab(), [("2", Counted("2"))], path, SETTINGS, {})
    assert list(found) == ["2"]
    assert list(json.loads(path.read_text())["rows"]) == ["2", "11"]


def test_a_row_that_cannot_be_made_is_told_and_tried_again(
    lab: Callable[..., ClaimSetup], tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    bad, good = Counted("1", UserError), Counted("2")
    found = run_claims(lab(), [("1", bad), ("2", good)], path, SETTINGS, {})
    assert found["1"] == Outcome(None, found["1"].seconds, "no luck here: try another seed")
    assert found["2"].row is not None
    assert "not made: 1" in claims_text(found)
    bad.ends = None
    assert run_claims(lab(), [("1", bad)], path, SETTINGS, {})["1"].row is not None
    assert (bad.made, good.made) == (2, 1)


def test_ctrl_c_keeps_what_was_done(lab: Callable[..., ClaimSetup], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    rows = [("1", Counted("1")), ("2", Counted("2", KeyboardInterrupt))]
    with pytest.raises(KeyboardInterrupt):
        run_claims(lab(), rows, path, SETTINGS, {})
    assert list(json.loads(path.read_text())["rows"]) == ["1"]


def test_results_of_other_settings_are_not_mixed_in(
    lab: Callable[..., ClaimSetup], tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    run_claims(lab(), [("1", Counted("1"))], path, SETTINGS, {})
    with pytest.raises(UserError, match=r"seed 3, now 4.*--out"):
        run_claims(lab(), [("1", Counted("1"))], path, SETTINGS | {"seed": 4}, {})


def test_what_was_left_out_before_may_be_given_later(
    lab: Callable[..., ClaimSetup], tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    one = Counted("1")
    for boxes in (None, "photographs", None):
        run_claims(lab(), [("1", one)], path, SETTINGS | {"boxes": boxes}, {})
        run_claims(lab(), [("2", Counted("2"))], path, SETTINGS | {"boxes": boxes}, {})
    assert one.made == 1
    assert len(json.loads(path.read_text())["rows"]) == 2
    three = [("3", Counted("3"))]
    run_claims(lab(), three, path, SETTINGS | {"boxes": "photographs"}, {})
    with pytest.raises(UserError, match=r"boxes photographs, now drawings"):
        run_claims(lab(), [("1", one)], path, SETTINGS | {"boxes": "drawings"}, {})


def test_another_commands_results_are_left_alone(
    lab: Callable[..., ClaimSetup], tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"explainers": {}}')
    with pytest.raises(UserError, match=r"not written by `camdistill claims`"):
        run_claims(lab(), [("1", Counted("1"))], path, SETTINGS, {})
    assert path.read_text() == '{"explainers": {}}'


def test_rows_come_in_the_papers_order_and_unknown_ones_are_a_mistake() -> None:
    numbers = [number for number, _ in ROWS]
    assert numbers == sorted(numbers, key=lambda text: (int(text.rstrip("bc")), text))
    assert [number for number, _ in select_claims(numbers[::-1])] == numbers
    assert "5c" not in [number for number, _ in select_claims([], photographs=False)]
    with pytest.raises(UserError, match=r"no row '99'"):
        select_claims(["99"])


def test_text_and_table_have_number_interval_n_criterion_and_verdict() -> None:
    ours = (
        ClaimMeasurement("grad_cam", 0.51234, 0.4, 0.6, 20, "box error"),
        ClaimMeasurement("random", 0.9, 0.8, 1.0, 20, "box error"),
        exact_number("forwards", 225, 1, "cost"),
    )
    found = {
        "3": Outcome(ClaimResult("3", "good |maps|", "56.51 %", ours, "order holds", False), 1.0),
        "4": Outcome(ClaimResult("4", "other maps", "-", ours, "order holds", True), 1.0),
        "5": Outcome(ClaimResult("5", "no maps", "-", (), "order holds", None), 1.0),
    }
    told = claims_text(found)
    assert "box error: grad_cam 0.512 [0.400, 0.600] (n=20), random 0.900" in told
    assert "cost: forwards 225" in told
    assert "1 of 3 claims hold" in told
    assert "do not hold: 3\ncan't be judged here: 5" in told
    rows = [line for line in claims_markdown(found).splitlines() if line.startswith("| 3 ")]
    assert rows[0].count("|") == 7, "a cell with a bar breaks the table"
    assert rows[0].endswith("| FAIL |")


def test_chart_leaves_out_what_is_not_a_number() -> None:
    nothing = ClaimResult("3", "maps", "-", (exact_number("a", float("nan"), 2),), "holds", None)
    assert claim_chart(nothing) is None
    ours = (
        ClaimMeasurement("a", 0.5, 0.4, 0.6, 9, "error"),
        ClaimMeasurement("a - b", 0.1, 0.0, 0.2, 9, "more"),
    )
    picture = claim_chart(ClaimResult("3", "maps", "-", ours, "holds", True))
    assert picture is not None
    assert picture.std() > 10


def test_charts_of_all_sizes_stand_below_one_another(tmp_path: Path) -> None:
    few = (ClaimMeasurement("a", 0.5, 0.4, 0.6, 9, "error"),)
    many = (
        *few,
        ClaimMeasurement("b", 0.5, 0.4, 0.6, 9, "error"),
        ClaimMeasurement("a", 1.0, 0.0, 2.0, 9, "time"),
    )
    found = {
        number: Outcome(ClaimResult(number, "maps", "-", ours, "holds", True), 1.0)
        for number, ours in (("3", few), ("4", many))
    }
    alone = [claim_chart(one.row) for one in found.values() if one.row is not None]
    write_claim_pictures(found, tmp_path)
    with Image.open(tmp_path / "claims_localization.png") as picture:
        heights = sum(one.shape[0] for one in alone if one is not None)
        widths = max(one.shape[1] for one in alone if one is not None)
        assert picture.size == (widths, heights)
    assert (tmp_path / "table.txt").read_text() == f"{claims_text(found)}\n"
