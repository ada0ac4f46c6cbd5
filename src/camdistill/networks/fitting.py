"""Weights that were read and the network they are for: whether they fit, and putting them in."""

from collections.abc import Mapping

from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.networks.weights import WeightFile, strip_wrapper_names


def align_names(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under the network's own names.

    A prefix is left out that all names share and the network doesn't know. A part of the network
    may be compiled, or be called as a wrapper is; reading the file has left such words out.
    """
    network_state = network.state_dict()
    stripped = list(strip_wrapper_names(network_state))
    # Two names that are one without such words stay as they are.
    names = (
        dict(zip(stripped, network_state, strict=True))
        if len(stripped) == len(network_state)
        else {}
    )
    state = dict(state)
    while not (network_state.keys() | names.keys()) & state.keys():
        prefixes = {name.partition(".")[0] for name in state}
        if len(prefixes) != 1 or not all("." in name for name in state):
            break
        state = {name.partition(".")[2]: value for name, value in state.items()}
    return {
        name if name in network_state else names.get(name, name): value
        for name, value in state.items()
    }


def describe_mismatch(network: nn.Module, state: Mapping[str, Tensor]) -> str:
    """What keeps an (aligned) state from fitting a network, "" if it fits."""
    network_state = network.state_dict()
    # Files from before batch normalization counted its batches lack this; it is not used.
    missing = [
        name
        for name in network_state
        if name not in state and not name.endswith("num_batches_tracked")
    ]
    unknown = [name for name in state if name not in network_state]
    if missing or unknown:
        problems = []
        if missing:
            problems.append(
                f"lacks {len(missing)} of its {len(network_state)} weights "
                f"({_quote_first(missing)})"
            )
        if unknown:
            problems.append(f"has {len(unknown)} that it doesn't know ({_quote_first(unknown)})")
        return " and ".join(problems)
    for name, value in network_state.items():
        if name in state and value.shape != state[name].shape:
            file_shape, network_shape = tuple(state[name].shape), tuple(value.shape)
            return f"has '{name}' of shape {file_shape} where it takes {network_shape}"
    return ""


def _quote_first(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:2]) + (", ..." if len(names) > 2 else "")


def load_weights(network: nn.Module, weights: WeightFile) -> None:
    """Put weights into a network; on an error the network stays as it was.

    Raises:
        UserError: If names or shapes differ.
    """
    state = align_names(network, weights.state)
    if problem := describe_mismatch(network, state):
        raise UserError(
            f"'{weights.path}' doesn't fit {type(network).__name__}: it {problem}; "
            "name the network that it was trained as"
        )
    network.load_state_dict(_add_counters(network, state))


def _add_counters(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    network_state = network.state_dict()
    return {name: state.get(name, value) for name, value in network_state.items()}
