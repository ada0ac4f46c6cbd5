"""The result of an analysis: everything that is known of the layers of one or two networks."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from camdistill.layers.filters import FilterBank, WeightSummary
from camdistill.layers.findings import Finding
from camdistill.layers.sweep.sweep_summary import SweepResult
from camdistill.layers.through_depth import DepthView
from camdistill.layers.units.unit_cards import UnitRecord
from camdistill.layers.units.unit_pairs import UnitPair


@dataclass(frozen=True)
class Analysis:
    """One sweep and what was looked at more closely afterwards; parts may be missing.

    Attributes:
        sweep: Result of the sweep over all images.
        classes: Names of the classes; empty when unknown.
        findings: What stands out, the gravest first.
        filters: First filters, by network.
        weights: By network, then by layer.
        pictures: Single images at all layers.
        unit_records: By network, then by layer.
        pairs: Units of teacher and student that do the same, by the student's layer.
        data: What the images are, for titles.
        unfinished: Why parts are missing; empty when everything was done.
    """

    sweep: SweepResult
    data: str
    classes: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    filters: Mapping[str, FilterBank] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, WeightSummary]] = field(default_factory=dict)
    pictures: tuple[DepthView, ...] = ()
    unit_records: Mapping[str, Mapping[str, tuple[UnitRecord, ...]]] = field(default_factory=dict)
    pairs: Mapping[str, tuple[UnitPair, ...]] = field(default_factory=dict)
    unfinished: str = ""
