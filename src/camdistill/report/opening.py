"""Opens the layers of one or two networks, stage by stage, and writes each stage's report.

Every stage leaves the report with more in it, so that one that was stopped shows what was done.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from camdistill.data.datasets import ImageSet, Positions
from camdistill.distill.training import as_images
from camdistill.errors import UserError, nearest
from camdistill.layers.analysis import Analysis
from camdistill.layers.close_up import Closeness, Sample, close_up
from camdistill.layers.filters import FilterBank, first_filters, weight_summaries
from camdistill.layers.findings import findings
from camdistill.layers.pairing import clearest_pairs
from camdistill.layers.plan import Options
from camdistill.layers.points import Layer
from camdistill.layers.portraits import Portrait
from camdistill.layers.summary import LayerSummary
from camdistill.layers.sweep import LayerSweep
from camdistill.layers.through_depth import spatial, stage_ends, through_depth
from camdistill.networks.capture import undisturbed
from camdistill.report.first_units import of_first_filters
from camdistill.report.layer_report import LayerReport
from camdistill.types import Images

BATCH = 64  # images in a forward, and in a group of the unbiased CKA
SAMPLE = 512  # images that single units are looked at with
EXPLAINED = 256  # images, about, of which every layer's Grad-CAM is measured
ACROSS = 60  # layers in the picture of one image through depth: ResNet-152 has 53 by default
CLOSE = 4  # layers whose units are looked at closely: the last of each resolution

MasksOf = Callable[[Positions], Mapping[str, Bool[np.ndarray, "n height width"]]]
Step = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Subject:
    """The images that layers are opened with.

    Attributes:
        images: A set whose ids are its positions.
        order: Positions of those that are looked at, in an order that has nothing to do with
            classes.
        name: What they are, for titles.
        masks_of: Where concepts are in some of them; None where that isn't known.
        classes: Names of the networks' classes; empty when unknown.
        channels: Of the images that the networks take: 3, or 1 for their mean.
        device: Where images go; the networks are there.
    """

    images: ImageSet
    order: Positions
    name: str
    masks_of: MasksOf | None = None
    classes: tuple[str, ...] = ()
    channels: int = 3
    device: str = "cpu"

    def fetch(self, numbers: Sequence[int] | Positions) -> Images:
        """Images in [0, 1], in the order of the numbers."""
        images = as_images(self.images.batch(numbers).pixels).to(self.device)
        return images.mean(1, keepdim=True) if self.channels == 1 else images


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
    """

    networks: Mapping[str, nn.Module]
    subject: Subject
    report: LayerReport
    layers: Sequence[str] = ()
    units: Mapping[str, Sequence[int]] = field(default_factory=dict)
    on_step: Step = lambda stage, done, total: None
    found: Analysis | None = None

    @torch.no_grad()
    def sweep(self, *, probes: bool = False) -> None:
        """One pass over all images; what was seen of them is reported even when it is stopped."""
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
        self._demand_runs(example[:1])
        looking = LayerSweep(self.networks, example, layers=self.layers or None, options=options)
        self._demand_units(looking.plan.layers)
        stopped = ""
        try:
            for start in range(0, count, BATCH):
                part = order[start : start + BATCH]
                numbers = torch.from_numpy(part)
                looking.update(self.subject.fetch(part), numbers, torch.from_numpy(labels[part]))
                self.on_step("sweep", min(start + BATCH, count), count)
        except KeyboardInterrupt:
            if not looking.images:
                raise
            stopped = f"stopped after {looking.images:,} of {count:,} images"
        sweep = looking.result()
        self.found = Analysis(
            sweep,
            self.subject.name,
            self.subject.classes,
            findings=findings(sweep),
            unfinished=stopped,
        )
        self.report.sweep(self.found)
        if stopped:
            raise KeyboardInterrupt

    def filters(self) -> None:
        """First filters and all weights."""
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
        self.found = replace(self._known, filters=banks, weights=weights)

    def through_depth(self, count: int) -> None:
        """Some images at all layers."""
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
        for number, picture in enumerate(shown):
            self.report.picture(number, picture, self.subject.classes, whole)
            self.on_step("maps", number + 1, len(shown))
        self.found = replace(self._known, pictures=tuple(shown))

    def close_up(self, how: Closeness) -> None:
        """Some units of some layers, closely."""
        sample = self._sample()
        wanted = {
            name: [
                layer
                for layer in self._known.sweep.networks[name]
                if layer.name in (self.units or stage_ends(self._known.sweep.networks[name], CLOSE))
            ]
            for name in self.networks
        }
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
                portraits = {**self._known.portraits, name: drawn}
                self.found = replace(self._known, portraits=portraits)

    def pairs(self, count: int) -> None:
        """Units of the student beside the teacher's that they follow."""
        sweep, sample = self._known.sweep, self._sample()
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

    def stopped(self, stage: str) -> None:
        """Notes that what comes from a stage on is missing."""
        known = self._known
        self.found = replace(known, unfinished=known.unfinished or f"stopped during {stage}")

    def _note(self, text: str) -> None:
        """Adds to what a reader must know."""
        sweep = replace(self._known.sweep, notes=(*self._known.sweep.notes, text))
        self.found = replace(self._known, sweep=sweep)

    @property
    def _known(self) -> Analysis:
        assert self.found is not None, "swept first"
        return self.found

    def _demand_runs(self, image: Images) -> None:
        """Networks may have a size of their own, and many ways to say so."""
        for name, network in self.networks.items():
            try:
                with undisturbed(network):
                    network(image)
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                raise UserError(
                    f"the {name} can't run on an image of {'x'.join(map(str, image.shape[1:]))} "
                    f"({str(error).splitlines()[0]}); give another --size"
                ) from error

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

    def _sample(self) -> Sample:
        chosen = self.subject.order[:SAMPLE]
        masks: dict[str, Tensor] = {}
        if self.subject.masks_of is not None:
            found = self.subject.masks_of(chosen)
            masks = {
                name: torch.from_numpy(mask).to(self.subject.device) for name, mask in found.items()
            }
        return Sample(self.subject.fetch(chosen), masks, self.subject.fetch)
