"""A network that classifies: how a teacher is trained, or fine-tuned for one's own images."""

import torch
from scipy.stats import binomtest
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric

from camdistill import tags
from camdistill.data.views import Augment
from camdistill.distill.losses import cross_entropy
from camdistill.distill.optimization import Optimization
from camdistill.distill.training import (
    TrainingModule,
    as_images,
    build_with_seed,
    in_float32,
    to_plain_data,
)
from camdistill.errors import UserError
from camdistill.measure.intervals import Interval
from camdistill.measure.scores import correct
from camdistill.networks.capture import check_forward
from camdistill.networks.heads import head_size
from camdistill.networks.teachers import NetworkSpec, Preprocessed, build_preprocessed
from camdistill.perturb.probability import expand_single_logit
from camdistill.types import Batch, Logits


class Classifier(TrainingModule):
    """Trains a network with labels, to be a teacher.

    A network with weights for other classes than the data's gets a new head: that is fine-tuning.

    Args:
        network: What to train, and from which weights.
        label_smoothing: The part of the target that is spread over all classes, in [0, 1).
        augment: Views of the training images.
        optimization: Optimizer and schedule.
        ema: Decay of a running average of the weights; null keeps the last weights.
        seed: Seed of the start and of the views.
    """

    cards = tags.CLASSIFIER_CARDS

    def __init__(
        self,
        network: NetworkSpec,
        *,
        label_smoothing: float = 0.0,
        augment: Augment = Augment(),  # noqa: B008  (frozen)
        optimization: Optimization = Optimization(),  # noqa: B008
        ema: float | None = None,
        seed: int = 0,
    ) -> None:
        arguments = dict(locals())
        super().__init__(optimization, augment, ema=ema, seed=seed)
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing is {label_smoothing}; give a part in [0, 1)")
        self.settings = {
            name: to_plain_data(value)
            for name, value in arguments.items()
            if name not in ("self", "__class__")
        }
        self.spec, self.label_smoothing = network, label_smoothing
        self.loss = MeanMetric()
        self.accuracy = MeanMetric()
        self.image_count = SumMetric()
        self.test_scores: tuple[float, int] | None = None

    @property
    def fitted(self) -> Preprocessed:
        """The network."""
        return self.network

    def setup(self, stage: str) -> None:
        """Builds the network for the classes of the data."""
        data = getattr(self.trainer, "datamodule", None)
        classes = len(data.classes) if data is not None else None
        if classes == 0:
            raise UserError("the images have no labels; a classifier needs a folder for each class")
        if not hasattr(self, "network"):
            self.network: Preprocessed = build_with_seed(
                self.seed, lambda: build_preprocessed(self.spec, classes=classes, replace_head=True)
            )
        elif classes is not None and head_size(self.network.network) != classes:
            raise UserError(
                f"the images have {classes} classes, the checkpoint's network "
                f"{head_size(self.network.network)}; give the data that it was trained with"
            )
        if data is not None:
            check_forward(
                {"network": self.network},
                torch.zeros(1, 3, *data.size),
                cure="give another --data.size, or another network",
            )
        super().setup(stage)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One step of cross-entropy."""
        images, _ = self.training_view(batch)
        logits = self.network(images)
        loss = self._cross_entropy(logits, batch).mean()
        self.log(tags.LOSS_TRAIN, loss, prog_bar=True, sync_dist=True)
        self.log(tags.ACCURACY_TRAIN, correct(logits, batch.labels).mean(), sync_dist=True)
        return self.watch_loss(loss)

    def _cross_entropy(self, logits: Logits, batch: Batch) -> Tensor:
        loss = cross_entropy(logits, batch.labels)
        if not self.label_smoothing:
            return loss
        # Szegedy et al. 2016, section 7: the target mixes in the uniform distribution
        spread = -torch.log_softmax(expand_single_logit(logits.float()), dim=1).mean(1)
        return (1 - self.label_smoothing) * loss + self.label_smoothing * spread

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Loss and accuracy on images as they are."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Evaluates the test images in float32."""
        with in_float32(self.device):
            self._evaluate(batch)

    def _evaluate(self, batch: Batch) -> None:
        logits = self.network(as_images(batch.pixels))
        counted = batch.counted.float()
        self.loss.update(self._cross_entropy(logits, batch), counted)
        self.accuracy.update(correct(logits, batch.labels), counted)
        self.image_count.update(counted)

    def on_validation_epoch_end(self) -> None:
        """Logs the means over the validation images."""
        self.log_dict(
            {tags.LOSS_VAL: self.loss.compute(), tags.ACCURACY_VAL: self.accuracy.compute()},
            rank_zero_only=True,  # all processes have the same means
        )
        self._reset_metrics()

    def on_test_epoch_end(self) -> None:
        """Keeps the accuracy and the number of images for `results`."""
        accuracy = float(self.accuracy.compute())
        self.test_scores = (accuracy, round(float(self.image_count.compute())))
        self.log(tags.on_test(tags.ACCURACY_VAL), accuracy, rank_zero_only=True)
        self._reset_metrics()

    def _reset_metrics(self) -> None:
        for metric in (self.loss, self.accuracy, self.image_count):
            metric.reset()

    def results(self) -> dict[str, object]:
        """What the test measured: accuracy with Wilson's 95 % interval."""
        if self.test_scores is None:
            raise UserError("nothing was tested yet; run `camdistill test` first")
        accuracy, n = self.test_scores
        confidence = binomtest(round(accuracy * n), n).proportion_ci(method="wilson")
        return {
            "n": n,
            "network": {"accuracy": accuracy},
            "intervals": {"network.accuracy": Interval(accuracy, confidence.low, confidence.high)},
        }

    def predict_step(self, batch: Batch, batch_index: int) -> Logits:
        """Logits, in float32."""
        with in_float32(self.device):
            logits: Logits = self.network(as_images(batch.pixels))
        return logits
