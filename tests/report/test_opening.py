from pathlib import Path

import torch

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
