import io
import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only
from tensorboard.backend.event_processing import event_accumulator as ea
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util.tensor_util import make_ndarray

from camdistill import tags
from camdistill.report.tensorboard import (
    TensorBoardLogger,
    front_page_url,
    read_scalars,
    settings_page,
)

from .conftest import get, tensorboard_of

OPENED: list[TensorBoardLogger] = []


def logger_in(folder: Path, **options) -> TensorBoardLogger:
    OPENED.append(TensorBoardLogger(folder, name="shapes", version="seed0", **options))
    return OPENED[-1]


@pytest.fixture(autouse=True)
def _close_writers() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().finalize("")


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    found.Reload()
    return found


def test_scalars_come_back_once_with_step_value_and_description(tmp_path: Path) -> None:
    logger = logger_in(tmp_path)
    for step in range(3):
        values = {
            tags.LOSS_VAL: 0.5 / (step + 1),
            tags.AGREEMENT: torch.tensor(0.25),
            "epoch": step,
        }
        logger.log_metrics(values, step)
    logger.save()
    found = events(Path(logger.log_dir))
    assert read_scalars(Path(logger.log_dir)) == {
        tags.LOSS_VAL: [(0, 0.5), (1, 0.25), (2, pytest.approx(1 / 6))],
        tags.AGREEMENT: [(0, 0.25), (1, 0.25), (2, 0.25)],
    }
    described = found.SummaryMetadata(tags.LOSS_VAL).summary_description
    assert described == tags.describe_card(tags.LOSS_VAL)
    old = ea.EventAccumulator(logger.log_dir).Reload()
    assert old.Tags()["scalars"] == [], "no old-style twin"


def test_nan_is_logged_as_nan(tmp_path: Path) -> None:
    logger = logger_in(tmp_path)
    logger.log_metrics({tags.LOSS_VAL: float("nan")}, 0)
    logger.save()
    ((step, value),) = read_scalars(Path(logger.log_dir))[tags.LOSS_VAL]
    assert step == 0
    assert np.isnan(value)


def test_picture_keeps_every_pixel(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (7, 13, 3), np.uint8)
    logger = logger_in(tmp_path)
    logger.log_picture(tags.grid("layer3"), picture, 41)
    found = events(Path(logger.log_dir))
    (event,) = found.Tensors(tags.grid("layer3"))
    wide, tall, content = make_ndarray(event.tensor_proto)
    assert (event.step, wide, tall) == (41, b"13", b"7")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), picture)
    assert found.SummaryMetadata(tags.grid("layer3")).plugin_data.plugin_name == "images"


def test_histogram_comes_back_as_it_was_counted(tmp_path: Path) -> None:
    logger = logger_in(tmp_path)
    edges = np.array([-2.0, -1.5, -1.0, 0.0, 0.5, 1.0])
    counts = np.array([0, 3, 0, 5, 0])
    logger.log_histogram(tags.RIDGE, edges, counts, 7)
    logger.save()
    found = events(Path(logger.log_dir))
    (event,) = found.Tensors(tags.RIDGE)
    assert event.step == 7
    assert make_ndarray(event.tensor_proto).tolist() == [
        [-1.5, -1.0, 3.0],
        [-1.0, 0.0, 0.0],
        [0.0, 0.5, 5.0],
    ]
    meaning = found.SummaryMetadata(tags.RIDGE)
    assert meaning.plugin_data.plugin_name == "histograms"
    assert meaning.summary_description == tags.describe_card(tags.RIDGE)


def test_histogram_of_nothing_or_with_nan_blanks_no_card(tmp_path: Path) -> None:
    logger = logger_in(tmp_path)
    logger.log_histogram(tags.RIDGE, np.array([0.0, 1.0, 2.0]), np.zeros(2), 0)
    broken = np.array([0.0, 1.0, np.inf, np.nan])
    logger.log_histogram(tags.RIDGE, broken, np.array([4.0, 1.0, np.nan]), 1)
    logger.save()
    first, second = events(Path(logger.log_dir)).Tensors(tags.RIDGE)
    assert make_ndarray(first.tensor_proto).tolist() == [[0.0, 0.0, 0.0]]
    assert make_ndarray(second.tensor_proto).tolist() == [[0.0, 1.0, 4.0]]


def test_layout_names_charts_whose_patterns_fit_their_tags_alone(tmp_path: Path) -> None:
    logger = logger_in(tmp_path)
    chosen = [tags.profile("dead"), tags.profile("nearly_dead")]
    logger.log_layout({"Units": {"silent": chosen}})
    logger.save()
    found = events(Path(logger.log_dir))
    (event,) = found.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(make_ndarray(event.tensor_proto).item())
    (category,) = layout.category
    (chart,) = category.chart
    assert (category.title, chart.title) == ("Units", "silent")
    known = [*tags.PROFILES, "3_profile/dead_and_more"]
    fitting = [tag for tag in known if any(re.match(p, tag) for p in chart.multiline.tag)]
    assert sorted(fitting) == sorted(chosen)


def test_text_comes_back(tmp_path: Path) -> None:
    logger = logger_in(tmp_path)
    logger.log_text(tags.HOW_TO_READ, "| ä | b |\n|---|---|")
    found = events(Path(logger.log_dir))
    (event,) = found.Tensors(tags.HOW_TO_READ)
    assert make_ndarray(event.tensor_proto)[0].decode() == "| ä | b |\n|---|---|"
    assert found.SummaryMetadata(tags.HOW_TO_READ).plugin_data.plugin_name == "text"


def test_resumed_run_hides_what_was_logged_after_its_checkpoint(tmp_path: Path) -> None:
    killed = logger_in(tmp_path)
    for step in range(10):
        killed.log_metrics({tags.LOSS_TRAIN: float(step)}, step)
    killed.log_picture(tags.grid("layer3"), np.zeros((2, 2, 3), np.uint8), 3)
    killed.log_picture(tags.grid("layer3"), np.zeros((2, 2, 3), np.uint8), 8)
    killed.save()
    time.sleep(1.1)  # event files are told apart, and put in order, by the second
    resumed = logger_in(tmp_path)
    assert resumed.log_dir == killed.log_dir
    resumed.resume_at(6)
    for step in range(6, 12):
        resumed.log_metrics({tags.LOSS_TRAIN: 100.0 + step}, step)
    resumed.save()
    expected = [(step, step + (100.0 if step >= 6 else 0.0)) for step in range(12)]
    assert read_scalars(Path(killed.log_dir))[tags.LOSS_TRAIN] == expected
    pictures = events(Path(killed.log_dir)).Tensors(tags.grid("layer3"))
    assert [event.step for event in pictures] == [3]


def test_settings_are_a_row_without_placeholder_points(tmp_path: Path) -> None:
    logger = logger_in(tmp_path, hparam_metrics=[tags.AGREEMENT])
    settings = {"beta": 2.0, "pair": ("layer3", "stage5"), "teacher": {"name": "resnet20"}}
    logger.log_hyperparams({**settings, "file": Path("a/b"), "none": None, "_instantiator": "x"})
    logger.finalize("success")
    found = events(Path(logger.log_dir))
    assert read_scalars(Path(logger.log_dir)) == {}
    assert set(found.Tags()["tensors"]) == {
        "_hparams_/experiment",
        "_hparams_/session_start_info",
        "_hparams_/session_end_info",
    }
    written = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert written == {
        "beta": 2.0,
        "pair": ["layer3", "stage5"],
        "teacher": {"name": "resnet20"},
        "file": "a/b",
        "none": None,
    }


def test_nothing_is_written_by_other_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = logger_in(tmp_path)
    logger.log_metrics({tags.LOSS_VAL: 1.0}, 0)
    logger.log_hyperparams({"beta": 1})
    logger.log_picture(tags.grid("layer3"), np.zeros((2, 2, 3), np.uint8), 0)
    logger.log_text(tags.CONFIG, "text")
    logger.resume_at(3)
    logger.save()
    logger.finalize("success")
    assert list(tmp_path.rglob("*")) == []


def test_front_page_link_names_each_card_as_tensorboard_wants_it() -> None:
    url = front_page_url(
        scalars=["1_overview/loss_val"],
        pictures=[("2_maps/grid_layer3", "shapes/seed0")],
        histograms=[("4_activations/ridge", "teacher")],
    )
    parts = urllib.parse.urlparse(url)
    query = urllib.parse.parse_qs(parts.query)
    assert (parts.scheme, parts.netloc, parts.path) == ("http", "localhost:6006", "/")
    assert parts.fragment == "timeseries"
    assert query["smoothing"] == ["0"]
    assert json.loads(query["pinnedCards"][0]) == [
        {"plugin": "scalars", "tag": "1_overview/loss_val"},
        {
            "plugin": "images",
            "tag": "2_maps/grid_layer3",
            "runId": "defaultExperimentId/shapes/seed0",
            "sample": 0,
        },
        {
            "plugin": "histograms",
            "tag": "4_activations/ridge",
            "runId": "defaultExperimentId/teacher",
        },
    ]
    assert not set(url) & set(' "{}[]'), "Markdown and terminals would cut the link"


def test_run_is_named_as_tensorboard_shows_it(tmp_path: Path) -> None:
    assert logger_in(tmp_path).run == "shapes/seed0"
    assert TensorBoardLogger(tmp_path, version=3, sub_dir="test").run == "version_3/test"
    assert TensorBoardLogger(tmp_path, version="").run == "."


def test_settings_page_is_plain_yaml() -> None:
    page = settings_page({"a": (1, 2), "b": {"c": Path("x")}, "_class_path": "y"})
    assert yaml.safe_load(page) == {"a": [1, 2], "b": {"c": "x"}}


@pytest.mark.slow
@pytest.mark.parametrize("load_fast", ["false", "true"])
def test_tensorboard_serves_what_was_written(tmp_path: Path, load_fast: str) -> None:
    logger = logger_in(tmp_path)
    logger.log_hyperparams({"beta": 2.0})
    for step in range(5):
        logger.log_metrics({tags.AGREEMENT: step / 8, tags.LOSS_VAL: 1.0}, step)
    picture = np.random.default_rng(0).integers(0, 256, (7, 13, 3), np.uint8)
    logger.log_picture(tags.grid("layer3"), picture, 4)
    logger.log_text(tags.HOW_TO_READ, tags.how_to_read())
    logger.finalize("success")
    with tensorboard_of(tmp_path, load_fast) as url:
        _check_pages(url, logger, picture)


@pytest.mark.slow
@pytest.mark.parametrize("load_fast", ["false", "true"])
def test_tensorboard_shows_a_resumed_run_as_one_line(tmp_path: Path, load_fast: str) -> None:
    killed = logger_in(tmp_path)
    for step in range(10):
        killed.log_metrics({tags.LOSS_TRAIN: float(step)}, step)
    killed.save()
    time.sleep(1.1)
    resumed = logger_in(tmp_path)
    resumed.resume_at(6)
    for step in range(6, 12):
        resumed.log_metrics({tags.LOSS_TRAIN: 100.0 + step}, step)
    resumed.save()
    tag = urllib.parse.quote(tags.LOSS_TRAIN, safe="")
    run = urllib.parse.quote(resumed.run, safe="")
    with tensorboard_of(tmp_path, load_fast) as url:
        points = json.loads(get(f"{url}/data/plugin/scalars/scalars?tag={tag}&run={run}"))
    assert [point[1:] for point in points] == [
        [step, step + (100.0 if step >= 6 else 0.0)] for step in range(12)
    ]


def _check_pages(url: str, logger: TensorBoardLogger, picture: np.ndarray) -> None:
    run = urllib.parse.quote(logger.run, safe="")
    known = json.loads(get(f"{url}/data/plugin/timeseries/tags"))
    assert sorted(known["scalars"]["runTagInfo"][logger.run]) == [tags.AGREEMENT, tags.LOSS_VAL]
    assert tags.describe_card(tags.AGREEMENT).split("`")[0][:30] in json.dumps(
        known["scalars"]["tagDescriptions"]
    )
    assert known["images"]["tagRunSampledInfo"] == {
        tags.grid("layer3"): {logger.run: {"maxSamplesPerStep": 1}}
    }
    tag = urllib.parse.quote(tags.AGREEMENT, safe="")
    points = json.loads(get(f"{url}/data/plugin/scalars/scalars?tag={tag}&run={run}"))
    assert [point[1:] for point in points] == [[step, step / 8] for step in range(5)]
    tag = urllib.parse.quote(tags.grid("layer3"), safe="")
    images = json.loads(get(f"{url}/data/plugin/images/images?tag={tag}&run={run}&sample=0"))
    content = get(f"{url}/data/plugin/images/individualImage?{images[0]['query']}")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), picture)
    tag = urllib.parse.quote(tags.HOW_TO_READ, safe="")
    (page,) = json.loads(get(f"{url}/data/plugin/text/text?tag={tag}&run={run}"))
    assert "<table>" in page["text"]
    asked = json.dumps({"allowedStatuses": ["STATUS_SUCCESS"], "sliceSize": 10}).encode()
    (group,) = json.loads(get(f"{url}/data/plugin/hparams/session_groups", asked))["sessionGroups"]
    assert group["hparams"] == {"beta": 2.0}
    values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    assert values[tags.AGREEMENT] == 0.5
    assert "hp_metric" not in values
