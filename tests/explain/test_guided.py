"""Guided backpropagation and its kin: by hand, against Captum where it is right, in every form."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cam_oracles import close, out_of_place, seeded, state_of, untouched
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.attribution import gradient
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.guided import (
    deconvnet,
    guided_backprop,
    guided_grad_cam,
    guided_gradient,
)
from camdistill.explain.maps import relu, upsample


def resnet() -> nn.Module:
    return seeded(lambda: torchvision.models.resnet18(num_classes=10)).double().eval()


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 3, 48, 40, generator=generator, dtype=torch.float64)


class PreActivation(nn.Module):
    """The score reads relu(x), and x itself: a skip that begins before the ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        through = self.relu(flat) * torch.tensor([-1.0, 2.0, 3.0, 1.0])
        skip = flat * torch.tensor([-5.0, -6.0, 7.0, 8.0])
        return (through + skip).sum(1, keepdim=True)


IMAGE = torch.tensor([[[[1.0, -2.0], [3.0, -1.0]]]])


def test_the_rule_is_the_relus_alone_and_not_its_inputs() -> None:
    """Captum 0.9.0 clamps the gradient of the ReLU's input tensor, so the skip that reads the same
    tensor is clamped with it: it gives (0, 0, 10, 8).
    """
    network = PreActivation()
    # 1[x > 0] relu(R) = (0, 0, 3, 0) beside the skip (-5, -6, 7, 8)
    expected = torch.tensor([-5.0, -6.0, 10.0, 8.0])
    torch.testing.assert_close(guided_gradient(network, IMAGE, 0).flatten(), expected)
    # relu(R) = (0, 2, 3, 1) beside the skip
    expected = torch.tensor([-5.0, -4.0, 10.0, 9.0])
    found = guided_gradient(network, IMAGE, 0, rule="deconvnet")
    torch.testing.assert_close(found.flatten(), expected)


class Form(nn.Module):
    """Units 2x, in [-4, 6]; R is (-1, 2, 3, 1, 5, -2) at their ReLU, whatever its form."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, images: Tensor) -> Tensor:
        after = self.activation(2 * images.flatten(1))
        return (after * torch.tensor([-1.0, 2.0, 3.0, 1.0, 5.0, -2.0])).sum(1, keepdim=True)


def written_over(values: Tensor) -> Tensor:
    values.relu_()  # what it returns is not used
    return values


FORMS = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "relu_": written_over,
    "ReLU6": nn.ReLU6(),
    "ReLU6 in place": nn.ReLU6(inplace=True),
    "F.relu6": F.relu6,
    "clamp": lambda x: x.clamp(min=0),
    "clamp both": lambda x: x.clamp(0, 50),
    "threshold": lambda x: F.threshold(x, 0, 0),
    "Hardtanh": nn.Hardtanh(0, 50),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_relu_is_one(form: str) -> None:
    image = torch.tensor([[[[2.0, -1.0, 2.5, -2.0, 1.0, 1.5]]]])
    network = Form(FORMS[form])
    expected = torch.tensor([0.0, 0.0, 6.0, 0.0, 10.0, 0.0])
    torch.testing.assert_close(guided_gradient(network, image, 0).flatten(), expected)
    expected = torch.tensor([0.0, 4.0, 6.0, 2.0, 10.0, 0.0])
    found = guided_gradient(network, image, 0, rule="deconvnet")
    torch.testing.assert_close(found.flatten(), expected)
    plain = gradient(network, image, 0, channels="sum").flatten()
    torch.testing.assert_close(plain, torch.tensor([-2.0, 0.0, 6.0, 0.0, 10.0, -4.0]))


def test_a_shared_relu_is_guided_at_each_call() -> None:
    """y = v relu(relu(x) - 1), v = (4, -4): the second call passes (4, 0)."""
    shared = nn.ReLU()

    class Twice(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            hidden = shared(shared(images.flatten(1)) - 1)
            return (hidden * torch.tensor([4.0, -4.0])).sum(1, keepdim=True)

    image = torch.tensor([[[[3.0, 3.0]]]])
    torch.testing.assert_close(guided_gradient(Twice(), image, 0).flatten(), torch.tensor([4.0, 0]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Setting backward hooks")  # what captum says of itself
@pytest.mark.parametrize(
    ("rule", "peer"), [("guided", "GuidedBackprop"), ("deconvnet", "Deconvolution")]
)
def test_captum_agrees_on_a_residual_network(images: Tensor, rule, peer: str) -> None:
    attr = pytest.importorskip("captum.attr")
    network = out_of_place(resnet())
    twin = copy.deepcopy(network)
    for block in (m for m in twin.modules() if isinstance(m, torchvision.models.resnet.BasicBlock)):
        first, second = nn.ReLU(), nn.ReLU()  # captum refuses modules that are called twice
        block.first, block.second, block.relu = first, second, nn.Identity()
        block.forward = lambda x, b=block: b.second(
            b.bn2(b.conv2(b.first(b.bn1(b.conv1(x))))) + (b.downsample(x) if b.downsample else x)
        )
    theirs = getattr(attr, peer)(twin).attribute(images.clone().requires_grad_(), target=[1, 2, 3])
    ours = guided_gradient(network, images, [1, 2, 3], rule=rule)
    close(ours, theirs.detach(), 1e-11)


def test_pytorch_grad_cam_agrees_on_one_fresh_image(images: Tensor) -> None:
    """Its model takes image 0 alone, and damages the network: it gets a copy."""
    peer = pytest.importorskip("pytorch_grad_cam")
    network = resnet().float()
    model = peer.GuidedBackpropReLUModel(copy.deepcopy(network), device=torch.device("cpu"))
    theirs = torch.from_numpy(model(images[:1].float(), target_category=4)).movedim(-1, 0)
    close(guided_gradient(network, images[:1].float(), 4)[0], theirs, 1e-5)


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_guided_grad_cam_is_its_two_factors_and_captums(images: Tensor) -> None:
    attr = pytest.importorskip("captum.attr")
    network = resnet()
    layers = ["layer2", "layer4"]
    found = guided_grad_cam(network, images, layers, [1, 2, 3], channels="sum")
    guided = guided_gradient(network, images, [1, 2, 3])
    cams = grad_cam(network, images, layers, [1, 2, 3])
    for layer in layers:
        grown = upsample(relu(cams[layer]), (48, 40))
        close(found[layer], (guided * grown[:, None]).sum(1), 1e-11)
    peer = attr.GuidedGradCam(network, network.layer4)
    theirs = peer.attribute(
        images.clone().requires_grad_(), target=[1, 2, 3], interpolate_mode="bilinear"
    )
    close(found["layer4"], theirs.sum(1).detach(), 1e-10)


@pytest.mark.slow
def test_a_batch_of_several_classes_equals_each_alone(images: Tensor) -> None:
    network, classes = resnet(), torch.tensor([[1, 5], [2, 0], [3, 3]])
    found = guided_gradient(network, images, classes)
    assert found.shape == (3, 2, 3, 48, 40)
    both = guided_grad_cam(network, images, ["layer3"], classes)["layer3"]
    for image in range(3):
        one = images[image : image + 1]
        for place in range(2):
            number = int(classes[image, place])
            close(found[image, place], guided_gradient(network, one, number)[0], 1e-11)
            alone = guided_grad_cam(network, one, ["layer3"], number)["layer3"]
            close(both[image, place], alone[0], 1e-11)


def test_maps_reduce_the_channels_as_asked(images: Tensor) -> None:
    network = resnet()
    found = guided_gradient(network, images)
    assert torch.equal(guided_backprop(network, images), found.abs().amax(1))
    assert torch.equal(guided_backprop(network, images, channels="sum"), found.sum(1))
    back = guided_gradient(network, images, rule="deconvnet")
    assert torch.equal(deconvnet(network, images), back.abs().amax(1))


def test_the_network_goes_on_as_before(images: Tensor) -> None:
    network = resnet()
    before, plain = state_of(network), gradient(network, images)
    guided_grad_cam(network, images, ["layer4"])
    untouched(network, before)
    assert torch.equal(gradient(network, images), plain)


def test_networks_without_relus_are_told(generator: torch.Generator) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.LazyLinear(2))
    images = torch.randn(2, 3, 6, 6, generator=generator)
    network(images)
    with pytest.raises(UserError, match="has no ReLU between the pixels and the score"):
        guided_gradient(network, images)
