import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from camdistill.errors import UserError
from camdistill.explain.gradcam import grad_cam
from camdistill.networks.capture import (
    capture,
    inspection_mode,
    layer_names,
    structure_fingerprint,
    unwrap,
    unwrap_outer,
    visit_layers,
)
from camdistill.networks.wrapper import Wrapper


class Doubled(Wrapper):
    """Stands for the package's own normalizing wrapper."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        return images * 2 - 1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(self.normalize(images))


class Twice(nn.Module):
    """Calls one ReLU three times, the last time in place on what came before."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=inplace)
        self.spare = nn.Conv2d(4, 4, 1)
        self.pair = nn.Identity()
        self.fc = nn.Linear(4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.relu(self.bn(self.conv(images)))
        hidden = self.relu(hidden - 0.3)
        self.pair((hidden, hidden))
        return self.fc(self.relu(hidden - 0.1).mean((2, 3)))


def hooks(network: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in network.modules()
    )


@pytest.fixture
def images(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(2, 3, 6, 6, generator=generator)


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Twice().eval()


def test_calls_are_numbered_from_0_and_no_number_is_the_last(
    network: nn.Module, images: torch.Tensor
) -> None:
    with torch.no_grad():
        first = F.relu(network.bn(network.conv(images)))
        second = F.relu(first - 0.3)
        third = F.relu(second - 0.1)
        names = ["relu", "relu#1", "conv", "relu#0", "relu#2"]
        with capture(network, names) as found:
            network(images)
    assert list(found) == names
    for name, true in zip(names[:2] + names[3:], (third, second, first, third), strict=True):
        assert torch.equal(found[name], true)


def test_inplace_operations_do_not_change_what_was_captured(images: torch.Tensor) -> None:
    network = Twice(inplace=True).eval()
    twin = Twice(inplace=False).eval()
    twin.load_state_dict(network.state_dict())
    names = ["conv", "bn", "relu#0", "relu#1"]
    with capture(network, names) as found:
        output = network(images)
    with capture(twin, names) as true:
        expected = twin(images)
    assert torch.equal(output, expected)
    assert all(torch.equal(found[name], true[name]) for name in names)
    assert found["bn"].requires_grad


def test_no_hook_stays_after_success_and_after_an_exception(
    network: nn.Module, images: torch.Tensor
) -> None:
    with capture(network, ["conv", "relu#1"]):
        network(images)
    assert hooks(network) == 0
    with pytest.raises(ZeroDivisionError), capture(network, ["conv", "relu#1"]):  # noqa: PT012
        assert hooks(network) == 2
        raise ZeroDivisionError
    assert hooks(network) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cnov", r"no layer 'cnov' in Twice; nearest: 'conv'"),
        ("relu#first", r"after # comes the number of the call, from 0, such as 'relu#0'"),
        ("relu#3", r"this forward calls 'relu' 3 times, so the last is 'relu#2'"),
        ("spare", r"'spare' is part of the network but this forward didn't call it"),
        ("pair", r"'pair' gives a tuple, not a tensor"),
        ("", r"no layer ''"),
    ],
)
def test_a_wrong_layer_is_told_with_its_cure(
    network: nn.Module, images: torch.Tensor, name: str, message: str
) -> None:
    with pytest.raises(UserError, match=message), capture(network, ["conv", name]):
        network(images)
    assert hooks(network) == 0


def test_wrappers_are_peeled_for_names_and_kept_for_running(
    network: nn.Module, images: torch.Tensor
) -> None:
    wrapped = Doubled(nn.DataParallel(network))
    assert unwrap(wrapped) is network
    assert unwrap(torch.compile(wrapped)) is network
    assert unwrap_outer(torch.compile(nn.DataParallel(wrapped))) is wrapped
    assert layer_names(wrapped) == ("conv", "bn", "relu", "spare", "pair", "fc")
    with torch.no_grad(), capture(wrapped, ["conv"]) as found:
        wrapped(images)
    assert torch.equal(found["conv"], network.conv(images * 2 - 1))


class OwnNames(nn.Module):
    """A user's network whose parts are called as our wrapper's, a compiled network's, DDP's are."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.normalize = nn.BatchNorm2d(3)
        self.add_module(name, nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()))
        self.more = nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.get_submodule(self.name)(self.normalize(images))
        return self.head(self.more(hidden).relu().mean((2, 3)))


@pytest.mark.parametrize("name", ["network", "_orig_mod", "module"])
def test_a_network_is_no_wrapper_for_the_names_of_its_parts(
    name: str, images: torch.Tensor
) -> None:
    torch.compile(nn.Conv2d(3, 4, 3), backend="eager")  # the class of compiled networks is there
    network = OwnNames(name).double().eval()
    images = images.double()
    assert unwrap(network) is network
    assert unwrap_outer(network) is network
    maps = grad_cam(network, images)
    assert list(maps) == ["more"]
    hidden = network.more(network.get_submodule(name)(network.normalize(images)))
    hidden = hidden.detach().requires_grad_()
    logits = network.head(hidden.relu().mean((2, 3)))
    (gradient,) = torch.autograd.grad(logits.max(1).values.sum(), hidden)
    expected = (gradient.mean((2, 3), keepdim=True) * hidden).sum(1)
    torch.testing.assert_close(maps["more"], expected, rtol=1e-12, atol=1e-12)
    before = network.normalize.running_mean.clone()
    with pytest.raises(UserError, match="'normalize' is in train mode"):
        grad_cam(network.train(), images, ["more"], 1)
    assert torch.equal(network.normalize.running_mean, before)


def test_a_compiled_network_is_run_uncompiled_and_hooked(
    network: nn.Module, images: torch.Tensor
) -> None:
    inside = Doubled(torch.compile(network, backend="eager"))
    in_place = copy.deepcopy(network)
    in_place.compile(backend="eager")
    with torch.no_grad():
        for compiled in (torch.compile(network, backend="eager"), inside, in_place):
            compiled(images)  # hooks that come after this call are not seen by compiled code
            with capture(compiled, ["conv"]) as found:
                compiled(images)
            given = images * 2 - 1 if compiled is inside else images
            assert torch.equal(found["conv"], network.conv(given))


def test_a_visitor_can_replace_an_output(network: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad(), visit_layers(network, ["relu#2"], lambda _, out: torch.zeros_like(out)):
        output = network(images)
    assert torch.equal(output, network.fc.bias.expand(2, -1))


def test_a_look_leaves_modes_buffers_and_random_state(images: torch.Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    network[1].eval()
    network.register_buffer("count", torch.zeros(()))
    before = copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), inspection_mode(network):  # noqa: PT012
        assert not any(m.training for m in network.modules())
        network.count += 1
        network[1].train()(network[0](images))
        torch.rand(3)
        raise ZeroDivisionError
    assert [m.training for m in network.modules()] == [True, True, False, True]
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(random, torch.get_rng_state())


def test_structure_changes_with_modules_modes_and_hooks(network: nn.Module) -> None:
    seen = {structure_fingerprint(network)}
    assert structure_fingerprint(network) in seen
    network.fc.train()
    seen.add(structure_fingerprint(network))
    network.fc = nn.Linear(4, 5)
    seen.add(structure_fingerprint(network))
    network.fc.register_forward_hook(lambda *_: None)
    seen.add(structure_fingerprint(network))
    assert len(seen) == 4


def test_a_look_before_a_call_sees_what_an_in_place_layer_overwrites(
    images: torch.Tensor,
) -> None:
    network = Twice(inplace=True).eval()
    seen: dict[str, torch.Tensor] = {}

    def look(name: str, given: object) -> None:
        assert isinstance(given, torch.Tensor)
        seen[name] = given.clone()

    with visit_layers(network, ["relu#0", "relu#1"], lambda *_: None, before=look):
        network(images)
    first = network.bn(network.conv(images))
    torch.testing.assert_close(seen["relu#0"], first, rtol=0, atol=0)
    torch.testing.assert_close(seen["relu#1"], first.relu() - 0.3, rtol=0, atol=0)
    assert seen["relu#0"].min() < 0
    assert hooks(network) == 0
