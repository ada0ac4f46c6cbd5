"""An analysis as a folder: TensorBoard's events, the same pictures as PNG, a page, results.json.

The parts are written as they are found, so that a report that was stopped holds what was done.
"""

import math
import re
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from camdistill import tags
from camdistill.layers.analysis import Analysis
from camdistill.layers.filters import (
    FilterBank,
    WeightSummary,
    binned_weights,
)
from camdistill.layers.findings import Finding
from camdistill.layers.profiles import profiles
from camdistill.layers.sweep.statistics.histograms import octaves, quantile, rebinned
from camdistill.layers.sweep.sweep_summary import Histogram, LayerSummary
from camdistill.layers.through_depth import ThroughDepth
from camdistill.layers.units.unit_cards import Portrait
from camdistill.layers.units.unit_pairs import Pair
from camdistill.report.figures.pictures import Picture, save_png
from camdistill.report.file_manifest import EVENTS, SWEEP, Written
from camdistill.report.layer_figures import (
    charts,
    depth_picture,
    feature_picture,
    filter_pictures,
    norm_picture,
    weight_picture,
)
from camdistill.report.layer_numbers import analysis_arrays, analysis_results, packed
from camdistill.report.layer_page import findings_page, layers_page, report_page
from camdistill.report.results import write_results
from camdistill.report.tensorboard import TensorBoardLogger, front_page_url
from camdistill.report.unit_figures import pair_picture, unit_picture
from camdistill.store.atomic_files import write_atomically

FILES = ("report.md", "results.json", "numbers.npz")
REPORT = "report"  # the run of what belongs to no network alone
_TAGS = {"best_cka": tags.BEST_CKA, "matched": tags.MATCHED, "zeros": tags.ZEROS}
_TAGS |= {"nonfinite": tags.NONFINITE}
LAYOUT = {
    "Units": {
        "silent and always on": [
            tags.profile(name) for name in ("dead", "nearly_dead", "always_on")
        ],
        "sparsity": [
            tags.profile(name) for name in ("population_sparsity", "lifetime_sparsity", "hoyer")
        ],
    },
    "Directions": {
        "rank": [tags.profile(name) for name in ("effective_rank", "participation", "saturation")],
        "probe": [tags.profile("probe"), tags.profile("probe_untrained")],
    },
    "Teacher and student": {"alike": [tags.BEST_CKA, tags.MATCHED]},
}


class LayerReport:
    """Writes a report, part by part.

    Attributes:
        folder: Where.
        files: Pictures written so far, by tag.
        written: List of all that stands in the folder.
    """

    def __init__(self, folder: Path, networks: tuple[str, ...]) -> None:
        self.folder = folder
        self.files: dict[str, list[str]] = {}
        self.written = Written(folder)
        self._runs = (REPORT, *networks)
        self.written.demand_free((*FILES, SWEEP))
        self._opened: dict[str, TensorBoardLogger] = {}

    @property
    def _loggers(self) -> dict[str, TensorBoardLogger]:
        """One a run. The first use removes an earlier report; mistakes have shown by then."""
        if not self._opened:
            # It would be drawn into the same charts.
            self.written.clear()
            for run in self._runs:
                # Listed before it is there, though its whole name isn't known before.
                own = f".{secrets.token_hex(4)}"
                logger = TensorBoardLogger(self.folder, "", version=run, filename_suffix=own)
                self.written.add(self.folder / run / f"{EVENTS}{own}")
                logger.open_file()
                self._opened[run] = logger
        return self._opened

    def show(self, tag: str, picture: Picture, run: str = REPORT, step: int = 0) -> None:
        """Writes one picture, for TensorBoard and as a file."""
        self._loggers[run].log_picture(tag, picture, step)
        parts = [tag, *([run] if run != REPORT else []), *([str(step)] if step else [])]
        name = re.sub(r"[^\w.-]", "-", "-".join(parts))
        path = self.written.add(self.folder / "pictures" / f"{name}.png")
        save_png(path, picture)
        self.files.setdefault(tag, []).append(f"pictures/{name}.png")

    def sweep(self, found: Analysis) -> None:
        """What a sweep gives: profiles, ridges, charts, findings."""
        written = set()
        whole = steps(map(len, found.sweep.networks.values()))
        for name, lines in profiles(found.sweep).items():
            tag = _TAGS.get(name, tags.profile(name))
            written.add(tag)
            for network, line in lines.items():
                for depth, value in zip(line.depth, line.values, strict=True):
                    if not math.isnan(value):
                        step = round(depth * whole / 100)
                        self._loggers[network].log_metrics({tag: value}, step)
        for network, layers in found.sweep.networks.items():
            for layer in layers:
                self._ridge(network, layer)
        for tag, picture in charts(found):
            self.show(tag, picture)
        self._loggers[REPORT].log_layout(_layout(written))
        self._loggers[REPORT].log_text(tags.FINDINGS, findings_page(found))

    def _ridge(self, network: str, layer: LayerSummary) -> None:
        # Of a dead layer there are no bins, and its step is there all the same.
        edges, counts = octaves(layer.post)
        self._loggers[network].log_histogram(tags.RIDGE, edges.numpy(), counts.numpy(), layer.order)
        if layer.pre is not None:
            self._loggers[network].log_histogram(
                tags.RIDGE_BEFORE, *standardised(layer.pre), layer.order
            )

    def weights(self, weights: Mapping[str, Mapping[str, WeightSummary]]) -> None:
        """Every layer's weights and norms."""
        whole = steps(map(len, weights.values()))
        for network, layers in weights.items():
            last = max(len(layers) - 1, 1)
            for number, summary in enumerate(layers.values()):
                norm = float(summary.norms.median())
                if math.isfinite(norm):
                    step = round(whole * number / last)
                    self._loggers[network].log_metrics({tags.WEIGHT_NORM: norm}, step)
                self._loggers[network].log_histogram(
                    tags.WEIGHTS_RIDGE, *binned_weights(summary, relative=True), number
                )
                lengths = summary.norms[torch.isfinite(summary.norms)].numpy()
                longest = max(lengths.max(initial=0.0), np.finfo(np.float64).tiny)
                counts, edges = np.histogram(lengths / longest, 30, (0.0, 1.0))
                self._loggers[network].log_histogram(tags.NORMS_RIDGE, edges, counts, number)
        if any(weights.values()):
            self.show(tags.WEIGHTS_CHART, weight_picture(weights))
            self.show(tags.NORMS_CHART, norm_picture(weights))

    def filters(self, network: str, bank: FilterBank) -> None:
        """First filters."""
        for tag, picture in filter_pictures(network, bank):
            self.show(tag, picture, network)

    def picture(
        self,
        number: int,
        picture: ThroughDepth,
        classes: tuple[str, ...],
        whole: Mapping[str, int],
    ) -> None:
        """One image at all layers; of the first one its feature maps too.

        Args:
            number: Of the image.
            picture: Its maps.
            classes: Names; empty when unknown.
            whole: How many layers with maps each network has.
        """
        self.show(tags.THROUGH_DEPTH, depth_picture(picture, classes, whole), step=number)
        if number:
            return
        for network, layers in picture.views.items():
            if not math.isfinite(picture.tops[network][1]):
                continue  # no unit has a weight
            for layer in layers:
                shown = feature_picture(network, layer, picture, classes)
                self.show(tags.feature_maps(layer), shown, network)

    def portraits(
        self,
        network: str,
        layer: str,
        found: tuple[Portrait, ...],
        noted: Sequence[Finding] = (),
        filters: FilterBank | None = None,
    ) -> None:
        """Cards of units, with what stands out of them, and of the first layer with the filters."""
        notes = {
            one.unit: [
                f"stands out: {finding.kind}"
                for finding in noted
                if (finding.network, finding.layer) == (network, layer)
                and one.unit in finding.units
            ]
            for one in found
        }
        self.show(tags.unit_cards(layer), unit_picture(found, notes, filters), network)

    def pairs(self, layer: str, found: Sequence[tuple[Pair, Portrait, Portrait]]) -> None:
        """Units of one layer of the student beside those of the teacher that they follow."""
        self.show(tags.unit_pairs(layer), pair_picture(found))

    def finish(
        self,
        found: Analysis,
        *,
        seconds: float | None = None,
        sha256: Mapping[str, str | None] | None = None,
    ) -> dict[str, object]:
        """Writes the page and the numbers, closes the events; gives back the numbers."""
        cards = {tags.HOW_TO_READ, tags.FINDINGS, tags.LAYERS}.union(
            *(logger.described for logger in self._loggers.values())
        )
        guide = tags.how_to_read(cards=cards)
        guide = f"[The cards that matter, on top]({self.link()})\n\n{guide}"
        self._loggers[REPORT].log_text(tags.HOW_TO_READ, guide)
        self._loggers[REPORT].log_text(tags.FINDINGS, findings_page(found), 1)
        self._loggers[REPORT].log_text(tags.LAYERS, layers_page(found))
        for logger in self._loggers.values():
            logger.finalize("success")
        text = report_page(found, self.files, cards)
        page, numbers, arrays = (self.written.add(self.folder / name) for name in FILES)
        write_atomically(page, text.encode())
        write_atomically(arrays, packed(analysis_arrays(found)))
        results = analysis_results(found)
        write_results(numbers, results, seconds=seconds, sha256=sha256)
        return results

    def link(self, base: str = "http://localhost:6006") -> str:
        """The front page of this report."""
        return front_page(self.folder, base)


def _layout(written: Collection[str]) -> dict[str, dict[str, list[str]]]:
    """The charts of several tags, of which at least one was written."""
    known = {
        category: {name: chosen for name, chosen in named.items() if set(chosen) & set(written)}
        for category, named in LAYOUT.items()
    }
    return {category: named for category, named in known.items() if named}


def front_page(folder: Path, base: str = "http://localhost:6006") -> str:
    """A link to TensorBoard with a report's best cards on top."""
    runs = [run for run in Written(folder).runs if run != REPORT]
    # The teacher first, whatever the alphabet says.
    runs.sort(key=lambda run: run != "teacher")
    return front_page_url(
        scalars=[tags.profile("active"), tags.profile("effective_rank")],
        pictures=[
            (tags.PROFILE_CHART, REPORT),
            (tags.CKA_CHART if len(runs) > 1 else tags.CKA_WITHIN, REPORT),
            (tags.RIDGE_CHART, REPORT),
            (tags.THROUGH_DEPTH, REPORT),
            *((tags.FIRST_SHAPE, run) for run in runs),
        ],
        histograms=[(tags.RIDGE, run) for run in runs],
        curves_last=True,
        base=base,
    )


def steps(layers: Iterable[int]) -> int:
    """The step of depth 1: percent, or so many tenths of it that no two layers share a step.

    Args:
        layers: How many each network has.
    """
    whole, most = 100, max(layers, default=0)
    while most - 1 > whole:
        whole *= 10
    return whole


def standardised(before: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """Edges and counts of 60 bins: shares of the magnitude that 99.9 % of the values stay below."""
    edges = np.linspace(-1.0, 1.0, 61)
    if not before.finite:
        return edges, np.zeros(60)
    low, high = quantile(before, 0.0005)[0], quantile(before, 0.9995)[1]
    spread = max(abs(low), abs(high)) or 1.0
    return edges, rebinned(before, torch.from_numpy(edges) * spread).numpy()
