"""Analyzes the layers of one or two networks in stages, and writes each stage's report.

Every stage leaves the report with more in it, so that one that was stopped shows what was done.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from camdistill.errors import UserError, nearest
from camdistill.layers.analysis import Analysis
from camdistill.layers.filters import FilterBank, first_filters, weight_summaries
from camdistill.layers.findings import findings
from camdistill.layers.sweep.layer_selection import Layer
from camdistill.layers.sweep.layer_sweep import LayerSweep
from camdistill.layers.sweep.sweep_plan import SweepOptions
from camdistill.layers.sweep.sweep_summary import LayerSummary
from camdistill.layers.through_depth import spread_layers, stage_ends, through_depth
from camdistill.layers.units.unit_cards import UnitRecord
from camdistill.layers.units.unit_inspection import (
    InspectionOptions,
    InspectionSample,
    inspect_units,
)
from camdistill.layers.units.unit_pairs import clearest_pairs
from camdistill.networks.capture import check_forward
from camdistill.report.analysis_data import AnalysisData
from camdistill.report.first_units import points_of_first_filters
from camdistill.report.layer_report import LayerReport
from camdistill.report.sweep_file import BATCH, SweepFile, run_sweep, sweep_fingerprint

CAM_IMAGES = 256  # images, about, of which every layer's Grad-CAM is measured
DEPTH_LAYERS = 60  # layers in the picture of one image through depth: ResNet-152 has 53 by default
INSPECTED_LAYERS = 4  # layers whose units are looked at closely: the last of each resolution

StepCallback = Callable[[str, int, int], None]


@dataclass
class AnalysisRun:
    """One analysis in the making.

    Attributes:
        networks: One or two, by name; the first says of which class maps are.
        dataset: The images.
        report: What is written.
        layers: Names or patterns; empty for blocks and non-linearities outside them.
        units: Units to look at closely, by layer, in place of interesting ones.
        on_step: Called with a stage's name, what is done of it, and of how much.
        analysis: What is known so far; None before the sweep.
        stage: What is being done.
        restored: Images whose sweep an earlier run had kept.
    """

    networks: Mapping[str, nn.Module]
    dataset: AnalysisData
    report: LayerReport
    layers: Sequence[str] = ()
    units: Mapping[str, Sequence[int]] = field(default_factory=dict)
    on_step: StepCallback = lambda stage, done, total: None
    analysis: Analysis | None = None
    stage: str = "the sweep"
    restored: int = 0

    @torch.no_grad()
    def sweep(self, *, probes: bool = False) -> None:
        """One pass over all images; what was seen of them is reported even when it is stopped.

        An earlier run's sweep of the same networks, layers and images isn't repeated.
        """
        order, count = self.dataset.order, len(self.dataset.order)
        labels = self.dataset.images.labels
        if probes and int(labels[order].max()) < 1:
            raise UserError(
                f"--probes reads labels out, and {self.dataset.name} has none, or one alone; leave "
                "it out, or give --data with class folders"
            )
        options = SweepOptions(
            probes=int(labels.max()) + 1 if probes else 0,
            cam_share=min(CAM_IMAGES / count, 1.0),
        )
        example = self.dataset.fetch(order[:BATCH])
        check_forward(self.networks, example[:1], numbers=False)
        layer_sweep = LayerSweep(
            self.networks, example, layers=self.layers or None, options=options
        )
        self._check_units(layer_sweep.plan.layers)
        sweep_file = SweepFile(self.report.manifest, sweep_fingerprint(self.networks, self.dataset))
        stopped = ""
        if run_sweep(
            layer_sweep, self.dataset, sweep_file, lambda done, of: self.on_step("sweep", done, of)
        ):
            stopped = f"stopped after {layer_sweep.images:,} of {count:,} images"
        sweep = layer_sweep.result()
        self.restored = sweep_file.restored
        sweep = replace(sweep, notes=(*sweep.notes, *_sweep_file_notes(sweep_file, count)))
        self.analysis = Analysis(
            sweep,
            self.dataset.name,
            self.dataset.classes,
            findings=findings(sweep),
            unfinished=stopped,
        )
        self.stage = "the charts of the sweep"
        self.report.show_sweep(self.analysis)
        if stopped:
            raise KeyboardInterrupt

    def report_filters(self) -> None:
        """First filters and all weights."""
        self.stage = "the filters"
        example = self.dataset.fetch(self.dataset.order[:1])
        banks: dict[str, FilterBank] = {}
        for name, network in self.networks.items():
            try:
                banks[name] = first_filters(network, example)
            except UserError as reason:
                self._note(str(reason))
        weights = {name: weight_summaries(net, name) for name, net in self.networks.items()}
        for name, bank in banks.items():
            self.report.show_filters(name, bank)
        self.report.show_weights(weights)
        broken = [
            f"{name} {layer} ({summary.signed.nonfinite:,} of {summary.count:,})"
            for name, layers in weights.items()
            for layer, summary in layers.items()
            if summary.signed.nonfinite
        ]
        if broken:
            more = f" and {len(broken) - 6} more" if len(broken) > 6 else ""
            self._note(f"weights that are not finite: {', '.join(broken[:6])}{more}")
        self.analysis = replace(self._current, filters=banks, weights=weights)

    def report_depth_views(self, count: int) -> None:
        """Some images at all layers."""
        self.stage = "the maps through depth"
        if not count:
            return
        sweep = self._current.sweep
        numbers = np.sort(self.dataset.order[:count])
        layers = {
            name: spread_layers(sweep.networks[name], DEPTH_LAYERS, self.units)
            for name in self.networks
        }
        networks = {name: network for name, network in self.networks.items() if layers[name]}
        for name in self.networks.keys() - networks.keys():
            self._note(f"no layer of the {name} has a map: all give one number a unit (1x1)")
        if not networks:
            return
        layer_counts = {
            name: len(spread_layers(sweep.networks[name], len(sweep.networks[name])))
            for name in networks
        }
        names = [str(self.dataset.images.names[number]) for number in numbers.tolist()]
        views = through_depth(
            networks, self.dataset.fetch(numbers), names, layers, units=self.units
        )
        first = next(iter(networks))
        # Without a top class there is nothing to explain.
        valid = [view for view in views if math.isfinite(view.tops[first][1])]
        if len(valid) < len(views):
            self._note(
                f"no maps of {len(views) - len(valid)} of {len(views)} images: the logits of the "
                f"{first} are not finite there, so it has no top class"
            )
        for number, picture in enumerate(valid):
            self.report.show_depth_view(number, picture, self.dataset.classes, layer_counts)
            self.on_step("maps", number + 1, len(valid))
        self.analysis = replace(self._current, pictures=tuple(valid))

    def inspect_units(self, options: InspectionOptions) -> None:
        """Some units of some layers, closely."""
        self.stage = "the look at units"
        sample = self.dataset.sample()
        layers_by_network = {
            name: self._layers_to_inspect(layers)
            for name, layers in self._current.sweep.networks.items()
        }
        total = sum(map(len, layers_by_network.values())) * (options.steps + 1)
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            self.on_step("units", done, total)

        for name, network in self.networks.items():
            if not layers_by_network[name]:
                continue
            records_by_layer: dict[str, tuple[UnitRecord, ...]] = {}
            failed: list[str] = []
            bank = self._current.filters.get(name)
            example = self.dataset.fetch(self.dataset.order[:1])
            layer_by_point = {layer.post.point: layer.name for layer in layers_by_network[name]}
            first_points = (
                points_of_first_filters(network, example, bank, list(layer_by_point))
                if bank
                else ()
            )
            first_layers = {layer_by_point[point] for point in first_points}
            for layer, records in inspect_units(
                network,
                layers_by_network[name],
                sample,
                options,
                units_by_layer=self.units,
                on_step=step,
            ):
                self.report.show_units(
                    name,
                    layer,
                    records,
                    self._current.findings,
                    bank if layer in first_layers else None,
                )
                records_by_layer[layer] = records
                failed += [f"{layer}:{record.unit}" for record in records if record.failed]
                unit_records = {**self._current.unit_records, name: records_by_layer}
                self.analysis = replace(self._current, unit_records=unit_records)
            if failed:
                self._note(
                    f"images made to excite units of the {name} failed for {', '.join(failed)}: "
                    "random images excite these as much"
                )

    def _layers_to_inspect(self, layers: Sequence[LayerSummary]) -> list[LayerSummary]:
        """Layers whose units are looked at closely; of what no image tells there is nothing."""
        names = self.units or stage_ends(layers, INSPECTED_LAYERS)
        requested = [layer for layer in layers if layer.name in names]
        if broken := [layer.name for layer in requested if layer.all_nonfinite]:
            self._note(
                f"no cards of units of {layers[0].network} {', '.join(broken)}: no image is finite "
                "there"
            )
        return [layer for layer in requested if not layer.all_nonfinite]

    def report_pairs(self, count: int) -> None:
        """Units of the student beside the teacher's that they follow."""
        self.stage = "the pairs of units"
        sweep, sample = self._current.sweep, self.dataset.sample()
        if len(self.networks) < 2:
            return
        (first, teacher), (second, student) = self.networks.items()
        layers = {
            name: {layer.name: layer for layer in sweep.networks[name]} for name in sweep.networks
        }
        among = spread_layers(sweep.networks[first], len(sweep.networks[first]))
        for layer in stage_ends(sweep.networks[second], INSPECTED_LAYERS):
            pairs = clearest_pairs(sweep.matches, layer, count, among=among)
            if not pairs:
                continue
            student_records = self._unit_records(
                student, layers[second][layer], [pair.student[1] for pair in pairs], sample
            )
            teacher_records = self._unit_records(
                teacher,
                layers[first][pairs[0].teacher[0]],
                [pair.teacher[1] for pair in pairs],
                sample,
            )
            self.report.show_pairs(
                layer, list(zip(pairs, teacher_records, student_records, strict=True))
            )
            self.analysis = replace(self._current, pairs={**self._current.pairs, layer: pairs})

    def _unit_records(
        self,
        network: nn.Module,
        layer: LayerSummary,
        units: Sequence[int],
        sample: InspectionSample,
    ) -> tuple[UnitRecord, ...]:
        """Of units that were chosen, without images made for them."""
        ((_, records),) = inspect_units(
            network, [layer], sample, InspectionOptions(steps=0), units_by_layer={layer.name: units}
        )
        return records

    def mark_stopped(self) -> None:
        """Notes that what comes from this stage on is missing."""
        analysis = self._current
        reason = analysis.unfinished or f"stopped during {self.stage}"
        self.analysis = replace(analysis, unfinished=reason)

    def _note(self, text: str) -> None:
        """Adds to what a reader must know."""
        sweep = replace(self._current.sweep, notes=(*self._current.sweep.notes, text))
        self.analysis = replace(self._current, sweep=sweep)

    @property
    def _current(self) -> Analysis:
        assert self.analysis is not None, "swept first"
        return self.analysis

    def _check_units(self, layers: Mapping[str, Sequence[Layer]]) -> None:
        """Before a long sweep, not after it."""
        for name, units in self.units.items():
            swept_layers = [layer for network_layers in layers.values() for layer in network_layers]
            fitting = [layer for layer in swept_layers if layer.name == name]
            if not fitting:
                hint = nearest(name, [layer.name for layer in swept_layers])
                raise UserError(f"no layer '{name}' is looked at; {hint}. --layers chooses others")
            if any(layer.shape[1] * layer.shape[2] == 1 for layer in fitting):
                raise UserError(
                    f"{name} gives one number a unit (1x1), so there is no place in the image to "
                    "show: leave it out of --units"
                )
            if max(units) >= min(layer.shape[0] for layer in fitting):
                largest_unit = min(layer.shape[0] for layer in fitting) - 1
                raise UserError(f"{name} has no unit {max(units)}; it has 0 to {largest_unit}")


def _sweep_file_notes(sweep_file: SweepFile, count: int) -> list[str]:
    """What a reader must know of the sweep's file."""
    notes = []
    if sweep_file.restored:
        notes.append(
            f"{sweep_file.restored:,} of {count:,} images were looked at by an earlier run, "
            "which kept "
            f"what they gave in {sweep_file.file.name}; delete it to look at them anew"
        )
    if sweep_file.problem:
        notes.append(f"the sweep isn't kept for another run: {sweep_file.problem}")
    return notes
