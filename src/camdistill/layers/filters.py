"""The weights themselves: first filters as they act on pixels, norms and histograms by layer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.engine.request import upcast
from camdistill.layers.sweep.statistics.histograms import HistogramCounts, rebin
from camdistill.layers.sweep.sweep_summary import Histogram, Point
from camdistill.networks.capture import (
    inspection_mode,
    layer_names,
    unwrap,
    unwrap_outer,
    visit_layers,
)
from camdistill.networks.fusion import find_foldable, fold_norm
from camdistill.networks.teachers import Preprocessed
from camdistill.types import Images

BINS = 60


@dataclass(frozen=True)
class FilterBank:
    """Filters of a convolution.

    Attributes:
        layer: The convolution's name.
        weights: [K, C, h, w].
        folded: The batch normalization whose scale is in them; empty where there is none.
        per_pixel: Whether they act on pixels in [0, 1]: the input's standard deviation is in them.
    """

    layer: str
    weights: Float[Tensor, "units channels height width"]
    folded: str = ""
    per_pixel: bool = False

    @property
    def norms(self) -> Float[Tensor, "units"]:
        """Length of each filter as a vector."""
        norms: Tensor = upcast(self.weights).flatten(1).norm(dim=1)
        return norms


def first_filters(network: nn.Module, images: Images) -> FilterBank:
    """Filters of the first convolution that runs, with the normalizations around it folded in.

    What they say is then the change of a unit, in standard deviations that its batch normalization
    makes, when a pixel changes by 1 (black to white).

    Args:
        network: Bare or wrapped; a `Preprocessed` one tells the images' standard deviation.
        images: Images as the network takes them; the first is run.

    Raises:
        UserError: The network has no two-dimensional convolution that runs on the images.
    """
    inner = unwrap(network)
    run_names: list[str] = []
    convolutions = [
        name for name in layer_names(network) if isinstance(inner.get_submodule(name), nn.Conv2d)
    ]

    def note(name: str, output: object) -> None:
        run_names.append(name)

    with inspection_mode(network):
        with visit_layers(network, convolutions, note, required=False):
            unwrap_outer(network)(images[:1])
        if not run_names:
            raise UserError(
                f"{type(inner).__name__} runs no two-dimensional convolution on these images, so "
                "there are no filters to show"
            )
        prepared = images[:1]
        if isinstance(network, Preprocessed):
            prepared = network.normalize(prepared)
        pairs = dict(find_foldable(inner, prepared))
    convolution = inner.get_submodule(run_names[0])
    assert isinstance(convolution, nn.Conv2d), "they were chosen as such"
    norm = pairs.get(run_names[0], "")
    if norm:
        convolution = fold_norm(convolution, inner.get_submodule(norm))  # type: ignore[arg-type]
    weights = convolution.weight.detach().clone()
    has_std = isinstance(network, Preprocessed) and network.std.shape[1] == weights.shape[1]
    if has_std:
        assert isinstance(network, Preprocessed), "just asked"
        weights = weights / network.std.to(weights)
    return FilterBank(run_names[0], weights, norm, has_std)


@dataclass(frozen=True)
class WeightSummary:
    """The weights of one layer.

    Attributes:
        count: How many numbers.
        mean: Their mean.
        std: Their standard deviation.
        norms: Length of each unit's weights as a vector, [K].
        limit: The largest magnitude.
        signed: Histogram of the weights.
        sizes: Histogram of their magnitudes.
    """

    count: int
    mean: float
    std: float
    norms: Float[Tensor, "units"]
    limit: float
    signed: Histogram
    sizes: Histogram


def weight_summaries(network: nn.Module, name: str = "network") -> dict[str, WeightSummary]:
    """Every convolution's and linear layer's weights, by layer in the order of definition.

    Args:
        network: Bare or wrapped.
        name: What the network is called.
    """
    inner = unwrap(network)
    layers = {path: inner.get_submodule(path) for path in layer_names(network)}
    return {
        path: summarize_weights(layer.weight.detach(), Point(name, path, 0, "post"))
        for path, layer in layers.items()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }


def summarize_weights(weights: Float[Tensor, "units *rest"], point: Point) -> WeightSummary:
    """Moments, norms and histograms of weights whose first axis is units.

    Args:
        weights: Numbers that are not finite count in the histograms alone, and in a norm.
        point: What the histograms are called.
    """
    rows = upcast(weights).flatten(1).double().cpu()
    finite = rows[torch.isfinite(rows)]
    return WeightSummary(
        count=rows.numel(),
        mean=float(finite.mean()) if len(finite) else math.nan,
        std=float(finite.std(correction=0)) if len(finite) else math.nan,
        norms=rows.norm(dim=1),
        limit=float(finite.abs().max()) if len(finite) else 0.0,
        signed=HistogramCounts.of(rows.float()).histogram(point),
        sizes=HistogramCounts.of(rows.float().abs()).histogram(point),
    )


def bin_weights(
    summary: WeightSummary, *, relative: bool = False
) -> tuple[Float[np.ndarray, "edges"], Float[np.ndarray, "bins"]]:
    """Edges and counts of 60 bins about zero, up to the largest magnitude.

    Args:
        summary: Summary of the layer.
        relative: Whether edges are shares of the largest magnitude.
    """
    edges = torch.linspace(-1.0, 1.0, BINS + 1, dtype=torch.float64)
    limits = edges * (summary.limit or 1.0)
    # The largest weight belongs to the last bin: its own bin in the summary reaches further.
    outer_limits = limits.clone()
    outer_limits[0], outer_limits[-1] = -math.inf, math.inf
    counts = rebin(summary.signed, outer_limits.clamp(-(2.0**128), 2.0**128))
    return (edges if relative else limits).numpy(), counts.numpy()


def weight_rows(summaries: Mapping[str, WeightSummary]) -> dict[str, dict[str, object]]:
    """The summaries as plain numbers, by layer."""
    return {
        name: {
            "count": summary.count,
            "mean": summary.mean,
            "std": summary.std,
            "limit": summary.limit,
            "nonfinite": summary.signed.nonfinite,
            "norms": summary.norms.tolist(),
        }
        for name, summary in summaries.items()
    }
