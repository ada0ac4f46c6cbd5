"""Which units of a teacher's layers the units of a student's layers follow.

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
        own: Sums and sums of squares of the layer's channels, by partner.
        cross: Products.
    """

    images: tuple[Int[Tensor, "_"], ...]
    partners: tuple[Float[Tensor, "2 _"], ...]
    own: tuple[Float[Tensor, "_ 2 _"], ...]
    cross: tuple[Float[Tensor, "_ _"], ...]

    @classmethod
    def of(
        cls,
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        pairs: Sequence[range],
        sound: tuple[Bool[Tensor, "teacher_layers batch"], Bool[Tensor, "student_layers batch"]],
    ) -> "MatchSums":
        """Of a batch.

        Args:
            teacher: Means [B, C] by layer.
            student: The same.
            pairs: The teacher's layers that each of the student's is compared with.
            sound: Images that count, by layer, of the teacher and of the student.
        """
        first, second = (
            [torch.where(good[:, None], layer, 0) for layer, good in zip(part, mask, strict=True)]
            for part, mask in zip((teacher, student), sound, strict=True)
        )
        good, its = (mask.to(torch.float64) for mask in sound)
        images, sums, own, cross = [], [], [], []
        for partners, layer, mask in zip(pairs, second, its, strict=True):
            whole = torch.cat([first[place] for place in partners], 1)
            chosen = good[list(partners)]
            images.append((chosen @ mask).long())
            sums.append(torch.stack([mask @ whole, mask @ whole.square()]))
            own.append(torch.stack([chosen @ layer, chosen @ layer.square()], 1))
            cross.append(whole.T @ layer)
        return cls(tuple(images), tuple(sums), tuple(own), tuple(cross))

    @classmethod
    def empty(
        cls, teacher: Sequence[int], student: Sequence[int], pairs: Sequence[range]
    ) -> "MatchSums":
        """Of no image, for layers of so many channels."""
        nothing = [[zeros(0, count) for count in channels] for channels in (teacher, student)]
        sound = [torch.zeros(len(channels), 0, dtype=torch.bool) for channels in (teacher, student)]
        return cls.of(nothing[0], nothing[1], pairs, (sound[0], sound[1]))

    def merged(self, other: "MatchSums") -> "MatchSums":
        """Of both."""
        sums = [
            tuple(one + two for one, two in zip(mine, its, strict=True))
            for mine, its in (
                (self.images, other.images),
                (self.partners, other.partners),
                (self.own, other.own),
                (self.cross, other.cross),
            )
        ]
        return MatchSums(sums[0], sums[1], sums[2], sums[3])

    @property
    def most(self) -> int:
        """Images of the pair of layers that has most."""
        return max((int(one.max()) for one in self.images), default=0)

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
        found = []
        for number, partners in enumerate(pairs):
            widths = [teacher[place][1] for place in partners]
            blocks = torch.split(self.cross[number], widths)
            sums = torch.split(self.partners[number], widths, 1)
            for order, place in enumerate(partners):
                count = int(self.images[number][order])
                if count < 2:
                    continue
                mean, power = sums[order] / count
                own_mean, own_power = self.own[number][order] / count
                table = correlation(
                    blocks[order] / count - mean[:, None] * own_mean,
                    power,
                    own_power,
                    power - mean.square(),
                    own_power - own_mean.square(),
                )
                found.append(_match(teacher[place][0], student[number], table, count))
        return tuple(found)


def compared(teacher: Sequence[int], student: Sequence[int], room: int) -> tuple[range, ...]:
    """Which of the teacher's layers each of the student's is compared with.

    All of them if their tables fit; else as many as do, the nearest in depth.

    Args:
        teacher: Channels of its layers.
        student: Channels of its layers.
        room: Bytes for all tables.
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
        if 8 * cells <= room or width == 1:
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
