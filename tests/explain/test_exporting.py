"""Logits and maps in one graph: Grad-CAM's numbers, and a graph that exports and compiles."""

import pytest
import torch
import torchvision
from cam_oracles import close, reference, seeded, student, untouched
from cam_oracles import state_of as state
from torch import Tensor, nn
from torch.export import Dim

from camdistill.errors import UserError
from camdistill.explain.exporting import ClosedExplainer
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.teachers import Preprocessed


def pixels(count: int = 2, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, size, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("build", "layer", "head"),
    [
        (student, "stage3", "linear"),
        (lambda: CifarResNet(8, 4), "layer3", "linear"),
        (
            lambda: torchvision.models.ResNet(
                torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4
            ),
            "layer4",
            "fc",
        ),
    ],
)
def test_maps_are_autograds_of_every_class(build, layer: str, head: str) -> None:
    network = seeded(build).double().eval()
    wrapped = Preprocessed(network, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)).double()
    images = pixels(size=64)
    before = state(wrapped)
    explainer = ClosedExplainer(wrapped, images)
    assert (explainer.layer, explainer.head) == (layer, head)
    logits, maps = explainer(images)
    untouched(wrapped, before)
    torch.testing.assert_close(logits, network(wrapped.normalize(images)))
    for number in range(4):
        true = reference(
            network, wrapped.normalize(images), [layer], torch.full((2,), number), create_graph=True
        )
        close(maps[:, number].detach(), true[layer].detach())


def test_the_graph_takes_any_batch_and_has_no_breaks() -> None:
    explainer = ClosedExplainer(student().eval(), pixels().float())
    program = torch.export.export(
        explainer, (pixels().float(),), dynamic_shapes=({0: Dim("batch")},), strict=False
    )
    compiled = torch.compile(program.module(), backend="eager", fullgraph=True)
    for count in (1, 2, 5):
        images = pixels(count).float()
        for found, true in zip(compiled(images), explainer(images), strict=True):
            torch.testing.assert_close(found, true)


@pytest.mark.parametrize("layer", ["stage2", None])
def test_layers_without_a_closed_form_are_refused(layer: str | None) -> None:
    network = student().eval()
    if layer is None:
        network.linear = nn.Sequential(nn.Linear(10, 4), nn.Tanh())
    with pytest.raises(UserError, match=r"of ShallowCNN has no closed form: .* name such a layer"):
        ClosedExplainer(network, pixels().float(), layer)
