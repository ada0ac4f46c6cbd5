"""Statistics of Grad-CAM at every layer: scale, share of blank maps, agreement of networks.

Maps are in logits per cell, everywhere: at the last layer of a network that ends in average pooling
and a linear layer, a map's sum over cells is the class's logit minus its bias. Their scale differs
by hundreds between a stem and the last block, mainly as a stem has more cells to share a logit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from camdistill.explain.engine.request import upcast
from camdistill.explain.gradcam import explain_images
from camdistill.layers.sweep.layer_selection import Layer
from camdistill.layers.sweep.statistics.histograms import HistogramCounts, interpolate_quantile
from camdistill.layers.sweep.statistics.layer_statistics import CamStatistics
from camdistill.layers.sweep.statistics.similarity import CamSimilarity
from camdistill.layers.sweep.sweep_state import zero_counts, zeros
from camdistill.layers.sweep.sweep_summary import Point
from camdistill.networks.capture import inspection_mode
from camdistill.types import Images

Maps = Float[Tensor, "_ _ _"]  # of sizes that differ from layer to layer


@dataclass(frozen=True)
class CamSums:
    """Sums over the images explained; a map that is not finite counts nowhere.

    Attributes:
        images: How many have a finite map, by layer, the first network's first.
        scales: Histogram of the maxima in logits per cell, by layer.
        zero: Images with a blank map, by layer.
        cosine: Sums of cosines, rows of the first network and columns of the second; empty with
            one network.
        pairs: Images that have finite maps at both.
    """

    images: Int[Tensor, "layers"]
    scales: Int[Tensor, "layers all_bins"]
    zero: Int[Tensor, "layers"]
    cosine: Float[Tensor, "rows columns"]
    pairs: Int[Tensor, "rows columns"]

    @classmethod
    def empty(cls, layers: Sequence[int]) -> "CamSums":
        """Of no image, for networks with so many layers."""
        rows, columns = (layers[0], layers[1]) if len(layers) == 2 else (0, 0)
        raw = HistogramCounts.empty().raw.expand(sum(layers), -1).clone()
        total = sum(layers)
        return cls(
            zero_counts(total),
            raw,
            zero_counts(total),
            zeros(rows, columns),
            zero_counts(rows, columns),
        )

    @classmethod
    def of(cls, maps: Sequence[Sequence[Maps]]) -> "CamSums":
        """Of a batch's raw maps by network and layer; a network may have no layer."""
        sums = cls.empty([len(network) for network in maps])
        finite = [[torch.isfinite(layer).flatten(1).all(1) for layer in part] for part in maps]
        places = zip(chain(*maps), chain(*finite), strict=True)
        for place, (layer, valid) in enumerate(places):
            # The number of cells is said, as it can't be told where no map is finite.
            cells = layer.shape[1] * layer.shape[2]
            peaks = upcast(layer[valid]).view(-1, cells).amax(1).clamp_min(0)
            sums.images[place] = valid.sum()
            sums.scales[place] = HistogramCounts.of(peaks.cpu()).raw
            sums.zero[place] = (peaks == 0).sum()
        if len(maps) != 2 or not all(maps):
            return sums
        rows, columns = (torch.stack(part).cpu().double() for part in finite)
        blanked = [
            [
                torch.where(valid[:, None, None], layer, 0)
                for layer, valid in zip(*part, strict=True)
            ]
            for part in zip(maps, finite, strict=True)
        ]
        cosine, pairs = _cosines(blanked[0], blanked[1]), (rows @ columns.T).long()
        return replace(sums, cosine=cosine, pairs=pairs)

    def merge(self, other: "CamSums") -> "CamSums":
        """Of both."""
        return CamSums(
            self.images + other.images,
            self.scales + other.scales,
            self.zero + other.zero,
            self.cosine + other.cosine,
            self.pairs + other.pairs,
        )

    def cams(self, layer: int, point: Point) -> CamStatistics:
        """What is told of a layer."""
        images = int(self.images[layer])
        if images == 0:
            return CamStatistics(torch.nan, torch.nan, torch.nan, torch.nan, 0)
        scales = HistogramCounts(self.scales[layer], zero_counts(2)).histogram(point)
        low, scale, high = (interpolate_quantile(scales, share) for share in (0.25, 0.5, 0.75))
        return CamStatistics(scale, low, high, int(self.zero[layer]) / images, images)

    def similarity(self, rows: Sequence[str], columns: Sequence[str]) -> CamSimilarity | None:
        """What is told of two networks; None if one of them has no maps."""
        if not rows or not columns:
            return None
        cosine = torch.where(self.pairs > 0, self.cosine / self.pairs, torch.nan)
        return CamSimilarity(tuple(rows), tuple(columns), cosine, int(self.pairs.max()))


def layer_maps(
    networks: Mapping[str, nn.Module], layers: Mapping[str, Sequence[Layer]], images: Images
) -> list[list[Maps]]:
    """Raw maps by network and layer, all of the first network's top class.

    A network with another number of outputs explains its own top class; one without layers has no
    maps. An image whose logits are not finite has no top class, and NaN for maps.
    """
    maps_by_network: list[list[Maps]] = []
    classes: Tensor | None = None
    first_invalid: Tensor | None = None
    class_count = -1
    for name, network in networks.items():
        keys = [layer.key for layer in layers[name]]
        with inspection_mode(network):
            own_classes = classes is not None and class_count != _class_count(network, images)
            explanation = explain_images(network, images, keys, None if own_classes else classes)
        invalid = ~torch.isfinite(explanation.logits).all(1)
        if first_invalid is not None and not own_classes:
            invalid = invalid | first_invalid
        if classes is None:
            classes, class_count = explanation.classes, explanation.logits.shape[1]
            first_invalid = invalid
        maps = [explanation.maps[key] for key in keys]
        if invalid.any():
            maps = [layer.masked_fill(invalid[:, None, None], torch.nan) for layer in maps]
        maps_by_network.append(maps)
    return maps_by_network


def has_maps(layer: Layer) -> bool:
    """Whether Grad-CAM has a place to point to."""
    return layer.shape[1] * layer.shape[2] > 1


def _class_count(network: nn.Module, images: Images) -> int:
    shape = explain_images(network, images[:1], [], maps=False).logits.shape
    return shape[1]


def _cosines(first: Sequence[Maps], second: Sequence[Maps]) -> Float[Tensor, "rows columns"]:
    """Sums over images of the cosine of ReLU maps, on the smaller grid of each pair."""
    total = zeros(len(first), len(second))
    sizes = {(int(row_map.shape[1]), int(row_map.shape[2])) for row_map in (*first, *second)}
    for size in sizes:
        rows, columns = _directions(first, size), _directions(second, size)
        sums = torch.einsum("rbp,cbp->rc", rows, columns).cpu().double()
        for row, row_map in enumerate(first):
            for column, column_map in enumerate(second):
                if min(row_map.shape[1:], column_map.shape[1:]) == size:
                    total[row, column] = sums[row, column]
    return total


def _directions(maps: Sequence[Maps], size: tuple[int, int]) -> Float[Tensor, "layers batch cells"]:
    """ReLU maps at a size, of unit length; blank ones stay 0."""
    resized = [
        F.adaptive_avg_pool2d(upcast(layer).clamp_min(0)[:, None], size).flatten(1)
        for layer in maps
    ]
    # Normalized by the peak first, so that small maps don't underflow.
    stacked = torch.stack(resized)
    stacked = stacked / stacked.amax(2, keepdim=True).clamp_min(torch.finfo(stacked.dtype).tiny)
    return F.normalize(stacked, dim=2)
