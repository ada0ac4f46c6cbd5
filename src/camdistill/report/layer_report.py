"""The folder of an analysis: TensorBoard events, PNG pictures, a page and `results.json`.

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
    bin_weights,
)
from camdistill.layers.findings import Finding
from camdistill.layers.profiles import profiles
from camdistill.layers.sweep.statistics.histograms import log10_bins, quantile, rebin
from camdistill.layers.sweep.sweep_summary import Histogram, LayerSummary
from camdistill.layers.through_depth import DepthView
from camdistill.layers.units.unit_cards import UnitRecord
from camdistill.layers.units.unit_pairs import UnitPair
from camdistill.report.figures.pictures import Picture, save_png
from camdistill.report.file_manifest import EVENTS, SWEEP, FileManifest
from camdistill.report.layer_figures import (
    depth_picture,
    feature_picture,
    filter_pictures,
    norm_picture,
    sweep_charts,
    weight_picture,
)
from camdistill.report.layer_numbers import analysis_arrays, analysis_results, pack_npz
from camdistill.report.layer_page import findings_page, layers_page, report_page
from camdistill.report.results import write_results
from camdistill.report.tensorboard import TensorBoardLogger, front_page_url
from camdistill.report.unit_figures import pair_picture, unit_picture
from camdistill.store.atomic_files import write_atomically

FILES = ("report.md", "results.json", "numbers.npz")
REPORT = "report"  # the run of what belongs to no network alone
_TAG_BY_STATISTIC = {"best_cka": tags.BEST_CKA, "matched": tags.MATCHED, "zeros": tags.ZEROS}
_TAG_BY_STATISTIC |= {"nonfinite": tags.NONFINITE}
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
        manifest: List of all that stands in the folder.
    """

    def __init__(self, folder: Path, networks: tuple[str, ...]) -> None:
        self.folder = folder
        self.files: dict[str, list[str]] = {}
        self.manifest = FileManifest(folder)
        self._runs = (REPORT, *networks)
        self.manifest.check_free((*FILES, SWEEP))
        self._logger_by_run: dict[str, TensorBoardLogger] = {}

    @property
    def _loggers(self) -> dict[str, TensorBoardLogger]:
        """One a run. The first use removes an earlier report; mistakes have shown by then."""
        if not self._logger_by_run:
            # It would be drawn into the same charts.
            self.manifest.clear()
            for run in self._runs:
                # Listed before it is there, though its whole name isn't known before.
                suffix = f".{secrets.token_hex(4)}"
                logger = TensorBoardLogger(self.folder, "", version=run, filename_suffix=suffix)
                self.manifest.add(self.folder / run / f"{EVENTS}{suffix}")
                logger.open_file()
                self._logger_by_run[run] = logger
        return self._logger_by_run

    def show_picture(self, tag: str, picture: Picture, run: str = REPORT, step: int = 0) -> None:
        """Writes one picture, for TensorBoard and as a file."""
        self._loggers[run].log_picture(tag, picture, step)
        parts = [tag, *([run] if run != REPORT else []), *([str(step)] if step else [])]
        name = re.sub(r"[^\w.-]", "-", "-".join(parts))
        path = self.manifest.add(self.folder / "pictures" / f"{name}.png")
        save_png(path, picture)
        self.files.setdefault(tag, []).append(f"pictures/{name}.png")

    def show_sweep(self, analysis: Analysis) -> None:
        """What a sweep gives: profiles, ridges, charts, findings."""
        written_tags = set()
        step_count = depth_steps(map(len, analysis.sweep.networks.values()))
        for name, lines in profiles(analysis.sweep).items():
            tag = _TAG_BY_STATISTIC.get(name, tags.profile(name))
            written_tags.add(tag)
            for network, line in lines.items():
                for depth, value in zip(line.depth, line.values, strict=True):
                    if not math.isnan(value):
                        step = round(depth * step_count / 100)
                        self._loggers[network].log_metrics({tag: value}, step)
        for network, layers in analysis.sweep.networks.items():
            for layer in layers:
                self._ridge(network, layer)
        for tag, picture in sweep_charts(analysis):
            self.show_picture(tag, picture)
        self._loggers[REPORT].log_layout(_charts_of_tags(written_tags))
        self._loggers[REPORT].log_text(tags.FINDINGS, findings_page(analysis))

    def _ridge(self, network: str, layer: LayerSummary) -> None:
        # Of a dead layer there are no bins, and its step is there all the same.
        edges, counts = log10_bins(layer.post)
        self._loggers[network].log_histogram(tags.RIDGE, edges.numpy(), counts.numpy(), layer.order)
        if layer.pre is not None:
            self._loggers[network].log_histogram(
                tags.RIDGE_BEFORE, *symmetric_bins(layer.pre), layer.order
            )

    def show_weights(self, weights: Mapping[str, Mapping[str, WeightSummary]]) -> None:
        """Every layer's weights and norms."""
        step_count = depth_steps(map(len, weights.values()))
        for network, layers in weights.items():
            last_index = max(len(layers) - 1, 1)
            for number, summary in enumerate(layers.values()):
                norm = float(summary.norms.median())
                if math.isfinite(norm):
                    step = round(step_count * number / last_index)
                    self._loggers[network].log_metrics({tags.WEIGHT_NORM: norm}, step)
                self._loggers[network].log_histogram(
                    tags.WEIGHTS_RIDGE, *bin_weights(summary, relative=True), number
                )
                lengths = summary.norms[torch.isfinite(summary.norms)].numpy()
                longest = max(lengths.max(initial=0.0), np.finfo(np.float64).tiny)
                counts, edges = np.histogram(lengths / longest, 30, (0.0, 1.0))
                self._loggers[network].log_histogram(tags.NORMS_RIDGE, edges, counts, number)
        if any(weights.values()):
            self.show_picture(tags.WEIGHTS_CHART, weight_picture(weights))
            self.show_picture(tags.NORMS_CHART, norm_picture(weights))

    def show_filters(self, network: str, bank: FilterBank) -> None:
        """First filters."""
        for tag, picture in filter_pictures(network, bank):
            self.show_picture(tag, picture, network)

    def show_depth_view(
        self,
        number: int,
        picture: DepthView,
        classes: tuple[str, ...],
        layer_counts: Mapping[str, int],
    ) -> None:
        """One image at all layers; of the first one its feature maps too.

        Args:
            number: Number of the image.
            picture: Its maps.
            classes: Names; empty when unknown.
            layer_counts: How many layers with maps each network has.
        """
        self.show_picture(
            tags.THROUGH_DEPTH, depth_picture(picture, classes, layer_counts), step=number
        )
        if number:
            return
        for network, layers in picture.views.items():
            if not math.isfinite(picture.tops[network][1]):
                continue  # no unit has a weight
            for layer in layers:
                feature_maps = feature_picture(network, layer, picture, classes)
                self.show_picture(tags.feature_maps(layer), feature_maps, network)

    def show_units(
        self,
        network: str,
        layer: str,
        records: tuple[UnitRecord, ...],
        findings: Sequence[Finding] = (),
        filters: FilterBank | None = None,
    ) -> None:
        """Cards of units, with what stands out of them, and of the first layer with the filters."""
        notes = {
            record.unit: [
                f"stands out: {finding.kind}"
                for finding in findings
                if (finding.network, finding.layer) == (network, layer)
                and record.unit in finding.units
            ]
            for record in records
        }
        self.show_picture(tags.unit_cards(layer), unit_picture(records, notes, filters), network)

    def show_pairs(
        self, layer: str, pairs: Sequence[tuple[UnitPair, UnitRecord, UnitRecord]]
    ) -> None:
        """Units of one layer of the student beside those of the teacher that they follow."""
        self.show_picture(tags.unit_pairs(layer), pair_picture(pairs))

    def finish(
        self,
        analysis: Analysis,
        *,
        seconds: float | None = None,
        sha256: Mapping[str, str | None] | None = None,
    ) -> dict[str, object]:
        """Writes the page and the numbers, closes the events; gives back the numbers."""
        cards = {tags.HOW_TO_READ, tags.FINDINGS, tags.LAYERS}.union(
            *(logger.written_tags for logger in self._loggers.values())
        )
        guide = tags.how_to_read(cards=cards)
        guide = f"[The cards that matter, on top]({self.link()})\n\n{guide}"
        self._loggers[REPORT].log_text(tags.HOW_TO_READ, guide)
        self._loggers[REPORT].log_text(tags.FINDINGS, findings_page(analysis), 1)
        self._loggers[REPORT].log_text(tags.LAYERS, layers_page(analysis))
        for logger in self._loggers.values():
            logger.finalize("success")
        text = report_page(analysis, self.files, cards)
        page, numbers, arrays = (self.manifest.add(self.folder / name) for name in FILES)
        write_atomically(page, text.encode())
        write_atomically(arrays, pack_npz(analysis_arrays(analysis)))
        results = analysis_results(analysis)
        write_results(numbers, results, seconds=seconds, sha256=sha256)
        return results

    def link(self, base: str = "http://localhost:6006") -> str:
        """The front page of this report."""
        return report_url(self.folder, base)


def _charts_of_tags(written: Collection[str]) -> dict[str, dict[str, list[str]]]:
    """The charts of several tags, of which at least one was written."""
    chosen_charts = {
        category: {
            name: chart_tags
            for name, chart_tags in charts.items()
            if set(chart_tags) & set(written)
        }
        for category, charts in LAYOUT.items()
    }
    return {category: charts for category, charts in chosen_charts.items() if charts}


def report_url(folder: Path, base: str = "http://localhost:6006") -> str:
    """A link to TensorBoard with a report's best cards on top."""
    runs = [run for run in FileManifest(folder).runs if run != REPORT]
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


def depth_steps(layers: Iterable[int]) -> int:
    """The step of depth 1: percent, or so many tenths of it that no two layers share a step.

    Args:
        layers: How many each network has.
    """
    step_count, most_layers = 100, max(layers, default=0)
    while most_layers - 1 > step_count:
        step_count *= 10
    return step_count


def symmetric_bins(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """Edges and counts of 60 bins: shares of the magnitude that 99.9 % of the values stay below."""
    edges = np.linspace(-1.0, 1.0, 61)
    if not histogram.finite:
        return edges, np.zeros(60)
    low, high = quantile(histogram, 0.0005)[0], quantile(histogram, 0.9995)[1]
    limit = max(abs(low), abs(high)) or 1.0
    return edges, rebin(histogram, torch.from_numpy(edges) * limit).numpy()
