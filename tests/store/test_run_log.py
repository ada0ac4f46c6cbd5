"""Finished runs are on the disk, whole lines only."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camdistill.errors import UserError
from camdistill.experiments.ranking.ranking_records import StudentRecord, pack_bits
from camdistill.store.run_log import RunLog

RECORD = StudentRecord(
    "k", "wide", 100, "none", 0.0, 3, 0.5, 0.25, 1.5, pack_bits(np.ones(9, bool)), 9, 1.2
)


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_scores_come_back_as_they_were(agrees: list[bool]) -> None:
    record = replace(RECORD, agrees=pack_bits(np.array(agrees)), images=len(agrees))
    assert record.scores().tolist() == agrees


def test_runs_are_read_back_and_a_cut_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "runs.jsonl"
    RunLog(path, StudentRecord).add([RECORD, replace(RECORD, key="l")])
    with path.open("a") as file:
        file.write('{"key": "m", "fam')
    found = RunLog(path, StudentRecord)
    assert found.records == {"k": RECORD, "l": replace(RECORD, key="l")}
    found.add([replace(RECORD, key="n")])
    assert list(RunLog(path, StudentRecord).records) == ["k", "l", "n"]


def test_a_first_line_that_was_cut_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"key":')
    assert RunLog(path, StudentRecord).records == {}
    assert path.read_text() == ""


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"key": 1}\n')
    with pytest.raises(UserError, match=r"line 1 of .* is no run"):
        RunLog(path, StudentRecord)


def test_runs_that_no_key_asks_for_are_counted(tmp_path: Path) -> None:
    ledger = RunLog(tmp_path / "runs.jsonl", StudentRecord)
    ledger.add([replace(RECORD, key=key) for key in "abc"])
    assert ledger.count_unused({"b", "z"}) == 2
    assert ledger.count_unused(set("abc")) == 0
