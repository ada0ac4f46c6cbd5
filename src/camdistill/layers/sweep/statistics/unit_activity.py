"""Activity, sparsity and rank of each channel, from sums over images.

A batch is first reduced to numbers by image and channel, then summed in float64; sums don't depend
on how images were split into batches, counts not even in their last bit. An image with a value
that is not finite is left out of a layer's sums as a whole, and counted by the histogram.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camdistill.layers.sweep.reduction import BatchReduction
from camdistill.layers.sweep.statistics.layer_statistics import Rank, Sparsity, UnitStatistics
from camdistill.layers.sweep.sweep_state import zero_counts, zeros

NEARLY_DEAD = 1e-3  # active in a smaller share of images
ALWAYS_ON = 0.999  # active in a larger share of places
DUPLICATE = 0.999  # correlation of spatial means over images
FEWEST_ACTIVE = 20  # images in which a unit must be active to be called another's duplicate
SAME_SCALE = 0.02  # how far a duplicate's mean and maximum may differ in scale, as log
SAME_ACTIVE = 0.01  # how far its share of active places may
MOST_DUPLICATES = 64  # pairs kept of a layer; all are counted
VARIES = 1e-12  # variance over the mean square below which a channel is constant, by rounding


@dataclass(frozen=True)
class UnitSums:
    """Sums over images; r is a channel's spatial mean in an image.

    Attributes:
        images: Sound ones.
        cells: Values of a channel, over all images.
        total: Sum of r.
        magnitude: Sum of |r|.
        outer: Sum of r r'.
        squares: Squares of all values.
        magnitudes: Magnitudes of all values.
        largest: Largest of all values; minus infinity without any.
        active: Values above 0.
        image_active: Images with a value above 0.
        saturated: Values at the bound.
        population: Sum over images of population sparsity, and images that have none.
    """

    images: Int[Tensor, ""]
    cells: Int[Tensor, ""]
    total: Float[Tensor, "channels"]
    magnitude: Float[Tensor, "channels"]
    outer: Float[Tensor, "channels channels"]
    squares: Float[Tensor, "channels"]
    magnitudes: Float[Tensor, "channels"]
    largest: Float[Tensor, "channels"]
    active: Int[Tensor, "channels"]
    image_active: Int[Tensor, "channels"]
    saturated: Int[Tensor, "channels"]
    population: Float[Tensor, "2"]

    @classmethod
    def empty(cls, channels: int) -> "UnitSums":
        """Of no image."""
        return cls(
            images=zero_counts(),
            cells=zero_counts(),
            total=zeros(channels),
            magnitude=zeros(channels),
            outer=zeros(channels, channels),
            squares=zeros(channels),
            magnitudes=zeros(channels),
            largest=torch.full((channels,), -torch.inf, dtype=torch.float64),
            active=zero_counts(channels),
            image_active=zero_counts(channels),
            saturated=zero_counts(channels),
            population=zeros(2),
        )

    @classmethod
    def of(cls, batch: BatchReduction) -> "UnitSums":
        """Of a batch."""
        finite_rows = batch.finite.nonzero().flatten()
        images, channels = len(finite_rows), batch.mean.shape[1]
        if images == 0:
            return cls.empty(channels)
        means, largest = batch.mean[finite_rows], batch.largest[finite_rows]
        return cls(
            torch.tensor(images),
            torch.tensor(images * batch.cells),
            means.sum(0),
            means.abs().sum(0),
            means.T @ means,
            batch.squares[finite_rows].sum(0),
            batch.magnitudes[finite_rows].sum(0),
            largest.amax(0),
            batch.active[finite_rows].sum(0).long(),
            (largest > 0).sum(0),
            batch.saturated[finite_rows].sum(0).long(),
            _population_sums(means),
        )

    def merge(self, other: "UnitSums") -> "UnitSums":
        """Of both."""
        return UnitSums(
            self.images + other.images,
            self.cells + other.cells,
            self.total + other.total,
            self.magnitude + other.magnitude,
            self.outer + other.outer,
            self.squares + other.squares,
            self.magnitudes + other.magnitudes,
            torch.maximum(self.largest, other.largest),
            self.active + other.active,
            self.image_active + other.image_active,
            self.saturated + other.saturated,
            self.population + other.population,
        )

    def units(self, *, gated: bool, bounded: bool) -> UnitStatistics:
        """What is told of each channel.

        Args:
            gated: Whether the layer's non-linearity cuts at 0.
            bounded: Whether its non-linearity has a bound.
        """
        images, cells = int(self.images), max(int(self.cells), 1)
        nan_or_zero = float("nan") if images == 0 else 0.0
        mean = self.total / images if images else self.total + nan_or_zero
        variance = (self.squares / cells - mean.square()).clamp_min(0) + nan_or_zero
        active = self.active.double() / cells + nan_or_zero
        image_active = self.image_active.double() / max(images, 1) + nan_or_zero
        dead = (self.magnitudes == 0) & (images > 0)
        first, second, alike = self._duplicates()
        most_alike = [part[:MOST_DUPLICATES].tolist() for part in (first, second, alike)]
        nearly = (image_active < NEARLY_DEAD) & (image_active > 0) & gated
        return UnitStatistics(
            images=images,
            cells=cells // images if images else 0,
            mean=mean,
            variance=variance,
            largest=self.largest + nan_or_zero,
            active=active,
            image_active=image_active,
            saturated=self.saturated.double() / cells + nan_or_zero if bounded else None,
            dead=_channel_ids(dead),
            nearly_dead=_channel_ids(nearly),
            always_on=_channel_ids((active > ALWAYS_ON) & gated),
            bound=min(3 / images, 1.0) if images else float("nan"),
            duplicates=tuple(
                (channel, partner, min(value, 1.0))
                for channel, partner, value in zip(*most_alike, strict=True)
            ),
            duplicate_pairs=len(first),
            duplicated=tuple(sorted({*first.tolist(), *second.tolist()})),
        )

    def sparsity(self) -> Sparsity:
        """Population, lifetime and Hoyer's."""
        images, (population, blank) = int(self.images), self.population.tolist()
        channels, active_images = len(self.total), int(self.images) - int(blank)
        lifetime = torch.full((channels,), torch.nan, dtype=torch.float64)
        squares = self.outer.diagonal()
        if images > 1:
            lifetime = _treves_rolls(self.magnitude, squares, images)
        count = int(self.cells) * channels
        total, norm = float(self.magnitudes.sum()), float(self.squares.sum()) ** 0.5
        hoyer = float("nan")
        if norm > 0 and count > 1:
            hoyer = (count**0.5 - total / norm) / (count**0.5 - 1)
        return Sparsity(
            population=population / active_images
            if active_images and channels > 1
            else float("nan"),
            lifetime=lifetime,
            hoyer=hoyer,
            blank=int(blank),
        )

    def covariance(self) -> Float[Tensor, "channels channels"]:
        """Of the spatial means over images, divided by their number; needs an image."""
        mean = self.total / self.images
        return self.outer / self.images - mean[:, None] * mean

    def rank(self) -> Rank:
        """Of the spatial means; NaN with fewer than 2 images or without variation."""
        channels, images = len(self.total), int(self.images)
        possible = max(min(channels, images - 1), 0)
        if images < 2:
            nothing = torch.full((channels,), torch.nan, dtype=torch.float64)
            return Rank(torch.nan, torch.nan, torch.nan, possible, nothing)
        values = torch.linalg.eigvalsh(self.covariance()).flip(0).clamp_min(0)
        # What rounding leaves of channels that don't vary is no direction.
        values[values <= VARIES * float(self.outer.diagonal().sum() / images)] = 0
        if float(values.sum()) == 0:
            return Rank(torch.nan, torch.nan, torch.nan, possible, values)
        singular = values.sqrt()
        shares = singular / singular.sum()
        needed = int((values.cumsum(0) < 0.99 * values.sum()).sum()) + 1
        return Rank(
            effective=float(torch.special.entr(shares).sum().exp()),
            participation=float(values.sum() ** 2 / values.square().sum()),
            saturation=needed / channels,
            possible=possible,
            eigenvalues=values,
        )

    def _duplicates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of channels and their correlations, the most alike first.

        Means that correlate aren't enough: two channels that are active in the same one image do.
        They must be active often, in as many places, and of one scale in mean and maximum.
        """
        nothing = zero_counts(0)
        if int(self.images) < 2:
            return nothing, nothing, zeros(0)
        correlations = correlation(
            self.covariance(), *[self.outer.diagonal() / self.images] * 2
        ).triu(1)
        first, second = (correlations >= DUPLICATE).nonzero(as_tuple=True)
        rarest = torch.minimum(self.image_active[first], self.image_active[second])
        places = (self.active[first] - self.active[second]).abs() / self.cells
        mean, largest = (
            (values[first] / values[second]).abs() for values in (self.total, self.largest)
        )
        # NaN and infinity, of channels that are 0, fail the comparison.
        same = (mean / largest).log().abs() <= SAME_SCALE
        same &= (rarest >= FEWEST_ACTIVE) & (places <= SAME_ACTIVE)
        first, second = first[same], second[same]
        values = correlations[first, second]
        order = values.argsort(descending=True, stable=True)
        return first[order], second[order], values[order]


def correlation(
    cross: Float[Tensor, "rows columns"],
    row_squares: Float[Tensor, "rows"],
    column_squares: Float[Tensor, "columns"],
    row_variance: Float[Tensor, "rows"] | None = None,
    column_variance: Float[Tensor, "columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """Correlations from covariances; 0 with a channel that doesn't vary.

    Args:
        cross: Covariances.
        row_squares: Mean squares, which tell what is rounding.
        column_squares: The same of the columns.
        row_variance: The diagonal of `cross` if None.
        column_variance: The diagonal of `cross` if None.
    """
    rows = cross.diagonal() if row_variance is None else row_variance
    columns = cross.diagonal() if column_variance is None else column_variance
    scale = [
        torch.where(variance > VARIES * squares, variance, torch.inf).rsqrt()
        for variance, squares in ((rows, row_squares), (columns, column_squares))
    ]
    return cross * scale[0][:, None] * scale[1]


def _treves_rolls(total: Tensor, squares: Tensor, count: int) -> Tensor:
    """(1 - mean(r)^2 / mean(r^2)) / (1 - 1/n); NaN where r is 0 throughout."""
    even = (total / count).square() / (squares / count)
    return ((1 - even) / (1 - 1 / count)).clamp_min(0)


def _population_sums(means: Float[Tensor, "batch channels"]) -> Float[Tensor, "2"]:
    channels = means.shape[1]
    if channels == 1:
        return zeros(2)
    values = _treves_rolls(means.abs().sum(1), means.square().sum(1), channels)
    defined = ~values.isnan()
    return torch.stack([values[defined].sum(), (~defined).sum().double()])


def _channel_ids(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())
