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
from camdistill.measure.intervals import Interval, interval, paired_interval
from camdistill.networks.teachers import Preprocessed
from camdistill.types import Images, Labels, Masks


@dataclass(frozen=True)
class Measured:
    """One number of ours.

    Attributes:
        name: What was measured: a method, a network, "grad_cam - gradient".
        value: A mean over n, or a count.
        low: Lower bound of the 95 % interval; None where the number is exact.
        high: Upper bound.
        n: Images (or whatever the mean is over).
        of: By which measure; rows of one measure share an axis and a table.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    of: str = ""

    @property
    def above(self) -> bool:
        """Whether the whole interval lies above 0."""
        return (self.value if self.low is None else self.low) > 0

    @property
    def interval(self) -> Interval:
        """With NaN for bounds that aren't there."""
        bounds = (float("nan") if bound is None else bound for bound in (self.low, self.high))
        return Interval(self.value, *bounds)


@dataclass(frozen=True)
class Row:
    """A claim of the paper beside what was found here.

    Attributes:
        number: Of the claim, as in `everything.ROWS`.
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
    ours: tuple[Measured, ...]
    criterion: str
    passed: bool | None
    note: str = ""


@dataclass(frozen=True)
class Lab:
    """What every experiment may use.

    Attributes:
        teacher: A trained network of Shapes: takes images in [0, 1], in eval mode, frozen.
        student: A shallow one.
        shapes: Draws the held-out images, of one object, at 32 pixels.
        ids: The images that are looked at.
        seed: Of every random choice.
        device: Where networks are.
        folder: Keeps the little networks that experiments train; see `training.trained`.
        boxes: An image folder with a boxes.csv, where one was given.
        tell: Takes a few words on what is being done.
    """

    teacher: Preprocessed
    student: Preprocessed
    shapes: Shapes
    ids: NDArray[np.int64]
    seed: int
    device: str
    folder: Path
    boxes: Path | None = None
    tell: Callable[[str], None] = field(default=lambda _: None, compare=False)

    @property
    def count(self) -> int:
        """How many images are looked at."""
        return len(self.ids)

    def generator(self, purpose: str) -> torch.Generator:
        """A stream of its own for each purpose, on the CPU."""
        seed = np.random.SeedSequence([self.seed, *purpose.encode()]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))


Claim = Callable[[Lab], Row]


class Drawn(NamedTuple):
    """Images of Shapes as tensors.

    Attributes:
        images: In [0, 1].
        labels: The object's class.
        seconds: The second object's class; the first one's where there is one object.
        masks: By name; see `data.shapes.Rendered`.
    """

    images: Images
    labels: Labels
    seconds: Labels
    masks: dict[str, Masks]


def drawn(lab: Lab, shapes: Shapes | None = None) -> Drawn:
    """The lab's images, or those of another drawer, with all that is known of them."""
    rendered = (shapes or lab.shapes).render(lab.ids)
    labels = torch.from_numpy(rendered.labels).to(lab.device)
    seconds = rendered.second_labels
    return Drawn(
        as_images(torch.from_numpy(rendered.pixels).to(lab.device)),
        labels,
        labels if seconds is None else torch.from_numpy(seconds).to(lab.device),
        {name: torch.from_numpy(mask).to(lab.device) for name, mask in rendered.masks.items()},
    )


def mean(name: str, values: Tensor, lab: Lab, of: str = "") -> Measured:
    """A mean over images with its bootstrap interval; NaN is left out, and not counted."""
    found = values.detach().cpu().double().numpy()
    if np.isnan(found).all():
        return _nothing(name, of)
    low = interval(found, lab.seed)
    return Measured(name, low.mean, low.low, low.high, int((~np.isnan(found)).sum()), of)


def gain(name: str, values: Tensor, others: Tensor, lab: Lab, of: str = "") -> Measured:
    """The mean of values - others over the same images, with its paired bootstrap interval."""
    first, second = (one.detach().cpu().double().numpy() for one in (values, others))
    if np.isnan(first - second).all():
        return _nothing(name, of)
    found = paired_interval(first, second, lab.seed)
    count = int((~np.isnan(first - second)).sum())
    return Measured(name, found.mean, found.low, found.high, count, of)


def trained_gain(
    name: str, runs: Sequence[Tensor], others: Sequence[Tensor], lab: Lab, of: str = ""
) -> Measured:
    """The same of several trainings of each, resampled over trainings and images."""
    scores = {
        arm: torch.stack(list(each)).detach().cpu().double().numpy()
        for arm, each in (("runs", runs), ("others", others))
    }
    found = Bootstrap(scores, lab.seed).gain("runs", "others")
    return Measured(name, found.mean, found.low, found.high, scores["runs"].shape[1], of)


def _nothing(name: str, of: str) -> Measured:
    """Of no image at all: no interval of it lies above anything."""
    nan = float("nan")
    return Measured(name, nan, nan, nan, 0, of)


def exact(name: str, value: float | int, n: int, of: str = "") -> Measured:
    """A number that isn't an estimate: a count, a largest error."""
    return Measured(name, float(value), None, None, n, of)
