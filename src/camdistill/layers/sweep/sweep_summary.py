"""The result of a sweep: frozen data on the CPU that needs no network to be read.

A **layer** of a summary is one call of one module, under the name that people use for it: a
residual block "layer1.0", a stage "stage2", a ReLU "relu", and "relu#1" where a module is called
twice. A **point** says which tensor a number is of, without doubt: network, path, number of the
call, and whether it goes into the module ("pre") or comes out of it ("post").
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtyping import Int
from torch import Tensor

from camdistill.layers.sweep.statistics.layer_statistics import (
    CamStatistics,
    ProbeAccuracy,
    Rank,
    Sparsity,
    TopImages,
    UnitStatistics,
)
from camdistill.layers.sweep.statistics.similarity import CamSimilarity, Match, Similarity

Side = Literal["pre", "post"]


class Point(NamedTuple):
    """One tensor of a forward.

    Attributes:
        network: "teacher", "student" or what the sweep was told.
        path: Dotted name inside the bare network.
        call: Number of the call, from 0.
        side: "pre" is what the module is given, "post" what it gives.
    """

    network: str
    path: str
    call: int
    side: Side

    def __str__(self) -> str:
        return f"{self.network}/{self.path}#{self.call}/{self.side}"


@dataclass(frozen=True)
class Histogram:
    """How often which value occurs, in bins that are the same for every tensor.

    `sweep.statistics.histograms` has the bins' edges (`bin_edges`), positive values in log10 units
    (`log10_bins`), other bins (`rebin`) and quantiles (`quantile`).

    Attributes:
        point: Point that names the tensor.
        counts: Per bin, negative values from the largest magnitude up, zero, positive ones; a
            bin is an eighth of an octave.
        nan: Values that are not a number.
        below: Values that are minus infinity.
        above: Values that are infinity.
    """

    point: Point
    counts: Int[Tensor, "bins"]
    nan: int = 0
    below: int = 0
    above: int = 0

    @property
    def nonfinite(self) -> int:
        """Values that are no finite number."""
        return self.nan + self.below + self.above

    @property
    def finite(self) -> int:
        """Values in the bins."""
        return int(self.counts.sum())

    @property
    def total(self) -> int:
        """Every value that was seen."""
        return self.finite + self.nonfinite

    @property
    def zeros(self) -> int:
        """Values that are exactly 0."""
        return int(self.counts[len(self.counts) // 2])

    @property
    def negatives(self) -> int:
        """Finite values below 0."""
        return int(self.counts[: len(self.counts) // 2].sum())

    @property
    def zero_share(self) -> float:
        """Zeros among the finite values; NaN without any."""
        return self.zeros / self.finite if self.finite else float("nan")


@dataclass(frozen=True)
class LayerSummary:
    """A layer of one network.

    Attributes:
        network: Name of the network, as in `SweepResult.networks`.
        name: What people call it; unique in its network.
        order: Place among the network's layers of this sweep, from 0.
        depth: `order` as a share, in [0, 1].
        shape: Channels, height and width of the output; (1, 1) for a vector.
        post: Histogram of the output: after the non-linearity.
        pre: Histogram of what the layer's last non-linearity was given; None without one.
        units, sparsity, rank, top: Of the output.
        probe: None if not asked for.
        cams: None if not asked for, or where the output has no spatial size.
    """

    network: str
    name: str
    order: int
    depth: float
    shape: tuple[int, int, int]
    post: Histogram
    pre: Histogram | None
    units: UnitStatistics
    sparsity: Sparsity
    rank: Rank
    top: TopImages
    probe: ProbeAccuracy | None = None
    cams: CamStatistics | None = None

    @property
    def channels(self) -> int:
        """Number of units."""
        return self.shape[0]

    @property
    def spatial(self) -> bool:
        """Whether the output has more than one cell."""
        return self.shape[1] * self.shape[2] > 1

    @property
    def all_nonfinite(self) -> bool:
        """Whether every image has values that are not finite, so that there are no statistics."""
        return self.units.images == 0 and self.post.nonfinite > 0

    @property
    def rectified(self) -> bool:
        """Whether no value is below 0."""
        return self.post.negatives == 0

    @property
    def title(self) -> str:
        """Network, layer, and of which tensor the numbers are: "student stage2 (post, 128 x 8x8)".

        Many a plot of others leaves open whether it is before or after the non-linearity.
        """
        channels, height, width = self.shape
        return f"{self.network} {self.name} ({self.post.point.side}, {channels} x {height}x{width})"


@dataclass(frozen=True)
class SweepResult:
    """Everything that one pass over a data set told.

    Attributes:
        networks: Layers by network, in the order in which they run; the first network is the one
            that the second is compared with ("teacher", then "student").
        images: How many were seen.
        used: By statistic ("histogram", "units", "top", "cka", "matching", "probe", "grad_cam"),
            how many images it used at most; a layer that met values which are not finite says its
            own number.
        similarity: None if not asked for.
        matches: For each student's layer, with the teacher's layers it was compared with and shares
            2 images with, whose values are finite at both.
        cam_similarity: None with one network, if not asked for, or if all layers of one network are
            vectors.
        notes: What a reader must know: what was sampled, what was left out and why.
    """

    networks: Mapping[str, tuple[LayerSummary, ...]]
    images: int
    used: Mapping[str, int]
    similarity: Similarity | None = None
    matches: tuple[Match, ...] = ()
    cam_similarity: CamSimilarity | None = None
    notes: tuple[str, ...] = ()

    def layer(self, network: str, name: str) -> LayerSummary:
        """One layer.

        Raises:
            KeyError: There is none of this name.
        """
        fitting = [layer for layer in self.networks[network] if layer.name == name]
        if not fitting:
            raise KeyError(f"no layer {name!r} of {network!r} in this sweep")
        return fitting[0]
