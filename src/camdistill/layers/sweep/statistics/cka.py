"""Linear CKA between all layers, from minibatches.

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
from torch import Tensor

from camdistill.layers.sweep.statistics.similarity import Similarity
from camdistill.layers.sweep.sweep_state import zero_counts, zeros

MIN_IMAGES = 4  # images that HSIC can be estimated from
GROUP = 64  # images compared at once, at most
# HSIC of a layer with itself, over the mean square of its Gram matrix, below which the layer is
# constant by float32's rounding.
CONSTANT = 1e-9


def group_sizes(images: int) -> list[int]:
    """Sizes of the groups that a batch is compared in, as even as can be.

    What a group of n images costs grows as n^2, what it tells as n; at 64 minibatch CKA is within
    0.01 of the whole set's (512 images, 21 layers).
    """
    count = -(-images // GROUP)
    return [images // count + (place < images % count) for place in range(count)]


def gram_matrices(output: Tensor) -> list[Float[Tensor, "_ _"]]:
    """Inner products of the images' activations, by group, in full float32 or wider."""
    if output.dim() == 4 and output.is_contiguous(memory_format=torch.channels_last):
        output = output.permute(0, 2, 3, 1)  # the order doesn't matter, a copy would
    flat = output.reshape(len(output), -1)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(flat.device.type, enabled=False):
            return [part @ part.T for part in torch.split(flat, group_sizes(len(flat)))]
    finally:
        torch.set_float32_matmul_precision(precision)


@dataclass(frozen=True)
class CkaSums:
    """Sums over groups, each times its images: every pair of layers by the images sound at both.

    Attributes:
        images: Images of groups in which a pair took part.
        groups: In how many it did.
        hsic: HSIC of the pair.
        self_hsic: HSIC of the row's layer with itself, over the same images.
        power: Mean square of the row's Gram matrix without its diagonal, over the same images.
    """

    images: Int[Tensor, "layers layers"]
    groups: Int[Tensor, "layers layers"]
    hsic: Float[Tensor, "layers layers"]
    self_hsic: Float[Tensor, "layers layers"]
    power: Float[Tensor, "layers layers"]

    @classmethod
    def empty(cls, layers: int) -> "CkaSums":
        """Of no image."""
        sums = [zeros(layers, layers) for _ in range(3)]
        return cls(zero_counts(layers, layers), zero_counts(layers, layers), *sums)

    @classmethod
    def of(
        cls, products: Sequence[Sequence[Tensor]], finite: Bool[Tensor, "layers batch"]
    ) -> "CkaSums":
        """Of a batch.

        Args:
            products: What `grams` gave, by layer.
            finite: Images whose activations are finite, by layer.
        """
        sums = cls.empty(len(products))
        for number, finite_part in enumerate(torch.split(finite, group_sizes(finite.shape[1]), 1)):
            sums = sums.merge(cls._of_group([layer[number] for layer in products], finite_part))
        return sums

    @classmethod
    def _of_group(cls, products: Sequence[Tensor], finite: Tensor) -> "CkaSums":
        grams = torch.stack([gram.cpu() for gram in products]).double()
        grams.diagonal(dim1=1, dim2=2).zero_()
        if finite.all():
            count = torch.tensor(float(finite.shape[1]), dtype=torch.float64)
            hsic, self_hsic, power = _hsic(grams, count)
        else:
            weights = finite.double()
            grams = torch.where(finite[:, :, None] & finite[:, None], grams, 0)
            count = weights @ weights.T
            hsic, self_hsic, power = _hsic_of_shared_images(grams, weights, count)
        enough = (count >= MIN_IMAGES).expand_as(hsic)
        count = count.expand_as(hsic)
        sums = [torch.where(enough, count * gram, 0) for gram in (hsic, self_hsic, power)]
        return cls(torch.where(enough, count, 0).long(), enough.long(), *sums)

    def merge(self, other: "CkaSums") -> "CkaSums":
        """Of both."""
        return CkaSums(
            self.images + other.images,
            self.groups + other.groups,
            self.hsic + other.hsic,
            self.self_hsic + other.self_hsic,
            self.power + other.power,
        )

    def similarity(self, layers: Sequence[tuple[str, str]]) -> Similarity:
        """CKA, with the reason wherever there is none.

        Args:
            layers: (network, name) of each.
        """
        constant = self.self_hsic <= CONSTANT * self.power
        scale = torch.where(constant, torch.nan, self.self_hsic).rsqrt()
        cka = self.hsic * scale * scale.T
        reasons: dict[tuple[int, int], str] = {}
        compared = self.images > 0
        for row in range(len(layers)):
            for column in range(row, len(layers)):
                uncompared = [place for place in (row, column) if not compared[place, place]]
                if uncompared and compared.any():
                    network, name = layers[uncompared[0]]
                    reasons[row, column] = (
                        f"{network} {name} has no group with {MIN_IMAGES} images whose values are "
                        "finite"
                    )
                elif not compared[row, column]:
                    reasons[row, column] = f"no group had {MIN_IMAGES} sound images or more"
                elif constant[row, column] or constant[column, row]:
                    network, name = layers[row if constant[row, column] else column]
                    reasons[row, column] = f"{network} {name} is the same for every image"
        maxima = [int(table.max()) if len(layers) else 0 for table in (self.images, self.groups)]
        return Similarity(tuple(layers), cka, reasons, maxima[0], maxima[1])


def _hsic(grams: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """HSIC of all pairs, of each layer with itself, and power, of Gram matrices [L, n, n]."""
    rows, flat = grams.sum(2), grams.flatten(1)
    products = flat @ flat.T
    hsic = _hsic_estimate(products, rows.sum(1)[:, None] * rows.sum(1), rows @ rows.T, count)
    power = products.diagonal() / (count * (count - 1))
    return hsic, hsic.diagonal()[:, None].expand_as(hsic), power[:, None].expand_as(hsic)


def _hsic_of_shared_images(
    grams: Tensor, mask: Float[Tensor, "layers n"], count: Float[Tensor, "layers layers"]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where each layer has unsound images of its own, whose rows and columns are 0.

    Products of two Gram matrices then hold the images sound at both; sums of one need the other's.
    """
    flat, squares = grams.flatten(1), grams.square().flatten(1)
    shared = (mask[:, :, None] * mask[:, None]).flatten(1)
    rows = torch.einsum("iab,jb->ija", grams, mask) * mask  # [i, j]: of i, over what is sound at j
    totals, powers = flat @ shared.T, squares @ shared.T
    cross = torch.einsum("ija,jia->ij", rows, rows)
    hsic = _hsic_estimate(flat @ flat.T, totals * totals.T, cross, count)
    self_hsic = _hsic_estimate(powers, totals.square(), rows.square().sum(2), count)
    return hsic, self_hsic, powers / (count * (count - 1))


def _hsic_estimate(products: Tensor, totals: Tensor, cross: Tensor, count: Tensor) -> Tensor:
    """The estimator in the module's docstring; meaningless with fewer than 4 images."""
    hsic = products + totals / ((count - 1) * (count - 2)) - cross * (2 / (count - 2))
    return hsic / (count * (count - 3))
