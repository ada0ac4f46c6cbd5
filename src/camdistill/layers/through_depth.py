"""Maps and feature maps of one image at all layers, for the first network's class."""

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
class DepthView:
    """One image.

    Attributes:
        image: In [0, 1].
        name: What it is called.
        explained_class: The class that all maps are of: the first network's top class.
        tops: Each network's own top class and its probability.
        views: By network, then by layer in the order of depth.
    """

    image: Float[Tensor, "channels height width"]
    name: str
    explained_class: int
    tops: Mapping[str, tuple[int, float]]
    views: Mapping[str, Mapping[str, LayerView]]


def spread_layers(
    layers: Sequence[LayerSummary], max_layers: int, required: Collection[str] = ()
) -> list[str]:
    """Names of layers with more than one cell, evenly spread over depth, the last among them.

    Args:
        layers: Layers of one network, in the order of depth.
        max_layers: At most so many.
        required: Shown in any case, besides.
    """
    names = [layer.name for layer in layers if layer.spatial]
    if max_layers >= len(names):
        return names
    indices = {
        round(index * (len(names) - 1) / max(max_layers - 1, 1)) for index in range(max_layers)
    }
    selected = {names[index] for index in indices} if max_layers > 1 else {names[-1]}
    return [name for name in names if name in selected or name in required]


def stage_ends(layers: Sequence[LayerSummary], max_layers: int) -> list[str]:
    """The last layer of each resolution: at most so many, the deepest."""
    last_by_size: dict[tuple[int, int], str] = {}
    for layer in layers:
        if layer.spatial:
            last_by_size[layer.shape[1], layer.shape[2]] = layer.name
    return list(last_by_size.values())[-max_layers:]


def through_depth(
    networks: Mapping[str, nn.Module],
    images: Images,
    names: Sequence[str],
    layers: Mapping[str, Sequence[str]],
    *,
    feature_count: int = 16,
    units: Mapping[str, Sequence[int]] | None = None,
) -> list[DepthView]:
    """Maps of some images at the chosen layers of all networks.

    Args:
        networks: By name; the first says of which class maps are.
        images: Images as all networks take them.
        names: What the images are called.
        layers: By network.
        feature_count: Feature maps kept of a layer.
        units: Units to show, by layer; elsewhere those whose alpha is largest in magnitude.

    Returns:
        By image; nothing if no network has a layer to show.
    """
    if not any(layers.values()):
        return []
    depth_views: list[DepthView] = []
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        classes: Tensor | None = None
        tops: dict[str, list[tuple[int, float]]] = {}
        views: dict[str, list[dict[str, LayerView]]] = {}
        for network, model in networks.items():
            logits, explained_classes, by_layer = contributions(
                model, chunk, layers[network], classes
            )
            classes = explained_classes if classes is None else classes
            top_probabilities = probabilities(logits).max(1)
            tops[network] = list(
                zip(
                    top_probabilities.indices.tolist(),
                    top_probabilities.values.tolist(),
                    strict=True,
                )
            )
            views[network] = [{} for _ in chunk]
            for layer, contribution in by_layer.items():
                # Once for all images, not once an image.
                maps, cams, alphas = (
                    contribution.grad_cam,
                    contribution.layer_cam,
                    contribution.alphas,
                )
                for row in range(len(chunk)):
                    top_units = contribution.strongest(row, feature_count)
                    if layer in (units or {}):
                        top_units = torch.tensor(list((units or {})[layer]))
                    views[network][row][layer] = LayerView(
                        maps[row],
                        cams[row],
                        tuple(top_units.tolist()),
                        tuple(alphas[row, top_units].tolist()),
                        contribution.activations[row, top_units],
                    )
        assert classes is not None, "there is at least one network"
        for row, image in enumerate(chunk):
            depth_views.append(
                DepthView(
                    image.detach().cpu(),
                    names[start + row],
                    int(classes[row]),
                    {network: tops[network][row] for network in networks},
                    {network: views[network][row] for network in networks},
                )
            )
    return depth_views
