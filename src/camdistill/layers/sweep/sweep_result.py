"""From a sweep's states to what they tell."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TypeVar

from camdistill.layers.sweep.layer_selection import Layer
from camdistill.layers.sweep.statistics.cka import FEWEST, CkaSums
from camdistill.layers.sweep.statistics.histograms import HistogramCounts
from camdistill.layers.sweep.statistics.layer_cams import CamSums
from camdistill.layers.sweep.statistics.layer_statistics import Cams, Probe
from camdistill.layers.sweep.statistics.linear_probes import ProbeSums
from camdistill.layers.sweep.statistics.similarity import Match
from camdistill.layers.sweep.statistics.top_images import TopKeys
from camdistill.layers.sweep.statistics.unit_activity import UnitSums
from camdistill.layers.sweep.statistics.unit_matching import MatchSums
from camdistill.layers.sweep.sweep_plan import Plan
from camdistill.layers.sweep.sweep_state import Seen, State
from camdistill.layers.sweep.sweep_summary import Histogram, LayerSummary, Point, Sweep

Kind = TypeVar("Kind", bound=State)


def told(plan: Plan, states: Mapping[str, State]) -> Sweep:
    """Everything that the states tell, in plain data."""
    images = int(_state(states, "seen", Seen).images)
    networks = {name: _layers(plan, states, name) for name in plan.networks}
    used = {"histogram": images}
    counts = [layer.units.images for layers in networks.values() for layer in layers]
    used |= {"units": max(counts), "top": max(counts)}
    similarity, cam_similarity = None, None
    matches: tuple[Match, ...] = ()
    if plan.options.cka:
        names = [(name, layer.name) for name in plan.networks for layer in plan.layers[name]]
        similarity = _state(states, "cka", CkaSums).similarity(names)
        used["cka"] = similarity.images
    if plan.matched:
        sums = _state(states, "match", MatchSums)
        first, second = (plan.layers[name] for name in plan.networks)
        matches = sums.matches(
            [(one.name, one.shape[0]) for one in first], [one.name for one in second], plan.pairs
        )
        used["matching"] = sums.most
    if plan.options.probes:
        told_images = [
            one.probe.images for layers in networks.values() for one in layers if one.probe
        ]
        used["probe"] = max(told_images)
    if plan.options.explained:
        cams = _state(states, "cams", CamSums)
        used["grad_cam"] = int(cams.images.max()) if len(cams.images) else 0
        if len(plan.networks) == 2:
            rows, columns = (
                [layer.name for layer in plan.explained(name)] for name in plan.networks
            )
            cam_similarity = cams.similarity(rows, columns)
    return Sweep(
        networks, images, used, similarity, matches, cam_similarity, _notes(plan, networks, used)
    )


def _layers(plan: Plan, states: Mapping[str, State], network: str) -> tuple[LayerSummary, ...]:
    layers = plan.layers[network]
    probes = _probes(plan, states, network)
    cams = _cams(plan, states, network)
    found = []
    for order, layer in enumerate(layers):
        key = f"{network}/{layer.name}"
        pre, post = _histograms(layer, states, network)
        sums = _state(states, f"{key}/units", UnitSums)
        found.append(
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
                top=_state(states, f"{key}/top", TopKeys).top(layer.shape[2]),
                probe=probes[order] if probes else None,
                cams=cams.get(layer.name),
            )
        )
    return tuple(found)


def _histograms(
    layer: Layer, states: Mapping[str, State], network: str
) -> tuple[Histogram | None, Histogram]:
    key = f"{network}/{layer.name}"
    given = Point(network, layer.path, layer.call, "pre")
    gave = Point(network, layer.path, layer.call, "post")
    pre = _state(states, f"{key}/pre", HistogramCounts) if layer.activated else None
    if layer.relu and pre is not None:
        post = pre.rectified()
    else:
        post = _state(states, f"{key}/post", HistogramCounts)
    return pre.histogram(given) if pre else None, post.histogram(gave)


def _probes(plan: Plan, states: Mapping[str, State], network: str) -> list[Probe]:
    if not plan.options.probes:
        return []
    trained = _state(states, f"{network}/probe", ProbeSums)
    fresh = _state(states, f"{network}/untrained", ProbeSums)
    found = (trained.accuracies(), trained.chances(), fresh.accuracies(), trained.tested())
    return [Probe(*numbers) for numbers in zip(*found, strict=True)]


def _cams(plan: Plan, states: Mapping[str, State], network: str) -> dict[str, Cams]:
    if not plan.options.explained:
        return {}
    sums = _state(states, "cams", CamSums)
    place = plan.networks.index(network)
    before = sum(len(plan.explained(name)) for name in plan.networks[:place])
    return {
        layer.name: sums.cams(before + number, Point(network, layer.path, layer.call, "post"))
        for number, layer in enumerate(plan.explained(network))
    }


def _notes(
    plan: Plan, networks: Mapping[str, tuple[LayerSummary, ...]], used: Mapping[str, int]
) -> tuple[str, ...]:
    notes = []
    for network, layers in networks.items():
        if others := plan.left_out.get(network):
            notes.append(
                f"{network}: left out, as they give their units last ([B, h, w, C]): "
                f"{_some(others)}"
            )
        for lost, alike in groupby(layers, lambda one: used["histogram"] - one.units.images):
            if lost:
                names = _some([layer.name for layer in alike])
                notes.append(
                    f"{network} {names}: {lost} of {used['histogram']} images have values that are "
                    "not finite; they count in the histogram alone"
                )
        partial = [layer.name for layer in layers if not layer.cams]
        if plan.options.explained and partial:
            notes.append(f"{network}: no Grad-CAM at {', '.join(partial)}, a single cell each")
    if plan.options.cka and used["cka"] < used["histogram"]:
        notes.append(
            f"CKA uses {used['cka']} of {used['histogram']} images at most: of two layers those "
            f"that are finite at both, in groups of {FEWEST} or more"
        )
    if plan.matched and any(len(part) < len(plan.layers[plan.networks[0]]) for part in plan.pairs):
        width = len(plan.pairs[0])
        notes.append(
            f"units are matched with the {width} layers nearest in depth, to bound the memory"
        )
    if plan.options.probes:
        notes.append(
            f"probes are tested on {used['probe']} held-out images, chosen by their numbers, and "
            "fitted on the other labelled ones"
        )
    if plan.options.explained:
        notes.append(
            f"Grad-CAM is of {used['grad_cam']} of {used['histogram']} images, chosen by their "
            "numbers"
        )
    return tuple(notes)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _state(states: Mapping[str, State], key: str, kind: type[Kind]) -> Kind:
    state = states[key]
    assert isinstance(state, kind), f"{key} is a {type(state).__name__}"
    return state
