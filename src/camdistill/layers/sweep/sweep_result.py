"""Turns the accumulated states of a sweep into its result."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TypeVar

from camdistill.layers.sweep.layer_selection import Layer
from camdistill.layers.sweep.statistics.cka import MIN_IMAGES, CkaSums
from camdistill.layers.sweep.statistics.histograms import HistogramCounts
from camdistill.layers.sweep.statistics.layer_cams import CamSums
from camdistill.layers.sweep.statistics.layer_statistics import CamStatistics, ProbeAccuracy
from camdistill.layers.sweep.statistics.linear_probes import ProbeSums
from camdistill.layers.sweep.statistics.similarity import Match
from camdistill.layers.sweep.statistics.top_images import TopKeys
from camdistill.layers.sweep.statistics.unit_activity import UnitSums
from camdistill.layers.sweep.statistics.unit_matching import MatchSums
from camdistill.layers.sweep.sweep_plan import SweepPlan
from camdistill.layers.sweep.sweep_state import ImageCounts, State
from camdistill.layers.sweep.sweep_summary import Histogram, LayerSummary, Point, SweepResult

StateType = TypeVar("StateType", bound=State)


def summarize(plan: SweepPlan, states: Mapping[str, State]) -> SweepResult:
    """Everything that the states tell, in plain data."""
    images = int(_state_of(states, "seen", ImageCounts).images)
    networks = {name: _layer_summaries(plan, states, name) for name in plan.networks}
    used = {"histogram": images}
    counts = [layer.units.images for layers in networks.values() for layer in layers]
    used |= {"units": max(counts), "top": max(counts)}
    similarity, cam_similarity = None, None
    matches: tuple[Match, ...] = ()
    if plan.options.cka:
        names = [(name, layer.name) for name in plan.networks for layer in plan.layers[name]]
        similarity = _state_of(states, "cka", CkaSums).similarity(names)
        used["cka"] = similarity.images
    if plan.matched:
        sums = _state_of(states, "match", MatchSums)
        first, second = (plan.layers[name] for name in plan.networks)
        matches = sums.matches(
            [(swept_layer.name, swept_layer.shape[0]) for swept_layer in first],
            [swept_layer.name for swept_layer in second],
            plan.pairs,
        )
        used["matching"] = sums.max_images
    if plan.options.probes:
        test_counts = [
            swept_layer.probe.images
            for layers in networks.values()
            for swept_layer in layers
            if swept_layer.probe
        ]
        used["probe"] = max(test_counts)
    if plan.options.cam_share:
        cams = _state_of(states, "cams", CamSums)
        used["grad_cam"] = int(cams.images.max()) if len(cams.images) else 0
        if len(plan.networks) == 2:
            rows, columns = (
                [layer.name for layer in plan.layers_with_maps(name)] for name in plan.networks
            )
            cam_similarity = cams.similarity(rows, columns)
    return SweepResult(
        networks, images, used, similarity, matches, cam_similarity, _notes(plan, networks, used)
    )


def _layer_summaries(
    plan: SweepPlan, states: Mapping[str, State], network: str
) -> tuple[LayerSummary, ...]:
    layers = plan.layers[network]
    probes = _probes(plan, states, network)
    cams = _cams(plan, states, network)
    summaries = []
    for order, layer in enumerate(layers):
        key = f"{network}/{layer.name}"
        pre, post = _histograms(layer, states, network)
        sums = _state_of(states, f"{key}/units", UnitSums)
        summaries.append(
            LayerSummary(
                network=network,
                name=layer.name,
                order=order,
                depth=order / (len(layers) - 1) if len(layers) > 1 else 1.0,
                shape=layer.shape,
                post=post,
                pre=pre,
                units=sums.units(gated=layer.gated, bounded=layer.bound is not None),
                sparsity=sums.sparsity(),
                rank=sums.rank(),
                top=_state_of(states, f"{key}/top", TopKeys).top_images(layer.shape[2]),
                probe=probes[order] if probes else None,
                cams=cams.get(layer.name),
            )
        )
    return tuple(summaries)


def _histograms(
    layer: Layer, states: Mapping[str, State], network: str
) -> tuple[Histogram | None, Histogram]:
    key = f"{network}/{layer.name}"
    pre_point = Point(network, layer.path, layer.call, "pre")
    post_point = Point(network, layer.path, layer.call, "post")
    pre = _state_of(states, f"{key}/pre", HistogramCounts) if layer.activated else None
    if layer.relu and pre is not None:
        post = pre.apply_relu()
    else:
        post = _state_of(states, f"{key}/post", HistogramCounts)
    return pre.histogram(pre_point) if pre else None, post.histogram(post_point)


def _probes(plan: SweepPlan, states: Mapping[str, State], network: str) -> list[ProbeAccuracy]:
    if not plan.options.probes:
        return []
    trained_sums = _state_of(states, f"{network}/probe", ProbeSums)
    untrained_sums = _state_of(states, f"{network}/untrained", ProbeSums)
    columns = (
        trained_sums.accuracies(),
        trained_sums.chances(),
        untrained_sums.accuracies(),
        trained_sums.test_counts(),
    )
    return [ProbeAccuracy(*numbers) for numbers in zip(*columns, strict=True)]


def _cams(plan: SweepPlan, states: Mapping[str, State], network: str) -> dict[str, CamStatistics]:
    if not plan.options.cam_share:
        return {}
    sums = _state_of(states, "cams", CamSums)
    network_index = plan.networks.index(network)
    offset = sum(len(plan.layers_with_maps(name)) for name in plan.networks[:network_index])
    return {
        layer.name: sums.cams(offset + number, Point(network, layer.path, layer.call, "post"))
        for number, layer in enumerate(plan.layers_with_maps(network))
    }


def _notes(
    plan: SweepPlan, networks: Mapping[str, tuple[LayerSummary, ...]], used: Mapping[str, int]
) -> tuple[str, ...]:
    notes = []
    for network, layers in networks.items():
        if left_out := plan.left_out.get(network):
            notes.append(
                f"{network}: left out, as they give their units last ([B, h, w, C]): "
                f"{_list_names(left_out)}"
            )
        for lost, layers_alike in groupby(
            layers, lambda summary: used["histogram"] - summary.units.images
        ):
            if lost:
                names = _list_names([layer.name for layer in layers_alike])
                notes.append(
                    f"{network} {names}: {lost} of {used['histogram']} images have values that are "
                    "not finite; they count in the histogram alone"
                )
        without_maps = [layer.name for layer in layers if not layer.cams]
        if plan.options.cam_share and without_maps:
            notes.append(f"{network}: no Grad-CAM at {', '.join(without_maps)}, a single cell each")
    if plan.options.cka and used["cka"] < used["histogram"]:
        notes.append(
            f"CKA uses {used['cka']} of {used['histogram']} images at most: of two layers those "
            f"that are finite at both, in groups of {MIN_IMAGES} or more"
        )
    if plan.matched and any(
        len(partners) < len(plan.layers[plan.networks[0]]) for partners in plan.pairs
    ):
        width = len(plan.pairs[0])
        notes.append(
            f"units are matched with the {width} layers nearest in depth, to bound the memory"
        )
    if plan.options.probes:
        notes.append(
            f"probes are tested on {used['probe']} held-out images, chosen by their numbers, and "
            "fitted on the other labeled ones"
        )
    if plan.options.cam_share:
        notes.append(
            f"Grad-CAM is of {used['grad_cam']} of {used['histogram']} images, chosen by their "
            "numbers"
        )
    return tuple(notes)


def _list_names(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _state_of(states: Mapping[str, State], key: str, kind: type[StateType]) -> StateType:
    state = states[key]
    assert isinstance(state, kind), f"{key} is a {type(state).__name__}"
    return state
