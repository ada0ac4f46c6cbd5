"""One backward for all layers: several classes at once, pooled heads, copies, mixed images."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cam_oracles import (
    close,
    head_of,
    out_of_place,
    pooled_layers,
    reference,
    seeded,
    state_of,
    student,
    untouched,
)
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from camdistill.errors import UserError
from camdistill.explain.engine import alphas
from camdistill.explain.gradcam import explain_images, grad_cam

TABLE = torch.tensor([[3, 0, 1], [1, 2, 0], [2, 2, 3]])


@pytest.fixture
def small(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 3, 12, 12, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("memory", [1, 3 * 6 * 144 * 3 * 8 * 2, None])
@pytest.mark.parametrize("grad", ["none", "full"])
def test_several_classes_at_inner_layers_equal_one_after_another_whatever_the_memory(
    small: Tensor, memory: int | None, grad
) -> None:
    network = student().double().eval()
    names = ["stage1", "stage2"]
    for _ in range(2):
        found = grad_cam(network, small, names, TABLE, grad=grad, memory=memory)
        for column in range(3):
            true = reference(network, small, names, TABLE[:, column])
            for name in names:
                close(found[name][:, column].detach(), true[name])


def test_gradients_of_several_classes_are_differentiable(small: Tensor) -> None:
    network, twin = student().double().eval(), student().double().eval()
    for one in (network, twin):
        for module in one.modules():
            if hasattr(module, "relu"):
                module.relu = nn.Softplus()
    grad_cam(network, small, ["stage1"], TABLE, grad="full")["stage1"].square().sum().backward()
    for column in range(3):
        true = reference(twin, small, ["stage1"], TABLE[:, column], create_graph=True)["stage1"]
        true.square().sum().backward()
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            close(ours.grad, theirs.grad, 1e-11)


class Foreign(torch.autograd.Function):
    """Its backward leaves torch, so it can't take a batch of gradients."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values)
        return values**2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (values,) = ctx.saved_tensors
        return torch.from_numpy(2 * gradient.numpy() * values.numpy())


class Squared(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return Foreign.apply(values)


def test_an_operation_without_a_rule_for_batches_goes_one_by_one(small: Tensor) -> None:
    network = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Squared(), nn.Conv2d(4, 4, 3), Pooled(4))
    ).double()
    for _ in range(2):
        found = grad_cam(network, small, ["0"], TABLE)["0"]
        for column in range(3):
            close(found[:, column], reference(network, small, ["0"], TABLE[:, column])["0"])
    assert alphas._ONE_BY_ONE[network] == {"0"}


def test_running_out_of_memory_is_not_taken_for_a_missing_rule(
    small: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was, for good, and made every later call slower."""
    network = student().double().eval()
    most, gradients = 1, torch.autograd.grad

    def limited(*given: object, is_grads_batched: bool = False, **options: object) -> object:
        if most < 1 + is_grads_batched:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return gradients(*given, is_grads_batched=is_grads_batched, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.autograd, "grad", limited)
        maps = grad_cam(network, small, ["stage1"], TABLE)["stage1"]
        most = 0
        with pytest.raises(torch.OutOfMemoryError):
            grad_cam(network, small, ["stage1"], TABLE)
    for column in range(3):
        close(maps[:, column], reference(network, small, ["stage1"], TABLE[:, column])["stage1"])
    assert not alphas._ONE_BY_ONE[network]


class Pooled(nn.Module):
    """A head that reads nothing but the spatial mean, and isn't linear."""

    def __init__(self, units: int, kind: str = "perceptron") -> None:
        super().__init__()
        self.kind = kind
        self.hidden, self.fc = nn.Linear(units, 7), nn.Linear(7, 4)
        self.norm = nn.LayerNorm(units)
        self.other = nn.Linear(units, 7)

    def forward(self, values: Tensor) -> Tensor:
        mean = F.adaptive_avg_pool2d(values, 1).flatten(1)
        if self.kind == "maximum":
            mean = mean + values.amax((2, 3))
        if self.kind == "batch":
            mean = mean - mean.mean(0)
        if self.kind == "pairs":
            mean = mean.view(-1, 2, mean.shape[1]).flip(1).flatten(0, 1)
        if self.kind == "norm":
            mean = self.norm(mean)
        hidden = F.hardswish(self.hidden(mean))
        if self.kind == "gate":
            hidden = hidden * self.other(mean).sigmoid()
        return self.fc(hidden)


@pytest.mark.parametrize("kind", ["perceptron", "norm", "gate", "maximum"])
@pytest.mark.parametrize("grad", ["none", "full"])
def test_a_head_that_reads_only_the_mean_is_asked_at_the_mean(
    small: Tensor, kind: str, grad
) -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 3), Pooled(5, kind))).double()
    wide = {"memory": 2**20}
    for _ in range(2):
        found = grad_cam(network, small, ["0"], TABLE, grad=grad, **wide)["0"]
        likely = grad_cam(network, small, ["0"], TABLE[:, 0], score="probability", grad=grad)["0"]
        for column in range(3):
            true = reference(network, small, ["0"], TABLE[:, column])["0"]
            close(found[:, column].detach(), true)
        true = reference(network, small, ["0"], TABLE[:, 0], lambda y: y.softmax(1))["0"]
        close(likely.detach(), true)
    assert head_of(network, small, "0") is None
    assert pooled_layers(network, small, ["0"]) == (["0"] if kind != "maximum" else [])


class Branching(nn.Module):
    """A head that reads the mean of one layer, and what another layer makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 6, 3)
        self.near, self.far = nn.Linear(5, 4), nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images)
        near = self.near(hidden.mean((2, 3))).tanh()
        return near + self.far(self.second(hidden.tanh()).mean((2, 3))).tanh()


def test_a_mean_that_is_not_all_that_is_read_is_seen_whatever_layers_are_asked(
    small: Tensor,
) -> None:
    network = seeded(Branching).double()
    names = ["first", "second"]
    true = reference(network, small, names, TABLE[:, 0])
    for asked in (names, names[:1], names[1:], names[::-1]):
        found = grad_cam(network, small, asked, TABLE[:, 0])
        for name in asked:
            close(found[name], true[name])
        assert pooled_layers(network, small, asked) == [name for name in asked if name == "second"]


def test_a_pooled_head_keeps_no_gradient_as_large_as_the_layer() -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 3), Pooled(5))).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    layer = 2 * 5 * 62 * 62 * 4
    grad_cam(network, images, ["0"], TABLE[:2])
    with LiveBytes() as live:
        grad_cam(network, images, ["0"], TABLE[:2])
    assert 2 * layer <= live.most < 3 * layer  # the activations, their copy, and the maps


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "closed"),
        ("mobilenet_v3_small", "pooled"),
        ("efficientnet_b0", "closed"),
        ("regnet_y_400mf", "closed"),
        ("densenet121", "neither"),
    ],
)
def test_torchvision_heads_are_seen_for_what_they_are(name: str, head: str) -> None:
    network = seeded(lambda: torchvision.models.get_model(name, num_classes=4)).double().eval()
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    layer = {"resnet18": "layer4", "regnet_y_400mf": "trunk_output"}.get(name, "features")
    trainable = out_of_place(network).requires_grad_(True)
    true = reference(trainable, images, [layer], TABLE[:2, 0])[layer]
    for _ in range(2):
        close(grad_cam(network, images, [layer], TABLE[:2])[layer][:, 0], true, 1e-11)
    assert (head_of(network, images, layer) is not None) == (head == "closed")
    assert pooled_layers(network, images, [layer]) == ([layer] if head == "pooled" else [])


@pytest.mark.parametrize("kind", ["batch", "pairs"])
def test_heads_that_mix_images_are_refused_but_one_image_is_fine(small: Tensor, kind: str) -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 3), Pooled(5, kind))).double()
    images = torch.cat([small, small[:1]])
    before = state_of(network)
    for _ in range(2):
        with pytest.raises(UserError, match="mixes the images of a batch behind layer '0'"):
            grad_cam(network, images, ["0"], 1)
    untouched(network, before)
    if kind == "batch":
        true = reference(network, small[:1], ["0"], torch.tensor([1]))["0"]
        assert true.abs().max() < 1e-12  # the mean of one image less itself
        assert grad_cam(network, small[:1], ["0"], 1)["0"].abs().max() < 1e-12


@pytest.mark.parametrize("layer", ["stage1", "stage3"])
def test_scores_that_mix_images_are_refused(small: Tensor, layer: str) -> None:
    network = student().double().eval()
    grad_cam(network, small, [layer], TABLE)
    grad_cam(network, small, [layer], score=lambda y: y[:, 1] - y[:, 2])
    with pytest.raises(UserError, match="the score callable mixes the images of a batch"):
        grad_cam(network, small, [layer], score=lambda y: y[:, 1] / y[:, 1].sum())
    alone = grad_cam(network, small[:1], [layer], score=lambda y: y[:, 1] / y[:, 1].sum())
    assert alone[layer].abs().max() < 1e-12  # the score is 1, whatever the image


def test_what_mixes_images_before_the_layer_does_no_harm(small: Tensor) -> None:
    class Centered(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values - values.mean(0)

    network = nn.Sequential(Centered(), *student().children())
    network.insert(4, nn.AdaptiveAvgPool2d(1))
    network.insert(5, nn.Flatten())
    network.double().eval()
    close(
        grad_cam(network, small, ["1"], 1)["1"],
        reference(network, small, ["1"], torch.ones(3).long())["1"],
    )


class Moody(nn.Module):
    """Overwrites its input in place only when told so."""

    overwrites = False

    def forward(self, values: Tensor) -> Tensor:
        return values.relu_() if self.overwrites else values.relu()


def test_code_that_begins_to_overwrite_is_noticed(small: Tensor) -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 3), Moody(), Pooled(5))).double().eval()
    true = reference(network, small, ["0"], TABLE[:, 0])["0"]
    close(grad_cam(network, small, ["0"], TABLE[:, 0])["0"], true)
    close(grad_cam(network, small, ["0"], TABLE[:, 0])["0"], true)
    network[1].overwrites = True
    for _ in range(2):
        close(grad_cam(network, small, ["0"], TABLE[:, 0])["0"], true)
        maps = explain_images(network, small, ["0"], TABLE[:, 0], grad="full").maps["0"]
        close(maps.detach(), true)


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_several_classes_cost_one_forward_and_a_backward_each() -> None:
    network = seeded(lambda: torchvision.models.resnet18(num_classes=10)).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    names = ["layer3", "layer4"]
    classes = torch.arange(5).expand(2, 5)
    with torch.no_grad():
        forward = flops(lambda: network(images))
        hidden = images
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
            hidden = network.get_submodule(name)(hidden)
        behind = flops(lambda: network.layer4(hidden))
    grad_cam(network, images, names, classes)
    for memory in (None, 1):
        cost = flops(lambda memory=memory: grad_cam(network, images, names, classes, memory=memory))
        assert cost == pytest.approx(forward + 5 * behind, rel=0.01)


@pytest.mark.parametrize("megabytes", [2, 8])
def test_memory_of_several_classes_stays_within_what_is_allowed(megabytes: int) -> None:
    network = seeded(lambda: torchvision.models.resnet18(num_classes=40)).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    names, classes = ["layer1", "layer3", "layer4"], torch.arange(40).expand(2, 40)
    peaks = []
    for memory in (1, megabytes * 2**20):
        grad_cam(network, images, names, classes, memory=memory)
        with LiveBytes() as live:
            grad_cam(network, images, names, classes, memory=memory)
        peaks.append(live.most)
    assert 0 < peaks[1] - peaks[0] <= megabytes * 2**20


def test_memory_does_not_grow_with_the_number_of_batches(small: Tensor) -> None:
    network = student().double().eval()
    names = ["stage1", "stage3"]
    with LiveBytes() as live:
        for _ in range(2):
            grad_cam(network, small, names, TABLE)
        after = live.now
        for _ in range(5):
            grad_cam(network, small, names, TABLE)
        assert live.now == after == 0


def test_logits_are_taken_out_of_a_tuple_or_a_dict(small: Tensor) -> None:
    inner = student().double().eval()

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> dict[str, object]:
            return {"aux": images.mean(), "out": (self.inner(images), None)}

    network = Pair().eval()
    names = ["inner.stage1", "inner.stage3"]
    for _ in range(2):
        found = explain_images(network, small, names, TABLE, logits=lambda output: output["out"][0])
        assert found.logits.shape == (3, 4)
        true = grad_cam(inner, small, ["stage1", "stage3"], TABLE)
        for name in names:
            close(found.maps[name], true[name.removeprefix("inner.")])
    assert found.heads == {names[0]: None, names[1]: inner.linear}
    with pytest.raises(UserError, match=r"Pair gives a dict, not logits \[3, classes\]: .*logits="):
        grad_cam(network, small, names)
