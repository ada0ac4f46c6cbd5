"""Matches the units of a student's layers to those of a teacher's layers.

By the correlation of spatial means over images; Li et al. 2016, https://arxiv.org/abs/1511.07543,
match one to one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from camdistill.layers.sweep.statistics.similarity import Match
from camdistill.layers.sweep.statistics.unit_activity import correlation
from camdistill.layers.sweep.sweep_state import zeros


@dataclass(frozen=True)
class MatchSums:
    """Sums of channels' spatial means, of each pair of layers over the images sound at both.

    All are by the student's layer; its partners are the teacher's layers that it is compared with,
    whose channels stand side by side.

    Attributes:
        images: How many, by partner.
        partners: Sums and sums of squares of the partners' channels.
        layer_sums: Sums and sums of squares of the layer's channels, by partner.
        cross: Products.
    """

    images: tuple[Int[Tensor, "_"], ...]
    partners: tuple[Float[Tensor, "2 _"], ...]
    layer_sums: tuple[Float[Tensor, "_ 2 _"], ...]
    cross: tuple[Float[Tensor, "_ _"], ...]

    @classmethod
    def of(
        cls,
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        pairs: Sequence[range],
        finite: tuple[Bool[Tensor, "teacher_layers batch"], Bool[Tensor, "student_layers batch"]],
    ) -> "MatchSums":
        """Of a batch.

        Args:
            teacher: Means [B, C] by layer.
            student: The same.
            pairs: The teacher's layers that each of the student's is compared with.
            finite: Images that count, by layer, of the teacher and of the student.
        """
        teacher_means, student_means = (
            [
                torch.where(teacher_finite[:, None], layer, 0)
                for layer, teacher_finite in zip(part, mask, strict=True)
            ]
            for part, mask in zip((teacher, student), finite, strict=True)
        )
        teacher_finite, student_finite = (mask.to(torch.float64) for mask in finite)
        images, partner_sums, layer_sums, cross = [], [], [], []
        for partners, layer, mask in zip(pairs, student_means, student_finite, strict=True):
            partner_means = torch.cat([teacher_means[place] for place in partners], 1)
            partner_finite = teacher_finite[list(partners)]
            images.append((partner_finite @ mask).long())
            partner_sums.append(torch.stack([mask @ partner_means, mask @ partner_means.square()]))
            layer_sums.append(
                torch.stack([partner_finite @ layer, partner_finite @ layer.square()], 1)
            )
            cross.append(partner_means.T @ layer)
        return cls(tuple(images), tuple(partner_sums), tuple(layer_sums), tuple(cross))

    @classmethod
    def empty(
        cls, teacher: Sequence[int], student: Sequence[int], pairs: Sequence[range]
    ) -> "MatchSums":
        """Of no image, for layers of so many channels."""
        no_means = [[zeros(0, count) for count in channels] for channels in (teacher, student)]
        finite = [
            torch.zeros(len(channels), 0, dtype=torch.bool) for channels in (teacher, student)
        ]
        return cls.of(no_means[0], no_means[1], pairs, (finite[0], finite[1]))

    def merge(self, other: "MatchSums") -> "MatchSums":
        """Of both."""
        sums = [
            tuple(left + right for left, right in zip(left_sums, right_sums, strict=True))
            for left_sums, right_sums in (
                (self.images, other.images),
                (self.partners, other.partners),
                (self.layer_sums, other.layer_sums),
                (self.cross, other.cross),
            )
        ]
        return MatchSums(sums[0], sums[1], sums[2], sums[3])

    @property
    def max_images(self) -> int:
        """Images of the pair of layers that has most."""
        return max((int(counts.max()) for counts in self.images), default=0)

    def matches(
        self,
        teacher: Sequence[tuple[str, int]],
        student: Sequence[str],
        pairs: Sequence[range],
    ) -> tuple[Match, ...]:
        """Of every pair of layers that was asked for and has 2 images or more.

        Args:
            teacher: (name, channels) of its layers.
            student: Names of its layers.
            pairs: As in `of`.
        """
        layer_matches = []
        for layer_index, partners in enumerate(pairs):
            widths = [teacher[place][1] for place in partners]
            blocks = torch.split(self.cross[layer_index], widths)
            sums = torch.split(self.partners[layer_index], widths, 1)
            for partner_index, place in enumerate(partners):
                count = int(self.images[layer_index][partner_index])
                if count < 2:
                    continue
                mean, power = sums[partner_index] / count
                layer_mean, layer_power = self.layer_sums[layer_index][partner_index] / count
                table = correlation(
                    blocks[partner_index] / count - mean[:, None] * layer_mean,
                    power,
                    layer_power,
                    power - mean.square(),
                    layer_power - layer_mean.square(),
                )
                layer_matches.append(_match(teacher[place][0], student[layer_index], table, count))
        return tuple(layer_matches)


def pair_layers(
    teacher: Sequence[int], student: Sequence[int], max_bytes: int
) -> tuple[range, ...]:
    """Which of the teacher's layers each of the student's is compared with.

    All of them if their tables fit; else as many as do, the nearest in depth.

    Args:
        teacher: Channels of its layers.
        student: Channels of its layers.
        max_bytes: Bytes for all tables.
    """
    count = len(teacher)
    for width in range(count, 0, -1):
        pairs = []
        for number in range(len(student)):
            depth = number / max(len(student) - 1, 1) * (count - 1)
            first = min(max(round(depth - (width - 1) / 2), 0), count - width)
            pairs.append(range(first, first + width))
        cells = sum(
            sum(teacher[place] for place in partners) * channels
            for partners, channels in zip(pairs, student, strict=True)
        )
        if 8 * cells <= max_bytes or width == 1:
            return tuple(pairs)
    return ()


def _match(teacher: str, student: str, table: Tensor, images: int) -> Match:
    correlations, best = table.max(0)
    partner = torch.full_like(best, -1)
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    rows, columns = torch.from_numpy(rows), torch.from_numpy(columns)
    partner[columns] = rows
    assigned = torch.full_like(correlations, torch.nan)
    assigned[columns] = table[rows, columns]
    return Match(
        teacher,
        student,
        torch.where((table != 0).any(0), best, -1),
        correlations,
        partner,
        assigned,
        images,
        table.diagonal().clone() if len(table) == table.shape[1] else None,
    )
