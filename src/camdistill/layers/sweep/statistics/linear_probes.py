"""Linear probes: how well a linear readout of a layer's spatial means predicts the label.

Alain and Bengio 2016, https://arxiv.org/abs/1610.01644, with ridge regression on one-hot labels,
whose sums need one pass. A fifth of the images, 1,000 at most, is held out: those with the
smallest of numbers drawn by image, so that neither order nor processes change which. Held-out
images are kept as features until an image with a smaller number takes their place; they then go
into the sums. So a sweep in two halves tells what a whole one does, and memory has a bound.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from camdistill.layers.sweep.sampling import ALL, integers_by_id
from camdistill.layers.sweep.sweep_state import zero_counts, zeros
from camdistill.networks.capture import unwrap, unwrap_outer
from camdistill.types import Images

HELD_OUT = 0.2
MAX_HELD_OUT = 1000
RIDGE = 1e-3  # over the mean variance of a feature


@dataclass(frozen=True)
class ProbeSums:
    """What the probes of all layers of a network need; each layer's of the images finite there.

    Attributes:
        labels: Images summed, by layer and label.
        totals: Sums of features, by layer.
        outers: Sums of features' products, by layer.
        crosses: Sums of features by label, by layer.
        held: Features of held-out images, all layers side by side; NaN where they aren't finite.
        held_labels: Their labels.
        held_draws: Their drawn numbers, ascending.
    """

    labels: Int[Tensor, "layers classes"]
    totals: tuple[Float[Tensor, "_"], ...]
    outers: tuple[Float[Tensor, "_ _"], ...]
    crosses: tuple[Float[Tensor, "_ classes"], ...]
    held: Float[Tensor, "held features"]
    held_labels: Int[Tensor, "held"]
    held_draws: Int[Tensor, "held"]

    @classmethod
    def empty(cls, channels: Sequence[int], classes: int) -> "ProbeSums":
        """Of no image."""
        return cls(
            zero_counts(len(channels), classes),
            tuple(zeros(count) for count in channels),
            tuple(zeros(count, count) for count in channels),
            tuple(zeros(count, classes) for count in channels),
            torch.zeros(0, sum(channels)),
            zero_counts(0),
            zero_counts(0),
        )

    @classmethod
    def of(
        cls, features: Sequence[Tensor], labels: Tensor, ids: Tensor, classes: int, seed: int
    ) -> "ProbeSums":
        """Of a batch; images without a label, -1, don't count.

        Args:
            features: [B, C] by layer.
            labels: [B].
            ids: The images' numbers.
            classes: Number of labels.
            seed: Seed of the draw.
        """
        labeled = labels >= 0
        all_features = torch.cat(list(features), 1)[labeled]
        labels, draws = labels[labeled], integers_by_id(ids[labeled], seed)
        order = draws.argsort()
        held = order[draws[order] < int(HELD_OUT * ALL)]
        fitted = order[draws[order] >= int(HELD_OUT * ALL)]
        batch = cls.empty([layer.shape[1] for layer in features], classes)
        batch = batch._add_images(all_features[fitted], labels[fitted])
        return batch._hold_out(all_features[held].float(), labels[held], draws[held])

    def merge(self, other: "ProbeSums") -> "ProbeSums":
        """Of both."""

        def add_tensors(
            left_sums: tuple[Tensor, ...], right_sums: tuple[Tensor, ...]
        ) -> tuple[Tensor, ...]:
            return tuple(left + right for left, right in zip(left_sums, right_sums, strict=True))

        sums = ProbeSums(
            self.labels + other.labels,
            add_tensors(self.totals, other.totals),
            add_tensors(self.outers, other.outers),
            add_tensors(self.crosses, other.crosses),
            self.held,
            self.held_labels,
            self.held_draws,
        )
        return sums._hold_out(other.held, other.held_labels, other.held_draws)

    def accuracies(self) -> list[float]:
        """Share of held-out images told right, by layer; NaN without images on either side."""
        layer_accuracies = []
        for held_out, labels, feature_sum, outer, cross in zip(
            self._finite_held_out(),
            self.labels,
            self.totals,
            self.outers,
            self.crosses,
            strict=True,
        ):
            image_count, (features, true_labels) = int(labels.sum()), held_out
            if image_count == 0 or len(true_labels) == 0:
                layer_accuracies.append(torch.nan)
                continue
            shares = labels / image_count
            mean = feature_sum / image_count
            covariance = outer / image_count - mean[:, None] * mean
            ridge = RIDGE * float(covariance.diagonal().mean()) or 1.0
            covariance.diagonal().add_(ridge)
            weights = torch.linalg.solve(covariance, cross / image_count - mean[:, None] * shares)
            scores = (features - mean) @ weights + shares
            layer_accuracies.append(float((scores.argmax(1) == true_labels).double().mean()))
        return layer_accuracies

    def chances(self) -> list[float]:
        """What the commonest label of the summed images gets on the held-out ones, by layer."""
        return [
            float((true_labels == labels.argmax()).double().mean())
            if int(labels.sum())
            else torch.nan
            for (_, true_labels), labels in zip(self._finite_held_out(), self.labels, strict=True)
        ]

    def test_counts(self) -> list[int]:
        """Held-out images, by layer."""
        return [len(true_labels) for _, true_labels in self._finite_held_out()]

    def _finite_held_out(self) -> list[tuple[Tensor, Tensor]]:
        """Held-out images' features and labels, by layer, where they are finite."""
        parts = torch.split(self.held.double(), [len(total) for total in self.totals], 1)
        finite_rows = [torch.isfinite(part).all(1) for part in parts]
        return [
            (part[finite], self.held_labels[finite])
            for part, finite in zip(parts, finite_rows, strict=True)
        ]

    def _add_images(self, features: Tensor, labels: Tensor) -> "ProbeSums":
        """With some images in the sums."""
        classes = self.labels.shape[1]
        parts = torch.split(features.double(), [len(total) for total in self.totals], 1)
        one_hot = torch.nn.functional.one_hot(labels, classes)
        finite = torch.stack([torch.isfinite(part).all(1) for part in parts])
        parts = tuple(
            torch.where(total[:, None], part, 0) for total, part in zip(finite, parts, strict=True)
        )
        label_counts = finite.long() @ one_hot
        one_hot = one_hot.double()
        return ProbeSums(
            self.labels + label_counts,
            tuple(total + part.sum(0) for total, part in zip(self.totals, parts, strict=True)),
            tuple(total + part.T @ part for total, part in zip(self.outers, parts, strict=True)),
            tuple(
                total + part.T @ one_hot for total, part in zip(self.crosses, parts, strict=True)
            ),
            self.held,
            self.held_labels,
            self.held_draws,
        )

    def _hold_out(self, features: Tensor, labels: Tensor, draws: Tensor) -> "ProbeSums":
        """With more images held out, and those in the sums that there is no room for."""
        held, held_labels = torch.cat([self.held, features]), torch.cat([self.held_labels, labels])
        held_draws = torch.cat([self.held_draws, draws])
        order = held_draws.argsort(stable=True)
        kept_rows, spare_rows = order[:MAX_HELD_OUT], order[MAX_HELD_OUT:]
        remaining = (
            self._add_images(held[spare_rows], held_labels[spare_rows]) if len(spare_rows) else self
        )
        return ProbeSums(
            remaining.labels,
            remaining.totals,
            remaining.outers,
            remaining.crosses,
            held[kept_rows],
            held_labels[kept_rows],
            held_draws[kept_rows],
        )


def copy_untrained(network: nn.Module, images: Images, seed: int) -> nn.Module:
    """A copy as it was before training: fresh weights, batch statistics of some images.

    Random convolutions already beat chance, so this is what a probe must be compared with.
    Parameters of modules without `reset_parameters` keep their values.

    Args:
        network: Bare or wrapped.
        images: Images as it takes them, for the batch normalizations' statistics.
        seed: Seed of the weights.
    """
    untrained_network = copy.deepcopy(unwrap_outer(network)).eval()
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        norms = []
        for module in unwrap(untrained_network).modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                norms.append((module, module.momentum))
                module.momentum = None  # one batch decides
                module.train()
        untrained_network(images[torch.isfinite(images).flatten(1).all(1)])
        for norm, momentum in norms:
            norm.momentum = momentum
    return untrained_network.eval()
