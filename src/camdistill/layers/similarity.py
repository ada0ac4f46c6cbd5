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

from camdistill.layers.likeness import Match, Similarity
from camdistill.layers.state import counts, zeros
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
    """Sums over groups, each times its images: every pair of layers by the images sound at both.

    Attributes:
        images: Of groups in which a pair took part.
        groups: In how many it did.
        hsic: Of the pair.
        own: Of the row's layer with itself, over the same images.
        power: Mean square of the row's Gram matrix without its diagonal, over the same images.
    """

    images: Int[Tensor, "layers layers"]
    groups: Int[Tensor, "layers layers"]
    hsic: Float[Tensor, "layers layers"]
    own: Float[Tensor, "layers layers"]
    power: Float[Tensor, "layers layers"]

    @classmethod
    def empty(cls, layers: int) -> "CkaSums":
        """Of no image."""
        sums = [zeros(layers, layers) for _ in range(3)]
        return cls(counts(layers, layers), counts(layers, layers), *sums)

    @classmethod
    def of(
        cls, products: Sequence[Sequence[Tensor]], sound: Bool[Tensor, "layers batch"]
    ) -> "CkaSums":
        """Of a batch.

        Args:
            products: What `grams` gave, by layer.
            sound: Images whose activations are finite, by layer.
        """
        found = cls.empty(len(products))
        for number, good in enumerate(torch.split(sound, groups(sound.shape[1]), 1)):
            found = found.merged(cls._of_group([layer[number] for layer in products], good))
        return found

    @classmethod
    def _of_group(cls, products: Sequence[Tensor], sound: Tensor) -> "CkaSums":
        whole = torch.stack([one.cpu() for one in products]).double()
        whole.diagonal(dim1=1, dim2=2).zero_()
        if sound.all():
            count = torch.tensor(float(sound.shape[1]), dtype=torch.float64)
            hsic, own, power = _hsic(whole, count)
        else:
            good = sound.double()
            whole = torch.where(sound[:, :, None] & sound[:, None], whole, 0)
            count = good @ good.T
            hsic, own, power = _hsic_of_both(whole, good, count)
        told = (count >= FEWEST).expand_as(hsic)
        count = count.expand_as(hsic)
        sums = [torch.where(told, count * one, 0) for one in (hsic, own, power)]
        return cls(torch.where(told, count, 0).long(), told.long(), *sums)

    def merged(self, other: "CkaSums") -> "CkaSums":
        """Of both."""
        return CkaSums(
            self.images + other.images,
            self.groups + other.groups,
            self.hsic + other.hsic,
            self.own + other.own,
            self.power + other.power,
        )

    def similarity(self, layers: Sequence[tuple[str, str]]) -> Similarity:
        """CKA, with the reason wherever there is none.

        Args:
            layers: (network, name) of each.
        """
        constant = self.own <= CONSTANT * self.power
        scale = torch.where(constant, torch.nan, self.own).rsqrt()
        cka = self.hsic * scale * scale.T
        reasons: dict[tuple[int, int], str] = {}
        told = self.images > 0
        for row in range(len(layers)):
            for column in range(row, len(layers)):
                lost = [place for place in (row, column) if not told[place, place]]
                if lost and told.any():
                    network, name = layers[lost[0]]
                    reasons[row, column] = (
                        f"{network} {name} has no group with {FEWEST} images whose values are "
                        "finite"
                    )
                elif not told[row, column]:
                    reasons[row, column] = f"no group had {FEWEST} sound images or more"
                elif constant[row, column] or constant[column, row]:
                    network, name = layers[row if constant[row, column] else column]
                    reasons[row, column] = f"{network} {name} is the same for every image"
        most = [int(one.max()) if len(layers) else 0 for one in (self.images, self.groups)]
        return Similarity(tuple(layers), cka, reasons, most[0], most[1])


def _hsic(whole: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """HSIC of all pairs, of each layer with itself, and power, of Gram matrices [L, n, n]."""
    rows, flat = whole.sum(2), whole.flatten(1)
    products = flat @ flat.T
    hsic = _estimate(products, rows.sum(1)[:, None] * rows.sum(1), rows @ rows.T, count)
    power = products.diagonal() / (count * (count - 1))
    return hsic, hsic.diagonal()[:, None].expand_as(hsic), power[:, None].expand_as(hsic)


def _hsic_of_both(
    whole: Tensor, good: Float[Tensor, "layers n"], count: Float[Tensor, "layers layers"]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where each layer has unsound images of its own, whose rows and columns are 0.

    Products of two Gram matrices then hold the images sound at both; sums of one need the other's.
    """
    flat, squares = whole.flatten(1), whole.square().flatten(1)
    both = (good[:, :, None] * good[:, None]).flatten(1)
    rows = torch.einsum("iab,jb->ija", whole, good) * good  # [i, j]: of i, over what is sound at j
    totals, powers = flat @ both.T, squares @ both.T
    cross = torch.einsum("ija,jia->ij", rows, rows)
    hsic = _estimate(flat @ flat.T, totals * totals.T, cross, count)
    own = _estimate(powers, totals.square(), rows.square().sum(2), count)
    return hsic, own, powers / (count * (count - 1))


def _estimate(products: Tensor, totals: Tensor, cross: Tensor, count: Tensor) -> Tensor:
    """The estimator in the module's docstring; meaningless with fewer than 4 images."""
    hsic = products + totals / ((count - 1) * (count - 2)) - cross * (2 / (count - 2))
    return hsic / (count * (count - 3))


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
