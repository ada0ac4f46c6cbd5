"""Selects layers of one or two networks by names or patterns."""

from collections.abc import Mapping, Sequence
from itertools import chain

from torch import nn

from camdistill.errors import UserError, nearest
from camdistill.layers.sweep.layer_selection import (
    Layer,
    fits_pattern,
    list_call_names,
    select_layers,
)
from camdistill.types import Images

Patterns = Sequence[str] | Mapping[str, Sequence[str]] | None


def select_layers_by_network(
    networks: Mapping[str, nn.Module], example: Images, patterns: Patterns
) -> dict[str, tuple[tuple[Layer, ...], tuple[str, ...]]]:
    """What `points.choice` finds in each network.

    Args:
        networks: By name.
        example: Images as they take them.
        patterns: By network, or for every network that has such layers. None is each network's
            blocks and the non-linearities outside them.

    Raises:
        UserError: A pattern fits no layer of any network, or a network has none of the layers.
    """
    if patterns is None or isinstance(patterns, Mapping):
        patterns_by_network: Mapping[str, Sequence[str]] = patterns or {}
        return {
            name: select_layers(net, example, patterns_by_network.get(name))
            for name, net in networks.items()
        }
    fitting: dict[str, list[str]] = {name: [] for name in networks}
    for pattern in patterns:
        misfits: dict[str, UserError] = {}
        for name, network in networks.items():
            try:
                select_layers(network, example, [pattern])
                fitting[name].append(pattern)
            except UserError as error:
                misfits[name] = error
        if len(misfits) == len(networks):
            raise _misfit(networks, example, pattern, misfits)
    if missed := [name for name, fitting_patterns in fitting.items() if not fitting_patterns]:
        raise UserError(
            f"none of the layers {list(patterns)} are in the {missed[0]}: name some of its layers "
            "too"
        )
    return {name: select_layers(net, example, fitting[name]) for name, net in networks.items()}


def _misfit(
    networks: Mapping[str, nn.Module],
    example: Images,
    pattern: str,
    reasons: Mapping[str, UserError],
) -> UserError:
    """Of a pattern that no network takes: the nearest names may be any network's."""
    names_by_network = {
        name: list_call_names(network, example) for name, network in networks.items()
    }
    fitting_networks = [
        name
        for name, layer_names in names_by_network.items()
        if any(fits_pattern(layer_name, pattern) for layer_name in layer_names)
    ]
    if fitting_networks or len(networks) == 1:
        return reasons[(fitting_networks or list(networks))[0]]
    listing = " and none in the ".join(networks)
    names = dict.fromkeys(chain.from_iterable(names_by_network.values()))
    return UserError(
        f"no layer '{pattern}' in the {listing}; {nearest(pattern, names)}. Patterns such as "
        "'layer3.*' work too"
    )
