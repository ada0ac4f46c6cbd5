from itertools import pairwise

import pytest
import torch
import torchvision
from torch import nn

from camdistill.layers.units.receptive_field import measure_fields, receptive_fields
from camdistill.layers.units.receptive_field_trace import FieldTracer
from camdistill.layers.units.receptive_spans import ReceptiveField, Span
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.students import ShallowCNN

# Size, stride, start; by hand from kernels and strides (Araujo et al. 2019, eq. 2 and 4).
KNOWN = {
    "resnet18": {
        "conv1": (7, 2, -3),
        "maxpool": (11, 4, -5),
        "layer1": (43, 4, -21),
        "layer2": (99, 8, -49),
        "layer3": (211, 16, -105),
        "layer4": (435, 32, -217),
    },
    "resnet34": {
        "layer1": (59, 4, -29),
        "layer2": (179, 8, -89),
        "layer3": (547, 16, -273),
        "layer4": (899, 32, -449),
    },
    # 427 in torchvision, whose stride is on the 3x3 convolution; 483 where it is on the 1x1.
    "resnet50": {
        "layer1": (35, 4, -17),
        "layer2": (91, 8, -45),
        "layer3": (267, 16, -133),
        "layer4": (427, 32, -213),
    },
    "vgg16": {"features.30": (212, 32, -90)},
    "alexnet": {"features.12": (195, 32, -66)},
}


@pytest.mark.parametrize("name", KNOWN)
def test_fields_of_known_networks(name: str) -> None:
    with torch.device("meta"):
        shadow = torchvision.models.get_model(name)
    network = shadow.to_empty(device="cpu")
    found = receptive_fields(network, torch.zeros(1, 3, 224, 224), KNOWN[name])
    expected = {layer: Span(*numbers) for layer, numbers in KNOWN[name].items()}
    assert found == {layer: ReceptiveField(span, span) for layer, span in expected.items()}


def test_resnet_field_is_where_gradients_are_pixel_for_pixel() -> None:
    network = torchvision.models.resnet18().eval()
    walked = receptive_fields(network, torch.zeros(1, 3, 64, 64), ["layer1"])
    support = measure_fields(network, torch.zeros(1, 3, 96, 96), ["layer1"])
    assert walked == support


@pytest.mark.slow
def test_deep_resnet_field_is_where_gradients_are_pixel_for_pixel() -> None:
    network = torchvision.models.resnet18().eval()
    support = measure_fields(network, torch.zeros(1, 3, 640, 640), ["layer3", "layer4"])
    assert support["layer3"] == ReceptiveField(*[Span(211, 16, -105)] * 2)
    assert support["layer4"] == ReceptiveField(*[Span(435, 32, -217)] * 2)


def test_cifar_resnet_with_a_thinned_shortcut_sees_what_its_convolutions_see() -> None:
    network = CifarResNet(20)
    found = receptive_fields(network, torch.zeros(1, 3, 32, 32))
    # 1 + 2 (stem) + 12 (six convolutions); then a step of 2 and five more convolutions each.
    assert found["layer1"] == ReceptiveField(*[Span(15, 1, -7)] * 2)
    assert found["layer2"].rows == Span(15 + 2 + 5 * 4, 2, -7 - 1 - 5 * 2)
    assert found["layer3"].rows == Span(37 + 4 + 5 * 8, 4, -18 - 2 - 5 * 4)


def test_every_call_of_a_shared_relu_has_its_own_field() -> None:
    network = CifarResNet(20)
    found = receptive_fields(
        network, torch.zeros(1, 3, 32, 32), ["layer1.0.relu#0", "layer1.0.relu#1", "layer1.0.relu"]
    )
    assert found["layer1.0.relu#0"].rows.size == 5
    assert found["layer1.0.relu#1"].rows.size == 7
    assert found["layer1.0.relu"] == found["layer1.0.relu#1"]


class Oblong(nn.Module):
    """Another kernel, stride, padding and dilation along each axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, (3, 5), (2, 1), (1, 0), (1, 2))
        self.b = nn.AvgPool2d((1, 3), (1, 2), (0, 1))
        self.c = nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect")

    def forward(self, images):
        return self.c(self.b(self.a(images)))


def test_axes_are_kept_apart() -> None:
    network = Oblong().eval()
    found = receptive_fields(network, torch.zeros(1, 3, 48, 48))
    assert found["a"] == ReceptiveField(Span(3, 2, -1), Span(9, 1, 0))
    assert found["b"] == ReceptiveField(Span(3, 2, -1), Span(11, 2, -1))
    assert found["c"] == ReceptiveField(Span(7, 2, -3), Span(15, 2, -3))
    assert measure_fields(network, torch.zeros(1, 3, 48, 48), ["a", "b", "c"]) == found


class Branches(nn.Module):
    """Channels shuffled, sliced, concatenated, squeezed and excited."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(1, 4, 7, padding=3)
        self.off = nn.Conv2d(1, 4, 3)
        self.gate = nn.Conv2d(8, 8, 1)
        self.shuffled = nn.Identity()
        self.scaled = nn.Identity()
        self.head = nn.Linear(8, 2)

    def forward(self, images):
        joined = torch.cat([self.wide(images)[:, :, 1:-1, 1:-1], self.off(images)], 1)
        grouped = joined.view(len(joined), 2, 4, *joined.shape[2:]).transpose(1, 2)
        shuffled = self.shuffled(grouped.reshape(joined.shape).relu_())
        scale = self.gate(shuffled.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(self.scaled(shuffled * scale).amax((2, 3)))


def test_branches_join_and_a_gate_is_told_but_not_counted() -> None:
    found = receptive_fields(Branches(), torch.zeros(1, 1, 16, 16))
    assert found["wide"].rows == Span(7, 1, -3)
    assert found["shuffled"] == ReceptiveField(*[Span(7, 1, -2)] * 2)
    assert found["scaled"] == ReceptiveField(*[Span(7, 1, -2)] * 2, gated=True)
    assert found["gate"] is None
    assert "head" not in found


class Upsampled(nn.Module):
    """An operation that the walk doesn't know: half the size by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images):
        small = nn.functional.interpolate(self.first(images), scale_factor=0.5, mode="nearest")
        return self.second(small)


def test_what_the_walk_cannot_follow_is_measured() -> None:
    found = receptive_fields(Upsampled().eval(), torch.zeros(1, 3, 32, 32))
    assert found["first"].rows == Span(3, 1, -1)
    # Nearest takes every second pixel, from the first.
    assert found["second"].rows == Span(3 + 2 * 2, 2, -1 - 2)


class Irregular(nn.Module):
    """One operation that no window with one step describes, between convolutions."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)
        self.way = way
        self.up = nn.ConvTranspose2d(2, 2, 3, 2)
        self.same = nn.ConvTranspose2d(2, 2, 3, 1, padding=1)
        self.down = nn.Conv2d(2, 2, 3, 2, padding=1)
        self.middle = nn.Identity()
        self.second = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, images):
        hidden = self.first(images)
        if self.way == "up":
            hidden = self.up(hidden)
        elif self.way == "same":
            hidden = self.same(hidden)
        elif self.way == "pool":
            hidden = nn.functional.adaptive_avg_pool2d(hidden, 10)
        elif self.way == "join":
            small = nn.functional.interpolate(self.down(hidden), scale_factor=2)
            hidden = small + hidden
        else:
            hidden = self.down(hidden)[..., :12, :12] + hidden[..., :12, :12]
        return self.second(self.middle(hidden))


@pytest.mark.parametrize("way", ["up", "pool", "join", "steps"])
def test_units_that_do_not_move_by_one_step_are_unknown_not_all_seeing(way: str) -> None:
    """Nobody's units see the whole image here, and no field holds for all of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Irregular(way).eval()
    found = receptive_fields(network, torch.zeros(1, 2, 24, 24), ["first", "middle", "second"])
    assert found["first"] == ReceptiveField(*[Span(3, 1, -1)] * 2)
    assert found["middle"] == found["second"] == "unknown"


def test_a_transposed_convolution_of_step_1_is_measured() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Irregular("same").eval()
    found = receptive_fields(network, torch.zeros(1, 2, 24, 24), ["middle", "second"])
    assert found["middle"] == ReceptiveField(*[Span(5, 1, -2)] * 2)
    assert found["second"] == ReceptiveField(*[Span(7, 1, -3)] * 2)


def test_attention_over_the_image_has_no_field() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, images):
            flat = images.flatten(2)
            mixed = torch.softmax(flat.transpose(1, 2) @ flat, -1)
            return self.layer((flat @ mixed).view_as(images))

    assert receptive_fields(Attends(), torch.rand(1, 3, 8, 8)) == {"layer": None}


def test_units_step_by_the_stride_and_boxes_may_exceed_the_image() -> None:
    network = ShallowCNN(4, (4, 4, 4), (1, 2, 2))
    found = receptive_fields(network, torch.zeros(1, 3, 16, 16))
    field = found["stage3"]
    assert field.box(0, 0) == (-4, -4, 5, 5)
    tops = [field.box(row, 1)[0] for row in range(4)]
    assert {after - before for before, after in pairwise(tops)} == {4}


def test_network_is_left_as_it_was() -> None:
    network = CifarResNet(20).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    receptive_fields(network, torch.rand(1, 3, 32, 32))
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"])
def test_a_normalization_keeps_the_field_under_the_names_of_a_gpu(name: str) -> None:
    walk = FieldTracer(torch.zeros(1, 3, 8, 8))
    with walk:
        seen = torch.nn.functional.conv2d(walk.images, torch.zeros(4, 3, 3, 3), stride=2)
    operation = getattr(torch.ops.aten, name).default
    after = walk._trace_output(operation, (seen,), [seen], torch.zeros(seen.shape))
    assert after == ReceptiveField(Span(3, 2, 0), Span(3, 2, 0))
    assert not walk.unknown
