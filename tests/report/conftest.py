"""A small report that several tests read, and TensorBoard on a folder."""

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from camdistill.data.concepts import shape_concepts
from camdistill.data.datasets import shapes_set
from camdistill.data.shapes import Shapes
from camdistill.layers.units.unit_inspection import InspectionOptions
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Preprocessed, Teacher
from camdistill.report.analysis_data import AnalysisData
from camdistill.report.analysis_run import AnalysisRun
from camdistill.report.layer_report import LayerReport

IMAGES = 40


def subject_of(count: int = IMAGES) -> AnalysisData:
    shapes = Shapes("test", count)
    order = np.random.default_rng(0).permutation(count)
    return AnalysisData(
        shapes_set(shapes),
        order,
        "shapes",
        lambda chosen: shape_concepts(shapes, chosen),
        shapes.class_names,
    )


@pytest.fixture(scope="session")
def subject() -> AnalysisData:
    """Some images with the masks of what is in them."""
    return subject_of()


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> AnalysisRun:
    """All of a report, in a folder that nobody changes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = Preprocessed(ShallowCNN(8, (4, 6, 6), (1, 2, 2)))
        teacher = Teacher.from_network(CifarResNet(20, classes=8))
    networks = {"teacher": teacher, "student": student.eval()}
    folder = tmp_path_factory.mktemp("opened")
    layers = ["relu", "layer1.2", "layer3.2", "stage?"]
    opening = AnalysisRun(networks, subject_of(), LayerReport(folder, tuple(networks)), layers)
    opening.sweep()
    opening.report_filters()
    opening.report_depth_views(3)
    opening.inspect_units(InspectionOptions(units=2, steps=2))
    opening.report_pairs(2)
    opening.report.finish(opening.analysis)
    return opening


def get(url: str, data: bytes | None = None) -> bytes:
    headers = {"Content-Type": "application/json"} if data else {}
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read()


@contextlib.contextmanager
def tensorboard_of(folder: Path, load_fast: str) -> Iterator[str]:
    """Address of a server that has read the folder; "true" is the loader that users get."""
    options = ["--logdir", str(folder), "--port", "0", "--load_fast", load_fast]
    command = [sys.executable, "-m", "tensorboard.main", *options, "--reload_interval", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            lines = iter(server.stderr.readline, "")
            found = next(match for line in lines if (match := re.search(r"http://\S+", line)))
            url = found[0].rstrip("/")
            for _ in range(100):
                if json.loads(get(f"{url}/data/runs")):
                    break
                time.sleep(0.1)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


@pytest.fixture
def served():
    """`with served(folder, load_fast) as url`."""
    return tensorboard_of
