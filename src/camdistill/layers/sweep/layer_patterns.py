"""Layers of one or two networks, by names or patterns that were given for all of them."""

from collections.abc import Mapping, Sequence
from itertools import chain

from torch import nn

from camdistill.errors import UserError, nearest
from camdistill.layers.sweep.layer_selection import Layer, choice, fits, names_of
from camdistill.types import Images

Patterns = Sequence[str] | Mapping[str, Sequence[str]] | None


def choices(
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
        own: Mapping[str, Sequence[str]] = patterns or {}
        return {name: choice(net, example, own.get(name)) for name, net in networks.items()}
    fitting: dict[str, list[str]] = {name: [] for name in networks}
    for pattern in patterns:
        misfits: dict[str, UserError] = {}
        for name, network in networks.items():
            try:
                choice(network, example, [pattern])
                fitting[name].append(pattern)
            except UserError as error:
                misfits[name] = error
        if len(misfits) == len(networks):
            raise _misfit(networks, example, pattern, misfits)
    if empty := [name for name, found in fitting.items() if not found]:
        raise UserError(
            f"none of the layers {list(patterns)} are in the {empty[0]}: name some of its layers "
            "too"
        )
    return {name: choice(net, example, fitting[name]) for name, net in networks.items()}


def _misfit(
    networks: Mapping[str, nn.Module],
    example: Images,
    pattern: str,
    reasons: Mapping[str, UserError],
) -> UserError:
    """Of a pattern that no network takes: the nearest names may be any network's."""
    known = {name: names_of(network, example) for name, network in networks.items()}
    there = [name for name, own in known.items() if any(fits(one, pattern) for one in own)]
    if there or len(networks) == 1:
        return reasons[(there or list(networks))[0]]
    whose = " and none in the ".join(networks)
    names = dict.fromkeys(chain.from_iterable(known.values()))
    return UserError(
        f"no layer '{pattern}' in the {whose}; {nearest(pattern, names)}. Patterns such as "
        "'layer3.*' work too"
    )
