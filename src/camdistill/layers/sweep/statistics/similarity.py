"""Similarity of two networks' layers and units."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Match:
    """Which channel of a teacher's layer each channel of a student's layer follows.

    Attributes:
        teacher: Name of the layer.
        student: Name of the layer.
        best: The teacher's channel that correlates most, over images, of spatial means; -1 for a
            channel that doesn't vary.
        correlation: With that channel.
        partner: A one-to-one assignment with the largest sum of correlations (Li et al. 2016); -1
            where there are more student's channels than teacher's.
        partner_correlation: With that channel; NaN without one.
        images: How many the correlations are of.
        same: With the teacher's channel of the same number, where both layers have as many; None
            where they don't.
    """

    teacher: str
    student: str
    best: Int[Tensor, "student_channels"]
    correlation: Float[Tensor, "student_channels"]
    partner: Int[Tensor, "student_channels"]
    partner_correlation: Float[Tensor, "student_channels"]
    images: int
    same: Float[Tensor, "student_channels"] | None = None


@dataclass(frozen=True)
class Similarity:
    """Linear CKA between all layers of all networks (Kornblith et al. 2019; Nguyen et al. 2021).

    The estimator is unbiased for any batch: independent layers have 0 on average, and single
    values may be below 0.

    Attributes:
        layers: (network, name) of each row and column.
        cka: NaN where it can't be told; `reasons` says why.
        reasons: By (row, column), row <= column.
        images: How many took part, at most: of a pair of layers those whose values are finite at
            both; a group of fewer than 4 can't.
        batches: In how many groups, at most, of at most 64 images each.
    """

    layers: tuple[tuple[str, str], ...]
    cka: Float[Tensor, "layers layers"]
    reasons: Mapping[tuple[int, int], str]
    images: int
    batches: int

    def between(self, rows: str, columns: str) -> Float[Tensor, "row_layers column_layers"]:
        """The part of the matrix that compares two networks, or one with itself."""
        networks = [network for network, _ in self.layers]
        masks = [
            torch.tensor([name == network_name for name in networks])
            for network_name in (rows, columns)
        ]
        return self.cka[masks[0]][:, masks[1]]

    def names(self, network: str) -> tuple[str, ...]:
        """The layers of a network, in the order of `between`."""
        return tuple(name for whose, name in self.layers if whose == network)


@dataclass(frozen=True)
class CamSimilarity:
    """How alike two networks' Grad-CAM maps are, of the same class.

    Attributes:
        teacher: Names of its layers.
        student: Names of its layers.
        cosine: Mean over images of the cosine of ReLU maps on the smaller of the two grids; 0 for
            an image of which one map is blank; NaN without an image that has both.
        images: How many have both maps, at most.
    """

    teacher: tuple[str, ...]
    student: tuple[str, ...]
    cosine: Float[Tensor, "teacher_layers student_layers"]
    images: int
