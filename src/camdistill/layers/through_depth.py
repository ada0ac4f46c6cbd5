"""One image at all layers of all networks: maps and feature maps of the first network's class."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.layers.contributions import contributions
from camdistill.layers.sweep.sweep_summary import LayerSummary
from camdistill.perturb.probability import probabilities
from camdistill.types import Images

CHUNK = 8  # images in one backward


@dataclass(frozen=True)
class LayerView:
    """One image at one layer.

    Attributes:
        grad_cam: Raw, in logits per cell.
        layer_cam: Likewise.
        units: Those chosen, or those whose alpha is largest in magnitude, largest first.
        alphas: Theirs.
        features: Their activations.
    """

    grad_cam: Float[Tensor, "rows columns"]
    layer_cam: Float[Tensor, "rows columns"]
    units: tuple[int, ...]
    alphas: tuple[float, ...]
    features: Float[Tensor, "chosen rows columns"]


@dataclass(frozen=True)
class ThroughDepth:
    """One image.

    Attributes:
        image: In [0, 1].
        name: What it is called.
        explained: The class that all maps are of: the first network's top class.
        tops: Each network's own top class and its probability.
        views: By network, then by layer in the order of depth.
    """

    image: Float[Tensor, "channels height width"]
    name: str
    explained: int
    tops: Mapping[str, tuple[int, float]]
    views: Mapping[str, Mapping[str, LayerView]]


def spatial(layers: Sequence[LayerSummary], most: int, wanted: Collection[str] = ()) -> list[str]:
    """Names of layers with more than one cell, evenly spread over depth, the last among them.

    Args:
        layers: Of one network, in the order of depth.
        most: At most so many.
        wanted: Shown in any case, besides.
    """
    names = [layer.name for layer in layers if layer.spatial]
    if most >= len(names):
        return names
    places = {round(place * (len(names) - 1) / max(most - 1, 1)) for place in range(most)}
    chosen = {names[place] for place in places} if most > 1 else {names[-1]}
    return [name for name in names if name in chosen or name in wanted]


def stage_ends(layers: Sequence[LayerSummary], most: int) -> list[str]:
    """The last layer of each resolution: at most so many, the deepest."""
    last: dict[tuple[int, int], str] = {}
    for layer in layers:
        if layer.spatial:
            last[layer.shape[1], layer.shape[2]] = layer.name
    return list(last.values())[-most:]


def through_depth(
    networks: Mapping[str, nn.Module],
    images: Images,
    names: Sequence[str],
    layers: Mapping[str, Sequence[str]],
    *,
    features: int = 16,
    units: Mapping[str, Sequence[int]] | None = None,
) -> list[ThroughDepth]:
    """Maps of some images at the chosen layers of all networks.

    Args:
        networks: By name; the first says of which class maps are.
        images: As all networks take them.
        names: What the images are called.
        layers: By network.
        features: Feature maps kept of a layer.
        units: Of which units, by layer; of other layers those whose alpha is largest in magnitude.

    Returns:
        By image; nothing if no network has a layer to show.
    """
    if not any(layers.values()):
        return []
    found: list[ThroughDepth] = []
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK]
        classes: Tensor | None = None
        tops: dict[str, list[tuple[int, float]]] = {}
        views: dict[str, list[dict[str, LayerView]]] = {}
        for network, model in networks.items():
            logits, chosen, by_layer = contributions(model, part, layers[network], classes)
            classes = chosen if classes is None else classes
            likely = probabilities(logits).max(1)
            tops[network] = list(zip(likely.indices.tolist(), likely.values.tolist(), strict=True))
            views[network] = [{} for _ in part]
            for layer, one in by_layer.items():
                # Once for all images, not once an image.
                maps, cams, alphas = one.grad_cam, one.layer_cam, one.alphas
                for row in range(len(part)):
                    shown = one.strongest(row, features)
                    if layer in (units or {}):
                        shown = torch.tensor(list((units or {})[layer]))
                    views[network][row][layer] = LayerView(
                        maps[row],
                        cams[row],
                        tuple(shown.tolist()),
                        tuple(alphas[row, shown].tolist()),
                        one.activations[row, shown],
                    )
        assert classes is not None, "there is at least one network"
        for row, image in enumerate(part):
            found.append(
                ThroughDepth(
                    image.detach().cpu(),
                    names[start + row],
                    int(classes[row]),
                    {network: tops[network][row] for network in networks},
                    {network: views[network][row] for network in networks},
                )
            )
    return found
