"""After any earlier calls a network is explained as a fresh copy of it would be."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cam_oracles import close, reference, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain import variants
from camdistill.explain.ablation import ablation_cam
from camdistill.explain.exporting import ClosedExplainer
from camdistill.explain.gradcam import TopClasses, explain_images, grad_cam, last_layer
from camdistill.explain.perturbation import occlusion, score_cam
from camdistill.networks.cifar_resnet import CifarResNet

CLASSES = 4


class Switched(nn.Module):
    """Two stages and two heads; what runs between them is chosen by an attribute.

    `way` is looked up where a subclass keeps it, as people's code does.
    """

    ways: tuple[Any, ...] = (0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3)
        self.b = nn.Conv2d(6, 6, 3, padding=1)
        self.heads = nn.ModuleList([nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)])
        self.options: dict[str, Any] = {"way": self.ways[0]}

    @property
    def way(self) -> Any:
        return self.options["way"]

    def switch(self, index: int) -> None:
        self.options["way"] = self.ways[index % len(self.ways)]

    def trunk(self, images: Tensor) -> Tensor:
        return self.b(self.a(images).relu())

    def forward(self, images: Tensor) -> Any:
        return self.heads[0](self.trunk(images).mean((2, 3)))


class Tasks(Switched):
    """The head of one task or the other."""

    def forward(self, images: Tensor) -> Tensor:
        return self.heads[self.way](self.trunk(images).mean((2, 3)))


class Adapter(Switched):
    """A low-rank addition to the head's weights, and to a convolution."""

    ways = (False, True)

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, CLASSES, bias=False)
        self.side = nn.Conv2d(6, 6, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.trunk(images)
        if self.way:
            hidden = hidden + self.side(hidden)
        pooled = hidden.mean((2, 3))
        logits = self.heads[0](pooled)
        return logits + self.up(self.down(pooled)) if self.way else logits


class EarlyExit(Switched):
    """Leaves after the first stage, or at the end."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.a(images).relu()
        if self.way:
            return self.heads[1](hidden.mean((2, 3)))
        return self.heads[0](self.b(hidden).relu().mean((2, 3)))


class InPlace(Switched):
    """What follows a layer overwrites it or not."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.a(images)
        hidden = hidden.relu_() if self.way else hidden.relu()
        hidden = self.b(hidden)
        return self.heads[0]((hidden.relu() if self.way else hidden.relu_()).mean((2, 3)))


class Mixing(Switched):
    """Reads the rest of the batch when told so."""

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.trunk(images).mean((2, 3))
        return self.heads[0](pooled - pooled.mean(0) if self.way else pooled)


class Running(Switched):
    """Reads the images before it in the batch when told so."""

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.trunk(images).mean((2, 3))
        return self.heads[0](pooled.cumsum(0) if self.way else pooled)


class Hidden(Switched):
    """A head with a hidden layer, which reads the mean alone or the maximum too."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.trunk(images)
        pooled = hidden.mean((2, 3)) + (hidden.amax((2, 3)) if self.way else 0)
        return self.heads[0](F.gelu(self.hidden(pooled)))


class Rectified(Switched):
    """DenseNet's trap: a ReLU between the last layer and the pooling, or none."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.trunk(images)
        return self.heads[0]((F.relu(hidden) if self.way else hidden).mean((2, 3)))


class Weighted(Switched):
    """Pools by the mean, or by a window's weights that don't sum to the mean."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.trunk(images)
        pooled = hidden[:, :, ::2].mean((2, 3)) if self.way else hidden.mean((2, 3))
        return self.heads[0](pooled)


class Outputs(Switched):
    """Gives a dictionary of two outputs."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pooled = self.trunk(images).mean((2, 3))
        return {"out": self.heads[self.way](pooled), "aux": self.heads[1 - self.way](pooled)}


class Tokens(Switched):
    """Tokens, of which the head reads the first or the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 2, 2)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.start = nn.Parameter(torch.randn(1, 1, 6))

    def mixed(self, tokens: Tensor) -> Tensor:
        return tokens + (tokens @ tokens.mT).softmax(-1) @ tokens

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.start.expand(len(tokens), -1, -1), tokens], 1)
        tokens = self.second(self.mixed(self.first(self.mixed(tokens)).relu()))
        return self.heads[0](tokens.mean(1) if self.way else tokens[:, 0])


class Thinned(Switched):
    """Batch normalization: in train mode it mixes images."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, images: Tensor) -> Tensor:
        return self.heads[self.way](self.norm(self.trunk(images)).relu().mean((2, 3)))


class Residual(CifarResNet):
    """A whole ResNet, whose attribute leaves out a stage's last block."""

    def __init__(self) -> None:
        super().__init__(14, CLASSES)
        self.way = 0

    def switch(self, index: int) -> None:
        self.way = index % 2

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(images)))
        hidden = self.layer2(self.layer1(hidden))
        stage = self.layer3[:1] if self.way else self.layer3
        return self.linear(stage(hidden).mean((2, 3)))


KINDS = [Tasks, Adapter, EarlyExit, InPlace, Mixing, Hidden, Rectified, Weighted, Outputs]
KINDS += [Tokens, Thinned, Residual, Running]


def pick(output: Any) -> Tensor:
    return output["out"] if isinstance(output, dict) else output


def pick_other(output: Any) -> Tensor:
    return output["aux"] if isinstance(output, dict) else output.flip(1)


def quarter(output: Any) -> Tensor:
    return pick(output) / 4


def two_columns(output: Any) -> Tensor:
    return pick(output)[:, [2, 0]]


def first_columns(output: Any) -> Tensor:
    return pick(output)[:, :3]


def both_signs(output: Any) -> Tensor:
    return torch.cat([-pick(output), pick(output)], 1)


def centered(output: Any) -> Tensor:
    return pick(output) - pick(output).mean(0)


def contrast(output: Any) -> Tensor:
    return pick(output)[:, 0] - pick(output)[:, 1]


def running(output: Any) -> Tensor:
    return pick(output)[:, 0].cumsum(0)


def share(output: Any) -> Tensor:
    return pick(output)[:, 0] / pick(output)[:, 0].sum()


LOGITS = [None, pick, pick_other, quarter, two_columns, first_columns, both_signs, centered]
SCORES = ["logit", "logit", "probability", contrast, share, running]
CLASS_CHOICES = [None, 0, 1, TopClasses(2), torch.tensor([[0, 1], [1, 0], [1, 1]])]
METHODS: list[Callable[..., Any]] = [grad_cam, grad_cam, grad_cam, variants.hires_cam]
METHODS += [variants.grad_cam_plus_plus, variants.layer_cam]


@dataclass(frozen=True)
class Call:
    """One call; the fields are numbers of choices."""

    method: int
    layers: int
    classes: int
    logits: int
    score: int
    grad: int
    count: int

    def answer(self, network: nn.Module) -> dict[str, Tensor] | str:
        """The maps, or what is said instead."""
        method = METHODS[self.method % len(METHODS)]
        names = [name for name, part in network.named_modules() if isinstance(part, nn.Conv2d)]
        names += [name for name in ("layer3", "second", "layer2.1") if hasattr(network, name)]
        layers = [None, names[:1], names[1:2] or names, names][self.layers % 4]
        logits = LOGITS[self.logits % len(LOGITS)]
        score = SCORES[self.score % len(SCORES)]
        classes = (
            CLASS_CHOICES[self.classes % len(CLASS_CHOICES)] if isinstance(score, str) else None
        )
        options: dict[str, Any] = {"logits": logits, "score": score}
        if method is grad_cam:
            options["grad"] = ["none", "none", "activations", "full"][self.grad % 4]
        images = IMAGES[: 3 if isinstance(classes, Tensor) else 1 + self.count % 3]
        try:
            maps = method(network, images, layers, classes, **options)
        except UserError as error:
            return str(error)
        return {name: values.detach() for name, values in maps.items()}


IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
numbers = st.integers(0, 10)
calls = st.builds(Call, *[numbers] * 7)
switches = st.one_of(
    st.tuples(st.just("switch"), numbers),
    st.tuples(
        st.sampled_from(["train", "eval", "hook", "unhook", "replace", "forward"]), st.none()
    ),
)


def scaled(_: object, __: object, output: Tensor) -> Tensor:
    return output * 3


def apply(network: nn.Module, change: tuple[str, Any], hooks: list[Any]) -> None:
    kind, index = change
    if kind == "switch":
        network.switch(index)
    elif kind in ("train", "eval"):
        network.train(kind == "train")
    elif kind == "hook":
        part = [part for part in network.modules() if isinstance(part, nn.Linear | nn.Conv2d)][-1]
        hooks.append(part.register_forward_hook(scaled))
    elif kind == "unhook":
        for handle in hooks:
            handle.remove()
        hooks.clear()
    elif kind == "replace":
        name = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)][-1]
        old = network.get_submodule(name)
        new = nn.Linear(old.in_features, old.out_features).to(torch.float64)
        with torch.no_grad():
            new.weight.copy_(-old.weight)
        network.set_submodule(name, new)
    else:  # a method that is replaced on the object
        original = type(network).forward
        network.forward = lambda images: original(network, images.flip(3))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KINDS), st.lists(st.one_of(calls, calls, switches), min_size=2, max_size=8))
def test_maps_after_any_earlier_calls_are_those_of_a_fresh_copy(
    kind: type[nn.Module], steps: list[Any]
) -> None:
    network = seeded(kind).to(torch.float64).eval()
    hooks: list[Any] = []
    for step in steps:
        if not isinstance(step, Call):
            if step[0] == "forward" and "forward" in vars(network):
                continue
            apply(network, step, hooks)
            continue
        fresh = copy.deepcopy(network)
        if "forward" in vars(fresh):
            del fresh.forward
            apply(fresh, ("forward", None), [])
        expected, found = step.answer(fresh), step.answer(network)
        if isinstance(expected, str) or isinstance(found, str):
            assert found == expected
            continue
        assert list(found) == list(expected)
        for name, maps in expected.items():
            bound = 1e-10 * float(maps.nan_to_num().abs().max().clamp(min=1e-6))
            torch.testing.assert_close(found[name], maps, rtol=0, atol=bound, equal_nan=True)
        network.load_state_dict(fresh.state_dict())  # a training step moves statistics once


@pytest.mark.parametrize("grad", ["none", "activations", "full"])
@pytest.mark.parametrize("kind", [Tasks, Adapter, Hidden, Rectified, Weighted, InPlace])
def test_a_switched_network_equals_plain_autograd(kind: type[Switched], grad: Any) -> None:
    network = seeded(kind).to(torch.float64).eval()
    classes = torch.tensor([0, 1, 2])
    for way in (0, 1, 0, 1):
        network.switch(way)
        true = reference(network, IMAGES, ["a", "b"], classes)
        for layers in (["b"], ["a", "b"]):
            found = grad_cam(network, IMAGES, layers, classes, grad=grad)
            for name in layers:
                close(found[name].detach(), true[name], 1e-10)


class Nearly(Switched):
    """A linear map near the identity between the mean and the head, or a pooling near the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Linear(6, 6)
        self.pool = nn.Conv2d(6, 6, 6, groups=6, bias=False)
        with torch.no_grad():
            self.near.weight.copy_(torch.eye(6) + 5e-4 * torch.randn(6, 6))
            self.pool.weight.copy_((1 + 2e-3 * torch.randn(6, 1, 6, 6)) / 36)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.trunk(images)
        if self.way:
            return self.heads[0](self.near(self.pool(hidden).flatten(1)).relu())
        return self.heads[0](self.near(hidden.mean((2, 3))))


@pytest.mark.parametrize("way", [0, 1])
def test_what_is_nearly_closed_or_nearly_the_mean_is_neither(way: int) -> None:
    network = seeded(Nearly).eval()
    network.switch(way)
    images, classes = IMAGES.float(), torch.tensor([0, 1, 2])
    true = reference(copy.deepcopy(network).double(), IMAGES, ["b"], classes)["b"]
    close(grad_cam(network, images, ["b"], classes)["b"].double(), true, 1e-5)


class Behind(Switched):
    """Changes a layer's output where no version counts it."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.a(images)
        if self.way:
            hidden.detach().numpy().clip(-0.2, 0.2, out=hidden.detach().numpy())
        else:
            hidden.data.clamp_(-0.2, 0.2)
        return self.heads[0](self.b(hidden.tanh()).relu().mean((2, 3)))


@pytest.mark.parametrize("way", [0, 1])
def test_what_is_changed_behind_autograds_back_is_explained_as_it_was(way: int) -> None:
    network = seeded(Behind).to(torch.float64).eval()
    network.switch(way)
    expected = grad_cam(copy.deepcopy(network), IMAGES, ["a"], 1)["a"]
    for _ in range(3):
        close(grad_cam(network, IMAGES, ["a"], 1)["a"], expected, 1e-12)


def test_a_score_may_read_more_than_the_logits() -> None:
    network = seeded(Switched).to(torch.float64).eval()
    kept: dict[str, Tensor] = {}
    network.b.register_forward_hook(lambda _, __, output: kept.update(b=output))

    def score(output: Tensor) -> Tensor:
        return output[:, 0] + kept["b"].square().mean((1, 2, 3))

    found = grad_cam(network, IMAGES, ["a"], score=score)["a"]
    activations = network.a(IMAGES).detach().requires_grad_()
    hidden = network.b(activations.relu())
    logits = network.heads[0](hidden.mean((2, 3)))
    total = logits[:, 0].sum() + hidden.square().mean((1, 2, 3)).sum()
    (gradient,) = torch.autograd.grad(total, activations)
    close(found, (gradient.mean((2, 3), keepdim=True) * activations).sum(1).detach(), 1e-10)


class Shaped(Switched):
    """Pools to a shape of its own, by images and units or not."""

    ways = ("rows", "flat", "leading")

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.trunk(images)
        count = len(hidden)
        if self.way == "flat":
            pooled = hidden.reshape(count * 6, -1).mean(1).view(count, 6)
        elif self.way == "leading":
            pooled = hidden.reshape(1, count, 6, -1).mean(-1, keepdim=True)[0, ..., 0]
        else:
            pooled = hidden.reshape(count, 6, -1).mean(-1)
        return self.heads[0](self.hidden(pooled).relu())


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("way", [0, 1, 2])
def test_a_mean_of_any_shape_is_explained(way: int, count: int) -> None:
    network = seeded(Shaped).to(torch.float64).eval()
    network.switch(way)
    classes = torch.tensor([[0, 1]]).expand(count, 2)
    found = grad_cam(network, IMAGES[:count], ["b"], classes)["b"]
    for column in range(2):
        true = reference(network, IMAGES[:count], ["b"], classes[:, column])["b"]
        close(found[:, column], true, 1e-10)


class Sideways(nn.Module):
    """Takes units for images, of which there are as many."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3)
        self.fc = nn.Linear(36, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.a(images).tanh().transpose(0, 1).flatten(2).mean(1))


def test_units_taken_for_images_are_refused() -> None:
    network = seeded(Sideways).to(torch.float64).eval()
    with pytest.raises(UserError, match="mixes the images of a batch behind layer 'a'"):
        grad_cam(network, IMAGES, ["a"], 1)


class Conditional(Switched):
    """Batch normalization whose weights are made of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.make = nn.BatchNorm2d(6), nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.a(images)
        weight = 1 + self.make(hidden.mean((0, 2, 3)))
        normed = torch.func.functional_call(self.norm, {"weight": weight}, (hidden,))
        return self.heads[0](self.b(normed.relu()).relu().mean((2, 3)))


def test_weights_of_a_normalization_that_are_made_on_the_way_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("camdistill.explain.engine.norms.LEAST", 1)
    network = seeded(Conditional).to(torch.float64).eval()
    true = reference(network, IMAGES[:1], ["a"], torch.tensor([1]))["a"]
    close(grad_cam(network, IMAGES[:1], ["a"], 1)["a"], true, 1e-10)


def test_a_copy_made_while_maps_are_made_is_a_network_of_its_own() -> None:
    network = seeded(Thinned).to(torch.float64).eval()
    copies: list[nn.Module] = []
    handle = network.a.register_forward_hook(lambda *_: copies.append(copy.deepcopy(network)))
    grad_cam(network, IMAGES, ["a"], 1)
    handle.remove()
    other = copies[0]
    other.a._forward_hooks.clear()
    before = other(IMAGES)
    with torch.no_grad():
        other.norm.running_mean += 1
    assert not torch.allclose(other(IMAGES), before)


def test_threads_on_networks_that_share_modules_leave_their_modes() -> None:
    shared = seeded(Thinned).to(torch.float64)
    networks = [nn.Sequential(shared).train() for _ in range(4)]
    before = [part.training for part in shared.modules()]

    def ask(number: int) -> None:
        explain_images(networks[number % 4], IMAGES, None, 1, grad="activations")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(80)))
    assert [part.training for part in shared.modules()] == before
    assert not any("forward" in vars(part) for part in shared.modules())


@pytest.mark.parametrize("method", [grad_cam, *METHODS[3:], variants.eigen_cam])
def test_a_batch_of_no_images_is_refused(method: Callable[..., Any]) -> None:
    network = seeded(Switched).to(torch.float64).eval()
    with pytest.raises(UserError, match="give at least one image"):
        method(network, IMAGES[:0])


@pytest.mark.parametrize("logits", [quarter, two_columns, first_columns, both_signs, pick_other])
def test_each_callable_has_its_own_maps(logits: Callable[[Tensor], Tensor]) -> None:
    network = seeded(Switched).to(torch.float64).eval()
    for _ in range(2):
        true = reference(network, IMAGES, ["a", "b"], torch.ones(3).long(), logits)
        for layers in (["b"], ["a", "b"]):
            grad_cam(network, IMAGES, layers, 1)
            found = grad_cam(network, IMAGES, layers, 1, logits=logits)
            for name in layers:
                close(found[name], true[name], 1e-10)


@pytest.mark.parametrize("kind", [Mixing, Running])
@pytest.mark.parametrize("layer", ["a", "b"])
def test_what_mixes_images_is_refused_after_any_earlier_call(
    layer: str, kind: type[Switched]
) -> None:
    network = seeded(kind).to(torch.float64).eval()
    grad_cam(network, IMAGES, [layer], 1)
    for score in (running, share):
        with pytest.raises(UserError, match="mixes the images of a batch"):
            grad_cam(network, IMAGES, [layer], score=score)
    with pytest.raises(UserError, match="mixes the images of a batch"):
        grad_cam(network, IMAGES, [layer], 1, logits=centered)
    network.switch(1)
    with pytest.raises(UserError, match="mixes the images of a batch"):
        grad_cam(network, IMAGES, [layer], 1)
    with pytest.raises(UserError, match="mixes the images of a batch"):
        variants.layer_cam(network, IMAGES, [layer], 1)


@pytest.mark.parametrize("kind", [Mixing, Running])
@pytest.mark.parametrize("method", [ablation_cam, score_cam, occlusion])
def test_methods_that_change_images_refuse_what_mixes_them(
    method: Callable[..., Any], kind: type[Switched]
) -> None:
    network = seeded(kind).to(torch.float64).eval()
    layers = [] if method is occlusion else [["b"]]
    method(network, IMAGES, *layers, classes=1)
    for logits, way in ((centered, 0), (None, 1)):
        network.switch(way)
        for count in (3, 1):
            with pytest.raises(UserError, match="mixes the images of a batch"):
                method(network, IMAGES[:count], *layers, classes=1, logits=logits)


def test_the_default_layer_is_the_last_of_this_forward() -> None:
    network = seeded(EarlyExit).to(torch.float64).eval()
    for way, layer in ((0, "b"), (1, "a"), (0, "b"), (1, "a")):
        network.switch(way)
        assert list(grad_cam(network, IMAGES)) == [layer]
        assert list(grad_cam(network, IMAGES, grad="full")) == [layer]
        assert last_layer(network, IMAGES) == layer


def test_cam_is_refused_where_this_forward_has_no_weights_for_it() -> None:
    network = seeded(Rectified).to(torch.float64).eval()
    cells = 36
    for way in (0, 1, 0):
        network.switch(way)
        if way:
            with pytest.raises(UserError, match="CAM has no weights for layer 'b'"):
                variants.cam(network, IMAGES, ["b"])
            with pytest.raises(UserError, match="layer 'b' of Rectified has no closed form"):
                ClosedExplainer(network, IMAGES, "b")
        else:
            found = variants.cam(network, IMAGES, ["b"], 1)["b"]
            close(found, cells * grad_cam(network, IMAGES, ["b"], 1)["b"], 1e-12)


@pytest.mark.parametrize("kind", [Switched, Hidden, Residual, Thinned])
def test_threads_that_share_a_network_get_their_own_maps(kind: type[nn.Module]) -> None:
    network = seeded(kind).to(torch.float64).eval()
    layers = [None, ["b"], ["a", "b"]] if kind is not Residual else [None, ["layer2", "layer3"]]
    batches = [IMAGES + number for number in range(4)]
    true = [[grad_cam(network, batch, one, 1) for one in layers] for batch in batches]
    wrong: list[int] = []

    def ask(number: int) -> None:
        batch, one = number % len(batches), number % len(layers)
        found = grad_cam(network, batches[batch], layers[one], 1)
        for name, maps in true[batch][one].items():
            if not torch.equal(found[name], maps):
                wrong.append(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(120)))
    assert not wrong
    assert not any(part._forward_hooks or "forward" in vars(part) for part in network.modules())


def test_another_thread_may_train_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """While maps are made, a plain forward of another thread keeps its output and its gradients."""
    monkeypatch.setattr("camdistill.explain.engine.norms.LEAST", 1)
    network = seeded(Thinned).to(torch.float64).eval()
    network(IMAGES).sum().backward()
    true = network.norm.weight.grad.clone()
    entered, done, gradients = threading.Event(), threading.Event(), []

    def train() -> None:
        entered.wait(20)
        network.zero_grad()
        network(IMAGES).sum().backward()
        gradients.append(network.norm.weight.grad)
        done.set()

    def look(output: Tensor) -> Tensor:
        return output

    def pause(_: object, __: object) -> None:
        if threading.current_thread() is threading.main_thread() and not entered.is_set():
            entered.set()
            done.wait(20)

    network.b.register_forward_pre_hook(pause)
    other = threading.Thread(target=train)
    other.start()
    found = explain_images(network, IMAGES, ["a", "b"], 1, logits=look)
    other.join()
    close(gradients[0], true)
    close(found.maps["b"], reference(network, IMAGES, ["b"], torch.ones(3).long())["b"], 1e-10)
