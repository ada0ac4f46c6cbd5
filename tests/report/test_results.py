import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from camdistill.errors import UserError
from camdistill.measure.intervals import Interval
from camdistill.report.results import (
    machine,
    package_versions,
    read_results,
    text_table,
    write_results,
)


def test_results_come_back_as_plain_values(tmp_path: Path) -> None:
    results = {
        "student": {
            "accuracy": np.float64(0.5),
            "layers": {"layer3": {"pearson": torch.tensor(0.25)}},
        },
        "seeds": (0, 1, 2),
        "n": np.int64(7),
        "bad": [float("nan"), float("inf")],
        "where": Path("a/b"),
        "interval": Interval(0.5, 0.25, 0.75),
        "labeled": True,
        "nothing": None,
    }
    path = write_results(
        tmp_path / "new" / "results.json", results, seconds=1.25, sha256={"teacher": "ab"}
    )
    found = read_results(path)
    assert found["student"] == {"accuracy": 0.5, "layers": {"layer3": {"pearson": 0.25}}}
    assert found["seeds"] == [0, 1, 2]
    assert (found["n"], found["where"], found["labeled"]) == (7, "a/b", True)
    assert found["bad"] == [None, None]
    assert found["interval"] == {"mean": 0.5, "low": 0.25, "high": 0.75}
    assert (found["seconds"], found["sha256"], found["nothing"]) == (1.2, {"teacher": "ab"}, None)
    assert found["machine"] == machine()
    assert found["versions"] == package_versions()


def test_file_reads_well(tmp_path: Path) -> None:
    path = write_results(tmp_path / "r.json", {"seeds": [0, 1], "odd": "[\n 1,\n 2]", "e": []})
    text = path.read_text()
    assert '\n  "seeds": [0, 1],\n' in text
    assert text.endswith("}\n")
    assert read_results(path)["odd"] == "[\n 1,\n 2]"


def test_machine_and_versions_say_what_ran() -> None:
    assert package_versions()["torch"] == torch.__version__
    assert set(package_versions()) >= {"camdistill", "torchvision", "lightning", "python"}
    assert machine()["cores"] >= 1
    assert machine()["cpu"]
    assert (machine()["gpu"] is not None) == torch.cuda.is_available()


def test_full_disk_leaves_the_old_file_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_results(tmp_path / "results.json", {"n": 1})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"can't write .*results.json: No space left on device; free"
    ):
        write_results(path, {"n": 2})
    assert read_results(path)["n"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_results_that_cant_be_written_as_json_leave_nothing(tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", {"odd": object(), 3: {"x"}})
    assert json.loads((tmp_path / "r.json").read_text())["3"] == "{'x'}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no results file .*results.json; nearest: 'result.json'. `camdistill evaluate`"),
        (b'{"n": 1', "is not JSON, or was cut short; run the command"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1]", "holds no named results"),
    ],
)
def test_unreadable_results_are_told_in_one_line(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    (tmp_path / "result.json").touch()
    if content is not None:
        (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_results(tmp_path / "results.json")
    assert "\n" not in str(caught.value)


def test_folder_instead_of_a_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Is a directory"):
        read_results(tmp_path)


def test_table_is_aligned_and_shows_intervals() -> None:
    table = {
        "KD": {"accuracy": Interval(0.5, 0.25, 0.75), "n": 3},
        "KD + Grad-CAM": {"accuracy": 0.9, "skill": None, "minutes": float("nan")},
    }
    assert text_table(table, corner="arm", digits=2) == "\n".join(
        [
            "arm                      accuracy  n  skill  minutes",
            "-------------  -----------------  -  -----  -------",
            "KD             0.50 [0.25, 0.75]  3      -        -",
            "KD + Grad-CAM               0.90  -      -        -",
        ]
    ).replace("arm                      accuracy", "arm                     accuracy")


def test_empty_table_is_empty() -> None:
    assert text_table({}).strip() == ""


def test_strings_that_look_like_lists_stay_what_they_are(tmp_path: Path) -> None:
    odd = {
        "a [ 1,  2 ].png": [1, 2],
        "b": 'x "[ 1,  2 ]" \\',
        "c": ["[ 3 ]", "[  4 ]"],
        "d": "[ 5,",
    }
    path = write_results(tmp_path / "r.json", odd)
    assert {name: read_results(path)[name] for name in odd} == odd
    assert '"a [ 1,  2 ].png": [1, 2],\n' in path.read_text()
