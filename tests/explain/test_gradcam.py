import copy
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cam_oracles import (
    close,
    head_of,
    out_of_place,
    reference,
    seeded,
    state_of,
    student,
    untouched,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from camdistill.errors import UserError
from camdistill.explain.gradcam import TopClasses, explain_images, grad_cam, last_layer
from camdistill.networks.cifar_resnet import CifarResNet, WideResNet

STAGES = ["layer1", "layer2", "layer3", "layer4"]


def resnet18() -> nn.Module:
    return seeded(lambda: torchvision.models.resnet18(num_classes=10)).eval()


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=generator, dtype=torch.float64)


@pytest.fixture
def small(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 3, 12, 12, generator=generator, dtype=torch.float64)


def test_map_equals_hand_numbers() -> None:
    """One unit doubles the image, one negates it; the head's weights for class 1 are 3 and 1."""
    network = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.append(nn.Linear(2, 2, bias=False))
    network[0].weight.data = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1)
    network[3].weight.data = torch.tensor([[0.0, 1.0], [3.0, 1.0]])
    image = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    # alpha = (3, 1) / 4; map = (3 * 2 x - x) / 4 = 5 x / 4
    expected = torch.tensor([[[1.25, 2.5], [3.75, 7.5]]])
    for _ in range(2):  # the first call proves the closed form, the second trusts it
        torch.testing.assert_close(grad_cam(network, image, ["0"], 1)["0"], expected)
    # S = relu(y): the map of class 0, y = -mean x = -3, is 0
    squashed = nn.Sequential(*network, nn.ReLU())
    assert grad_cam(squashed, image, ["0"], 0)["0"].abs().max() == 0
    torch.testing.assert_close(grad_cam(squashed, image, ["0"], 1)["0"], expected)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_all_stages_equal_plain_autograd_in_every_mode(
    images: Tensor, frozen: bool, mode: Callable[[], object]
) -> None:
    network = resnet18().double()
    true = reference(out_of_place(network), images, STAGES)
    network.requires_grad_(not frozen)
    with mode():
        given = images.clone()
        before = state_of(network)
        for _ in range(2):
            found = explain_images(network, given, STAGES)
            assert list(found.maps) == STAGES
            for name in STAGES:
                close(found.maps[name], true[name])
                assert not found.maps[name].requires_grad
                assert not found.activations[name].requires_grad
            assert not found.logits.requires_grad
        untouched(network, before)
    assert head_of(network, images, "layer4") == "fc"
    assert head_of(network, images, "layer3") is None


def test_a_network_made_under_inference_mode_is_explained(images: Tensor) -> None:
    with torch.inference_mode():
        network = resnet18().double()
    twin = out_of_place(resnet18()).double()
    true = reference(twin, images, ["layer2", "layer4"])
    for _ in range(2):
        found = grad_cam(network, images, ["layer2", "layer4"])
        close(found["layer2"], true["layer2"])
        close(found["layer4"], true["layer4"])


@pytest.mark.parametrize("name", ["bn1", "layer4.1.bn2", "layer1.0.bn1"])
def test_inplace_relu_after_the_layer_equals_the_out_of_place_twin(
    images: Tensor, name: str
) -> None:
    network = resnet18().double()
    true = reference(out_of_place(network), images, [name, "layer4"])
    close(grad_cam(network, images, [name, "layer4"])[name], true[name])
    trained = explain_images(network, images, [name], grad="full")
    close(trained.maps[name].detach(), true[name])


def test_calls_of_one_module_have_their_own_maps(images: Tensor) -> None:
    network = resnet18().double()
    twin = out_of_place(network)
    block = twin.layer1[0]
    twin.layer1[0].relu = nn.ReLU()
    extra = nn.ReLU()
    block.forward = lambda x: block.relu(
        block.bn2(block.conv2(extra(block.bn1(block.conv1(x))))) + x
    )
    block.extra = extra
    true = reference(twin, images, ["layer1.0.extra", "layer1.0.relu"])
    found = grad_cam(network, images, ["layer1.0.relu", "layer1.0.relu#1", "layer1.0.relu#0"])
    close(found["layer1.0.relu#0"], true["layer1.0.extra"])
    close(found["layer1.0.relu#1"], true["layer1.0.relu"])
    close(found["layer1.0.relu"], true["layer1.0.relu"])


def test_nested_layers_that_end_together_have_equal_maps(images: Tensor) -> None:
    network = resnet18().double()
    names = ["layer4.1.relu#1", "layer4", "layer4.1"]
    true = reference(out_of_place(network), images, ["layer4"])["layer4"]
    for _ in range(2):
        for found in grad_cam(network, images, names).values():
            close(found, true)


def test_classes_may_be_one_number_one_an_image_or_several_an_image(images: Tensor) -> None:
    network = resnet18().double()
    twin = out_of_place(network)
    table = torch.tensor([[3, 0], [1, 9], [2, 2]])
    names = ["layer2", "layer4"]
    for _ in range(2):
        found = grad_cam(network, images, names, table)
        one = grad_cam(network, images, names, 7)
        each = grad_cam(network, images, names, [3, 1, 2])
        for name in names:
            for column in range(2):
                true = reference(twin, images, names, table[:, column])[name]
                close(found[name][:, column], true)
            close(each[name], found[name][:, 0])
            close(one[name], reference(twin, images, names, torch.full((3,), 7))[name])


def test_top_is_each_images_own_likeliest_classes(images: Tensor) -> None:
    network = student().double().eval()
    found = explain_images(network, images, ["stage1", "stage2"], TopClasses(3))
    assert torch.equal(found.classes, network(images).topk(3, 1).indices)
    named = explain_images(network, images, ["stage1", "stage2"], found.classes)
    for layer, maps in found.maps.items():
        assert torch.equal(maps, named.maps[layer])
    assert explain_images(network, images, ["stage2"], TopClasses(99)).classes.shape == (
        3,
        network(images).shape[1],
    )
    with pytest.raises(UserError, match="the top 0 classes were asked for; give 1 or more"):
        grad_cam(network, images, classes=TopClasses(0))


def test_completeness_of_all_class_maps_at_the_last_stage(images: Tensor) -> None:
    network = resnet18().double()
    every = torch.arange(10).expand(3, 10)
    found = explain_images(network, images, ["layer4"], every)
    close(found.maps["layer4"].sum((2, 3)), found.logits - network.fc.bias.detach())


@pytest.mark.parametrize("grad", ["none", "full"])
def test_scores_equal_plain_autograd(images: Tensor, grad) -> None:
    network = resnet18().double()
    twin = out_of_place(network)
    names = ["layer3", "layer4"]
    classes = torch.tensor([4, 5, 6])
    true = reference(twin, images, names, classes, lambda y: y.softmax(1))

    def margin(logits: Tensor) -> Tensor:
        return logits[:, 1] - logits[:, 2] ** 2

    contrast = reference(twin, images, names, torch.zeros(3).long(), lambda y: margin(y)[:, None])
    for _ in range(2):
        found = grad_cam(network, images, names, classes, score="probability", grad=grad)
        called = explain_images(network, images, names, score=margin, grad=grad)
        for name in names:
            close(found[name].detach(), true[name])
            close(called.maps[name].detach(), contrast[name])
        assert called.classes.tolist() == [-1, -1, -1]


class Odd(nn.Module):
    """A dictionary as output, the logits inside; a batch-wise or broken trunk on request."""

    def __init__(self, inner: nn.Module, form: str) -> None:
        super().__init__()
        self.inner, self.form = inner, form
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> object:
        if self.form == "dict":
            return {"logits": self.inner(images)}
        if self.form == "raises":
            self.inner(images)
            raise ZeroDivisionError
        if self.form == "detach":
            return self.inner(images).detach()
        with torch.no_grad():
            hidden = self.inner.stage2(self.inner.stage1(images))
        return self.inner.linear(self.inner.stage3(hidden).mean((2, 3)))


def test_a_dictionary_output_is_explained_by_a_callable_score(small: Tensor) -> None:
    network = student().double().eval()
    odd = Odd(network, "dict").double().eval()
    true = reference(network, small, ["stage2"], torch.ones(3).long())["stage2"]
    found = explain_images(odd, small, ["inner.stage2"], score=lambda out: out["logits"][:, 1])
    close(found.maps["inner.stage2"], true)
    with pytest.raises(UserError, match=r"Odd gives a dict, not logits .* score="):
        grad_cam(odd, small, ["inner.stage2"])


def test_a_trunk_that_switches_the_graph_off_itself_is_explained(small: Tensor) -> None:
    network = student().double().eval()
    odd = Odd(network, "no_grad").double().eval()
    true = reference(network, small, ["stage2"])["stage2"]
    with torch.no_grad():
        close(grad_cam(odd, small, ["inner.stage2"])["inner.stage2"], true)
        assert not torch.is_grad_enabled()
    with pytest.raises(UserError, match="has no gradient at every one of the layers"):
        grad_cam(odd, small, ["inner.stage1"])


@pytest.mark.parametrize("name", ["shallow", "cifar", "wide"])
def test_training_maps_in_train_mode_equal_double_backward_for_every_parameter(
    generator: torch.Generator, name: str
) -> None:
    build, layer = {
        "shallow": (student, "stage3"),
        "cifar": (lambda: seeded(lambda: CifarResNet(8, 4)), "layer3"),
        "wide": (lambda: seeded(lambda: WideResNet(10, 1, 4)), "relu"),
    }[name]
    network, twin = build().double().train(), build().double().train()
    images = torch.randn(4, 3, 12, 12, generator=generator, dtype=torch.float64)
    classes = torch.tensor([0, 1, 2, 3])
    target = torch.rand(4, *[12 // (2 if name == "shallow" else 4)] * 2, generator=generator)
    for _ in range(2):
        network.zero_grad()
        twin.zero_grad()
        found = explain_images(network, images, [layer], classes, grad="full")
        (F.mse_loss(found.maps[layer].relu(), target) + found.logits.square().mean()).backward()
        true = reference(twin, images, [layer], classes, create_graph=True)[layer]
        F.mse_loss(true.relu(), target).backward()
        twin(images).square().mean().backward()
        close(found.maps[layer].detach(), true.detach())
        largest = max(p.grad.abs().max() for p in twin.parameters())
        for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
            assert (ours.grad - theirs.grad).abs().max() < 1e-12 * largest
        assert found.heads == {layer: network.linear}


@pytest.mark.parametrize("layers", [["stage2"], ["stage1", "stage2", "stage3"]])
@pytest.mark.parametrize("train", [True, False])
def test_full_gradient_at_inner_stages_equals_finite_differences(
    small: Tensor, layers: list[str], train: bool
) -> None:
    network = student().double().train(train)
    for module in network.modules():  # smooth, so that differences converge
        if hasattr(module, "relu"):
            module.relu = nn.Softplus()
    classes = torch.tensor([0, 3, 1])
    generator = torch.Generator().manual_seed(5)

    def loss() -> Tensor:
        maps = grad_cam(network, small, layers, classes, grad="full")
        return sum((m.square() * (1 + i)).mean() for i, m in enumerate(maps.values())) * 100

    loss().backward()
    for parameter in network.parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = 0.0 if parameter.grad is None else (parameter.grad * direction).sum().item()
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step * direction
                values.append(loss().item())
                parameter -= step * direction
        assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("layer", ["stage2", "stage3"])
def test_with_activations_alpha_is_a_constant(small: Tensor, layer: str) -> None:
    network, twin = student().double().eval(), student().double().eval()
    for _ in range(2):
        network.zero_grad()
        twin.zero_grad()
        found = explain_images(network, small, [layer], 1, grad="activations")
        found.maps[layer].square().sum().backward()
        hidden = small
        for number in range(1, int(layer[-1]) + 1):
            hidden = twin.get_submodule(f"stage{number}")(hidden)
        tail = hidden
        for number in range(int(layer[-1]) + 1, 4):
            tail = twin.get_submodule(f"stage{number}")(tail)
        total = twin.linear(tail.mean((2, 3)))[:, 1].sum()
        alpha = torch.autograd.grad(total, hidden, retain_graph=True)[0].mean((2, 3))
        torch.einsum("bk,bkhw->bhw", alpha, hidden).square().sum().backward()
        assert network.linear.weight.grad is None
        for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                close(ours.grad, theirs.grad, 1e-10)


def test_an_explicit_grad_holds_whatever_mode_surrounds_the_call(small: Tensor) -> None:
    network = student().double().eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = explain_images(network, small.clone(), ["stage2", "stage3"], grad="full")
        assert all(m.requires_grad for m in found.maps.values())
        assert found.logits.requires_grad
    network.requires_grad_(False)
    network.linear.requires_grad_(True)
    maps = grad_cam(network, small, ["stage2", "stage3"], grad="full")
    (maps["stage2"].sum() + maps["stage3"].sum()).backward()
    assert network.linear.weight.grad.abs().max() > 0


def test_training_step_under_bf16_autocast_is_near_float32(generator: torch.Generator) -> None:
    network = seeded(lambda: CifarResNet(8, 4)).train()
    images = torch.randn(8, 3, 16, 16, generator=generator)
    names = ["layer2", "layer3"]
    true = explain_images(copy.deepcopy(network), images, names, 2, grad="full")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = explain_images(network, images, names, 2, grad="full")
    assert found.logits.dtype == torch.bfloat16
    for name in names:
        assert found.maps[name].dtype == torch.float32
        close(found.maps[name], true.maps[name], 0.08)
        found.maps[name].square().mean().backward(retain_graph=True)
    assert found.heads == {"layer2": None, "layer3": network.linear}
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_give_float32_maps(images: Tensor, dtype: torch.dtype) -> None:
    network = resnet18().to(dtype)
    given, classes = images.to(dtype), torch.ones(3).long()
    true = reference(out_of_place(network), given, STAGES, classes)
    for _ in range(2):
        found = grad_cam(network, given, STAGES, 1)
        for name in STAGES:
            assert found[name].dtype == torch.float32
            # float16's gradients are scaled, and so rounded elsewhere
            close(found[name], true[name], 1e-4 if dtype == torch.bfloat16 else 0.01)
    with torch.inference_mode():
        close(grad_cam(network, given, ["layer2"], 1)["layer2"], found["layer2"], 1e-4)


def test_gradients_below_the_smallest_float16_are_not_lost() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ).append(nn.Linear(4, 2))
    network[4].weight.data *= 1e-3  # over 64 * 64 cells: dS/dA is about 1e-7
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    true = reference(network, image, ["0"], torch.tensor([1]))["0"]
    close(grad_cam(copy.deepcopy(network).half(), image.half(), ["0"], 1)["0"], true, 0.02)


@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=5), "features"),
        (lambda: Perceptron(), "features"),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), Pooled(6)), "0"),
        (lambda: nn.Sequential(student().stage1, Pooled(6, nn.Linear(6, 6))), "0"),
        (lambda: nn.Sequential(student().stage1, Pooled(6, nn.Sigmoid())), "0"),
    ],
)
def test_closed_form_is_refused_where_it_is_wrong(
    build: Callable[[], nn.Module], layer: str, generator: torch.Generator
) -> None:
    network = seeded(build).double().eval()
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    true = reference(out_of_place(network), images, [layer])[layer]
    for _ in range(2):
        close(grad_cam(network, images, [layer])[layer], true, 1e-11)
    assert head_of(network, images, layer) is None


class Perceptron(nn.Module):
    """A small VGG: pooling to a grid, flattened, and hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(True), nn.MaxPool2d(2))
        self.avgpool = nn.AdaptiveAvgPool2d(3)
        self.classifier = nn.Sequential(nn.Linear(45, 8), nn.ReLU(True), nn.Linear(8, 5))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


class Pooled(nn.Module):
    """GAP, something, and a linear head; dropout where asked."""

    def __init__(self, units: int, between: nn.Module | None = None, dropout: float = 0) -> None:
        super().__init__()
        self.between = between or nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(units, 5)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc(self.dropout(self.between(F.adaptive_avg_pool2d(hidden, 1).flatten(1))))


def test_an_active_dropout_is_seen_with_its_own_mask(generator: torch.Generator) -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), Pooled(6, dropout=0.5))).double()
    images = torch.randn(2, 3, 9, 9, generator=generator, dtype=torch.float64)
    network.eval()
    assert head_of(network, images, "0") == "1.fc"
    network.train()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        true = reference(network, images, ["0"], torch.ones(2).long())["0"]
        torch.manual_seed(3)
        found = grad_cam(network, images, ["0"], 1)["0"]
    close(found, true)
    assert head_of(network, images, "0") is None


def test_a_changed_head_is_noticed(generator: torch.Generator) -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), Pooled(6))).double().eval()
    images = torch.randn(2, 3, 9, 9, generator=generator, dtype=torch.float64)

    def check() -> None:
        classes = torch.ones(2).long()
        close(
            grad_cam(network, images, ["0"], 1)["0"],
            reference(network, images, ["0"], classes)["0"],
        )

    check()
    check()
    network[1].fc.weight.data.normal_(generator=generator)
    check()
    network[1].fc = nn.Linear(6, 4).double()
    check()
    network[1].between = nn.Tanh()
    check()
    network[1].between = nn.Identity()
    handle = network[1].fc.register_forward_pre_hook(lambda _, inputs: (inputs[0].tanh(),))
    check()
    handle.remove()
    check()


def test_of_two_equal_heads_the_one_that_runs_is_taken(generator: torch.Generator) -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), Pooled(6))).double().eval()
    network[1].average = copy.deepcopy(network[1].fc)
    network.requires_grad_(False)
    images = torch.randn(2, 3, 9, 9, generator=generator, dtype=torch.float64)
    grad_cam(network, images, ["0"], 1)
    network[1].average.weight.data.zero_()
    assert grad_cam(network, images, ["0"], 1)["0"].abs().max() > 0
    assert head_of(network, images, "0") == "1.fc"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "layer4"),
        ("vgg11", "features"),
        ("densenet121", "features"),
        ("mobilenet_v3_small", "features"),
        ("shufflenet_v2_x0_5", "conv5"),
    ],
)
def test_last_layer_is_found_by_running(name: str, layer: str, images: Tensor) -> None:
    network = seeded(lambda: torchvision.models.get_model(name, num_classes=3)).train()
    before = state_of(network)
    assert last_layer(network, images.float()) == layer
    untouched(network, before)


def test_last_layer_of_our_networks(small: Tensor) -> None:
    images = small.float()
    assert last_layer(student(), images) == "stage3"
    assert last_layer(CifarResNet(8), images) == "layer3"
    assert last_layer(WideResNet(10, 1), images) == "relu"
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    assert last_layer(plain, images) == "1"
    with pytest.raises(UserError, match="no layer with a spatial output for images of 12x12"):
        last_layer(nn.Sequential(nn.Flatten(), nn.Linear(432, 2)), images)
    found = explain_images(student().eval(), images)
    assert list(found.maps) == ["stage3"]


@pytest.mark.parametrize("grad", ["none", "full"])
def test_an_exception_in_the_network_leaves_nothing(small: Tensor, grad) -> None:
    odd = Odd(student(), "raises").double().eval()
    before = state_of(odd)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        grad_cam(odd, small, ["inner.stage1", "inner.stage2"], grad=grad)
    untouched(odd, before)


def test_no_graph_stays_alive(small: Tensor) -> None:
    network = student().double().eval()
    kept: list[weakref.ref[Tensor]] = []
    handle = network.stage2.conv.register_forward_hook(
        lambda _, __, out: kept.append(weakref.ref(out))
    )
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            maps = grad_cam(network, small, ["stage1", "stage2.conv", "stage3"])
        assert all(m.grad_fn is None for m in maps.values())
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()
    handle.remove()
    forgotten = weakref.ref(network)
    del network, handle
    gc.collect()
    assert forgotten() is None  # no cache holds the network


def test_cost_is_one_forward_and_the_backward_behind_the_first_layer(images: Tensor) -> None:
    network = resnet18()
    given = images.float()

    def flops(call: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    with torch.no_grad():
        forward = flops(lambda: network(given))
    every = torch.arange(10).expand(3, 10)
    maps = 2 * every.numel() * 512 * 4
    proof = 2 * every.numel() * 512  # the head's weights times as many numbers as logits, twice
    for _ in range(2):
        cost = flops(lambda: grad_cam(network, given, ["layer4"], every))
        assert cost <= forward + maps + 2 * proof
    with torch.no_grad():
        hidden = network.layer2(
            network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(given)))))
        )
        behind = flops(lambda: network.fc(network.layer4(network.layer3(hidden)).mean((2, 3))))
    names = ["layer4", "layer2", "layer3"]
    for _ in range(2):
        cost = flops(lambda: grad_cam(network, given, names))
        # A backward through inputs alone repeats the forward's products, weights' would double it.
        assert cost == pytest.approx(forward + behind, rel=0.01)


def test_nothing_is_saved_before_the_first_layer(images: Tensor) -> None:
    network = resnet18()
    saved: list[tuple[int, ...]] = []

    def pack(value: Tensor) -> Tensor:
        saved.append(tuple(value.shape))
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        grad_cam(network, images.float(), ["layer3"])
    assert (3, 256, 4, 4) in saved
    assert not any(len(s) == 4 and s[0] == 3 and s[1] < 256 for s in saved)


def test_batch_of_one_equals_batch_of_many_and_order_does_not_matter(images: Tensor) -> None:
    network = resnet18().double()
    whole = grad_cam(network, images, STAGES)
    for name in STAGES:
        close(grad_cam(network, images.flip(0), [name])[name].flip(0), whole[name])
        close(grad_cam(network, images[1:2], [name])[name], whole[name][1:2])


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone, as DDP wants one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrap(network: nn.Module, kind: str) -> nn.Module:
    if kind == "method":
        network.compile(backend="eager")
        return network
    if kind == "DDP":
        return nn.parallel.DistributedDataParallel(network)
    if kind == "DataParallel":
        return nn.DataParallel(network)
    compiled = torch.compile(network, backend="eager" if kind == "compiled DDP" else kind)
    return nn.parallel.DistributedDataParallel(compiled) if kind == "compiled DDP" else compiled


@pytest.mark.parametrize(
    "kind", ["eager", "aot_eager", "method", "DataParallel", "DDP", "compiled DDP"]
)
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.usefixtures("one_process")
def test_wrapped_networks_give_the_maps_of_the_bare_one(
    small: Tensor, kind: str, called: bool
) -> None:
    network = seeded(  # without the checks of shapes in our own, which can't be compiled
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(True), nn.Conv2d(5, 6, 3), Pooled(6))
    )
    network.double().eval()
    names = ["0", "1", "2"]
    true = grad_cam(copy.deepcopy(network), small, names, 1)
    wrapped = wrap(network, kind)
    if called:
        wrapped(small)
    for grad in ("none", "full", "none"):
        with torch.no_grad():
            found = grad_cam(wrapped, small, names, 1, grad=grad)
        for name, values in found.items():
            close(values.detach(), true[name])
    torch.testing.assert_close(wrapped(small), explain_images(wrapped, small).logits)
    assert head_of(wrapped, small, "2") == "3.fc"


def test_maps_can_be_left_out(small: Tensor) -> None:
    network = student().double().train()
    found = explain_images(network, small, ["stage1", "stage3"], grad="full", maps=False)
    assert found.maps == {}
    assert found.activations["stage3"].requires_grad
    hidden = found.activations["stage3"].mean((2, 3))
    torch.testing.assert_close(network.linear(hidden), found.logits)
    network.eval()
    assert explain_images(network, small, []).logits.shape == (3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["stage9"]}, r"no layer 'stage9' in ShallowCNN; nearest: 'stage"),
        ({"layers": ["linear"]}, r"'linear' gives \[3, 4\], which has no spatial size"),
        ({"classes": [1]}, r"the shape \[1\] for 3 images: give None, one number, \[3\]"),
        ({"classes": torch.zeros(2, 3).long()}, r"the shape \[2, 3\] for 3 images"),
        ({"classes": 4}, r"class 4 does not exist: the network has 4 classes, 0 to 3"),
        ({"classes": [0, -1, 2]}, r"class -1 does not exist"),
        ({"classes": torch.rand(3)}, r"classes are torch.float32"),
        ({"score": lambda y: y}, r"gave \[3, 4\] for 3 images"),
        ({"score": lambda y: y[:, 0], "classes": 1}, r"both given"),
        ({"score": lambda y: y[:, 0].detach()}, r"depend|no gradient"),
    ],
)
@pytest.mark.parametrize("layer", ["stage2", "stage3"])
def test_mistakes_are_told_with_their_cure(
    small: Tensor, layer: str, arguments: dict[str, object], message: str
) -> None:
    network = student().double().eval()
    grad_cam(network, small, [layer])
    before = state_of(network)
    with pytest.raises(UserError, match=message):
        grad_cam(network, small, **{"layers": [layer], **arguments})
    untouched(network, before)


def test_layers_that_do_not_run_or_do_not_matter_are_refused(small: Tensor) -> None:
    odd = Odd(student(), "detach").double().eval()
    with pytest.raises(UserError, match="this forward didn't call it"):
        grad_cam(odd, small, ["unused"])
    with pytest.raises(UserError, match="has no gradient"):
        grad_cam(odd, small, ["inner.stage2"])


def test_networks_that_mix_images_are_refused_without_a_training_graph(small: Tensor) -> None:
    network = student().double().train()
    before = state_of(network)
    with pytest.raises(UserError, match=r"'stage1.bn' is in train mode.* call \.eval\(\)"):
        grad_cam(network, small)
    untouched(network, before)
    alone = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()).double()
    with pytest.raises(UserError, match="keeps no running statistics"):
        grad_cam(alone.eval(), small, ["0"])
