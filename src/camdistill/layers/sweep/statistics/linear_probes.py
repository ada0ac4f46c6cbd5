"""Linear probes: how well a linear readout of a layer's spatial means tells the label.

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

from camdistill.layers.sweep.sampling import ALL, drawn
from camdistill.layers.sweep.sweep_state import counts, zeros
from camdistill.networks.capture import unwrap, unwrap_outer
from camdistill.types import Images

HELD_OUT = 0.2
MOST_HELD = 1000
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
            counts(len(channels), classes),
            tuple(zeros(count) for count in channels),
            tuple(zeros(count, count) for count in channels),
            tuple(zeros(count, classes) for count in channels),
            torch.zeros(0, sum(channels)),
            counts(0),
            counts(0),
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
            seed: Of the draw.
        """
        known = labels >= 0
        whole = torch.cat(list(features), 1)[known]
        labels, draws = labels[known], drawn(ids[known], seed)
        order = draws.argsort()
        held = order[draws[order] < int(HELD_OUT * ALL)]
        summed = order[draws[order] >= int(HELD_OUT * ALL)]
        batch = cls.empty([layer.shape[1] for layer in features], classes)
        batch = batch._with(whole[summed], labels[summed])
        return batch._holding(whole[held].float(), labels[held], draws[held])

    def merged(self, other: "ProbeSums") -> "ProbeSums":
        """Of both."""

        def both(mine: tuple[Tensor, ...], its: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(one + two for one, two in zip(mine, its, strict=True))

        whole = ProbeSums(
            self.labels + other.labels,
            both(self.totals, other.totals),
            both(self.outers, other.outers),
            both(self.crosses, other.crosses),
            self.held,
            self.held_labels,
            self.held_draws,
        )
        return whole._holding(other.held, other.held_labels, other.held_draws)

    def accuracies(self) -> list[float]:
        """Share of held-out images told right, by layer; NaN without images on either side."""
        found = []
        for part, labels, one, outer, cross in zip(
            self._parts(), self.labels, self.totals, self.outers, self.crosses, strict=True
        ):
            total, (features, known) = int(labels.sum()), part
            if total == 0 or len(known) == 0:
                found.append(torch.nan)
                continue
            shares = labels / total
            mean = one / total
            covariance = outer / total - mean[:, None] * mean
            ridge = RIDGE * float(covariance.diagonal().mean()) or 1.0
            covariance.diagonal().add_(ridge)
            weights = torch.linalg.solve(covariance, cross / total - mean[:, None] * shares)
            scores = (features - mean) @ weights + shares
            found.append(float((scores.argmax(1) == known).double().mean()))
        return found

    def chances(self) -> list[float]:
        """What the commonest label of the summed images gets on the held-out ones, by layer."""
        return [
            float((known == labels.argmax()).double().mean()) if int(labels.sum()) else torch.nan
            for (_, known), labels in zip(self._parts(), self.labels, strict=True)
        ]

    def tested(self) -> list[int]:
        """Held-out images, by layer."""
        return [len(known) for _, known in self._parts()]

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """Held-out images' features and labels, by layer, where they are finite."""
        parts = torch.split(self.held.double(), [len(one) for one in self.totals], 1)
        sound = [torch.isfinite(part).all(1) for part in parts]
        return [
            (part[good], self.held_labels[good]) for part, good in zip(parts, sound, strict=True)
        ]

    def _with(self, features: Tensor, labels: Tensor) -> "ProbeSums":
        """With some images in the sums."""
        classes = self.labels.shape[1]
        parts = torch.split(features.double(), [len(one) for one in self.totals], 1)
        hot = torch.nn.functional.one_hot(labels, classes)
        good = torch.stack([torch.isfinite(part).all(1) for part in parts])
        parts = tuple(
            torch.where(one[:, None], part, 0) for one, part in zip(good, parts, strict=True)
        )
        known = good.long() @ hot
        hot = hot.double()
        return ProbeSums(
            self.labels + known,
            tuple(one + part.sum(0) for one, part in zip(self.totals, parts, strict=True)),
            tuple(one + part.T @ part for one, part in zip(self.outers, parts, strict=True)),
            tuple(one + part.T @ hot for one, part in zip(self.crosses, parts, strict=True)),
            self.held,
            self.held_labels,
            self.held_draws,
        )

    def _holding(self, features: Tensor, labels: Tensor, draws: Tensor) -> "ProbeSums":
        """With more images held out, and those in the sums that there is no room for."""
        held, known = torch.cat([self.held, features]), torch.cat([self.held_labels, labels])
        numbers = torch.cat([self.held_draws, draws])
        order = numbers.argsort(stable=True)
        kept, spare = order[:MOST_HELD], order[MOST_HELD:]
        rest = self._with(held[spare], known[spare]) if len(spare) else self
        return ProbeSums(
            rest.labels,
            rest.totals,
            rest.outers,
            rest.crosses,
            held[kept],
            known[kept],
            numbers[kept],
        )


def untrained(network: nn.Module, images: Images, seed: int) -> nn.Module:
    """A copy as it was before training: fresh weights, batch statistics of some images.

    Random convolutions already beat chance, so this is what a probe must be compared with.
    Parameters of modules without `reset_parameters` keep their values.

    Args:
        network: Bare or wrapped.
        images: As it takes them, for the batch normalisations' statistics.
        seed: Of the weights.
    """
    fresh = copy.deepcopy(unwrap_outer(network)).eval()
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        norms = []
        for module in unwrap(fresh).modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                norms.append((module, module.momentum))
                module.momentum = None  # one batch decides
                module.train()
        fresh(images[torch.isfinite(images).flatten(1).all(1)])
        for norm, momentum in norms:
            norm.momentum = momentum
    return fresh.eval()
