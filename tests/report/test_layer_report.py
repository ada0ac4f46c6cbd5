import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util.tensor_util import make_ndarray
from torch import nn

from camdistill import tags
from camdistill.errors import UserError
from camdistill.layers.profiles import profiles
from camdistill.layers.sweep.statistics.histograms import log10_bins
from camdistill.networks.students import ShallowCNN
from camdistill.report.analysis_run import AnalysisRun
from camdistill.report.file_manifest import FileManifest
from camdistill.report.layer_report import LayerReport, depth_steps, report_url, symmetric_bins
from camdistill.report.tensorboard import TensorBoardLogger, read_scalars


def _events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    found.Reload()
    return found


def _pictures(events: EventAccumulator, tag: str) -> dict[int, np.ndarray]:
    found = {}
    for event in events.Tensors(tag):
        content = make_ndarray(event.tensor_proto)[2]
        found[event.step] = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return found


def test_every_card_of_the_sweep_exists_in_the_run_of_its_network(opened: AnalysisRun) -> None:
    folder = opened.report.folder
    known = {run: set(_events(folder / run).Tags()["tensors"]) for run in ("teacher", "student")}
    for run, network in (("teacher", "teacher"), ("student", "student")):
        expected = {tags.RIDGE, tags.RIDGE_BEFORE, tags.WEIGHTS_RIDGE, tags.WEIGHT_NORM}
        expected |= {tags.NORMS_RIDGE}
        expected |= {tags.FIRST_SHAPE, tags.FIRST_SIZE, tags.ZEROS, tags.NONFINITE}
        expected |= {tags.profile(name) for name in ("active", "dead", "effective_rank", "hoyer")}
        expected |= {tags.BEST_CKA, tags.profile("cam_scale"), tags.profile("cam_blank")}
        expected |= {
            tags.feature_maps(layer) for layer in opened.analysis.pictures[0].views[network]
        }
        expected |= {tags.unit_cards(layer) for layer in opened.analysis.unit_records[network]}
        assert expected <= known[run], expected - known[run]
    assert tags.MATCHED in known["student"]
    report = set(_events(folder / "report").Tags()["tensors"])
    assert report == {
        *(tags.PROFILE_CHART, tags.RIDGE_CHART, tags.CKA_CHART, tags.CAM_CHART),
        *(tags.WEIGHTS_CHART, tags.NORMS_CHART, tags.THROUGH_DEPTH),
        *(tags.FINDINGS, tags.HOW_TO_READ, tags.LAYERS),
        *(tags.unit_pairs(layer) for layer in ("stage1", "stage2", "stage3")),
        "custom_scalars__config__",
    }


def test_profiles_are_drawn_at_their_depth_in_percent(opened: AnalysisRun) -> None:
    for network in ("teacher", "student"):
        read = read_scalars(opened.report.folder / network)
        for name in ("active", "population_sparsity", "effective_rank"):
            line = profiles(opened.analysis.sweep)[name][network]
            expected = [
                (round(depth), pytest.approx(value, rel=1e-6))
                for depth, value in zip(line.depth, line.values, strict=True)
                if not math.isnan(value)
            ]
            assert read[tags.profile(name)] == expected
    active = opened.analysis.sweep.layer("student", "stage1").units.active
    assert read[tags.profile("active")][0] == (0, pytest.approx(float(active.mean()), rel=1e-5))


def test_ridges_hold_the_counts_of_the_sweep_with_the_layers_number_as_step(
    opened: AnalysisRun,
) -> None:
    for network, layers in opened.analysis.sweep.networks.items():
        events = _events(opened.report.folder / network)
        read = {
            event.step: make_ndarray(event.tensor_proto) for event in events.Tensors(tags.RIDGE)
        }
        assert set(read) == {layer.order for layer in layers}
        for layer in layers:
            edges, counts = log10_bins(layer.post)
            assert np.array_equal(read[layer.order][:, 2], counts.numpy())
            assert np.allclose(read[layer.order][:, 0], edges[:-1].numpy())
            assert np.allclose(read[layer.order][:, 1], edges[1:].numpy())
            assert np.isfinite(read[layer.order]).all()


def test_ridges_of_inputs_weights_and_lengths_hold_every_number(opened: AnalysisRun) -> None:
    for network, layers in opened.analysis.sweep.networks.items():
        events = _events(opened.report.folder / network)
        read = {
            tag: {event.step: make_ndarray(event.tensor_proto) for event in events.Tensors(tag)}
            for tag in (tags.RIDGE_BEFORE, tags.WEIGHTS_RIDGE, tags.NORMS_RIDGE)
        }
        before = {layer.order: layer.pre for layer in layers if layer.pre is not None}
        assert read[tags.RIDGE_BEFORE].keys() == before.keys()
        for order, histogram in before.items():
            counts = read[tags.RIDGE_BEFORE][order][:, 2]
            assert 0.998 * histogram.finite <= counts.sum() <= histogram.finite
        bare = opened.networks[network].network
        parts = [part for part in bare.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
        assert set(read[tags.WEIGHTS_RIDGE]) == set(range(len(parts)))
        for number, part in enumerate(parts):
            weights = part.weight.detach().double().flatten(1).numpy()
            ridge = read[tags.WEIGHTS_RIDGE][number]
            assert ridge[:, 2].sum() == pytest.approx(weights.size)
            below = ridge[ridge[:, 1] <= 1e-9, 2].sum()
            assert below == pytest.approx((weights < 0).sum(), abs=0.01 * weights.size + 1)
            lengths = np.sqrt((weights**2).sum(1))
            ridge = read[tags.NORMS_RIDGE][number]
            assert ridge[:, 2].sum() == len(lengths)
            assert ridge[-1, 2] == (lengths >= lengths.max() * 29 / 30).sum()


def test_arrays_hold_what_results_leave_out(opened: AnalysisRun) -> None:
    with np.load(opened.report.folder / "numbers.npz", allow_pickle=False) as read:
        arrays = dict(read)
    images = opened.dataset.fetch(opened.dataset.order)
    student = opened.networks["student"]
    with torch.no_grad():
        values = student.network.stage1(student.normalize(images)).double().numpy()
    own = {
        name.rpartition("/")[2]: array
        for name, array in arrays.items()
        if name.startswith("student/stage1/")
    }
    assert np.allclose(own["unit_variance"], values.var((0, 2, 3)), rtol=1e-4)
    means = values.mean((2, 3))
    count = len(means)
    lifetime = (1 - means.mean(0) ** 2 / (means**2).mean(0)) / (1 - 1 / count)
    assert np.allclose(own["unit_lifetime_sparsity"], lifetime, rtol=1e-3, atol=1e-6)
    covariance = np.cov(means.T, bias=True)
    spectrum = np.linalg.eigvalsh(covariance)[::-1]
    scale = own["eigenvalues"][0] / spectrum[0]
    assert scale == pytest.approx(1, rel=0.03), "over n or n - 1"
    assert np.allclose(own["eigenvalues"], scale * spectrum, rtol=1e-3, atol=1e-9)
    peaks = values.max((2, 3))
    assert np.allclose(own["top_values"][:, 0], peaks.max(0), rtol=1e-5)
    assert np.array_equal(own["top_images"][:, 0], opened.dataset.order[peaks.argmax(0)])
    assert own["post_counts"].sum() == values.size
    assert own["post_edges"].shape == (len(own["post_counts"]) + 1,)
    assert own["pre_counts"].sum() == values.size
    weight = student.network.stage1.conv.weight.detach().flatten(1).norm(dim=1)
    assert np.allclose(arrays["student/stage1.conv/weights_norm"], weight)
    row = json.loads((opened.report.folder / "results.json").read_text())
    row = row["networks"]["student"]["stage1"]
    assert row["cam_scale_low"] <= row["cam_scale"] <= row["cam_scale_high"]


def test_page_explains_exactly_the_cards_that_were_written(opened: AnalysisRun) -> None:
    folder = opened.report.folder
    written = {
        tag
        for run in ("report", "teacher", "student")
        for tag in _events(folder / run).Tags()["tensors"]
    } - {"custom_scalars__config__"}
    page = (folder / "report.md").read_text().partition("## Every card")[2]
    told = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    stems = {card.removesuffix("<layer>") for card in told if card.endswith("<layer>")}
    assert {card for card in told if not card.endswith("<layer>")} == {
        tag for tag in written if not any(tag.startswith(stem) for stem in stems)
    }
    assert stems == {"7_units/cards_", "7_units/pairs_", "7_units/maps_"}


def test_pictures_in_events_are_those_of_the_files(opened: AnalysisRun) -> None:
    folder = opened.report.folder
    for run in ("report", "teacher", "student"):
        events = _events(folder / run)
        for tag in events.Tags()["tensors"]:
            if events.SummaryMetadata(tag).plugin_data.plugin_name != "images":
                continue
            for step, picture in _pictures(events, tag).items():
                parts = [tag, *([run] if run != "report" else []), *([str(step)] if step else [])]
                name = re.sub(r"[^\w.-]", "-", "-".join(parts))
                file = folder / "pictures" / f"{name}.png"
                assert np.array_equal(np.asarray(Image.open(file).convert("RGB")), picture), name
                assert (picture.min(-1) < 200).mean() > 0.002, f"{name} is blank"
    assert set(_pictures(_events(folder / "report"), tags.THROUGH_DEPTH)) == {0, 1, 2}


def test_every_tag_has_its_meaning_in_the_events(opened: AnalysisRun) -> None:
    for run in ("report", "teacher", "student"):
        events = _events(opened.report.folder / run)
        for tag in events.Tags()["tensors"]:
            if tag != "custom_scalars__config__":
                assert (
                    events.SummaryMetadata(tag).summary_description == tags.describe_card(tag) != ""
                )


def test_layout_has_no_chart_without_tags(opened: AnalysisRun) -> None:
    known = {
        tag for run in ("teacher", "student") for tag in read_scalars(opened.report.folder / run)
    }
    (event,) = _events(opened.report.folder / "report").Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(make_ndarray(event.tensor_proto).item())
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    assert set(charts) == {"silent and always on", "sparsity", "rank", "alike"}, "no probes here"
    for chart in charts.values():
        for pattern in chart.multiline.tag:
            assert any(re.match(pattern, tag) for tag in known), pattern


def test_page_names_every_picture_and_results_hold_the_numbers(opened: AnalysisRun) -> None:
    folder = opened.report.folder
    page = (folder / "report.md").read_text()
    files = {path.name for path in (folder / "pictures").iterdir()}
    assert set(re.findall(r"!\[[^\]]*\]\(pictures/([^)]+)\)", page)) == files
    results = json.loads((folder / "results.json").read_text())
    row = results["networks"]["student"]["stage2"]
    layer = opened.analysis.sweep.layer("student", "stage2")
    assert row["dead_units"] == list(layer.units.dead)
    assert row["active"] == pytest.approx(float(layer.units.active.mean()))
    assert results["n"] == opened.analysis.sweep.images
    cka = np.array(results["cka"]["values"], float)
    assert np.allclose(cka, opened.analysis.sweep.similarity.cka, equal_nan=True)
    assert {"machine", "versions"} <= set(results)


def test_front_page_pins_cards_that_exist(opened: AnalysisRun) -> None:
    import urllib.parse

    url = report_url(opened.report.folder)
    query = urllib.parse.parse_qs(urllib.parse.urlparse(url).query)
    for card in json.loads(query["pinnedCards"][0]):
        runs = ["teacher", "student"]
        if "runId" in card:
            runs = [card["runId"].removeprefix("defaultExperimentId/")]
        for run in runs:
            events = _events(opened.report.folder / run)
            assert events.SummaryMetadata(card["tag"]).plugin_data.plugin_name == card["plugin"]


def test_values_before_the_relu_are_binned_about_zero(opened: AnalysisRun) -> None:
    before = opened.analysis.sweep.layer("student", "stage1").pre
    edges, counts = symmetric_bins(before)
    assert edges[30] == 0.0
    assert counts[:30].sum() == pytest.approx(before.negatives, rel=0.01)
    assert 0.99 * before.finite <= counts.sum() <= before.finite


class Broken(nn.Module):
    """Gives NaN for some images, from its second layer on; its third is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ShallowCNN(8, (4, 5, 5), (1, 2, 2))
        self.inner.stage3.bn.bias.data.fill_(-100.0)

    def forward(self, images):
        hidden = self.inner.stage1(images)
        bad = (images.mean((1, 2, 3)) > 0.5).nonzero().flatten()
        hidden = hidden.index_fill(0, bad, float("nan"))
        hidden = self.inner.stage3(self.inner.stage2(hidden))
        return self.inner.linear(hidden.mean((2, 3)))


def test_nan_and_dead_layers_leave_no_card_blank_and_are_counted(tmp_path: Path, subject) -> None:
    network = Broken().eval()
    opening = AnalysisRun({"network": network}, subject, LayerReport(tmp_path, ("network",)))
    opening.sweep()
    opening.report_filters()
    opening.report.finish(opening.analysis)
    layer = opening.analysis.sweep.layer("network", "inner.stage2")
    assert layer.post.nonfinite > 0
    read = read_scalars(tmp_path / "network")
    assert read[tags.NONFINITE][1][1] == layer.post.nonfinite
    assert all(math.isfinite(value) for line in read.values() for _, value in line)
    events = _events(tmp_path / "network")
    for tag in (tags.RIDGE, tags.RIDGE_BEFORE, tags.WEIGHTS_RIDGE):
        for event in events.Tensors(tag):
            assert np.isfinite(make_ndarray(event.tensor_proto)).all()
    assert read[tags.profile("dead")][-1] == (100, 1.0)
    tokens: list[str] = []
    json.loads((tmp_path / "results.json").read_text(), parse_constant=tokens.append)
    assert not tokens, "JSON has no NaN"


def test_sweep_that_is_stopped_gives_a_partial_report_that_says_so(tmp_path: Path, subject) -> None:
    network = ShallowCNN(8, (4, 5), (1, 2)).eval()
    report = LayerReport(tmp_path, ("network",))
    opening = AnalysisRun({"network": network}, replace(subject), report)

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    opening.on_step = stop
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        opening.sweep()
    assert opening.analysis is not None
    opening.report.finish(opening.analysis)
    assert "This report is partial: stopped after" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["unfinished"]
    assert tags.RIDGE in _events(tmp_path / "network").Tags()["tensors"]


def test_report_written_again_replaces_the_earlier_events(tmp_path: Path, subject) -> None:
    network = ShallowCNN(8, (4, 5), (1, 2)).eval()
    for _ in range(2):
        report = LayerReport(tmp_path, ("network",))
        opening = AnalysisRun({"network": network}, subject, report)
        opening.sweep()
        report.finish(opening.analysis)
    assert len(read_scalars(tmp_path / "network")[tags.profile("active")]) == 2


def test_report_killed_when_its_events_were_opened_can_be_written_again(
    tmp_path: Path, subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    def killed(logger: TensorBoardLogger) -> None:
        opened(logger)
        raise KilledError

    opened = TensorBoardLogger.open_file
    network = ShallowCNN(8, (4, 5), (1, 2)).eval()
    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardLogger, "open_file", killed)
        with pytest.raises(KilledError):
            AnalysisRun({"network": network}, subject, LayerReport(tmp_path, ("network",))).sweep()
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    report = LayerReport(tmp_path, ("network",))
    opening = AnalysisRun({"network": network}, subject, report)
    opening.sweep()
    report.finish(opening.analysis)
    assert len(read_scalars(tmp_path / "network")[tags.profile("active")]) == 2
    assert len(list((tmp_path / "network").glob("events.out.tfevents.*"))) == 1
    # events of a training that were put there since are none of the report's
    foreign = tmp_path / "network" / "events.out.tfevents.1.host.1.0"
    foreign.touch()
    with pytest.raises(UserError, match="holds another run's events"):
        LayerReport(tmp_path, ("network",))
    assert foreign.exists()


def test_report_that_never_began_leaves_the_earlier_one_alone(opened: AnalysisRun) -> None:
    folder = opened.report.folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    LayerReport(folder, ("teacher", "student"))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_report_of_another_network_leaves_nothing_of_the_earlier_one(
    tmp_path: Path, subject
) -> None:
    network = ShallowCNN(8, (4, 5), (1, 2)).eval()
    (tmp_path / "kept.txt").write_text("of somebody else")
    for name, pictures in (("student", 2), ("teacher", 1)):
        report = LayerReport(tmp_path, (name,))
        opening = AnalysisRun({name: network}, subject, report)
        opening.sweep()
        opening.report_filters()
        opening.report_depth_views(pictures)
        report.finish(opening.analysis)
    assert not (tmp_path / "student").exists(), "nor an empty hparams.yaml"
    files = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert "2_maps-through_depth.png" in files
    assert "2_maps-through_depth-1.png" not in files
    assert not any("student" in name for name in files)
    assert "student" not in report_url(tmp_path)
    assert (tmp_path / "kept.txt").exists()


EVENTS = "events.out.tfevents.1.x.1.0"


@pytest.mark.parametrize(
    "file", ["results.json", EVENTS, f"teacher/{EVENTS}", f"student/{EVENTS}", f"a/b/{EVENTS}"]
)
def test_what_others_wrote_is_refused_and_intact(tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("of a training run")
    with pytest.raises(UserError, match="give another --out"):
        LayerReport(tmp_path, ("teacher",))
    assert path.read_text() == "of a training run"


def test_list_of_what_was_written_reaches_nothing_outside_its_folder(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside.txt", tmp_path / "folder"
    outside.write_text("kept")
    folder.mkdir()
    (folder / "written.txt").write_text(f"../outside.txt\n{outside}\n")
    FileManifest(folder).clear()
    assert outside.exists()


@pytest.mark.parametrize("count", [1, 2, 100, 101, 102, 150, 1001, 1002, 3000])
def test_no_two_layers_share_a_step(count: int) -> None:
    whole = depth_steps([3, count])
    assert len({round(place * whole / max(count - 1, 1)) for place in range(count)}) == count
    assert whole == (100 if count <= 101 else 1000 if count <= 1001 else 10_000)


@pytest.mark.slow
def test_every_one_of_150_layers_has_its_own_step(tmp_path: Path, subject) -> None:
    parts = [part for _ in range(150) for part in (nn.Conv2d(3, 3, 1), nn.ReLU())]
    network = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8))
    report = LayerReport(tmp_path, ("network",))
    few = replace(subject, order=subject.order[:4])
    opening = AnalysisRun({"network": network.eval()}, few, report)
    opening.sweep()
    opening.report_filters()
    report.finish(opening.analysis)
    read = read_scalars(tmp_path / "network")
    for tag, count in ((tags.profile("active"), 150), (tags.WEIGHT_NORM, 151)):
        found = [step for step, _ in read[tag]]
        assert len(set(found)) == len(found) == count
        assert (found[0], found[-1]) == (0, 1000)


def test_dead_layer_keeps_its_step_in_the_ridges(tmp_path: Path, subject) -> None:
    network = ShallowCNN(8, (4, 5, 5), (1, 2, 2)).eval()
    network.stage2.bn.bias.data.fill_(-100.0)
    report = LayerReport(tmp_path, ("network",))
    opening = AnalysisRun({"network": network}, subject, report)
    opening.sweep()
    report.finish(opening.analysis)
    assert opening.analysis.sweep.layer("network", "stage2").post.zero_share == 1
    assert [e.step for e in _events(tmp_path / "network").Tensors(tags.RIDGE)] == [0, 1, 2]
