import json
import re
import urllib.parse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import nn

from camdistill import tags
from camdistill.errors import UserError
from camdistill.layers.filters import first_filters
from camdistill.layers.sweep.sweep_summary import Point
from camdistill.layers.units.unit_inspection import InspectionOptions
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Preprocessed
from camdistill.report.analysis_data import AnalysisData
from camdistill.report.analysis_run import AnalysisRun
from camdistill.report.first_units import points_of_first_filters
from camdistill.report.layer_figures import depth_picture
from camdistill.report.layer_page import findings_page
from camdistill.report.layer_report import LayerReport
from camdistill.report.tensorboard import read_scalars


def _reader(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    found.Reload()
    return found


def test_what_stands_out_is_on_the_page_of_a_report(tmp_path: Path, subject: AnalysisData) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = ShallowCNN(8, (8, 12), (2, 2)).eval()
        for unit in (3, 7):
            network.stage2.bn.weight[unit] = 0
            network.stage2.bn.bias[unit] = -1
    networks = {"teacher": Preprocessed(network).eval()}
    opening = AnalysisRun(networks, subject, LayerReport(tmp_path, ("teacher",)))
    opening.sweep()
    sentence = (
        "teacher stage2: 2 of 12 units dead on 40 images (active in at most 7.5 % of images, "
        "95 % confidence): 3, 7"
    )
    (finding,) = [one for one in opening.analysis.findings if one.kind == "dead"]
    assert finding.text == sentence
    assert finding.units == (3, 7)
    assert f"- **dead** — {sentence}" in findings_page(opening.analysis)


def test_units_of_a_vector_are_refused_before_the_sweep(
    tmp_path: Path, subject: AnalysisData
) -> None:
    network = ShallowCNN(8, (4, 5), (1, 2)).eval()
    report = LayerReport(tmp_path / "out", ("network",))
    layers, units = ["stage1", "linear"], {"linear": [1]}
    opening = AnalysisRun({"network": network}, subject, report, layers, units)
    with pytest.raises(UserError, match="linear gives one number a unit"):
        opening.sweep()
    assert opening.analysis is None
    assert not (tmp_path / "out").exists()


def test_network_without_convolutions_gets_a_note_in_place_of_filters(
    tmp_path: Path, subject: AnalysisData
) -> None:
    parts = [nn.AvgPool2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(8)]
    network = nn.Sequential(*parts)
    network(subject.fetch([0]))
    report = LayerReport(tmp_path, ("network",))
    opening = AnalysisRun({"network": network.eval()}, subject, report)
    opening.sweep()
    opening.report_filters()
    report.finish(opening.analysis)
    assert "no two-dimensional convolution" in (tmp_path / "report.md").read_text()
    assert set(opening.analysis.weights["network"]) == {"3"}


def test_first_filters_belong_to_layers_that_no_other_weights_reach(subject: AnalysisData) -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8)),
    ).eval()
    example = subject.fetch([0])
    points = [Point("network", path, 0, "post") for path in ("0", "2", "3", "4", "5")]
    found = points_of_first_filters(network, example, first_filters(network, example), points)
    assert [point.path for point in found] == ["0", "2", "3"]


def test_card_of_a_first_unit_shows_its_filter(opened: AnalysisRun) -> None:
    bank = opened.analysis.filters["student"]
    (one, *_) = opened.analysis.unit_records["student"]["stage1"]
    tall, wide = bank.weights.shape[2:]
    unit = bank.weights[one.unit].numpy()
    factor = round(96 / max(tall, wide))
    level = np.round((unit / np.abs(unit).max() + 1) / 2 * 255)
    expected = np.kron(level.transpose(1, 2, 0), np.ones((factor, factor, 1)))
    name = next((opened.report.folder / "pictures").glob("7_units-cards_stage1-student.png"))
    page = np.asarray(Image.open(name).convert("RGB")).astype(int)
    corners = np.argwhere(np.abs(page - expected[0, 0]).max(-1) <= 2)
    rows, columns = factor * tall, factor * wide
    assert any(
        np.abs(page[y : y + rows, x : x + columns] - expected).max() <= 2
        for y, x in corners
        if y + rows <= page.shape[0] and x + columns <= page.shape[1]
    )


@torch.no_grad()
def _never_finite() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ShallowCNN(8, (4, 6, 6), (1, 2, 2)).eval()
    network.stage2.conv.weight.fill_(torch.nan)
    return Preprocessed(network).eval()


def _opened(folder: Path, networks: dict[str, nn.Module], subject: AnalysisData) -> AnalysisRun:
    few = replace(subject, order=subject.order[:12])
    opening = AnalysisRun(networks, few, LayerReport(folder, tuple(networks)))
    opening.sweep()
    opening.report_filters()
    opening.report_depth_views(2)
    opening.inspect_units(InspectionOptions(units=1, steps=0))
    opening.report_pairs(1)
    opening.report.finish(opening.analysis)
    return opening


def test_network_that_is_never_finite_is_told_in_words_and_has_no_statistics(
    tmp_path: Path, subject: AnalysisData
) -> None:
    opening = _opened(tmp_path, {"network": _never_finite()}, subject)
    (finding,) = opening.analysis.findings
    values = 12 * 6 * 16 * 16
    assert finding.text == (
        "network: each of 12 images has values that are not finite at 2 of 3 layers, stage2 the "
        f"first of them ({values:,} NaN among {values:,} values before the non-linearity): these "
        "layers have no statistics, and no average, comparison or map counts them"
    )
    assert (finding.kind, finding.layer, finding.value) == ("not finite", "stage2", 2)
    page = (tmp_path / "report.md").read_text()
    assert f"- **not finite** — {finding.text}" in page
    assert "| stage2 | 6 | 16x16 | **no image is finite here** |" in page
    assert "network stage2, stage3: 12 of 12 images have values that are not finite" in page
    assert "weights that are not finite: network stage2.conv (216 of 216)" in page
    assert "no maps of 2 of 2 images: the logits of the network are not finite there" in page
    assert "no cards of units of network stage2, stage3: no image is finite there" in page
    assert not re.search(r"\bnan\b", page), "a number that is none"
    assert not list((tmp_path / "pictures").glob("2_maps-*"))
    assert {path.name for path in (tmp_path / "pictures").glob("7_units-*")} == {
        "7_units-cards_stage1-network.png"
    }
    read = read_scalars(tmp_path / "network")
    assert [value for _, value in read[tags.NONFINITE]] == [0, values, 12 * 6 * 8 * 8]
    for name in ("active", "dead", "nearly_dead", "always_on", "effective_rank", "largest"):
        assert [step for step, _ in read[tags.profile(name)]] == [0], "stage1's alone"
    row = json.loads((tmp_path / "results.json").read_text())["networks"]["network"]["stage2"]
    assert row["images"] == 0
    for name in ("dead", "dead_units", "always_on_units", "active", "largest", "cam_scale"):
        assert row[name] is None, name


def test_student_that_is_never_finite_changes_no_number_of_its_teacher(
    tmp_path: Path, subject: AnalysisData
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        teacher = Preprocessed(ShallowCNN(8, (4, 6), (1, 2))).eval()
    both = {"teacher": teacher, "student": _never_finite()}
    _opened(tmp_path / "both", both, subject)
    _opened(tmp_path / "alone", {"teacher": teacher}, subject)
    rows = {
        name: json.loads((tmp_path / name / "results.json").read_text())["networks"]["teacher"]
        for name in ("both", "alone")
    }
    assert rows["both"] == rows["alone"]
    page = (tmp_path / "both" / "report.md").read_text()
    assert "student: each of 12 images has values that are not finite at 2 of 3 layers" in page
    assert "![through_depth](pictures/2_maps-through_depth.png)" in page
    assert not list((tmp_path / "both" / "pictures").glob("7_units-maps_*-student.png"))


def test_words_of_a_network_alone_are_of_one_network(tmp_path: Path, subject: AnalysisData) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Preprocessed(ShallowCNN(8, (8, 12), (1, 2))).eval()
    opening = _opened(tmp_path, {"network": network}, subject)
    events = {run: _reader(tmp_path / run) for run in ("report", "network")}
    written = set(events["report"].Tags()["tensors"])
    assert tags.CKA_WITHIN in written
    assert tags.CKA_CHART not in written
    assert tags.CKA_WITHIN in urllib.parse.unquote(opening.report.link())
    nothing = findings_page(replace(opening.analysis, findings=()))
    said = [nothing, (tmp_path / "report.md").read_text()]
    said += [
        make_ndarray(event.tensor_proto).item().decode()
        for tag in (tags.HOW_TO_READ, tags.FINDINGS, tags.LAYERS)
        for event in events["report"].Tensors(tag)
    ]
    said += [
        reader.SummaryMetadata(tag).summary_description
        for reader in events.values()
        for tag in reader.Tags()["tensors"]
    ]
    for text in said:
        assert not re.search(r"teacher|student|other network|all networks|both|two net", text), text


def test_title_says_whose_class_it_is_where_there_are_two_networks(
    opened: AnalysisRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = opened.analysis.pictures[0]
    alone = replace(picture, views={"teacher": picture.views["teacher"]})
    titles: list[str] = []
    monkeypatch.setattr(
        "camdistill.report.layer_figures.depth_panel",
        lambda *_, title, lines: titles.append(title) or np.zeros((1, 1, 3), np.uint8),
    )
    for shown in (picture, alone):
        depth_picture(shown, (), dict.fromkeys(shown.views, 0))
    assert titles[0].endswith("? (teacher's class)")
    assert titles[1].endswith(f"why class {picture.explained_class}?")


@pytest.mark.slow
def test_picture_of_fewer_layers_than_there_are_says_so(
    tmp_path: Path, subject: AnalysisData
) -> None:
    parts = [part for _ in range(70) for part in (nn.Conv2d(3, 3, 1), nn.ReLU())]
    network = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8))
    few = replace(subject, order=subject.order[:2])
    opening = AnalysisRun({"network": network.eval()}, few, LayerReport(tmp_path, ("network",)))
    said: list[tuple] = []
    opening.sweep()
    opening.report.show_depth_view = lambda *given: said.append(given)
    opening.report_depth_views(1)
    ((_, picture, _, whole),) = said
    assert len(picture.views["network"]) == 60
    assert whole == {"network": 70}
    tall = depth_picture(picture, (), whole).shape[0]
    assert tall > depth_picture(picture, (), {"network": 60}).shape[0], "a line more"


def test_network_without_maps_or_filters_gets_notes_in_their_place(
    tmp_path: Path, subject: AnalysisData
) -> None:
    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.relu, self.linear = nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 8)

        def forward(self, images):
            return self.linear(self.relu(self.hidden(images.mean((2, 3)))))

    report = LayerReport(tmp_path, ("network",))
    opening = AnalysisRun({"network": Vectors().eval()}, subject, report)
    opening.sweep()
    opening.report_filters()
    opening.report_depth_views(2)
    opening.inspect_units(InspectionOptions(units=2, steps=2))
    opening.report_pairs(2)
    report.finish(opening.analysis)
    page = (tmp_path / "report.md").read_text()
    assert "no two-dimensional convolution" in page
    assert "no layer of the network has a map" in page
    assert not opening.analysis.unit_records
    assert set(opening.analysis.weights["network"]) == {"hidden", "linear"}
