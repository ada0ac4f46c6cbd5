"""Weights that were read and the network they are for: whether they fit, and putting them in."""

from collections.abc import Mapping

from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.networks.weights import WeightFile, unwrapped


def aligned(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under the network's own names.

    A prefix is left out that all names share and the network doesn't know. A part of the network
    may be compiled, or be called as a wrapper is; reading the file has left such words out.
    """
    own = network.state_dict()
    short = list(unwrapped(own))
    # Two names that are one without such words stay as they are.
    names = dict(zip(short, own, strict=True)) if len(short) == len(own) else {}
    state = dict(state)
    while not (own.keys() | names.keys()) & state.keys():
        prefixes = {name.partition(".")[0] for name in state}
        if len(prefixes) != 1 or not all("." in name for name in state):
            break
        state = {name.partition(".")[2]: value for name, value in state.items()}
    return {name if name in own else names.get(name, name): value for name, value in state.items()}


def mismatch(network: nn.Module, state: Mapping[str, Tensor]) -> str:
    """What keeps an (aligned) state from fitting a network, "" if it fits."""
    own = network.state_dict()
    # Files from before batch normalisation counted its batches lack this; it is not used.
    missing = [
        name for name in own if name not in state and not name.endswith("num_batches_tracked")
    ]
    unknown = [name for name in state if name not in own]
    if missing or unknown:
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} of its {len(own)} weights ({_some(missing)})")
        if unknown:
            parts.append(f"has {len(unknown)} that it doesn't know ({_some(unknown)})")
        return " and ".join(parts)
    for name, value in own.items():
        if name in state and value.shape != state[name].shape:
            given, wanted = tuple(state[name].shape), tuple(value.shape)
            return f"has '{name}' of shape {given} where it takes {wanted}"
    return ""


def _some(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:2]) + (", ..." if len(names) > 2 else "")


def load_state(network: nn.Module, weights: WeightFile) -> None:
    """Put weights into a network; on an error the network stays as it was.

    Raises:
        UserError: If names or shapes differ.
    """
    state = aligned(network, weights.state)
    if problem := mismatch(network, state):
        raise UserError(
            f"'{weights.path}' doesn't fit {type(network).__name__}: it {problem}; "
            "name the network that it was trained as"
        )
    network.load_state_dict(_with_counters(network, state))


def _with_counters(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    own = network.state_dict()
    return {name: state.get(name, value) for name, value in own.items()}
