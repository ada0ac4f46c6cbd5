"""How alike layers are: CKA between all of them, and which units follow which.

Linear CKA (Kornblith et al. 2019, https://arxiv.org/abs/1905.00414) from minibatches, with the
unbiased estimator of HSIC (Song et al. 2012, eq. 5; Nguyen et al. 2021, appendix A.1,
https://arxiv.org/abs/2010.15327), which has the same expectation for every batch size. The biased
one is near 1 for unrelated layers on small batches and isn't offered. For Gram matrices K, L of a
batch with their diagonals set to 0:

    HSIC = [tr(K L) + (1'K 1)(1'L 1) / ((n-1)(n-2)) - 2 / (n-2) 1'K L 1] / (n (n-3))
    CKA = sum_b n_b HSIC_b(K, L) / sqrt(sum_b n_b HSIC_b(K, K) . sum_b n_b HSIC_b(L, L))

Over all pairs of layers at once these are three matrix products. A batch is compared in groups of
at most 64 images, which count by their images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from camdistill.layers.state import counts, zeros
from camdistill.layers.summary import Match, Similarity
from camdistill.layers.units import correlation

FEWEST = 4  # images that HSIC can be estimated from
GROUP = 64  # images compared at once, at most
# HSIC of a layer with itself, over the mean square of its Gram matrix, below which the layer is
# constant by float32's rounding.
CONSTANT = 1e-9


def groups(images: int) -> list[int]:
    """Sizes of the groups that a batch is compared in, as even as can be.

    What a group of n images costs grows as n^2, what it tells as n; at 64 minibatch CKA is within
    0.01 of the whole set's (512 images, 21 layers).
    """
    count = -(-images // GROUP)
    return [images // count + (place < images % count) for place in range(count)]


def grams(output: Tensor) -> list[Float[Tensor, "_ _"]]:
    """Inner products of the images' activations, by group, in full float32 or wider."""
    if output.dim() == 4 and output.is_contiguous(memory_format=torch.channels_last):
        output = output.permute(0, 2, 3, 1)  # the order doesn't matter, a copy would
    flat = output.reshape(len(output), -1)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(flat.device.type, enabled=False):
            return [part @ part.T for part in torch.split(flat, groups(len(flat)))]
    finally:
        torch.set_float32_matmul_precision(precision)


@dataclass(frozen=True)
class CkaSums:
    """Sums over groups, each times its images.

    Attributes:
        images: Of groups that took part.
        groups: How many took part.
        hsic: Of all pairs of layers.
        power: Mean square of the Gram matrices without their diagonals.
    """

    images: Int[Tensor, ""]
    groups: Int[Tensor, ""]
    hsic: Float[Tensor, "layers layers"]
    power: Float[Tensor, "layers"]

    @classmethod
    def empty(cls, layers: int) -> "CkaSums":
        """Of no image."""
        return cls(counts(), counts(), zeros(layers, layers), zeros(layers))

    @classmethod
    def of(cls, products: Sequence[Sequence[Tensor]], sound: Bool[Tensor, "batch"]) -> "CkaSums":
        """Of a batch.

        Args:
            products: What `grams` gave, by layer.
            sound: Images whose activations are finite at every layer; the others are left out.
        """
        found = cls.empty(len(products))
        for number, good in enumerate(torch.split(sound, groups(len(sound)))):
            found = found.merged(cls._of_group([layer[number] for layer in products], good))
        return found

    @classmethod
    def _of_group(cls, products: Sequence[Tensor], sound: Tensor) -> "CkaSums":
        chosen = sound.nonzero().flatten()
        count = len(chosen)
        if count < FEWEST:
            return cls.empty(len(products))
        whole = torch.stack([one.cpu() for one in products]).double()
        if count < len(sound):
            whole = whole[:, chosen[:, None], chosen]
        whole.diagonal(dim1=1, dim2=2).zero_()
        rows, flat = whole.sum(2), whole.flatten(1)
        totals = rows.sum(1)
        hsic = flat @ flat.T
        power = hsic.diagonal() / (count * (count - 1))
        hsic = hsic + totals[:, None] * totals / ((count - 1) * (count - 2))
        hsic = (hsic - rows @ rows.T * (2 / (count - 2))) / (count * (count - 3))
        return cls(torch.tensor(count), torch.tensor(1), count * hsic, count * power)

    def merged(self, other: "CkaSums") -> "CkaSums":
        """Of both."""
        return CkaSums(
            self.images + other.images,
            self.groups + other.groups,
            self.hsic + other.hsic,
            self.power + other.power,
        )

    def similarity(self, layers: Sequence[tuple[str, str]]) -> Similarity:
        """CKA, with the reason wherever there is none.

        Args:
            layers: (network, name) of each.
        """
        own = self.hsic.diagonal()
        constant = own <= CONSTANT * self.power
        scale = torch.where(constant, torch.nan, own).rsqrt()
        cka = self.hsic * scale[:, None] * scale
        reasons: dict[tuple[int, int], str] = {}
        for row in range(len(layers)):
            for column in range(row, len(layers)):
                if int(self.images) == 0:
                    reasons[row, column] = f"no group had {FEWEST} sound images or more"
                elif constant[row] or constant[column]:
                    network, name = layers[row if constant[row] else column]
                    reasons[row, column] = f"{network} {name} is the same for every image"
        return Similarity(tuple(layers), cka, reasons, int(self.images), int(self.groups))


@dataclass(frozen=True)
class MatchSums:
    """Sums over images that are finite at every layer, of channels' spatial means.

    Attributes:
        images: How many.
        totals: Sum, of the teacher's layers and of the student's, one after another.
        squares: Sum of squares of the same.
        cross: For each of the student's layers, products with the teacher's channels that it is
            compared with.
    """

    images: Int[Tensor, ""]
    totals: tuple[Float[Tensor, "_"], ...]
    squares: tuple[Float[Tensor, "_"], ...]
    cross: tuple[Float[Tensor, "_ _"], ...]

    @classmethod
    def of(
        cls,
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        pairs: Sequence[range],
        sound: Bool[Tensor, "batch"],
    ) -> "MatchSums":
        """Of a batch.

        Args:
            teacher: Means [B, C] by layer.
            student: The same.
            pairs: The teacher's layers that each of the student's is compared with.
            sound: Images that count.
        """
        chosen = sound.nonzero().flatten()
        first = [layer[chosen] for layer in teacher]
        second = [layer[chosen] for layer in student]
        return cls(
            torch.tensor(len(chosen)),
            tuple(layer.sum(0) for layer in (*first, *second)),
            tuple(layer.square().sum(0) for layer in (*first, *second)),
            tuple(
                torch.cat([first[place] for place in partners], 1).T @ layer
                for partners, layer in zip(pairs, second, strict=True)
            ),
        )

    @classmethod
    def empty(
        cls, teacher: Sequence[int], student: Sequence[int], pairs: Sequence[range]
    ) -> "MatchSums":
        """Of no image, for layers of so many channels."""
        nothing = [[zeros(0, count) for count in channels] for channels in (teacher, student)]
        return cls.of(nothing[0], nothing[1], pairs, torch.zeros(0, dtype=torch.bool))

    def merged(self, other: "MatchSums") -> "MatchSums":
        """Of both."""
        sums = [
            tuple(one + two for one, two in zip(mine, its, strict=True))
            for mine, its in (
                (self.totals, other.totals),
                (self.squares, other.squares),
                (self.cross, other.cross),
            )
        ]
        return MatchSums(self.images + other.images, sums[0], sums[1], sums[2])

    def matches(
        self, teacher: Sequence[str], student: Sequence[str], pairs: Sequence[range]
    ) -> tuple[Match, ...]:
        """Of every pair of layers that was asked for; none with fewer than 2 images."""
        count = int(self.images)
        if count < 2:
            return ()
        means = [total / count for total in self.totals]
        powers = [square / count for square in self.squares]
        variances = [power - mean.square() for power, mean in zip(powers, means, strict=True)]
        found = []
        for number, partners in enumerate(pairs):
            own = len(teacher) + number
            blocks = torch.split(self.cross[number], [len(means[place]) for place in partners])
            for place, block in zip(partners, blocks, strict=True):
                cross = block / count - means[place][:, None] * means[own]
                table = correlation(
                    cross, powers[place], powers[own], variances[place], variances[own]
                )
                found.append(_match(teacher[place], student[number], table, count))
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
