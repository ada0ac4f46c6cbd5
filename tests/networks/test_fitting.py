from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.networks.fitting import load_weights
from camdistill.networks.students import ShallowCNN
from camdistill.networks.weights import WeightFile, read_weights

State = dict[str, Tensor]


def student(seed: int = 0) -> ShallowCNN:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ShallowCNN(3, (4, 6), (1, 2))


def same(network: ShallowCNN, state: State) -> bool:
    own = network.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


def test_old_files_without_batch_counters_fit(tmp_path: Path) -> None:
    network = student()
    state = {n: v for n, v in network.state_dict().items() if "num_batches" not in n}
    torch.save(state, tmp_path / "w.pt")
    other = student(seed=1)
    load_weights(other, read_weights(tmp_path / "w.pt"))
    assert same(network, other.state_dict())


def test_file_read_from_halves_fills_a_network_of_singles(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in student().state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    other = student(seed=1)
    load_weights(other, read_weights(tmp_path / "w.pt"))
    assert other.linear.weight.dtype == torch.float32
    assert torch.equal(other.linear.weight, state["linear.weight"].float())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("linear.bias"), r"lacks 1 of its 14 weights \('linear.bias'\)"),
        (lambda s: s.update(extra=torch.ones(1)), r"has 1 that it doesn't know \('extra'\)"),
        (
            lambda s: s.update({"linear.weight": torch.ones(5, 6)}),
            r"'linear.weight' of shape \(5, 6\) where it takes \(3, 6\)",
        ),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    change: Callable[[State], object], said: str
) -> None:
    network = student()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = {name: torch.zeros_like(value) for name, value in before.items()}
    change(state)
    with pytest.raises(UserError, match=said) as caught:
        load_weights(network, WeightFile(state))
    assert "\n" not in str(caught.value)
    assert same(network, before)


class OwnNames(nn.Module):
    """A user's network with a part that is called as torch.compile's or DDP's own is."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(2, 3))

    def forward(self, values: Tensor) -> Tensor:
        return next(self.children())(values)


@pytest.mark.parametrize("name", ["_orig_mod", "module", "not_orig_mod"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.backbone."])
def test_weights_of_a_network_with_a_wrapper_s_word_for_a_part_fit(
    name: str, prefix: str, tmp_path: Path
) -> None:
    network, other = OwnNames(name), OwnNames(name)
    state = {prefix + key: value for key, value in network.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    load_weights(other, read_weights(tmp_path / "w.pt"))
    values = torch.ones(1, 2)
    assert torch.equal(other(values), network(values))


def test_a_network_with_compiled_parts_takes_the_weights_of_the_plain_one(tmp_path: Path) -> None:
    plain, compiled = student(), student(seed=1)
    compiled.stage1 = torch.compile(compiled.stage1, backend="eager")
    torch.save(plain.state_dict(), tmp_path / "w.pt")
    load_weights(compiled, read_weights(tmp_path / "w.pt"))
    assert torch.equal(compiled.get_submodule("stage1").conv.weight, plain.stage1.conv.weight)
