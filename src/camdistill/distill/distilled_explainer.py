"""The distilled explainer: a shallow student learns its teacher's classes and maps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from camdistill import tags
from camdistill.data.cache import cache_folder
from camdistill.data.datasets import ImageSet
from camdistill.data.views import Augment, View, identity_view
from camdistill.distill.checks import check_data_matches, check_label_count, check_loss_weights
from camdistill.distill.comparison import (
    Comparison,
    MapComparison,
    build_comparison,
    build_map_comparison,
    compare,
    fidelity_scalars,
    mean_maps,
    runner_up_maps,
    update_meter,
)
from camdistill.distill.losses import beta_factor, cross_entropy, soft_targets_kl
from camdistill.distill.optimization import Optimization
from camdistill.distill.targets import Targets, cached_targets, live_targets, open_shared_cache
from camdistill.distill.teacher_cache import TeacherCache
from camdistill.distill.teacher_maps_plan import likeliest_classes
from camdistill.distill.training import (
    TrainingModule,
    as_images,
    build_with_seed,
    in_float32,
    to_plain_data,
)
from camdistill.distill.transfer import Transfer, name_pairs, quantity_maps, transfer_distance
from camdistill.errors import UserError
from camdistill.explain.gradcam import explain_images
from camdistill.measure.fidelity import FidelityMeter, FidelityTable, intervals, summary
from camdistill.networks.capture import check_forward
from camdistill.networks.teachers import NetworkSpec, Preprocessed, Teacher, build
from camdistill.networks.training_facts import EXPERIMENT, parse_experiment
from camdistill.perturb.probability import label_count
from camdistill.types import Batch, Images, Logits


class DistilledExplainer(TrainingModule):
    """Trains a student to classify and to explain like its teacher.

    The loss of an image is

        ce * CE(student, label) + kd * T^2 KL(teacher || student) + beta * distance(maps)

    where the maps of both networks are those of the teacher's top class, or of its
    `transfer.classes` likeliest. With `ce=0` no label is needed: unlabeled images train.

    Args:
        teacher: The network to imitate; it is never trained and never stored.
        student: The network that is trained; it gets the teacher's normalization and classes.
        transfer: Which explanation is transferred, and at which layers.
        ce: Weight of cross-entropy with the labels.
        kd: Weight of distillation with the teacher's logits (Hinton et al. 2015).
        temperature: Temperature of distillation.
        beta: Weight of the distance between the maps.
        augment: Views of the training images; maps move with them.
        optimization: Optimizer and schedule.
        cached: Ask the teacher once per image and orientation and keep its answers on disk; false
            asks it at every step. Cached maps are cropped with the image; cached logits are of the
            whole one.
        cache_dir: Where the teacher's answers are kept; the default is CAMDISTILL_CACHE or the
            user's cache folder.
        ema: Decay of a running average of the student's weights; null keeps the last weights.
        seed: Seed of the student's start and of the views.
    """

    cards = tags.STUDENT_CARDS

    def __init__(
        self,
        teacher: NetworkSpec,
        student: NetworkSpec = NetworkSpec("shallow_cnn"),  # noqa: B008  (frozen)
        *,
        transfer: Transfer = Transfer(),  # noqa: B008
        ce: float = 0.1,
        kd: float = 0.9,
        temperature: float = 4.0,
        beta: float = 20.0,
        augment: Augment = Augment(),  # noqa: B008
        optimization: Optimization = Optimization(),  # noqa: B008
        cached: bool = True,
        cache_dir: Path | None = None,
        ema: float | None = None,
        seed: int = 0,
    ) -> None:
        arguments = dict(locals())
        super().__init__(optimization, augment, ema=ema, seed=seed)
        check_loss_weights(ce=ce, kd=kd, beta=beta, temperature=temperature)
        self.settings = {
            name: to_plain_data(value)
            for name, value in arguments.items()
            if name not in _NOT_SETTINGS
        }
        self.transfer, self.ce, self.kd, self.temperature = transfer, ce, kd, temperature
        self.beta, self.cached, self.cache_dir = beta, cached, cache_dir
        self.teacher = Teacher(teacher)
        self.teacher.holds_precision = True
        network = build_with_seed(seed, lambda: build(student, classes=self.teacher.classes))
        self.student = Preprocessed(
            network, self.teacher.mean.flatten().tolist(), self.teacher.std.flatten().tolist()
        )
        self.pairs: list[tuple[str, str, float]] = []
        self.mean_map_by_layer: dict[str, Tensor] = {}
        self.table: FidelityTable | None = None
        self._caches: dict[str, TeacherCache] = {}
        self._live_teachers: list[
            Teacher
        ] = []  # in a list, so that it isn't one of the module's own
        self._meter: FidelityMeter | None = None
        self._labels_match = True
        self.image_size: tuple[int, int] = (0, 0)

    @property
    def fitted(self) -> Preprocessed:
        """The student."""
        return self.student

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One step of distillation; a term without a weight is not even computed."""
        images, view = self.training_view(batch)
        targets = self.targets(batch, images, view)
        logits, maps_by_layer = self.student_quantities(images, targets.classes)
        loss, terms = torch.zeros((), device=images.device), {}
        if self.ce:
            terms[tags.LOSS_CE] = cross_entropy(logits, batch.labels).mean()
            loss = loss + self.ce * terms[tags.LOSS_CE]
        if self.kd:
            terms[tags.LOSS_KD] = soft_targets_kl(logits, targets.logits, self.temperature).mean()
            loss = loss + self.kd * terms[tags.LOSS_KD]
        if self.beta:
            terms[tags.LOSS_MAPS] = transfer_distance(
                self.transfer, self.pairs, maps_by_layer, targets.maps_by_layer
            ).mean()
            beta = self.beta * beta_factor(self.transfer.schedule, self.progress)
            loss = loss + beta * terms[tags.LOSS_MAPS]
            self.log(tags.BETA, beta)
        self.log_dict(terms, sync_dist=True)
        self.log(tags.LOSS_TRAIN, loss, prog_bar=True, sync_dist=True)
        return self.watch_loss(loss)

    def targets(self, batch: Batch, images: Images, view: View) -> Targets:
        """What the teacher says of augmented images: from its cache, or asked now."""
        layers = [teacher_layer for _, teacher_layer, _ in self.pairs] if self.beta else []
        cache, quantity = self._caches.get("train"), self.transfer.quantity
        if cache is not None:
            return cached_targets(cache, batch.ids, view, layers, quantity=quantity)
        teacher = self._live_teachers[0] if self._live_teachers else self.teacher
        classes, p = self.transfer.classes, self.transfer.p
        return live_targets(teacher, images, layers, quantity=quantity, classes=classes, p=p)

    def student_quantities(
        self, images: Images, classes: Int[Tensor, "batch *classes"]
    ) -> tuple[Logits, dict[str, Tensor]]:
        """The student's logits and its side of the transfer, with graph."""
        if not self.beta:
            return self.student(images), {}
        logits, maps_by_layer = quantity_maps(
            self.student,
            images,
            [student_layer for student_layer, _, _ in self.pairs],
            classes,
            quantity=self.transfer.quantity,
            p=self.transfer.p,
            grad=self.transfer.grad,
        )
        return logits, {layer: maps.float() for layer, maps in maps_by_layer.items()}

    def compare(self, images: Images, *, runner_up: bool = False) -> Comparison:
        """Teacher and student on images in [0, 1], at the layer pairs."""
        self._name_pairs(images)
        return compare(self.student, self.teacher, images, self.pairs, runner_up=runner_up)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Fidelity, agreement and accuracy on images as they are."""
        images = as_images(batch.pixels)
        cache = self._caches.get("val")
        if cache is None:
            self._update_meter(batch, self.compare(images))
            return
        logits, maps = cache.lookup(batch.ids, identity_view(len(images)).flip)
        classes = likeliest_classes(logits, cache.plan.classes)
        student_explanation = explain_images(
            self.student, images, [student_layer for student_layer, _, _ in self.pairs], classes
        )
        self._update_meter(batch, build_comparison(logits, classes, maps, student_explanation))

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Evaluates the test images in float32, with the live teacher."""
        with in_float32(self.device):
            self._update_meter(batch, self.compare(as_images(batch.pixels), runner_up=True))

    def predict_step(self, batch: Batch, batch_index: int) -> Comparison:
        """Logits and raw maps of both networks, in float32."""
        with in_float32(self.device):
            return self.compare(as_images(batch.pixels))

    def explain_images(self, batch: Batch) -> MapComparison:
        """A few images with the maps of both networks, for pictures."""
        images = as_images(batch.pixels)
        return build_map_comparison(batch, images, self.compare(images), self.pairs)

    def results(self) -> dict[str, object]:
        """What the test measured, with 95 % intervals over the test images."""
        if self.table is None:
            raise UserError("nothing was tested yet; run `camdistill test` first")
        test_results = {**summary(self.table), "intervals": intervals(self.table)}
        return test_results | {"sha256": {"teacher": self.teacher.sha256}}

    def on_validation_epoch_end(self) -> None:
        """Logs the means over the validation images."""
        self._log_fidelity()

    def on_test_epoch_end(self) -> None:
        """Keeps the values of each test image in `table`, and logs their means."""
        self._log_fidelity(tags.on_test)

    def setup(self, stage: str) -> None:
        """Checks that data and networks fit together before anything is spent."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        self.image_size = data.size
        self._labels_match = len(data.classes) == label_count(self.teacher.classes)
        check_data_matches(self.teacher.facts, data.size, data.classes, "teacher")
        check_forward(
            {"teacher": self.teacher, "student": self.student},
            torch.zeros(1, 3, *data.size),
            cure="give another --data.size, or another network",
        )
        if stage == "fit":
            check_label_count(len(data.classes), label_count(self.teacher.classes), self.ce)
        self._name_pairs(torch.zeros(1, 3, *data.size, device=self.device))

    def on_fit_start(self) -> None:
        """Asks the teacher about all images once, finds what it said before, or makes it fast."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        if self.cached:
            self._caches["train"] = self._open_cache(data.train_set, "training images", flips=True)
            self._caches["val"] = self._open_cache(data.val_set, "validation images", flips=False)
            self.mean_map_by_layer = self._caches["train"].mean_map_by_layer
            return
        layers = [teacher_layer for _, teacher_layer, _ in self.pairs]
        self._live_teachers = [self.teacher.fuse_batch_norm(data.size, keep=layers)]
        if not self.mean_map_by_layer:
            self.mean_map_by_layer = mean_maps(self._live_teachers[0], data.train_set, layers)

    def teardown(self, stage: str) -> None:
        """The next loop may have other images."""
        self._caches, self._live_teachers = {}, []

    def experiment(self) -> dict[str, Any]:
        """Adds what the training found out: the layers, the teacher's file and its mean maps."""
        return {
            **super().experiment(),
            "pairs": to_plain_data(self.pairs),
            **({"size": list(self.image_size)} if all(self.image_size) else {}),
            "teacher_sha256": self.teacher.sha256,
            "mean_map_by_layer": {
                layer: mean.tolist() for layer, mean in self.mean_map_by_layer.items()
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the mean maps along; refuses to go on with another teacher."""
        super().on_load_checkpoint(checkpoint)
        experiment = parse_experiment(checkpoint[EXPERIMENT], "the checkpoint")
        self.mean_map_by_layer = {
            layer: torch.tensor(mean) for layer, mean in experiment["mean_map_by_layer"].items()
        }
        training = self._trainer is not None and self.trainer.training
        if training and experiment["teacher_sha256"] != self.teacher.sha256:
            raise UserError(
                "the teacher's file is no longer the one that the checkpoint was trained with; "
                "bring that one back, or start without --ckpt_path"
            )

    def _name_pairs(self, images: Images) -> None:
        """Names the matched layers; one that can't be explained is told now, not after an epoch."""
        if self.pairs:
            return
        pairs = name_pairs(self.transfer.pairs, self.student, self.teacher, images)
        training = self.student.training
        try:
            compare(self.student.eval(), self.teacher, images, pairs)
        finally:
            self.student.train(training)
        self.pairs = pairs

    def _open_cache(self, images: ImageSet, what: str, *, flips: bool) -> TeacherCache:
        cache = open_shared_cache(
            self.trainer,
            self.teacher,
            images,
            [teacher_layer for _, teacher_layer, _ in self.pairs],
            what=what,
            root=cache_folder(self.cache_dir) / "teachers",
            quantities=[self.transfer.quantity] if flips else [],
            classes=self.transfer.classes,
            flips=flips and self.augment.flip,
            p=self.transfer.p,
        )
        return cache if self.device.type == "cpu" else cache.to(self.device)

    def _update_meter(self, batch: Batch, comparison: Comparison) -> None:
        if self._meter is None:
            pairs = {student_layer: teacher_layer for student_layer, teacher_layer, _ in self.pairs}
            has_runner_up = runner_up_maps(comparison) is not None
            self._meter = FidelityMeter(pairs, self.mean_map_by_layer, runner_up=has_runner_up)
        if not self._labels_match:
            batch = batch._replace(labels=torch.full_like(batch.labels, -1))
        update_meter(self._meter, batch, comparison)

    def _log_fidelity(self, rename: Callable[[str], str] = str) -> None:
        assert self._meter is not None, "an epoch has a batch"
        self.table, self._meter = self._meter.table(), None
        scalars = fidelity_scalars(summary(self.table)["student"])  # the same in all processes
        self.log_dict({rename(tag): value for tag, value in scalars.items()}, rank_zero_only=True)


_NOT_SETTINGS = ("self", "__class__", "cached", "cache_dir")
