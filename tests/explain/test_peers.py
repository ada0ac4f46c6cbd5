"""The three engines of the field: ours equals them where they are right, and the truth elsewhere.

Each defect that is named was seen by running captum 0.9.0, torchcam 0.5.0 and grad-cam
(pytorch-grad-cam) 1.5.7 on the same networks.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cam_oracles import close, out_of_place, reference, seeded
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.maps import normalize

STAGES = ["layer1", "layer2", "layer3", "layer4"]


def resnet() -> nn.Module:
    return seeded(lambda: torchvision.models.resnet18(num_classes=10)).double().eval()


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 3, 96, 80, generator=generator, dtype=torch.float64)


def to_unit(maps: Tensor, epsilon: float) -> Tensor:
    """The peers' min-max, whose epsilon ours doesn't have."""
    shifted = maps - maps.amin((-2, -1), keepdim=True)
    return shifted / (shifted.amax((-2, -1), keepdim=True) + epsilon)


def grown(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


@pytest.mark.parametrize("relu", [False, True])
def test_captums_attributions_are_ours(images: Tensor, relu: bool) -> None:
    attr = pytest.importorskip("captum.attr")
    network, classes = resnet(), [1, 2, 3]
    ours = grad_cam(network, images, STAGES, classes)
    for name in STAGES:
        layer = network.get_submodule(name)
        theirs = attr.LayerGradCam(network, layer).attribute(
            images, target=classes, relu_attributions=relu
        )
        close(ours[name].relu() if relu else ours[name], theirs[:, 0].detach())


def test_torchcams_normalized_maps_are_ours_by_composition(images: Tensor) -> None:
    methods = pytest.importorskip("torchcam.methods")
    network, classes = resnet(), [1, 2, 3]
    ours = grad_cam(network, images, STAGES, classes)
    with methods.GradCAM(network, STAGES, input_shape=(3, 96, 80)) as extractor:
        theirs = extractor(classes, network(images))
    for name, maps in zip(STAGES, theirs, strict=True):
        close(to_unit(ours[name].relu(), 1e-8), maps)


@pytest.mark.parametrize("layers", [["layer2"], ["layer4"], STAGES])
def test_pytorch_grad_cams_pictures_are_ours_by_composition(
    images: Tensor, layers: list[str]
) -> None:
    peer = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    network, classes = resnet(), [1, 2, 3]
    ours = grad_cam(network, images, layers, classes)
    twin = copy.deepcopy(network)
    with peer.GradCAM(twin, [twin.get_submodule(name) for name in layers]) as cam:
        theirs = cam(images, [targets.ClassifierOutputTarget(number) for number in classes])
    grids = [grown(to_unit(ours[name].relu(), 1e-7), (96, 80)) for name in layers]
    fused = to_unit(torch.stack(grids).mean(0), 1e-7)
    # It casts to float32 for its resizing.
    assert (fused - torch.from_numpy(theirs).double()).abs().max() < 1e-6


class Toy(nn.Module):
    """One unit is the image, one its negative; the classes weigh their positive parts."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.relu = nn.ReLU(inplace)
        self.fc = nn.Linear(2, 2, bias=False)
        self.conv.weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
        self.fc.weight.data = torch.tensor([[4.0, 0.0], [8.0, 4.0]])

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv(images)).mean((2, 3)))


IMAGE = torch.tensor([[[[3.0, 1.0], [-2.0, -1.0]]]])
# After the ReLU the units are (3, 1, 0, 0) and (0, 0, 2, 1). Class 1: alpha = (8, 4) / 4.
AFTER = torch.tensor([[[6.0, 2.0], [2.0, 1.0]]])
# Before it dS/dA is (8, 8, 0, 0) / 4 and (0, 0, 4, 4) / 4, so alpha = (1, 1/2) and the map is
# image - image / 2.
BEFORE = IMAGE[0] / 2


def test_a_layer_that_is_overwritten_in_place_keeps_its_own_values() -> None:
    """pytorch-grad-cam takes the values after the ReLU with the gradient before it; torchcam both
    after it, the map of another tensor.
    """
    for inplace in (False, True):
        for _ in range(2):
            found = grad_cam(Toy(inplace), IMAGE, ["conv", "relu"], 1)
            torch.testing.assert_close(found["conv"], BEFORE)
            torch.testing.assert_close(found["relu"], AFTER)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("frozen", ["none", "some", "all"])
def test_frozen_networks_are_explained_in_every_mode(mode, frozen: str) -> None:
    """pytorch-grad-cam and torchcam fail if all is frozen, pytorch-grad-cam also if a part is; all
    three fail under inference_mode.
    """
    network = Toy()
    network.requires_grad_(frozen == "none")
    network.fc.requires_grad_(frozen != "all")
    with mode():
        for _ in range(2):
            found = grad_cam(network, IMAGE.clone(), ["conv", "relu"], 1)
            torch.testing.assert_close(found["conv"], BEFORE)
            torch.testing.assert_close(found["relu"], AFTER)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_maps(dtype: torch.dtype) -> None:
    """pytorch-grad-cam has no bfloat16; torchcam's epsilon is 0 in float16, so its map of a blank
    image is not a number.
    """
    network = Toy().to(dtype)
    for _ in range(2):
        found = grad_cam(network, IMAGE.to(dtype), ["conv", "relu"], 1)
        torch.testing.assert_close(found["conv"], BEFORE)
        torch.testing.assert_close(found["relu"], AFTER)
    blank = grad_cam(network, torch.zeros(1, 1, 2, 2, dtype=dtype), ["relu"], 1)["relu"]
    assert normalize(blank.relu()).eq(0).all()
    assert normalize(blank.to(dtype).relu()).eq(0).all()


def test_every_image_has_its_own_class_and_none_is_left_out() -> None:
    """pytorch-grad-cam pairs images and targets as far as the shorter list goes: with one target
    the maps of all further images are 0.
    """
    images = torch.cat([IMAGE, 2 * IMAGE, IMAGE])
    found = grad_cam(Toy(), images, ["relu"], [1, 1, 0])["relu"]
    # Class 0: alpha = (1, 0)
    zero = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(found, torch.stack([AFTER[0], 2 * AFTER[0], zero]))
    with pytest.raises(UserError, match=r"the shape \[1\] for 3 images"):
        grad_cam(Toy(), images, ["relu"], [1])


class Shared(Toy):
    """The ReLU runs on the convolution, and again on what is above 1."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.relu(self.conv(images))
        return self.fc(self.relu(hidden - 1).mean((2, 3)))


def test_each_call_of_a_shared_module_has_its_own_map() -> None:
    """pytorch-grad-cam takes the first call, captum and torchcam the last; none can be asked."""
    found = grad_cam(Shared(), IMAGE, ["relu#0", "relu#1", "relu"], 1)
    # Second call: units (2, 0, 0, 0) and (0, 0, 1, 0), alpha (2, 1). First call: units as AFTER's,
    # gradients (2, 0, 0, 0) and (0, 0, 1, 0), so alpha (1/2, 1/4).
    second = torch.tensor([[[4.0, 0.0], [1.0, 0.0]]])
    first = torch.tensor([[[1.5, 0.5], [0.5, 0.25]]])
    torch.testing.assert_close(found["relu#0"], first)
    torch.testing.assert_close(found["relu#1"], second)
    torch.testing.assert_close(found["relu"], second)


def test_gradients_that_are_there_stay_and_maps_add_none() -> None:
    """pytorch-grad-cam clears the network's gradients and leaves its own."""
    network = Toy()
    network(IMAGE).sum().backward()
    before = {name: p.grad.clone() for name, p in network.named_parameters()}
    grad_cam(network, IMAGE, ["conv", "relu"])
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter.grad, before[name])


def test_in_place_networks_equal_their_twins_where_captum_agrees(images: Tensor) -> None:
    attr = pytest.importorskip("captum.attr")
    network, names = resnet(), ["bn1", "layer4.1.bn2"]
    true = reference(out_of_place(network), images, names, torch.tensor([1, 2, 3]))
    for _ in range(2):
        found = grad_cam(network, images, names, [1, 2, 3])
        for name in names:
            close(found[name], true[name])
            layer = network.get_submodule(name)
            theirs = attr.LayerGradCam(network, layer).attribute(images, target=[1, 2, 3])
            close(found[name], theirs[:, 0].detach())
