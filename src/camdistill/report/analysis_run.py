"""Opens the layers of one or two networks, stage by stage, and writes each stage's report.

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
from camdistill.layers.sweep.sweep_plan import Options
from camdistill.layers.sweep.sweep_summary import LayerSummary
from camdistill.layers.through_depth import spatial, stage_ends, through_depth
from camdistill.layers.units.unit_cards import Portrait
from camdistill.layers.units.unit_inspection import Closeness, Sample, close_up
from camdistill.layers.units.unit_pairs import clearest_pairs
from camdistill.networks.capture import check_forward
from camdistill.report.analysis_data import Subject
from camdistill.report.first_units import of_first_filters
from camdistill.report.layer_report import LayerReport
from camdistill.report.sweep_file import BATCH, KeptSweep, fingerprint, look

EXPLAINED = 256  # images, about, of which every layer's Grad-CAM is measured
ACROSS = 60  # layers in the picture of one image through depth: ResNet-152 has 53 by default
CLOSE = 4  # layers whose units are looked at closely: the last of each resolution

Step = Callable[[str, int, int], None]


@dataclass
class Opening:
    """One analysis in the making.

    Attributes:
        networks: One or two, by name; the first says of which class maps are.
        subject: The images.
        report: What is written.
        layers: Names or patterns; empty for blocks and non-linearities outside them.
        units: Units to look at closely, by layer, in place of interesting ones.
        on_step: Called with a stage's name, what is done of it, and of how much.
        found: What is known so far; None before the sweep.
        stage: What is being done.
        restored: Images whose sweep an earlier run had kept.
    """

    networks: Mapping[str, nn.Module]
    subject: Subject
    report: LayerReport
    layers: Sequence[str] = ()
    units: Mapping[str, Sequence[int]] = field(default_factory=dict)
    on_step: Step = lambda stage, done, total: None
    found: Analysis | None = None
    stage: str = "the sweep"
    restored: int = 0

    @torch.no_grad()
    def sweep(self, *, probes: bool = False) -> None:
        """One pass over all images; what was seen of them is reported even when it is stopped.

        An earlier run's sweep of the same networks, layers and images isn't repeated.
        """
        order, count = self.subject.order, len(self.subject.order)
        labels = self.subject.images.labels
        if probes and int(labels[order].max()) < 1:
            raise UserError(
                f"--probes reads labels out, and {self.subject.name} has none, or one alone; leave "
                "it out, or give --data with class folders"
            )
        options = Options(
            probes=int(labels.max()) + 1 if probes else 0,
            explained=min(EXPLAINED / count, 1.0),
        )
        example = self.subject.fetch(order[:BATCH])
        check_forward(self.networks, example[:1], numbers=False)
        looking = LayerSweep(self.networks, example, layers=self.layers or None, options=options)
        self._demand_units(looking.plan.layers)
        kept = KeptSweep(self.report.written, fingerprint(self.networks, self.subject))
        stopped = ""
        if look(looking, self.subject, kept, lambda done, of: self.on_step("sweep", done, of)):
            stopped = f"stopped after {looking.images:,} of {count:,} images"
        sweep = looking.result()
        self.restored = kept.restored
        sweep = replace(sweep, notes=(*sweep.notes, *_of_file(kept, count)))
        self.found = Analysis(
            sweep,
            self.subject.name,
            self.subject.classes,
            findings=findings(sweep),
            unfinished=stopped,
        )
        self.stage = "the charts of the sweep"
        self.report.sweep(self.found)
        if stopped:
            raise KeyboardInterrupt

    def filters(self) -> None:
        """First filters and all weights."""
        self.stage = "the filters"
        example = self.subject.fetch(self.subject.order[:1])
        banks: dict[str, FilterBank] = {}
        for name, network in self.networks.items():
            try:
                banks[name] = first_filters(network, example)
            except UserError as reason:
                self._note(str(reason))
        weights = {name: weight_summaries(net, name) for name, net in self.networks.items()}
        for name, bank in banks.items():
            self.report.filters(name, bank)
        self.report.weights(weights)
        broken = [
            f"{name} {layer} ({one.signed.nonfinite:,} of {one.count:,})"
            for name, layers in weights.items()
            for layer, one in layers.items()
            if one.signed.nonfinite
        ]
        if broken:
            more = f" and {len(broken) - 6} more" if len(broken) > 6 else ""
            self._note(f"weights that are not finite: {', '.join(broken[:6])}{more}")
        self.found = replace(self._known, filters=banks, weights=weights)

    def through_depth(self, count: int) -> None:
        """Some images at all layers."""
        self.stage = "the maps through depth"
        if not count:
            return
        sweep = self._known.sweep
        numbers = np.sort(self.subject.order[:count])
        layers = {name: spatial(sweep.networks[name], ACROSS, self.units) for name in self.networks}
        networks = {name: network for name, network in self.networks.items() if layers[name]}
        for name in self.networks.keys() - networks.keys():
            self._note(f"no layer of the {name} has a map: all give one number a unit (1x1)")
        if not networks:
            return
        whole = {
            name: len(spatial(sweep.networks[name], len(sweep.networks[name]))) for name in networks
        }
        names = [str(self.subject.images.names[number]) for number in numbers.tolist()]
        shown = through_depth(
            networks, self.subject.fetch(numbers), names, layers, units=self.units
        )
        first = next(iter(networks))
        # Without a top class there is nothing to explain.
        told = [one for one in shown if math.isfinite(one.tops[first][1])]
        if len(told) < len(shown):
            self._note(
                f"no maps of {len(shown) - len(told)} of {len(shown)} images: the logits of the "
                f"{first} are not finite there, so it has no top class"
            )
        for number, picture in enumerate(told):
            self.report.picture(number, picture, self.subject.classes, whole)
            self.on_step("maps", number + 1, len(told))
        self.found = replace(self._known, pictures=tuple(told))

    def close_up(self, how: Closeness) -> None:
        """Some units of some layers, closely."""
        self.stage = "the look at units"
        sample = self.subject.sample()
        wanted = {name: self._wanted(layers) for name, layers in self._known.sweep.networks.items()}
        total = sum(map(len, wanted.values())) * (how.steps + 1)
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            self.on_step("units", done, total)

        for name, network in self.networks.items():
            if not wanted[name]:
                continue
            drawn: dict[str, tuple[Portrait, ...]] = {}
            failed: list[str] = []
            bank = self._known.filters.get(name)
            example = self.subject.fetch(self.subject.order[:1])
            points = {layer.post.point: layer.name for layer in wanted[name]}
            first = of_first_filters(network, example, bank, list(points)) if bank else ()
            own = {points[point] for point in first}
            for layer, found in close_up(
                network, wanted[name], sample, how, chosen=self.units, on_step=step
            ):
                self.report.portraits(
                    name, layer, found, self._known.findings, bank if layer in own else None
                )
                drawn[layer] = found
                failed += [f"{layer}:{one.unit}" for one in found if one.failed]
                portraits = {**self._known.portraits, name: drawn}
                self.found = replace(self._known, portraits=portraits)
            if failed:
                self._note(
                    f"images made to excite units of the {name} failed for {', '.join(failed)}: "
                    "random images excite these as much"
                )

    def _wanted(self, layers: Sequence[LayerSummary]) -> list[LayerSummary]:
        """Layers whose units are looked at closely; of what no image tells there is nothing."""
        names = self.units or stage_ends(layers, CLOSE)
        wanted = [layer for layer in layers if layer.name in names]
        if lost := [layer.name for layer in wanted if layer.lost]:
            self._note(
                f"no cards of units of {layers[0].network} {', '.join(lost)}: no image is finite "
                "there"
            )
        return [layer for layer in wanted if not layer.lost]

    def pairs(self, count: int) -> None:
        """Units of the student beside the teacher's that they follow."""
        self.stage = "the pairs of units"
        sweep, sample = self._known.sweep, self.subject.sample()
        if len(self.networks) < 2:
            return
        (first, teacher), (second, student) = self.networks.items()
        layers = {
            name: {layer.name: layer for layer in sweep.networks[name]} for name in sweep.networks
        }
        among = spatial(sweep.networks[first], len(sweep.networks[first]))
        for layer in stage_ends(sweep.networks[second], CLOSE):
            pairs = clearest_pairs(sweep.matches, layer, count, among=among)
            if not pairs:
                continue
            own = self._portraits(
                student, layers[second][layer], [one.student[1] for one in pairs], sample
            )
            its = self._portraits(
                teacher,
                layers[first][pairs[0].teacher[0]],
                [one.teacher[1] for one in pairs],
                sample,
            )
            self.report.pairs(layer, list(zip(pairs, its, own, strict=True)))
            self.found = replace(self._known, pairs={**self._known.pairs, layer: pairs})

    def _portraits(
        self, network: nn.Module, layer: LayerSummary, units: Sequence[int], sample: Sample
    ) -> tuple[Portrait, ...]:
        """Of units that were chosen, without images made for them."""
        ((_, found),) = close_up(
            network, [layer], sample, Closeness(steps=0), chosen={layer.name: units}
        )
        return found

    def stopped(self) -> None:
        """Notes that what comes from this stage on is missing."""
        known = self._known
        why = known.unfinished or f"stopped during {self.stage}"
        self.found = replace(known, unfinished=why)

    def _note(self, text: str) -> None:
        """Adds to what a reader must know."""
        sweep = replace(self._known.sweep, notes=(*self._known.sweep.notes, text))
        self.found = replace(self._known, sweep=sweep)

    @property
    def _known(self) -> Analysis:
        assert self.found is not None, "swept first"
        return self.found

    def _demand_units(self, layers: Mapping[str, Sequence[Layer]]) -> None:
        """Before a long sweep, not after it."""
        for name, units in self.units.items():
            known = [layer for found in layers.values() for layer in found]
            fitting = [layer for layer in known if layer.name == name]
            if not fitting:
                swept = nearest(name, [layer.name for layer in known])
                raise UserError(f"no layer '{name}' is looked at; {swept}. --layers chooses others")
            if any(layer.shape[1] * layer.shape[2] == 1 for layer in fitting):
                raise UserError(
                    f"{name} gives one number a unit (1x1), so there is no place in the image to "
                    "show: leave it out of --units"
                )
            if max(units) >= min(layer.shape[0] for layer in fitting):
                most = min(layer.shape[0] for layer in fitting) - 1
                raise UserError(f"{name} has no unit {max(units)}; it has 0 to {most}")


def _of_file(kept: KeptSweep, count: int) -> list[str]:
    """What a reader must know of the sweep's file."""
    notes = []
    if kept.restored:
        notes.append(
            f"{kept.restored:,} of {count:,} images were looked at by an earlier run, which kept "
            f"what they gave in {kept.file.name}; delete it to look at them anew"
        )
    if kept.problem:
        notes.append(f"the sweep isn't kept for another run: {kept.problem}")
    return notes
