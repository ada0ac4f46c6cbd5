"""What a claim's experiment is given, and what it gives back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camdistill.data.shapes import Shapes
from camdistill.distill.training import as_images
from camdistill.experiments.shared.seed_statistics import Bootstrap
from camdistill.measure.intervals import Interval, bootstrap_interval, paired_interval
from camdistill.networks.teachers import Preprocessed
from camdistill.types import Images, Labels, Masks


@dataclass(frozen=True)
class ClaimMeasurement:
    """One number of ours.

    Attributes:
        name: What was measured: a method, a network, "grad_cam - gradient".
        value: A mean over n, or a count.
        low: Lower bound of the 95 % interval; None where the number is exact.
        high: Upper bound.
        n: Images (or whatever the mean is over).
        measure: By which measure; rows of one measure share an axis and a table.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    measure: str = ""

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above 0."""
        return (self.value if self.low is None else self.low) > 0

    @property
    def interval(self) -> Interval:
        """With NaN for bounds that aren't there."""
        bounds = (float("nan") if bound is None else bound for bound in (self.low, self.high))
        return Interval(self.value, *bounds)


@dataclass(frozen=True)
class ClaimResult:
    """A claim of the paper beside what was found here.

    Attributes:
        number: Number of the claim, as in `claims_index.ROWS`.
        claim: In a sentence.
        paper: Its number, or that it has none.
        ours: What was measured.
        criterion: When the claim holds; fixed before it was measured.
        passed: None where nothing can be said.
        note: What a reader must know beside.
    """

    number: str
    claim: str
    paper: str
    ours: tuple[ClaimMeasurement, ...]
    criterion: str
    passed: bool | None
    note: str = ""


@dataclass(frozen=True)
class ClaimSetup:
    """What every experiment may use.

    Attributes:
        teacher: A trained network of Shapes: takes images in [0, 1], in eval mode, frozen.
        student: A shallow one.
        shapes: Draws the held-out images, of one object, at 32 pixels.
        ids: The images that are looked at.
        seed: Seed of every random choice.
        device: Where networks are.
        folder: Keeps the little networks that experiments train; see `training.trained`.
        boxes: An image folder with a boxes.csv, where one was given.
        announce: Takes a few words on what is being done.
    """

    teacher: Preprocessed
    student: Preprocessed
    shapes: Shapes
    ids: NDArray[np.int64]
    seed: int
    device: str
    folder: Path
    boxes: Path | None = None
    announce: Callable[[str], None] = field(default=lambda _: None, compare=False)

    @property
    def count(self) -> int:
        """How many images are looked at."""
        return len(self.ids)

    def generator(self, purpose: str) -> torch.Generator:
        """A stream of its own for each purpose, on the CPU."""
        seed = np.random.SeedSequence([self.seed, *purpose.encode()]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))


ClaimExperiment = Callable[[ClaimSetup], ClaimResult]


class ShapesBatch(NamedTuple):
    """Images of Shapes as tensors.

    Attributes:
        images: In [0, 1].
        labels: The object's class.
        second_labels: The second object's class; the first one's where there is one object.
        masks: By name; see `data.shapes.RenderedShapes`.
    """

    images: Images
    labels: Labels
    second_labels: Labels
    masks: dict[str, Masks]


def draw_batch(setup: ClaimSetup, shapes: Shapes | None = None) -> ShapesBatch:
    """The lab's images, or those of another drawer, with all that is known of them."""
    rendered = (shapes or setup.shapes).render(setup.ids)
    labels = torch.from_numpy(rendered.labels).to(setup.device)
    second_labels = rendered.second_labels
    return ShapesBatch(
        as_images(torch.from_numpy(rendered.pixels).to(setup.device)),
        labels,
        labels if second_labels is None else torch.from_numpy(second_labels).to(setup.device),
        {name: torch.from_numpy(mask).to(setup.device) for name, mask in rendered.masks.items()},
    )


def mean(name: str, values: Tensor, setup: ClaimSetup, measure: str = "") -> ClaimMeasurement:
    """A mean over images with its bootstrap interval; NaN is left out, and not counted."""
    numbers = values.detach().cpu().double().numpy()
    if np.isnan(numbers).all():
        return _no_measurement(name, measure)
    estimate = bootstrap_interval(numbers, setup.seed)
    return ClaimMeasurement(
        name, estimate.mean, estimate.low, estimate.high, int((~np.isnan(numbers)).sum()), measure
    )


def gain(
    name: str, values: Tensor, others: Tensor, setup: ClaimSetup, measure: str = ""
) -> ClaimMeasurement:
    """The mean of values - others over the same images, with its paired bootstrap interval."""
    first, second = (tensor.detach().cpu().double().numpy() for tensor in (values, others))
    if np.isnan(first - second).all():
        return _no_measurement(name, measure)
    estimate = paired_interval(first, second, setup.seed)
    count = int((~np.isnan(first - second)).sum())
    return ClaimMeasurement(name, estimate.mean, estimate.low, estimate.high, count, measure)


def gain_over_trainings(
    name: str,
    runs: Sequence[Tensor],
    others: Sequence[Tensor],
    setup: ClaimSetup,
    measure: str = "",
) -> ClaimMeasurement:
    """The same of several trainings of each, resampled over trainings and images."""
    scores = {
        arm: torch.stack(list(tensors)).detach().cpu().double().numpy()
        for arm, tensors in (("runs", runs), ("others", others))
    }
    estimate = Bootstrap(scores, setup.seed).gain("runs", "others")
    return ClaimMeasurement(
        name, estimate.mean, estimate.low, estimate.high, scores["runs"].shape[1], measure
    )


def _no_measurement(name: str, measure: str) -> ClaimMeasurement:
    """Of no image at all: no interval of it lies above anything."""
    nan = float("nan")
    return ClaimMeasurement(name, nan, nan, nan, 0, measure)


def exact_number(name: str, value: float | int, n: int, measure: str = "") -> ClaimMeasurement:
    """A number that isn't an estimate: a count, a largest error."""
    return ClaimMeasurement(name, float(value), None, None, n, measure)
