from pathlib import Path

import pytest
import torch
from torch import nn

from camdistill.errors import UserError
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Preprocessed
from camdistill.report.layer_page import findings_page
from camdistill.report.layer_report import LayerReport
from camdistill.report.opening import Opening, Subject


def test_what_stands_out_is_on_the_page_of_a_report(tmp_path: Path, subject: Subject) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = ShallowCNN(8, (8, 12), (2, 2)).eval()
        for unit in (3, 7):
            network.stage2.bn.weight[unit] = 0
            network.stage2.bn.bias[unit] = -1
    networks = {"teacher": Preprocessed(network).eval()}
    opening = Opening(networks, subject, LayerReport(tmp_path, ("teacher",)))
    opening.sweep()
    sentence = (
        "teacher stage2: 2 of 12 units dead on 40 images (active in at most 7.5 % of images, "
        "95 % confidence): 3, 7"
    )
    (finding,) = [one for one in opening.found.findings if one.kind == "dead"]
    assert finding.text == sentence
    assert finding.units == (3, 7)
    assert f"- **dead** — {sentence}" in findings_page(opening.found)


def test_units_of_a_vector_are_refused_before_the_sweep(tmp_path: Path, subject: Subject) -> None:
    network = ShallowCNN(8, (4, 5), (1, 2)).eval()
    report = LayerReport(tmp_path / "out", ("network",))
    layers, units = ["stage1", "linear"], {"linear": [1]}
    opening = Opening({"network": network}, subject, report, layers, units)
    with pytest.raises(UserError, match="linear gives one number a unit"):
        opening.sweep()
    assert opening.found is None
    assert not (tmp_path / "out").exists()


def test_network_without_convolutions_gets_a_note_in_place_of_filters(
    tmp_path: Path, subject: Subject
) -> None:
    parts = [nn.AvgPool2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(8)]
    network = nn.Sequential(*parts)
    network(subject.fetch([0]))
    report = LayerReport(tmp_path, ("network",))
    opening = Opening({"network": network.eval()}, subject, report)
    opening.sweep()
    opening.filters()
    report.finish(opening.found)
    assert "no two-dimensional convolution" in (tmp_path / "report.md").read_text()
    assert set(opening.found.weights["network"]) == {"3"}
