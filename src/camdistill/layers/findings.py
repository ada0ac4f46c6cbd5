"""Finds what stands out in a sweep, in sentences and as data.

How the thresholds were set: on ten networks (4-stage students and ResNet-8, trained for a few steps
on Shapes; seeds 100 to 109), each beside a copy that was trained on and beside a network trained by
itself; `python tests/layers/test_findings.py 100 110` prints the numbers. The thresholds lie in
gaps: no healthy network had a dead, nearly dead, always-on or duplicated unit, or an effective rank
below 0.48 of the possible one; a copy's units correlated with those of their number at 0.94 or more
(median of a layer), an independent network's at 0.28 or less, and with their best partners at 0.86
or less; CKA of a copy fell by 0.03 at most from one layer to the next; every layer of an
independent network had a CKA of 0.51 or more with some layer. The tests plant faults with other
seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from camdistill.layers.sweep.statistics.similarity import Match
from camdistill.layers.sweep.sweep_summary import LayerSummary, SweepResult

FindingKind = Literal[
    "not finite",
    "dead",
    "collapsed rank",
    "always on",
    "saturated",
    "duplicates",
    "permuted",
    "unlike",
    "nearly dead",
]
ALWAYS_ON_SHARE = 0.1  # of a layer's units
SATURATED_SHARE = 0.5  # of a layer's values
COLLAPSED = 0.1  # effective rank over the possible one
FEWEST_DIRECTIONS = 8  # possible rank below which a small one says nothing
FEWEST_UNITS = 8  # of a layer that may tell whether one network is the other's copy
RELATED = 0.8  # median correlation of units with those of the same number: one network's copies
CERTAIN = 0.93  # median correlation with partners that no independent networks have
PARTNER = 0.8  # correlation of a unit with the one it was moved from
MOVED = 0.1  # how much more it must follow that one than the one of its own number
FALL = 0.2  # of CKA from one layer to the next, between a network and its copy
UNLIKE = 0.15  # CKA with every layer of the teacher


@dataclass(frozen=True)
class Finding:
    """One thing that stands out.

    Attributes:
        kind: What it is.
        network: Network of the layer.
        layer: Its name.
        text: In a sentence, with its numbers.
        units: Which units, where it is about units.
        value: The number that the finding stands on: how many units, or the statistic.
    """

    kind: FindingKind
    network: str
    layer: str
    text: str
    units: tuple[int, ...]
    value: float


def findings(sweep: SweepResult) -> tuple[Finding, ...]:
    """What stands out, the gravest first, then by network and depth."""
    all_findings = [
        finding
        for layers in sweep.networks.values()
        for finding in _network_findings(layers, sweep.images)
    ]
    if len(sweep.networks) == 2:
        all_findings += _pair_findings(sweep)
    order = get_args(FindingKind)
    return tuple(sorted(all_findings, key=lambda finding: order.index(finding.kind)))


def _network_findings(layers: Sequence[LayerSummary], images: int) -> list[Finding]:
    broken = [layer for layer in layers if layer.all_nonfinite]
    finite_layers = [layer for layer in layers if not layer.all_nonfinite]
    layer_findings = [finding for layer in finite_layers for finding in _layer_findings(layer)]
    return [*([_find_nonfinite_layers(broken, layers, images)] if broken else []), *layer_findings]


def _find_nonfinite_layers(
    broken: Sequence[LayerSummary], layers: Sequence[LayerSummary], images: int
) -> Finding:
    """One sentence for all layers: behind the first of them there is nothing to be seen."""
    where = f"at {len(broken)} of {len(layers)} layers, {broken[0].name} the first of them"
    text = (
        f"each of {images:,} images has values that are not finite {where} "
        f"({_nonfinite_words(broken[0])}): these layers have no statistics, and no average, "
        "comparison or map "
        "counts them"
    )
    sentence = f"{broken[0].network}: {text}"
    return Finding(
        "not finite", broken[0].network, broken[0].name, sentence, (), float(len(broken))
    )


def _layer_findings(layer: LayerSummary) -> list[Finding]:
    detectors = (
        _find_nonfinite,
        _find_dead,
        _find_collapsed,
        _find_always_on,
        _find_saturated,
        _find_duplicates,
        _find_nearly_dead,
    )
    return [finding for detector in detectors if (finding := detector(layer)) is not None]


def _find_nonfinite(layer: LayerSummary) -> Finding | None:
    histogram = layer.pre if layer.pre is not None else layer.post
    if histogram.nonfinite == 0:
        return None
    return _finding("not finite", layer, _nonfinite_words(layer), (), histogram.nonfinite)


def _nonfinite_words(layer: LayerSummary) -> str:
    """How many values of which kind, where the layer is read first."""
    histogram = layer.pre if layer.pre is not None else layer.post
    kinds = [
        f"{count:,} {name}"
        for name, count in (
            ("NaN", histogram.nan),
            ("minus infinity", histogram.below),
            ("infinity", histogram.above),
        )
        if count
    ]
    side = "before" if histogram.point.side == "pre" else "after"
    return f"{' and '.join(kinds)} among {histogram.total:,} values {side} the non-linearity"


def _find_dead(layer: LayerSummary) -> Finding | None:
    units = layer.units
    if not units.dead or units.bound >= 1:  # so few images say nothing of a unit's death
        return None
    text = (
        f"{_count_of(units.dead, layer)} dead on {units.images:,} images (active in at most "
        f"{100 * units.bound:.2g} % of images, 95 % confidence): {_list_units(units.dead)}"
    )
    return _finding("dead", layer, text, units.dead, len(units.dead))


def _find_nearly_dead(layer: LayerSummary) -> Finding | None:
    units = layer.units
    if not units.nearly_dead:
        return None
    text = (
        f"{_count_of(units.nearly_dead, layer)} active in fewer than one of 1,000 images "
        f"({units.images:,} seen): {_list_units(units.nearly_dead)}"
    )
    return _finding("nearly dead", layer, text, units.nearly_dead, len(units.nearly_dead))


def _find_always_on(layer: LayerSummary) -> Finding | None:
    units = layer.units
    if len(units.always_on) < max(ALWAYS_ON_SHARE * layer.channels, 1):
        return None
    text = (
        f"{_count_of(units.always_on, layer)} above 0 at more than 99.9 % of places, where cutting "
        f"at 0 does nothing: {_list_units(units.always_on)}"
    )
    return _finding("always on", layer, text, units.always_on, len(units.always_on))


def _find_saturated(layer: LayerSummary) -> Finding | None:
    shares = layer.units.saturated
    if shares is None or not float(shares.mean()) > SATURATED_SHARE:
        return None
    saturated_units = tuple((shares > SATURATED_SHARE).nonzero().flatten().tolist())
    text = f"{100 * float(shares.mean()):.0f} % of the values are at the non-linearity's bound"
    return _finding("saturated", layer, text, saturated_units, float(shares.mean()))


def _find_collapsed(layer: LayerSummary) -> Finding | None:
    rank = layer.rank
    if rank.possible < FEWEST_DIRECTIONS:
        return None
    if math.isnan(rank.effective) and len(layer.units.dead) < layer.channels:
        text = f"effective rank 0 of {rank.possible} possible: the same for every image"
        return _finding("collapsed rank", layer, text, (), 0.0)
    if not rank.effective < COLLAPSED * rank.possible:
        return None
    text = (
        f"effective rank {rank.effective:.1f} of {rank.possible} possible: over images the "
        "units vary together in few directions"
    )
    return _finding("collapsed rank", layer, text, (), rank.effective)


def _find_duplicates(layer: LayerSummary) -> Finding | None:
    units, count = layer.units, layer.units.duplicate_pairs
    if not count:
        return None
    examples = ", ".join(f"{first} and {second}" for first, second, _ in units.duplicates[:6])
    text = (
        f"{count:,} pair{'s' if count > 1 else ''} of units do the same, up to scale: "
        f"{examples}{', ...' if count > 6 else ''}"
    )
    return _finding("duplicates", layer, text, units.duplicated, count)


def _pair_findings(sweep: SweepResult) -> list[Finding]:
    teacher, student = sweep.networks
    twins = [match for match in sweep.matches if match.teacher == match.student]
    twins = [match for match in twins if match.same is not None]
    # Heads correlate by design: both are taught the same labels. So do maps of very few units.
    comparable = [
        match
        for match in twins
        if (student_layer := sweep.layer(student, match.student)).spatial
        and student_layer.channels >= FEWEST_UNITS
    ]
    related = any(
        float(_same_number_correlations(match).median()) >= RELATED for match in comparable
    )
    pair_findings = []
    for match in twins:
        layer = sweep.layer(student, match.student)
        if (finding := _find_permuted(match, layer, teacher, related)) is not None:
            pair_findings.append(finding)
    moved = {finding.layer for finding in pair_findings}
    pair_findings += _find_unlike(sweep, related, moved)
    return pair_findings


def _same_number_correlations(match: Match) -> torch.Tensor:
    assert match.same is not None, "layers of one size"
    # A unit that doesn't vary correlates with none and says nothing of the others.
    varying = match.best >= 0
    return match.same[varying] if varying.any() else match.same


def _find_permuted(
    match: Match, layer: LayerSummary, teacher: str, related: bool
) -> Finding | None:
    assert match.same is not None, "layers of one size"
    follows = match.partner_correlation
    numbers = torch.arange(len(match.partner))
    moved = (match.partner != numbers) & (follows >= PARTNER) & (follows - match.same >= MOVED)
    certain = float(follows[match.best >= 0].median()) >= CERTAIN if len(follows) else False
    if int(moved.sum()) < 2 or not (related or certain):
        return None
    units = tuple(moved.nonzero().flatten().tolist())
    text = (
        f"{_count_of(units, layer)} follow another unit of {teacher} {match.teacher} than that of "
        f"their number (correlation {float(follows[moved].median()):.2f}, with their own "
        f"{float(match.same[moved].median()):.2f}): the layer's units are in another order"
    )
    return _finding("permuted", layer, text, units, len(units))


def _find_unlike(sweep: SweepResult, related: bool, moved: set[str]) -> list[Finding]:
    """A student's layers that resemble none of the teacher's, or where a copy parts from it."""
    if sweep.similarity is None:
        return []
    teacher, student = sweep.networks
    table = sweep.similarity.between(teacher, student)
    rows = sweep.similarity.names(teacher)
    unlike_findings = []
    before = 1.0  # both see the same images
    for place, name in enumerate(sweep.similarity.names(student)):
        column = table[:, place]
        best = float(column[column.isfinite()].max()) if column.isfinite().any() else torch.nan
        layer = sweep.layer(student, name)
        if best < UNLIKE:
            text = f"like no layer of the {teacher}: CKA is {best:.2f} at most"
            unlike_findings.append(_finding("unlike", layer, text, (), best))
        if related and name in rows:
            same_layer_cka = float(column[rows.index(name)])
            if before - same_layer_cka > FALL and not moved and best >= UNLIKE:
                text = (
                    f"here the {student} parts from the {teacher}: CKA with its {name} is "
                    f"{same_layer_cka:.2f}, one layer before {before:.2f}"
                )
                unlike_findings.append(_finding("unlike", layer, text, (), same_layer_cka))
            before = same_layer_cka if same_layer_cka == same_layer_cka else before
    return unlike_findings


def _finding(
    kind: FindingKind, layer: LayerSummary, text: str, units: Sequence[int], value: float | int
) -> Finding:
    sentence = f"{layer.network} {layer.name}: {text}"
    return Finding(kind, layer.network, layer.name, sentence, tuple(units), float(value))


def _count_of(units: Sequence[int], layer: LayerSummary) -> str:
    return f"{len(units)} of {layer.channels} units"


def _list_units(units: Sequence[int]) -> str:
    listing = ", ".join(map(str, units[:10]))
    return f"{listing}, ..." if len(units) > 10 else listing
