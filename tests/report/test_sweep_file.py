import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from camdistill.errors import UserError
from camdistill.layers.sweep.layer_sweep import LayerSweep
from camdistill.layers.sweep.sweep_state import load_sweep_state
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Preprocessed, Teacher
from camdistill.report import sweep_file
from camdistill.report.analysis_data import AnalysisData
from camdistill.report.analysis_run import AnalysisRun
from camdistill.report.file_manifest import SWEEP
from camdistill.report.layer_report import LayerReport

BATCH = 16


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 40 images are three of them, the last one short."""
    monkeypatch.setattr(sweep_file, "BATCH", BATCH)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts take longer than such sweeps."""
    monkeypatch.setattr(LayerReport, "show_sweep", lambda *_: None)


def networks() -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher, student = ShallowCNN(8, (6, 8), (1, 2)), ShallowCNN(8, (4, 5), (1, 2))
    return {"teacher": Teacher.from_network(teacher), "student": Preprocessed(student).eval()}


def opening_in(folder: Path, subject: AnalysisData, **other: object) -> AnalysisRun:
    both = networks()
    return AnalysisRun(both, subject, LayerReport(folder, tuple(both)), **other)


def stopped_after(batches: int) -> Callable[[str, int, int], None]:
    def step(stage: str, done: int, total: int) -> None:
        if done >= batches * BATCH:
            raise KeyboardInterrupt

    return step


@pytest.mark.usefixtures("undrawn")
def test_stopped_sweep_goes_on_and_tells_to_the_last_bit_what_a_whole_one_does(
    tmp_path: Path, subject: AnalysisData
) -> None:
    whole = opening_in(tmp_path / "whole", subject)
    whole.sweep(probes=True)
    whole.report.finish(whole.analysis)
    for batches in (1, 2):
        part = opening_in(tmp_path / "parts", subject, on_step=stopped_after(batches))
        with pytest.raises(KeyboardInterrupt):
            part.sweep(probes=True)
        part.report.finish(part.analysis)
        assert part.restored == (batches - 1) * BATCH
    rest = opening_in(tmp_path / "parts", subject)
    rest.sweep(probes=True)
    rest.report.finish(rest.analysis)
    assert rest.restored == 2 * BATCH
    told = {}
    for name in ("whole", "parts"):
        told[name] = json.loads((tmp_path / name / "results.json").read_text())
        told[name].pop("notes")
    assert told["parts"] == told["whole"]
    with (
        np.load(tmp_path / "whole" / "numbers.npz") as first,
        np.load(tmp_path / "parts" / "numbers.npz") as second,
    ):
        assert set(first) == set(second)
        for name in first:
            np.testing.assert_array_equal(second[name], first[name], err_msg=name)
    assert "32 of 40 images were looked at by an earlier run" in rest.analysis.sweep.notes[-1]


def test_whole_sweep_is_not_repeated_for_other_looks(
    tmp_path: Path, subject: AnalysisData, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = opening_in(tmp_path, subject)
    opening.sweep()
    opening.report.finish(opening.analysis)
    monkeypatch.delattr(LayerSweep, "update")
    again = opening_in(tmp_path, subject, units={"stage2": [3]})
    again.sweep()
    again.report_depth_views(1)
    again.report.finish(again.analysis)
    assert again.restored == len(subject.order)
    assert (tmp_path / "pictures" / "2_maps-through_depth.png").exists()
    assert (tmp_path / SWEEP).exists()


@pytest.mark.usefixtures("undrawn")
def test_killed_process_loses_no_more_than_what_came_since_the_last_minute(
    tmp_path: Path, subject: AnalysisData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_file, "SAVE_INTERVAL", 0.0)
    on_disk = []

    def step(stage: str, done: int, total: int) -> None:
        file = tmp_path / SWEEP
        on_disk.append(int(load_sweep_state(file)["seen:images"]) if file.exists() else 0)

    opening_in(tmp_path, subject, on_step=step).sweep()
    assert on_disk == [0, 16, 32]


@torch.no_grad()
def _other_weight(opening: AnalysisRun) -> None:
    opening.networks["teacher"].network.linear.bias[3] += 1e-3


def _other_normalization(opening: AnalysisRun) -> None:
    opening.networks["student"].mean += 0.1


def _other_stride(opening: AnalysisRun) -> None:
    opening.networks["student"].network.stage2.conv.stride = (1, 1)


def _other_order(opening: AnalysisRun) -> None:
    opening.dataset = replace(opening.dataset, order=opening.dataset.order[::-1].copy())


def _other_pixels(opening: AnalysisRun) -> None:
    images = opening.dataset.images
    pixels = images.pixels.copy()
    pixels[3, 0, 0, 0] ^= 1
    opening.dataset = replace(opening.dataset, images=replace(images, pixels=pixels))


def _other_layers(opening: AnalysisRun) -> None:
    opening.layers = ["stage2"]


OTHERS = [_other_weight, _other_normalization, _other_stride, _other_order, _other_pixels]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("change", [*OTHERS, _other_layers])
def test_sweep_of_anything_else_is_not_taken(
    tmp_path: Path, subject: AnalysisData, change: Callable[[AnalysisRun], None]
) -> None:
    # Files that were given one by one have no fingerprint of their own.
    files = replace(subject, images=replace(subject.images, fingerprint=""))
    opening_in(tmp_path, files).sweep()
    same = opening_in(tmp_path, files)
    same.sweep()
    assert same.restored == len(files.order)
    other = opening_in(tmp_path, files)
    change(other)
    other.sweep()
    assert other.restored == 0
    assert other.analysis.sweep.images == len(files.order)


@pytest.mark.usefixtures("undrawn")
def test_damaged_file_is_made_anew(tmp_path: Path, subject: AnalysisData) -> None:
    opening_in(tmp_path, subject).sweep()
    (tmp_path / SWEEP).write_bytes((tmp_path / SWEEP).read_bytes()[:-100])
    again = opening_in(tmp_path, subject)
    again.sweep()
    assert (again.restored, again.analysis.sweep.images) == (0, len(subject.order))
    load_sweep_state(tmp_path / SWEEP)


@pytest.mark.usefixtures("undrawn")
def test_full_disk_stops_no_sweep_and_the_report_says_so(
    tmp_path: Path, subject: AnalysisData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise UserError("can't write the sweep to x: No space left on device; name another folder")

    monkeypatch.setattr(sweep_file, "save_sweep_state", full)
    opening = opening_in(tmp_path, subject)
    opening.sweep()
    assert "the sweep isn't kept for another run: can't write" in opening.analysis.sweep.notes[-1]


def test_foreign_file_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / SWEEP).write_text("of somebody else")
    with pytest.raises(UserError, match="give another --out"):
        LayerReport(tmp_path, ("teacher",))
