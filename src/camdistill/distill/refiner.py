"""A trained network whose own maps are refined: the training step whole, on one screen."""

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from scipy.stats import binomtest
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric

from camdistill import tags
from camdistill.data.datasets import ImageSet
from camdistill.data.modules import ImageData
from camdistill.data.views import Augment, View, view_maps
from camdistill.distill.checks import check_data_matches
from camdistill.distill.differentiable_maps import eval_mode, explain_with_graph
from camdistill.distill.losses import beta_factor, cross_entropy, soft_targets_kl
from camdistill.distill.optimization import Optimization
from camdistill.distill.refinement_targets import (
    Objective,
    Refinement,
    RefinementArm,
    ViewBatch,
)
from camdistill.distill.training import TrainingModule, as_images, in_float32, to_plain_data
from camdistill.errors import UserError
from camdistill.measure.boxes import inside_boxes
from camdistill.measure.intervals import Interval
from camdistill.networks.capture import check_forward
from camdistill.networks.heads import head_size
from camdistill.networks.teachers import NetworkSpec, Preprocessed, Teacher, build_preprocessed
from camdistill.perturb.batched_forward import forward_in_chunks
from camdistill.perturb.probability import label_count, predict_labels
from camdistill.store.digest import sha256_of
from camdistill.types import Batch, Images, Labels, Logits, Masks, PerImage

RECIPE = Optimization(optimizer="adamw", lr=3e-4, schedule="cosine", warmup=0.1)


class Refiner(TrainingModule):
    """Fine-tunes a trained network so that a metric of its own maps improves.

    The loss is cross-entropy with the labels, or without labels the divergence from what the
    network said at the start, plus the objective times its weight. Maps are those of the network
    in eval mode: what is refined is what will be used.

    Args:
        network: What is refined; it has weights.
        objective: What its maps are trained to be.
        arm: The objective, or one of its controls.
        keep: What the answers are held to: labels, start (the network's own answers at the start),
            or auto, which takes labels where the images have them.
        frozen_statistics: Keep the statistics of batch normalization (and leave out dropout).
        augment: Views of the training images.
        optimization: Optimizer and schedule.
        ema: Decay of a running average of the weights; null keeps the last weights.
        seed: Seed of views, random targets and changes.
    """

    cards = (tags.ACCURACY_VAL, tags.AGREEMENT_START, tags.LOSS_OBJECTIVE)

    def __init__(
        self,
        network: NetworkSpec,
        objective: Objective = Objective(),  # noqa: B008  (frozen)
        *,
        arm: RefinementArm = "objective",
        keep: Literal["auto", "labels", "start"] = "auto",
        frozen_statistics: bool = True,
        augment: Augment = Augment(),  # noqa: B008
        optimization: Optimization = RECIPE,
        ema: float | None = None,
        seed: int = 0,
    ) -> None:
        arguments = dict(locals())
        super().__init__(optimization, augment, ema=ema, seed=seed)
        self.settings = {
            name: to_plain_data(value)
            for name, value in arguments.items()
            if name not in ("self", "__class__")
        }
        self.spec, self.keep, self.frozen = network, keep, frozen_statistics
        self.refinement = Refinement(objective, arm, seed)
        self.accuracy, self.agreement, self.image_count = MeanMetric(), MeanMetric(), SumMetric()
        self.test_scores: tuple[float, float, int] | None = None
        self.labeled = False
        self._masks: Bool[Tensor, "images height width"] | None = None
        self._mask_ids: Labels | None = None
        self._start_classes: dict[
            tuple[int, ...], Labels
        ] = {}  # by the start, of validation images

    @property
    def fitted(self) -> Preprocessed:
        """The network."""
        return self.network

    def setup(self, stage: str) -> None:
        """Builds the network and keeps a copy of it as it starts."""
        if not hasattr(self, "network"):
            if self.spec.weights is None:
                raise UserError(
                    f"network {self.spec.name} has no weights; give those that are refined"
                )
            self.network = build_preprocessed(self.spec)
        self._start_classes.clear()  # the images may be others
        self.network.train(not self.frozen)  # Lightning leaves a network in the mode it is in
        if not hasattr(self, "start"):
            mean, std = (part.flatten().tolist() for part in (self.network.mean, self.network.std))
            start_network = copy.deepcopy(self.network.network)
            self.start = Teacher.from_network(start_network, mean, std)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageData):
            self._check_data(data)
        super().setup(stage)

    def _check_data(self, data: ImageData) -> None:
        classes, network_classes = len(data.classes), label_count(head_size(self.network.network))
        if self.keep == "labels" and not classes:
            raise UserError("keep is labels, but the images have none; --keep start needs no label")
        if classes and classes != network_classes and self.keep != "start":
            raise UserError(
                f"the images have {classes} classes, the network {network_classes}; give the "
                "data that it was "
                "trained with, or --keep start, which needs no label"
            )
        size_cure = "give another --data.size, or another network"
        check_forward({"network": self.network}, torch.zeros(1, 3, *data.size), cure=size_cure)
        check_data_matches(self.network.facts, data.size, data.classes, "network")
        self.labeled = bool(classes) and classes == network_classes
        needs_masks = self.refinement.objective.kind == "energy" and self.refinement.arm != "ce"
        if needs_masks and data.train_set is not None and self._masks is None:
            self._masks, self._mask_ids = object_masks(data.train_set)

    def experiment(self) -> dict[str, Any]:
        """Everything that a checkpoint needs to say, with the metric's file."""
        file = self.refinement.objective.file
        metric = {} if file is None else {"metric_sha256": sha256_of(Path(file))}
        return {**super().experiment(), **metric}

    def train(self, mode: bool = True) -> "Refiner":
        """Batch normalization stays as it is where its statistics are frozen."""
        super().train(mode)
        if self.frozen and hasattr(self, "network"):
            self.network.eval()
        return self

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One step: keep the answers, refine the maps."""
        images, view = self.training_view(batch)
        objective_config, arm = self.refinement.objective, self.refinement.arm
        weight = objective_config.weight * beta_factor(objective_config.schedule, self.progress)
        if arm == "ce" or weight == 0:
            keep_loss = self._keep_loss(self.network(images), batch, images).mean()
            loss = keep_loss
        else:
            with eval_mode(self.network):
                logits, classes, maps = explain_with_graph(
                    self.network, images, objective_config.cam, objective_config.layer
                )
                masks = self._view_masks(batch, view)
                view_batch = ViewBatch(images, batch.ids, view, classes.detach(), maps, masks)
                objective_loss = self.refinement.loss(
                    self.network, view_batch, self.global_step
                ).mean()
            keep_loss = self._keep_loss(
                logits if self.frozen else self.network(images), batch, images
            ).mean()
            loss = keep_loss + weight * objective_loss
            self.log(tags.LOSS_OBJECTIVE, objective_loss, prog_bar=True, sync_dist=True)
        self.log(tags.LOSS_KEPT, keep_loss, sync_dist=True)
        self.log(tags.LOSS_TRAIN, loss, prog_bar=True, sync_dist=True)
        return self.watch_loss(loss)

    def _keep_loss(self, logits: Logits, batch: Batch, images: Images) -> PerImage:
        if self.keep != "start" and self.labeled:
            return cross_entropy(logits, batch.labels)
        with torch.no_grad():
            start_logits = self.start(images)
        return soft_targets_kl(logits, start_logits, 1.0)

    def _view_masks(self, batch: Batch, view: View) -> Masks | None:
        if self._masks is None or self._mask_ids is None:
            return None
        rows = torch.searchsorted(self._mask_ids, batch.ids.cpu())
        masks = self._masks[rows].to(batch.ids.device)
        return view_maps(masks.float(), view, flipped=False) > 0.5

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Accuracy, and agreement with the start, on images as they are.

        The start says the same in every epoch, so it is asked once.
        """
        images, ids = as_images(batch.pixels), tuple(batch.ids.tolist())
        if ids not in self._start_classes:
            self._start_classes[ids] = predict_labels(forward_in_chunks(self.start, images))
        self._evaluate(batch, images, self._start_classes[ids])

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Evaluates the test images in float32."""
        images = as_images(batch.pixels)
        with in_float32(self.device):
            self._evaluate(batch, images, predict_labels(forward_in_chunks(self.start, images)))

    def _evaluate(self, batch: Batch, images: Images, start_classes: Labels) -> None:
        top, counted = (
            predict_labels(forward_in_chunks(self.network, images)),
            batch.counted.float(),
        )
        if self.labeled:
            self.accuracy.update((top == batch.labels).float(), counted)
        self.agreement.update((top == start_classes).float(), counted)
        self.image_count.update(counted)

    def retention(self) -> float:
        """Accuracy of what was evaluated last; agreement with the start where that is kept."""
        by_labels = self.labeled and self.keep != "start"
        metric = self.accuracy if by_labels else self.agreement
        return float(metric.compute())

    def on_validation_epoch_start(self) -> None:
        """Forgets what was evaluated before."""
        self._reset_metrics()

    def on_validation_epoch_end(self) -> None:
        """Logs the means over the validation images."""
        if self.labeled:
            self.log(tags.ACCURACY_VAL, self.accuracy.compute(), rank_zero_only=True)
        self.log(tags.AGREEMENT_START, self.agreement.compute(), rank_zero_only=True)

    def on_test_epoch_start(self) -> None:
        """Forgets what was evaluated before."""
        super().on_test_epoch_start()
        self._reset_metrics()

    def on_test_epoch_end(self) -> None:
        """Keeps what `results` tells."""
        accuracy = float(self.accuracy.compute()) if self.labeled else float("nan")
        agreement, count = float(self.agreement.compute()), round(float(self.image_count.compute()))
        self.test_scores = (accuracy, agreement, count)
        self.log(tags.on_test(tags.AGREEMENT_START), agreement, rank_zero_only=True)

    def results(self) -> dict[str, object]:
        """What the test measured, with Wilson's 95 % intervals."""
        if self.test_scores is None:
            raise UserError("nothing was tested yet; run `camdistill test` first")
        accuracy, agreement, n = self.test_scores
        shares = {"accuracy": accuracy, "agreement": agreement}
        measured = {name: share for name, share in shares.items() if not np.isnan(share)}
        intervals = {}
        for name, share in measured.items():
            confidence = binomtest(round(share * n), n).proportion_ci(method="wilson")
            intervals[f"network.{name}"] = Interval(share, confidence.low, confidence.high)
        return {"n": n, "network": measured, "intervals": intervals}

    def _reset_metrics(self) -> None:
        for metric in (self.accuracy, self.agreement, self.image_count):
            metric.reset()


def object_masks(images: ImageSet) -> tuple[Bool[Tensor, "images height width"], Labels]:
    """The objects' masks (or the insides of their boxes), and the images' ids, both by id.

    Raises:
        UserError: The images have neither.
    """
    order = np.argsort(images.ids)
    if images.masks is not None:
        masks = torch.from_numpy(np.asarray(images.masks[order]) > 0)
    elif images.boxes is not None:
        masks = inside_boxes(torch.from_numpy(images.boxes[order]), images.size)
    else:
        raise UserError(
            "the objective is energy, but the images have no masks and no boxes.csv: give data "
            "that have them (ShapesData does), or another --objective.kind"
        )
    return masks, torch.from_numpy(images.ids[order])
