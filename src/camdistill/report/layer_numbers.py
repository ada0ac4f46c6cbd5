"""The numbers of an analysis, for tables and figures of a paper."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict

import numpy as np
from jaxtyping import Shaped

from camdistill.layers.analysis import Analysis
from camdistill.layers.filters import weight_rows
from camdistill.layers.profiles import rows_by_layer
from camdistill.layers.sweep.statistics.histograms import bin_edges
from camdistill.layers.sweep.sweep_summary import Histogram, LayerSummary
from camdistill.layers.units.unit_cards import UnitRecord

Numbers = Shaped[np.ndarray, "..."]


def analysis_results(analysis: Analysis) -> dict[str, object]:
    """What `results.json` holds."""
    sweep = analysis.sweep
    results: dict[str, object] = {
        "n": sweep.images,
        "data": analysis.data,
        "used": dict(sweep.used),
        "notes": list(sweep.notes),
        "unfinished": analysis.unfinished,
        "findings": [asdict(record) for record in analysis.findings],
        "networks": {
            network: {
                name: row | _cam_quartiles(sweep.layer(network, name))
                for name, row in layers.items()
            }
            for network, layers in rows_by_layer(sweep).items()
        },
        "weights": {network: weight_rows(rows) for network, rows in analysis.weights.items()},
    }
    if sweep.similarity is not None:
        results["cka"] = {
            "layers": [list(pair) for pair in sweep.similarity.layers],
            "values": sweep.similarity.cka,
            "images": sweep.similarity.images,
            "batches": sweep.similarity.batches,
        }
    if sweep.cam_similarity is not None:
        results["cam_cosine"] = {
            "teacher": list(sweep.cam_similarity.teacher),
            "student": list(sweep.cam_similarity.student),
            "values": sweep.cam_similarity.cosine,
            "images": sweep.cam_similarity.images,
        }
    results["matches"] = [
        {
            "teacher": match.teacher,
            "student": match.student,
            "best": match.best,
            "correlation": match.correlation,
            "partner": match.partner,
            "partner_correlation": match.partner_correlation,
            "images": match.images,
        }
        for match in sweep.matches
    ]
    results["pairs"] = {
        layer: [asdict(pair) for pair in pairs] for layer, pairs in analysis.pairs.items()
    }
    results["units"] = {
        network: {
            layer: [_unit_row(record) for record in portraits]
            for layer, portraits in layers.items()
        }
        for network, layers in analysis.unit_records.items()
    }
    return results


def _unit_row(record: UnitRecord) -> dict[str, object]:
    return {
        "unit": record.unit,
        "sees": record.receptive_size if record.field_known else "unknown",
        "images": [patch.image for patch in record.patches],
        "values": [patch.value for patch in record.patches],
        "reached": record.reached,
        "random": record.random,
        "failed": record.failed,
        "natural": record.natural,
        "concepts": [list(concept) for concept in record.concepts],
    }


def _cam_quartiles(layer: LayerSummary) -> dict[str, object]:
    """Grad-CAM's quartiles; `cam_scale` is the middle one."""
    if layer.cams is None:
        return {}
    return {
        "cam_scale_low": layer.cams.scale_low,
        "cam_scale_high": layer.cams.scale_high,
        "cam_images": layer.cams.images,
    }


def analysis_arrays(analysis: Analysis) -> dict[str, Numbers]:
    """What `numbers.npz` holds: every unit's numbers, whole histograms, spectra.

    Names are `network/layer/what`; weights of a module are `network/module/weights_...`.
    """
    arrays: dict[str, Numbers] = {}
    for network, layers in analysis.sweep.networks.items():
        for layer in layers:
            for name, values in _layer_arrays(layer):
                arrays[f"{network}/{layer.name}/{name}"] = values
    for network, summaries in analysis.weights.items():
        for module, summary in summaries.items():
            stem = f"{network}/{module}/weights"
            arrays[f"{stem}_norm"] = summary.norms.numpy()
            arrays[f"{stem}_edges"], arrays[f"{stem}_counts"] = trim_bins(summary.signed)
    return arrays


def pack_npz(arrays: Mapping[str, Numbers]) -> bytes:
    """Arrays as a compressed .npz."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    return content.getvalue()


def trim_bins(
    histogram: Histogram,
) -> tuple[Shaped[np.ndarray, "bins_and_one"], Shaped[np.ndarray, "bins"]]:
    """Edges and counts, exact, without the empty bins at both ends.

    The bin about 0, between the smallest magnitudes that float32 tells, holds what is exactly 0.
    """
    used = histogram.counts.nonzero().flatten()
    if not len(used):
        return np.zeros(1), np.zeros(0, np.int64)
    first, last = int(used[0]), int(used[-1])
    return bin_edges()[first : last + 2].numpy(), histogram.counts[first : last + 1].numpy()


def _layer_arrays(layer: LayerSummary) -> Iterator[tuple[str, Numbers]]:
    units, top = layer.units, layer.top
    yield "unit_mean", units.mean.numpy()
    yield "unit_variance", units.variance.numpy()
    yield "unit_largest", units.largest.numpy()
    yield "unit_active", units.active.numpy()
    yield "unit_image_active", units.image_active.numpy()
    if units.saturated is not None:
        yield "unit_saturated", units.saturated.numpy()
    yield "unit_lifetime_sparsity", layer.sparsity.lifetime.numpy()
    yield "eigenvalues", layer.rank.eigenvalues.numpy()
    yield "top_values", top.values.numpy()
    yield "top_images", top.images.numpy()
    yield "top_rows", top.rows.numpy()
    yield "top_columns", top.columns.numpy()
    for side, histogram in (("post", layer.post), ("pre", layer.pre)):
        if histogram is not None:
            limits, counts = trim_bins(histogram)
            yield f"{side}_edges", limits
            yield f"{side}_counts", counts
