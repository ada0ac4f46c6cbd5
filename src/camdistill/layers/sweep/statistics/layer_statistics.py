"""Summaries of one layer's units, as frozen data on the CPU."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class UnitStatistics:
    """What each channel of a layer's output does.

    Attributes:
        images: How many the numbers are of; an image with a value that is not finite counts only
            in the histogram.
        cells: Values of a channel in one image.
        mean: Over all values.
        variance: Over all values, divided by their number.
        largest: Over all values.
        active: Share of values above 0.
        image_active: Share of images in which a value is above 0.
        saturated: Share of values at 99 % of an activation's bound or beyond (sigmoid, tanh,
            ReLU6); None where there is no bound.
        dead: Channels that gave 0 everywhere.
        nearly_dead: Channels above 0 in fewer than one image in a thousand, but not never; empty
            for a layer that doesn't end in a ReLU (or another that cuts at 0).
        always_on: Channels above 0 at more than 99.9 % of places, so that their ReLU does nothing;
            empty likewise.
        bound: 3/N: of how many images, at most (95 % confidence), a channel may be active that was
            so in none of N.
        duplicates: Pairs of channels that do the same up to scale: (channel, channel, correlation
            of means over images), the most alike first; 64 at most.
        duplicate_pairs: How many such pairs there are, those beyond 64 too.
        duplicated: Every channel of such a pair.
    """

    images: int
    cells: int
    mean: Float[Tensor, "channels"]
    variance: Float[Tensor, "channels"]
    largest: Float[Tensor, "channels"]
    active: Float[Tensor, "channels"]
    image_active: Float[Tensor, "channels"]
    saturated: Float[Tensor, "channels"] | None
    dead: tuple[int, ...]
    nearly_dead: tuple[int, ...]
    always_on: tuple[int, ...]
    bound: float
    duplicates: tuple[tuple[int, int, float], ...] = ()
    duplicate_pairs: int = 0
    duplicated: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sparsity:
    """How few carry the activity: 0 is evenly spread, 1 is one alone.

    Population and lifetime sparsity are (1 - mean(r)^2 / mean(r^2)) / (1 - 1/n) of a channel's
    spatial means r (Vinje and Gallant 2000); of |r| where a layer gives negative values.

    Attributes:
        population: Among the channels of an image, averaged over images.
        lifetime: Among the images of a channel, by channel; NaN for one that is 0 throughout.
        hoyer: Hoyer sparsity of all values of the layer together (Hoyer 2004): (sqrt(n) - L1/L2) /
            (sqrt(n) - 1).
        blank: Images without any activity, which population sparsity leaves out.
    """

    population: float
    lifetime: Float[Tensor, "channels"]
    hoyer: float
    blank: int

    @property
    def lifetime_mean(self) -> float:
        """Over channels that are ever active; NaN without any."""
        return float(self.lifetime.nanmean())


@dataclass(frozen=True)
class Rank:
    """In how many directions a layer's spatial means vary over images.

    Attributes:
        effective: exp of the entropy of the normalized singular values (Roy and Vetterli 2007);
            of a matrix's singular values, not of its covariance's eigenvalues.
        participation: (sum of eigenvalues)^2 / sum of their squares.
        saturation: Smallest share of the directions that holds 99 % of the variance.
        possible: min(channels, images - 1): what `effective` could be at most.
        eigenvalues: Eigenvalues of the covariance, the largest first.
    """

    effective: float
    participation: float
    saturation: float
    possible: int
    eigenvalues: Float[Tensor, "channels"]


@dataclass(frozen=True)
class TopImages:
    """Where each channel is most active, at most once in an image, the strongest first.

    Attributes:
        values: NaN beyond the number of images.
        images: The images' numbers (`Batch.ids`); -1 beyond the number of images.
        rows: On the layer's grid.
        columns: On the layer's grid.
    """

    values: Float[Tensor, "channels top"]
    images: Int[Tensor, "channels top"]
    rows: Int[Tensor, "channels top"]
    columns: Int[Tensor, "channels top"]


@dataclass(frozen=True)
class ProbeAccuracy:
    """How well a linear readout of a layer's spatial means tells the label.

    Attributes:
        accuracy: On held-out images, a fifth of all (1,000 at most), by ridge regression on the
            others.
        chance: What the commonest label among the others gets on the held-out ones.
        untrained: Accuracy at the same layer with random weights; NaN if it wasn't measured.
        images: How many were held out.
    """

    accuracy: float
    chance: float
    untrained: float
    images: int


@dataclass(frozen=True)
class CamStatistics:
    """What Grad-CAM looks like at a layer, for the class that the first network finds likeliest.

    Attributes:
        scale: Median over images of the largest value of the ReLU map, in logits per cell.
        scale_low: First quartile of the same.
        scale_high: Third quartile of the same.
        zero_share: Share of images whose ReLU map is 0 everywhere.
        images: How many were explained; without those whose map is not finite.
    """

    scale: float
    scale_low: float
    scale_high: float
    zero_share: float
    images: int
