"""The pictures of an analysis, each under its tag."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from camdistill import tags
from camdistill.layers.analysis import Analysis
from camdistill.layers.filters import FilterBank, WeightSummary
from camdistill.layers.profiles import profiles
from camdistill.layers.sweep.statistics.histograms import log10_bins
from camdistill.layers.sweep.sweep_summary import Histogram
from camdistill.layers.through_depth import DepthView
from camdistill.report.figures.depth import (
    LogHistogram,
    ProfileLine,
    profile_chart,
    ridge_chart,
    similarity_chart,
)
from camdistill.report.figures.depth_maps import LayerMap, depth_panel
from camdistill.report.figures.pictures import SEQUENTIAL, Picture
from camdistill.report.figures.tiles import (
    Bar,
    filter_tiles,
    map_tiles,
    patch_tile,
    tile_grid,
)

SHOWN_FILTERS = 128
FEW_VALUES = 1000  # values in the fullest bin
DECADES = np.linspace(-6.0, 4.0, 81)  # an eighth of a decade each
_UNIT_RANGE = (
    *("active", "dead", "population_sparsity", "lifetime_sparsity", "effective_rank"),
    *("saturation", "probe", "best_cka", "matched", "cam_blank"),
)


def sweep_charts(analysis: Analysis) -> Iterator[tuple[str, Picture]]:
    """What a sweep alone gives: (tag, picture)."""
    images = f"{analysis.sweep.images:,} images of {analysis.data}"
    table = profiles(analysis.sweep)
    lines_by_statistic = {
        name: {network: _to_profile_line(line) for network, line in lines.items()}
        for name, lines in table.items()
        if name in _PROFILE_CHARTS
    }
    nonfinite_networks = [
        name
        for name, layers in analysis.sweep.networks.items()
        if all(summary.all_nonfinite for summary in layers)
    ]
    if lines_by_statistic:
        yield (
            tags.PROFILE_CHART,
            profile_chart(
                {_PROFILE_CHARTS[name][0]: lines for name, lines in lines_by_statistic.items()},
                title="Layers through depth, "
                f"{images}{''.join(map(_nonfinite_note, nonfinite_networks))}",
                notes=dict(_PROFILE_CHARTS.values()),
                ranges={_PROFILE_CHARTS[name][0]: (0.0, 1.0) for name in _UNIT_RANGE},
            ),
        )
    ridges = {
        network: {layer.name: log_histogram(layer.post) for layer in layers}
        for network, layers in analysis.sweep.networks.items()
        if layers
    }
    title = f"Activations after the non-linearity, {images}"
    yield tags.RIDGE_CHART, ridge_chart(ridges, title=title)
    yield from _similarity_charts(analysis)


def _nonfinite_note(network: str) -> str:
    return f"; {network}: not finite"


_PROFILE_CHARTS = {
    "active": ("active", "share of values above 0"),
    "dead": ("dead units", "share that is 0 on every image"),
    "population_sparsity": ("population sparsity", "1: one unit carries an image"),
    "lifetime_sparsity": ("lifetime sparsity", "1: a unit is active in one image alone"),
    "effective_rank": ("effective rank", "share of what was possible"),
    "saturation": ("saturation", "share of directions with 99 % of the variance"),
    "cam_scale": ("Grad-CAM, largest value", "logits per cell, median over images"),
    "best_cka": ("CKA with the other network", "its most similar layer"),
    "matched": ("units followed", "mean correlation with the best teacher's unit"),
    "probe": ("linear probe", "accuracy of a readout of spatial means"),
    "largest": ("largest value", "over all units and images"),
    "cam_blank": ("blank Grad-CAM", "share of images"),
}


def _similarity_charts(analysis: Analysis) -> Iterator[tuple[str, Picture]]:
    names = list(analysis.sweep.networks)
    first, last = names[0], names[-1]
    similarity = analysis.sweep.similarity
    if similarity is not None and similarity.between(first, last).isfinite().any():
        note = (
            f"linear CKA, unbiased, {similarity.images:,} images in {similarity.batches} batches; "
            "0 is unrelated"
        )
        yield (
            tags.CKA_CHART if first != last else tags.CKA_WITHIN,
            similarity_chart(
                np.asarray(similarity.between(first, last), np.float64),
                similarity.names(first),
                similarity.names(last),
                title="Which layers are alike",
                note=note,
                row_axis=first,
                column_axis=last,
            ),
        )
    cams = analysis.sweep.cam_similarity
    if cams is not None and cams.cosine.isfinite().any():
        yield (
            tags.CAM_CHART,
            similarity_chart(
                np.asarray(cams.cosine, np.float64),
                cams.teacher,
                cams.student,
                title="Which layers look at the same places",
                note=f"cosine of Grad-CAM maps of the same class, {cams.images:,} images",
                row_axis=first,
                column_axis=last,
            ),
        )


def filter_pictures(network: str, bank: FilterBank) -> Iterator[tuple[str, Picture]]:
    """The first filters by shape and by size."""
    weights = bank.weights.float().cpu().numpy()
    count = len(weights)
    visible = weights[:SHOWN_FILTERS]
    norms = bank.norms.cpu().numpy()
    dead = set(np.flatnonzero(norms <= 1e-3 * np.median(norms)).tolist())
    lines = [_filter_words(bank)]
    if broken := int((~np.isfinite(norms)).sum()):
        lines.append(f"{broken} of {count} filters are not finite, and drawn as zero")
    if count > SHOWN_FILTERS:
        lines.append(f"the first {SHOWN_FILTERS} of {count}")
    name = f"{network} {bank.layer}, {count} filters of {weights.shape[2]}x{weights.shape[3]}"
    bar = Bar("RdBu_r", ("-", "0", "+")) if weights.shape[1] == 1 else None
    yield (
        tags.FIRST_SHAPE,
        tile_grid(
            filter_tiles(visible, marked=dead),
            title=f"{name}: shape",
            lines=[*lines, "each by its own largest weight; gray is zero"],
            bar=bar,
        ),
    )
    yield (
        tags.FIRST_SIZE,
        tile_grid(
            filter_tiles(visible, shared=True, marked=dead),
            title=f"{name}: size",
            lines=[*lines, "all on one scale; below: unit and norm; red: as good as zero"],
            bar=bar,
        ),
    )


def _filter_words(bank: FilterBank) -> str:
    words = f"{bank.folded} folded in" if bank.folded else "as stored"
    if bank.weights.shape[1] not in (1, 3):
        return f"{words}; {bank.weights.shape[1]} channels as three principal components"
    return f"{words}; per pixel in [0, 1]" if bank.per_pixel else words


def weight_picture(weights: Mapping[str, Mapping[str, WeightSummary]]) -> Picture:
    """Magnitudes of all weights of every layer, as ridges."""
    ridges = {
        network: {layer: log_histogram(summary.sizes) for layer, summary in layers.items()}
        for network, layers in weights.items()
        if layers
    }
    return ridge_chart(ridges, title="Weights by layer", axis="magnitude of a weight")


def norm_picture(weights: Mapping[str, Mapping[str, WeightSummary]]) -> Picture:
    """Lengths of all filters of every layer, as ridges."""
    ridges = {
        network: {layer: value_histogram(summary.norms) for layer, summary in layers.items()}
        for network, layers in weights.items()
        if layers
    }
    return ridge_chart(ridges, title="Filters by layer", axis="length of a filter as a vector")


def depth_picture(
    picture: DepthView, classes: Sequence[str], layer_counts: Mapping[str, int]
) -> Picture:
    """One image's maps at all layers; where a network has more than are shown, it says so."""
    first = next(iter(picture.views))
    omissions = [
        f"{network}: {len(layers)} of {layer_counts[network]} layers, evenly spread"
        for network, layers in picture.views.items()
        if len(layers) < layer_counts[network]
    ]
    predictions = [
        f"{network}: {_class_name(top, classes)} {probability:.2f}"
        if math.isfinite(probability)
        else f"{network}: its logits are not finite"
        for network, (top, probability) in picture.tops.items()
    ]
    class_name = _class_name(picture.explained_class, classes)
    whose = f" ({first}'s class)" if len(picture.views) > 1 else ""
    return depth_panel(
        picture.image.float().numpy(),
        {
            "Grad-CAM": {
                network: [LayerMap(name, view.grad_cam.numpy()) for name, view in layers.items()]
                for network, layers in picture.views.items()
            },
            "LayerCAM": {
                network: [LayerMap(name, view.layer_cam.numpy()) for name, view in layers.items()]
                for network, layers in picture.views.items()
            },
        },
        title=f"{picture.name}: why {class_name}?{whose}",
        lines=["   ".join(predictions), *omissions],
    )


def feature_picture(
    network: str, layer: str, picture: DepthView, classes: Sequence[str]
) -> Picture:
    """Feature maps of one image: the units with the largest alpha."""
    view = picture.views[network][layer]
    image = picture.image.float().numpy()
    tiles = [patch_tile(image, size=64, note="image")]
    notes = [
        f"{unit}: {alpha * view.features[0].numel():+.2g}"
        for unit, alpha in zip(view.units, view.alphas, strict=True)
    ]
    tiles += map_tiles(view.features.numpy(), notes)
    rows, columns = view.features.shape[1:]
    return tile_grid(
        tiles,
        title=f"{network} {layer}: feature maps of {picture.name}",
        lines=[
            f"for {_class_name(picture.explained_class, classes)}; {rows}x{columns} cells",
            "below: unit, and the logit's change if it grew by 1 everywhere (to first order)",
        ],
        bar=Bar(SEQUENTIAL, ("0", "activation / its own maximum", "1")),
    )


def log_histogram(histogram: Histogram) -> LogHistogram:
    """A sweep's histogram as the figures want it."""
    edges, counts = log10_bins(histogram)
    if not len(counts):
        edges, counts = torch.tensor([-1.0, 1.0]), counts.new_zeros(1)
    if int(counts.max()) < FEW_VALUES:
        # Half octaves instead of eighths: chance would make a comb of few values.
        padded = torch.nn.functional.pad(counts, (0, -len(counts) % 4))
        counts = padded.view(-1, 4).sum(1)
        edges = torch.cat([edges[:-1:4], edges[-1:]])
    return LogHistogram(
        edges.double().numpy(),
        counts.double().numpy(),
        histogram.zero_share,
        histogram.nonfinite,
    )


def value_histogram(values: torch.Tensor) -> LogHistogram:
    """Of single values; those below 0 aren't drawn."""
    finite = values[torch.isfinite(values)].double().numpy()
    counts, _ = np.histogram(np.log10(finite[finite > 0]), DECADES)
    zeros = float((finite == 0).mean()) if finite.size else math.nan
    return LogHistogram(DECADES, counts.astype(float), zeros, values.numel() - finite.size)


def _to_profile_line(line: object) -> ProfileLine:
    assert hasattr(line, "depth"), "a profile of layers"
    assert hasattr(line, "values"), "a profile of layers"
    return ProfileLine(np.asarray(line.depth, np.float64), np.asarray(line.values, np.float64))


def _class_name(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else f"class {number}"
