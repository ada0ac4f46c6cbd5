"""Tables of a sweep's numbers against depth and by layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from camdistill.layers.sweep.sweep_summary import LayerSummary, SweepResult


class LayerProfile(NamedTuple):
    """A statistic of every layer of one network that has it, in the order of depth.

    Attributes:
        layers: Names.
        depth: In percent: 0 the first layer, 100 the last.
        values: NaN where it isn't defined.
    """

    layers: tuple[str, ...]
    depth: tuple[float, ...]
    values: tuple[float, ...]


def _share(units: Sequence[int], layer: LayerSummary) -> float:
    """NaN where no image could tell: such a layer is not healthy."""
    return len(units) / layer.channels if layer.units.images else math.nan


_STATISTICS: dict[str, Callable[[LayerSummary], float | None]] = {
    "active": lambda layer: float(layer.units.active.double().mean()),
    "dead": lambda layer: _share(layer.units.dead, layer),
    "nearly_dead": lambda layer: _share(layer.units.nearly_dead, layer),
    "always_on": lambda layer: _share(layer.units.always_on, layer),
    "population_sparsity": lambda layer: layer.sparsity.population,
    "lifetime_sparsity": lambda layer: layer.sparsity.lifetime_mean,
    "hoyer": lambda layer: layer.sparsity.hoyer,
    "effective_rank": lambda layer: layer.rank.effective / max(layer.rank.possible, 1),
    "participation": lambda layer: layer.rank.participation / max(layer.rank.possible, 1),
    "saturation": lambda layer: layer.rank.saturation,
    "largest": lambda layer: float(layer.units.largest.max()),
    "probe": lambda layer: None if layer.probe is None else layer.probe.accuracy,
    "probe_untrained": lambda layer: None if layer.probe is None else layer.probe.untrained,
    "cam_scale": lambda layer: None if layer.cams is None else layer.cams.scale,
    "cam_blank": lambda layer: None if layer.cams is None else layer.cams.zero_share,
    "zeros": lambda layer: layer.post.zero_share,
    "nonfinite": lambda layer: float(layer.post.nonfinite),
}


def profiles(sweep: SweepResult) -> dict[str, dict[str, LayerProfile]]:
    """Every statistic against depth, by statistic, then by network.

    Statistics that no layer has (probes that weren't asked for) are left out.
    """
    table: dict[str, dict[str, LayerProfile]] = {}
    for name, statistic in _STATISTICS.items():
        for network, layers in sweep.networks.items():
            numbers = [(layer, statistic(layer)) for layer in layers]
            defined = [(layer, value) for layer, value in numbers if value is not None]
            if any(not math.isnan(value) for _, value in defined):
                table.setdefault(name, {})[network] = _profile(defined)
    return table | _similarity_profiles(sweep)


def _profile(numbers: list[tuple[LayerSummary, float]]) -> LayerProfile:
    return LayerProfile(
        tuple(layer.name for layer, _ in numbers),
        tuple(100 * layer.depth for layer, _ in numbers),
        tuple(float(value) for _, value in numbers),
    )


def _similarity_profiles(sweep: SweepResult) -> dict[str, dict[str, LayerProfile]]:
    """The best CKA of each layer with the other network, and the units' best correlations."""
    table: dict[str, dict[str, LayerProfile]] = {}
    names = list(sweep.networks)
    if sweep.similarity is not None and len(names) == 2:
        between = sweep.similarity.between(*names)
        for network, values in ((names[0], between), (names[1], between.T)):
            if not values.isfinite().any():
                continue
            best = values.nan_to_num(-math.inf).max(1).values.tolist()
            layers = {layer.name: layer for layer in sweep.networks[network]}
            rows = zip(sweep.similarity.names(network), best, strict=True)
            table.setdefault("best_cka", {})[network] = _profile(
                [
                    (layers[name], value if math.isfinite(value) else math.nan)
                    for name, value in rows
                ]
            )
    if sweep.matches:
        best_match: dict[str, float] = {}
        for match in sweep.matches:
            mean = float(match.correlation.double().nanmean())
            best_match[match.student] = max(best_match.get(match.student, -math.inf), mean)
        mean_correlations = [
            (sweep.layer(names[1], name), value) for name, value in best_match.items()
        ]
        table["matched"] = {
            names[1]: _profile(sorted(mean_correlations, key=lambda row: row[0].order))
        }
    return table


def rows_by_layer(sweep: SweepResult) -> dict[str, dict[str, dict[str, object]]]:
    """What `results.json` says of every layer, by network, then by layer."""
    return {
        network: {layer.name: _layer_row(layer) for layer in layers}
        for network, layers in sweep.networks.items()
    }


def _layer_row(layer: LayerSummary) -> dict[str, object]:
    units = layer.units
    numbers: Mapping[str, object] = {
        name: value
        for name, statistic in _STATISTICS.items()
        if (value := statistic(layer)) is not None
    }
    return {
        "point": str(layer.post.point),
        "depth": layer.depth,
        "shape": list(layer.shape),
        "images": units.images,
        "rate_bound": units.bound,
        "rectified": layer.rectified,
        **numbers,
        "effective_rank_absolute": layer.rank.effective,
        "rank_possible": layer.rank.possible,
        "dead_units": list(units.dead) if units.images else None,
        "nearly_dead_units": list(units.nearly_dead) if units.images else None,
        "always_on_units": list(units.always_on) if units.images else None,
        "duplicates": [list(pair) for pair in units.duplicates],
        "unit_mean": _round_values(units.mean),
        "unit_active": _round_values(units.active),
        "unit_largest": _round_values(units.largest),
    }


def _round_values(values: torch.Tensor) -> list[float]:
    """Six digits: as many as float32 has."""
    return [float(f"{value:.6g}") for value in values.tolist()]
