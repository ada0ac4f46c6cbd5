"""`analyze`: every layer of a network, or of a student and its teacher, opened."""

import functools
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from rich.progress import Progress, TaskID
from torch import nn

from camdistill.commands.image_sources import ImageSource, load_image_source
from camdistill.commands.networks import NetworkSelection, image_side, load_networks
from camdistill.commands.progress import resolve_device
from camdistill.data.concepts import shape_concepts
from camdistill.errors import UserError
from camdistill.layers.sweep.layer_selection import find_layers, list_layers
from camdistill.layers.units.unit_inspection import InspectionOptions
from camdistill.networks.capture import check_forward
from camdistill.networks.heads import head_size
from camdistill.report.analysis_data import AnalysisData
from camdistill.report.analysis_run import AnalysisRun, StepCallback
from camdistill.report.file_manifest import SWEEP
from camdistill.report.layer_report import LayerReport
from camdistill.report.results import Cell, text_table

NUMBERS = "pictures/, results.json, numbers.npz of every unit, and what other looks start from"
STAGES = {"sweep": "every layer, all images", "maps": "maps through depth", "units": "units"}


def analyze(
    checkpoint: Path | None = None,
    teacher: str | None = None,
    weights: str | None = None,
    data: str | None = None,
    images: list[Path] = [],  # noqa: B006  (never changed; jsonargparse shows it)
    layers: list[str] = [],  # noqa: B006
    list_layers: bool = False,
    count: int = 2000,
    size: int | None = None,
    units: list[str] = [],  # noqa: B006
    cards: int = 4,
    steps: int = 256,
    pictures: int = 6,
    probes: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
    out: Path = Path("runs/analyze"),
    trust: list[str] = [],  # noqa: B006
) -> dict[str, object]:
    """Opens every layer: statistics, filters, units and maps, in TensorBoard and as files.

    With a checkpoint the student stands beside its teacher. `camdistill report --run OUT` shows it.
    What the images gave is kept in OUT/sweep.safetensors: the same command goes on after it was
    stopped, and other units, cards, steps or pictures don't look at all images again.

    Args:
        checkpoint: A student (or classifier) of ours: .safetensors or .ckpt.
        teacher: A network alone, by name or class path: resnet50, resnet56, package.module.Network.
        weights: Weights of that network: a file, or DEFAULT for torchvision's. With a checkpoint:
            where the teacher's file is now.
        data: Images: shapes, cifar10, cifar100, or an image folder; its test images.
        images: In place of data: image files or folders.
        layers: Layers by name or pattern: layer3, 'layer1.*', 'stage?'. Default: blocks, and
            non-linearities outside them.
        list_layers: Show the layers that there are, and do nothing.
        count: At most so many images, spread evenly.
        size: Side in pixels that images are scaled and cut to. Default: the training images'.
        units: Units to look at closely, such as stage3:17. Default: those that know a concept, or
            are the most selective.
        cards: Units of a layer that are looked at closely, and pairs of units that do the same in
            teacher and student; 0 for none.
        steps: Steps of the images made to excite units; 0 makes none.
        pictures: Images that are shown at all layers.
        probes: Whether labels are read out at each layer, here and in an untrained copy.
        device: Where networks and images go: cpu or cuda.
        out: Folder for the report.
        trust: Packages besides camdistill, torch, torchvision and timm that a checkpoint's class
            paths may come from.
    """
    start_time = time.monotonic()
    for name, number in {"cards": cards, "steps": steps, "pictures": pictures}.items():
        if number < 0:
            raise UserError(f"{name} is {number}; give 0 (none) or more")
    selection = load_networks(checkpoint, teacher, weights, trust)
    networks = selection.by_name
    if list_layers:
        return _list_layers(networks, image_side(size, selection.size), selection.channels)
    source = load_image_source(
        images, data, count=count, size=image_side(size, selection.size), carving=selection.carving
    )
    torch_device = resolve_device(device)
    for network in networks.values():
        network.to(torch_device)
    subject = _subject(source, selection, torch_device)
    analysis = AnalysisRun(
        networks, subject, LayerReport(out, tuple(networks)), layers, _parse_units(units)
    )
    with Progress(disable=not sys.stdout.isatty(), transient=True) as progress:
        analysis.on_step = _progress_step(progress)
        try:
            analysis.sweep(probes=probes)
            analysis.report_filters()
            analysis.report_depth_views(pictures)
            if cards or units:
                analysis.inspect_units(InspectionOptions(cards, steps))
            if cards:
                analysis.report_pairs(cards)
        except (KeyboardInterrupt, UserError) as error:
            if analysis.analysis is None:
                raise
            analysis.mark_stopped()
            # What was computed until then may have taken hours.
            _finish(analysis, selection, start_time)
            if isinstance(error, KeyboardInterrupt):
                _print_summary(analysis, out)
            raise
    results = _finish(analysis, selection, start_time)
    _print_summary(analysis, out)
    return results


def _finish(
    analysis: AnalysisRun, selection: NetworkSelection, start_time: float
) -> dict[str, object]:
    assert analysis.analysis is not None, "swept"
    seconds = time.monotonic() - start_time
    return analysis.report.finish(analysis.analysis, seconds=seconds, sha256=selection.sha256)


def _subject(source: ImageSource, selection: NetworkSelection, device: str) -> AnalysisData:
    classes_match = len(source.images.classes) == head_size(selection.teacher.network)
    masks = None
    if source.shapes is not None:
        masks = functools.partial(shape_concepts, source.shapes)
    return AnalysisData(
        source.images,
        source.order,
        source.name,
        masks,
        selection.classes or (source.images.classes if classes_match else ()),
        selection.channels,
        device,
    )


def _parse_units(words: Sequence[str]) -> dict[str, list[int]]:
    """`stage3:17` as a layer and a unit."""
    units_by_layer: dict[str, list[int]] = {}
    for word in words:
        layer, mark, unit = word.rpartition(":")
        if not mark or not unit.isdecimal():
            raise UserError(f"unit '{word}': give a layer and a number, such as stage3:17")
        units_by_layer.setdefault(layer, []).append(int(unit))
    return units_by_layer


def _progress_step(progress: Progress) -> StepCallback:
    tasks: dict[str, TaskID] = {}

    def step(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = progress.add_task(STAGES[stage], total=total)
        progress.update(tasks[stage], completed=done)

    return step


def _list_layers(networks: Mapping[str, nn.Module], size: int, channels: int) -> dict[str, object]:
    """Prints the layers that there are; those that are looked at by default have a star."""
    names_by_network: dict[str, object] = {}
    for name, network in networks.items():
        example = torch.zeros(1, channels, size, size)
        check_forward({name: network}, example, numbers=False)
        default_keys = {layer.key for layer in find_layers(network, example)}
        rows: dict[str, dict[str, Cell]] = {}
        for layer in list_layers(network, example):
            units, height, width = layer.shape
            rows[layer.name] = {
                "units": units,
                "grid": f"{height}x{width}",
                "by default": "yes" if layer.key in default_keys else "",
            }
        print(f"{text_table(rows, corner=name)}\n")
        names_by_network[name] = list(rows)
    return names_by_network


def _print_summary(analysis: AnalysisRun, out: Path) -> None:
    """Prints what stands out, and where everything is."""
    findings = analysis.analysis
    assert findings is not None, "swept"
    if findings.unfinished:
        print(
            f"Partial report: {findings.unfinished}. The same command goes on with what was "
            "swept.\n"
        )
    if analysis.restored:
        note = f"{analysis.restored:,} images were looked at before ({out / SWEEP}"
        print(f"{note}; delete it to look anew).\n")
    if findings.findings:
        print(f"What stands out ({findings.sweep.images:,} images of {findings.data}):")
        print("\n".join(f"  {finding.text}" for finding in findings.findings))
    else:
        print(f"Nothing stands out ({findings.sweep.images:,} images of {findings.data}).")
    print(f"\n{out / 'report.md'} explains every card; beside it {NUMBERS}")
    print(f"TensorBoard: camdistill report --run {shlex.quote(str(out))}")
