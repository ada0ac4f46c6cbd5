"""Evaluates explainers on one network, batch by batch, and resumes where it was stopped."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from camdistill.data.datasets import ImageSet
from camdistill.data.shapes import Shapes
from camdistill.distill.training import as_images, match_channels
from camdistill.errors import UserError
from camdistill.experiments.evaluation.evaluation_values import (
    CURVES,
    LADDER,
    ORACLE,
    Values,
    join_values,
    save_values,
)
from camdistill.experiments.evaluation.partial_results import (
    Arrays,
    clear,
    load_or_compute,
    partial_folder,
    read_finished,
)
from camdistill.explain.maps import resize
from camdistill.measure import controls
from camdistill.measure.boxes import inside_boxes
from camdistill.measure.metrics import OF_WEIGHTS
from camdistill.measure.panel import EvaluationBatch, measure, prepare_batch
from camdistill.measure.scores import is_constant, level_constant_maps
from camdistill.types import Explain, Images, Maps, Masks, Pixels


@dataclass(frozen=True)
class EvaluatedExplainer:
    """What is compared.

    Attributes:
        name: In tables.
        explain: Gives maps of any size; None where they are stored.
        stored: One map an image, in the images' order.
        kind: What it is: a method at a layer, another network, a callable, stored maps.
        digest: Digest of the maps, network or source that it is made of: another one is another
            evaluation.
        apart: Whether its maps are another network's: no change of the explained network's weights
            changes them, so what such a change does to them isn't measured.
    """

    name: str
    explain: Explain | None = None
    stored: Float[np.ndarray, "images rows columns"] | None = None
    kind: str = ""
    digest: str = ""
    apart: bool = False


@dataclass(frozen=True)
class EvaluationSubject:
    """The network and the images that explainers are compared on.

    Attributes:
        network: In eval mode; takes images in [0, 1].
        images: Their masks are the ground truth; where they have none, the insides of their boxes.
        shapes: What drew the images, by their ids: it knows distractors, and draws an image again
            without its objects.
        channels: Channels of the images that the network takes: 3, or 1 for their mean.
    """

    network: nn.Module
    images: ImageSet
    shapes: Shapes | None = None
    channels: int = 3

    @property
    def has_locations(self) -> bool:
        """Whether the images say where their objects are."""
        return self.images.masks is not None or self.images.boxes is not None


@dataclass(frozen=True)
class Evaluation:
    """What is measured.

    Attributes:
        subject: Network and images.
        explainers: The controls that are made from a map are made from the first one's.
        metrics: Names.
        seed: Seed of every random choice.
        batch: Images at once; part of what the random choices are.
        ladder: Measure a ladder of ever worse maps too.
        settings: What tells this evaluation from another: files, options.
    """

    subject: EvaluationSubject
    explainers: Sequence[EvaluatedExplainer]
    metrics: Sequence[str]
    seed: int
    batch: int
    ladder: bool
    settings: Mapping[str, object]


def evaluate_explainers(
    evaluation: Evaluation, folder: Path, on_batch: Callable[[int, int], None] | None = None
) -> Values:
    """Measures every explainer and control on every image.

    Killed and started again with the same settings, it goes on after the last whole batch; the
    numbers are those of a run that was not killed. Started again when it was whole, it measures
    nothing.

    Args:
        evaluation: What is measured.
        folder: Where `values.npz`, and until it is whole the batches, go.
        on_batch: Told how many batches are done of how many; each is met twice, first for the mean
            map.
    """
    starts = range(0, len(evaluation.subject.images), evaluation.batch)
    on_batch_done = on_batch or (lambda done, total: None)
    values = read_finished(folder, evaluation.settings)
    if values is None:
        values = _measure_batches(evaluation, folder, starts, on_batch_done)
    clear(folder, evaluation.settings)
    on_batch_done(2 * len(starts), 2 * len(starts))
    return values


def _measure_batches(
    evaluation: Evaluation, folder: Path, starts: range, on_batch_done: Callable[[int, int], None]
) -> Values:
    """All batches' values, also in their file."""
    partial = partial_folder(folder, evaluation.settings)
    sums = []
    for number, start in enumerate(starts):
        on_batch_done(number, 2 * len(starts))
        sums.append(
            load_or_compute(
                partial / f"mean_{start:08d}.npz", functools.partial(_sum_maps, evaluation, start)
            )
        )
    mean = _mean(sums)
    paths = [partial / f"{start:08d}.npz" for start in starts]
    for number, (start, path) in enumerate(zip(starts, paths, strict=True)):
        on_batch_done(len(starts) + number, 2 * len(starts))
        load_or_compute(path, functools.partial(_measure_batch, evaluation, start, mean))
    values = join_values(paths, evaluation.metrics, len(evaluation.explainers))
    save_values(folder, values, evaluation.subject.images.ids, evaluation.settings)
    return values


def explainer_maps(
    explainer: EvaluatedExplainer, network: nn.Module, images: Images, classes: Tensor, first: int
) -> Maps:
    """An explainer's maps at the images' resolution; `first` is the first image's position."""
    if explainer.stored is not None:
        maps = torch.from_numpy(explainer.stored[first : first + len(images)]).to(images.device)
    else:
        assert explainer.explain is not None, "an explainer explains or has stored maps"
        # Its own copies: what it changes in place is not what is measured next.
        maps = explainer.explain(network, images.clone(), classes.clone()).detach()
    if maps.dim() != 3 or len(maps) != len(images):
        raise UserError(
            f"explainer '{explainer.name}' gave {list(maps.shape)} for {len(images)} images: it "
            f"must give one map an image, [{len(images)}, height, width]"
        )
    size = (images.shape[2], images.shape[3])
    return level_constant_maps(resize(maps.float(), size))


def example_maps(evaluation: Evaluation, start: int) -> Images:
    """A batch's images in [0, 1], on the network's device."""
    rows = _positions(evaluation, start)
    parameter = next(evaluation.subject.network.parameters(), None)
    images = _match_channels(evaluation.subject, evaluation.subject.images.batch(rows).pixels)
    return images if parameter is None else images.to(parameter.device)


def _match_channels(
    subject: EvaluationSubject, pixels: Pixels
) -> Float[Tensor, "batch channels_taken height width"]:
    return match_channels(as_images(pixels), subject.channels)


def _positions(evaluation: Evaluation, start: int) -> NDArray[np.int64]:
    stop = min(start + evaluation.batch, len(evaluation.subject.images))
    return np.arange(start, stop)


def _sum_maps(evaluation: Evaluation, start: int) -> Arrays:
    """The sum of a batch's maps, each first divided by its largest value, and how many."""
    images = example_maps(evaluation, start)
    with torch.no_grad():
        classes = evaluation.subject.network(images).argmax(1)
    first = evaluation.explainers[0]
    maps = explainer_maps(first, evaluation.subject.network, images, classes, start)
    maps = maps[torch.isfinite(maps).flatten(1).all(1)]
    peaks = maps.abs().amax((1, 2), keepdim=True)
    total = (maps / peaks.clamp(min=1e-30)).double().sum(0).cpu().numpy()
    return {"sum": total, "count": np.array(len(maps))}


def _mean(sums: Sequence[Arrays]) -> Float[np.ndarray, "height width"]:
    total = np.stack([batch_sum["sum"] for batch_sum in sums]).sum(0)
    count = sum(int(batch_sum["count"]) for batch_sum in sums)
    return np.asarray(total / max(count, 1), np.float32)


def _measure_batch(
    evaluation: Evaluation, start: int, mean: Float[np.ndarray, "height width"]
) -> Arrays:
    """A batch's arrays, by what they are."""
    subject = evaluation.subject
    images = example_maps(evaluation, start)
    masks, distractors, rerendered = _ground_truth(evaluation, start, images)
    evaluation_batch = prepare_batch(
        subject.network,
        images,
        evaluation.metrics,
        f"{evaluation.seed} {start}",
        masks=masks,
        rerendered=rerendered,
    )
    arrays: Arrays = {}
    apart = {one.name for one in evaluation.explainers if one.apart}
    for name, maps, explain, seconds in _entries(
        evaluation, evaluation_batch, mean, distractors, start
    ):
        asks = [
            metric for metric in evaluation.metrics if not (name in apart and metric in OF_WEIGHTS)
        ]
        measured = measure(evaluation_batch, maps, asks, explain)
        nothing = torch.full((len(images),), torch.nan)
        columns = [measured.values.get(metric, nothing).cpu() for metric in evaluation.metrics]
        sound = torch.isfinite(maps).flatten(1).all(1)
        arrays[f"values/{name}"] = torch.stack(columns).float().numpy()
        arrays[f"seconds/{name}"] = np.full(len(images), seconds / len(images))
        arrays[f"failed/{name}"] = (~sound).cpu().numpy()
        arrays[f"blank/{name}"] = (sound & is_constant(maps)).cpu().numpy()
        for metric in set(CURVES) & set(measured.curves):
            arrays[f"curves/{name}/{metric}"] = measured.curves[metric].float().cpu().numpy()
    return arrays


def _ground_truth(
    evaluation: Evaluation, start: int, images: Images
) -> tuple[Masks | None, Masks | None, Images | None]:
    """The objects' masks, the distractors', and the images drawn again without either."""
    subject, rows = evaluation.subject, _positions(evaluation, start)
    masks = None
    if subject.images.masks is not None:
        masks = torch.from_numpy(np.asarray(subject.images.masks[rows]) > 0).to(images.device)
    elif subject.images.boxes is not None:
        boxes = torch.from_numpy(subject.images.boxes[rows]).to(images.device)
        masks = inside_boxes(boxes, subject.images.size)
    if subject.shapes is None:
        return masks, None, None
    ids = subject.images.ids[rows]
    distractors = subject.shapes.render(ids).masks["distractor"]
    empty = subject.shapes.render(ids, remove=("object", "second", "distractor"))
    inputs = _match_channels(subject, torch.from_numpy(empty.pixels)).to(images.device)
    return masks, torch.from_numpy(distractors).to(images.device), inputs


def _entries(
    evaluation: Evaluation,
    evaluation_batch: EvaluationBatch,
    mean: Float[np.ndarray, "height width"],
    distractors: Masks | None,
    start: int,
) -> Iterator[tuple[str, Maps, Explain | None, float]]:
    """Every map that is measured, one after the other, and how long it took to make."""
    first: Maps | None = None
    for explainer in evaluation.explainers:
        begun = time.perf_counter()
        maps = explainer_maps(
            explainer,
            evaluation_batch.network,
            evaluation_batch.images,
            evaluation_batch.classes,
            start,
        )
        if maps.is_cuda:
            torch.cuda.synchronize(maps.device)
        seconds = time.perf_counter() - begun
        first = maps if first is None else first
        live = None if explainer.explain is None else _at_image_size(explainer)
        yield explainer.name, maps, live, seconds if live else float("nan")
    assert first is not None, "there is at least one explainer"
    for name, maps in _controls(evaluation_batch, first, mean, distractors).items():
        yield name, maps, None, float("nan")
    if evaluation.ladder:
        best = (
            first if evaluation_batch.masks is None else controls.mask_maps(evaluation_batch.masks)
        )
        # Where no object is known there is no order to be found: these images don't count.
        everywhere = torch.ones(len(best), dtype=torch.bool, device=best.device)
        has_object = (
            everywhere
            if evaluation_batch.masks is None
            else evaluation_batch.masks.flatten(1).any(1)
        )
        for number, maps in enumerate(
            controls.ladder(torch.nan_to_num(best), evaluation_batch.generator("ladder"))
        ):
            rung = level_constant_maps(maps)
            rung[~has_object] = torch.nan
            yield f"{LADDER}_{number}", rung, None, float("nan")


def _controls(
    evaluation_batch: EvaluationBatch,
    first: Maps,
    mean: Float[np.ndarray, "height width"],
    distractors: Masks | None,
) -> dict[str, Maps]:
    images = evaluation_batch.images
    control_maps = {
        "random": controls.random_maps(images, evaluation_batch.generator("random")),
        "smooth_random": controls.smooth_random_maps(
            images, evaluation_batch.generator("smooth random")
        ),
        "edges": controls.sobel_edges(images),
        "center": controls.center(images),
        "mean_map": torch.from_numpy(mean).to(images.device).expand(len(images), -1, -1),
        "inverted": controls.invert(first),
        "blurred_copy": controls.blur_maps(torch.nan_to_num(first)),
    }
    if distractors is not None:
        control_maps["distractor"] = controls.mask_maps(distractors)
    if evaluation_batch.masks is not None:
        control_maps[ORACLE] = controls.mask_maps(evaluation_batch.masks)
    return {name: level_constant_maps(maps) for name, maps in control_maps.items()}


def _at_image_size(explainer: EvaluatedExplainer) -> Explain:
    def explain(network: nn.Module, images: Images, classes: Tensor) -> Maps:
        return explainer_maps(explainer, network, images, classes, 0)

    return explain
