"""The distilled explainer: a shallow student learns its teacher's classes and its teacher's maps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from camdistill import tags
from camdistill.data.cache import cache_folder
from camdistill.data.datasets import ImageSet
from camdistill.data.views import Augment, View, identity_view, view_maps
from camdistill.distill.cache import TeacherCache
from camdistill.distill.comparison import Comparison, MapComparison, mean_maps
from camdistill.distill.losses import beta_factor, cross_entropy, soft_targets_kl
from camdistill.distill.optimisation import Optimisation
from camdistill.distill.training import Training, as_images, plain, seeded
from camdistill.distill.transfer import Targets, Transfer, quantity_maps, transfer_distance
from camdistill.errors import UserError
from camdistill.explain.gradcam import explain, last_layer
from camdistill.measure.fidelity import FidelityMeter, FidelityTable, intervals, summary
from camdistill.networks.teachers import NetworkSpec, Preprocessed, Teacher, build
from camdistill.types import Batch, Images, Labels, Logits


class DistilledExplainer(Training):
    """Trains a student to classify and to explain like its teacher.

    The loss of an image is

        ce * CE(student, label) + kd * T^2 KL(teacher || student) + beta * distance(maps)

    where the maps of both networks are those of the teacher's top class. With `ce=0` no label is
    needed: unlabelled images train.

    Args:
        teacher: The network to imitate; it is never trained and never stored.
        student: The network that is trained; it gets the teacher's normalisation and classes.
        transfer: Which explanation is transferred, and at which layers.
        ce: Weight of cross-entropy with the labels.
        kd: Weight of distillation with the teacher's logits (Hinton et al. 2015).
        temperature: Of distillation.
        beta: Weight of the distance between the maps.
        augment: Views of the training images; maps move with them.
        optimisation: Optimiser and schedule.
        cached: Ask the teacher once per image and orientation and keep its answers on disk; false asks
            it at every step. Cached maps are cropped with the image; cached logits are of the whole one.
        cache_dir: Where the teacher's answers are kept; the default is CAMDISTILL_CACHE or the
            user's cache folder.
        ema: Decay of a running average of the student's weights; null keeps the last weights.
        seed: Of the student's start and of the views.
    """

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
        optimisation: Optimisation = Optimisation(),  # noqa: B008
        cached: bool = True,
        cache_dir: Path | None = None,
        ema: float | None = None,
        seed: int = 0,
    ) -> None:
        given = dict(locals())
        super().__init__(optimisation, augment, ema=ema, seed=seed)
        _check_weights(ce, kd, beta, temperature)
        self.settings = {
            name: plain(value) for name, value in given.items() if name not in _NOT_SETTINGS
        }
        self.transfer, self.ce, self.kd, self.temperature = transfer, ce, kd, temperature
        self.beta, self.cached, self.cache_dir = beta, cached, cache_dir
        self.teacher = Teacher(teacher)
        network = seeded(seed, lambda: build(student, classes=self.teacher.classes))
        self.student = Preprocessed(
            network, self.teacher.mean.flatten().tolist(), self.teacher.std.flatten().tolist()
        )
        self.pairs: list[tuple[str, str, float]] = []
        self.mean_map_by_layer: dict[str, Tensor] = {}
        self.table: FidelityTable | None = None
        self._caches: dict[str, TeacherCache] = {}
        self._meter: FidelityMeter | None = None
        self._labels_count = True
        self.image_size: tuple[int, int] = (0, 0)

    @property
    def fitted(self) -> Preprocessed:
        """The student."""
        return self.student

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One step of distillation."""
        images, view = self.training_view(batch)
        targets = self.targets(batch, images, view)
        logits, maps_by_layer = self.student_quantities(images, targets.classes)
        ce = cross_entropy(logits, batch.labels).mean()
        kd = soft_targets_kl(logits, targets.logits, self.temperature).mean()
        loss = self.ce * ce + self.kd * kd
        if self.beta:
            beta = self.beta * beta_factor(self.transfer.schedule, self.progress)
            maps = transfer_distance(
                self.transfer, self.pairs, maps_by_layer, targets.maps_by_layer
            ).mean()
            loss = loss + beta * maps
            self.log_dict({tags.LOSS_MAPS: maps, tags.BETA: beta})
        self.log_dict({tags.LOSS_CE: ce, tags.LOSS_KD: kd})
        self.log(tags.LOSS_TRAIN, loss, prog_bar=True)
        return self.finite(loss)

    def targets(self, batch: Batch, images: Images, view: View) -> Targets:
        """What the teacher says of augmented images: from its cache, or asked now."""
        cache, quantity = self._caches.get("train"), self.transfer.quantity
        layers = [teacher_layer for _, teacher_layer, _ in self.pairs] if self.beta else []
        if cache is None:
            with torch.no_grad():
                logits, maps = quantity_maps(
                    self.teacher, images, layers, None, quantity=quantity, p=self.transfer.p
                )
            return Targets(logits, logits.argmax(1), maps)
        logits, found = cache.lookup(batch.ids, view.flip, quantity)
        moved = {layer: view_maps(found[layer], view, flipped=True) for layer in layers}
        return Targets(logits, logits.argmax(1), moved)

    def student_quantities(
        self, images: Images, classes: Labels
    ) -> tuple[Logits, dict[str, Tensor]]:
        """The student's logits and its side of the transfer, with graph."""
        if not self.beta:
            return self.student(images), {}
        return quantity_maps(
            self.student,
            images,
            [student_layer for student_layer, _, _ in self.pairs],
            classes,
            quantity=self.transfer.quantity,
            p=self.transfer.p,
            grad=self.transfer.grad,
        )

    @torch.no_grad()
    def compare(self, images: Images) -> Comparison:
        """Teacher and student on images in [0, 1], at the layer pairs."""
        self._resolve_pairs(images)
        told = explain(self.teacher, images, [teacher for _, teacher, _ in self.pairs])
        shown = explain(self.student, images, [own for own, _, _ in self.pairs], told.classes)
        return Comparison(told.logits, shown.logits, told.classes, told.maps, shown.maps)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Fidelity, agreement and accuracy on images as they are."""
        images = as_images(batch.pixels)
        cache = self._caches.get("val")
        if cache is None:
            self._score(batch, self.compare(images))
            return
        logits, maps = cache.lookup(batch.ids, identity_view(len(images)).flip)
        classes = logits.argmax(1)
        shown = explain(self.student, images, [own for own, _, _ in self.pairs], classes)
        self._score(batch, Comparison(logits, shown.logits, classes, maps, shown.maps))

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """The same in float32, with the live teacher."""
        with torch.autocast(self.device.type, enabled=False):
            self._score(batch, self.compare(as_images(batch.pixels)))

    def predict_step(self, batch: Batch, batch_index: int) -> Comparison:
        """Logits and raw maps of both networks."""
        return self.compare(as_images(batch.pixels))

    def explain_images(self, batch: Batch) -> MapComparison:
        """A few images with the maps of both networks, for pictures."""
        images = as_images(batch.pixels)
        found = self.compare(images)
        return MapComparison(
            images.cpu(),
            batch.labels.cpu(),
            found.classes.cpu(),
            found.student_logits.argmax(1).cpu(),
            {layer: maps.cpu() for layer, maps in found.teacher_maps_by_layer.items()},
            {layer: maps.cpu() for layer, maps in found.student_maps_by_layer.items()},
        )

    def results(self) -> dict[str, object]:
        """What the test measured, with 95 % intervals over the test images."""
        if self.table is None:
            raise UserError("nothing was tested yet; run `camdistill test` first")
        return {
            **summary(self.table),
            "intervals": intervals(self.table),
            "sha256": {"teacher": self.teacher.sha256},
        }

    def on_validation_epoch_end(self) -> None:
        """Logs the means over the validation images."""
        self._log_fidelity()

    def on_test_epoch_end(self) -> None:
        """Keeps the values of each test image in `table`, and logs their means."""
        self._log_fidelity(tags.on_test)

    def setup(self, stage: str) -> None:
        """Checks that data and networks fit together before anything is spent."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        self.image_size = data.size
        self._labels_count = len(data.classes) == self.teacher.classes
        if self.ce > 0 and stage == "fit" and not self._labels_count:
            raise UserError(_labels_do_not_fit(len(data.classes), self.teacher.classes, self.ce))
        self._resolve_pairs(torch.zeros(1, 3, *data.size, device=self.device))

    def on_fit_start(self) -> None:
        """Asks the teacher about all images once, or finds what it said before."""
        super().on_fit_start()
        self.teacher.to(memory_format=torch.channels_last)
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        if self.cached:
            self._caches["train"] = self._cache(data.train_set, "training images", flips=True)
            self._caches["val"] = self._cache(data.val_set, "validation images", flips=False)
            self.mean_map_by_layer = self._caches["train"].mean_map_by_layer
        elif not self.mean_map_by_layer:
            self.mean_map_by_layer = mean_maps(
                self.teacher, data.train_set, [teacher for _, teacher, _ in self.pairs]
            )

    def experiment(self) -> dict[str, Any]:
        """Adds what the training found out: the layers, the teacher's file and its mean maps."""
        return {
            **super().experiment(),
            "pairs": plain(self.pairs),
            "size": list(self.image_size),
            "teacher_sha256": self.teacher.sha256,
            "mean_map_by_layer": {
                layer: mean.tolist() for layer, mean in self.mean_map_by_layer.items()
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the mean maps along."""
        super().on_load_checkpoint(checkpoint)
        found = json.loads(checkpoint["camdistill"])["mean_map_by_layer"]
        self.mean_map_by_layer = {layer: torch.tensor(mean) for layer, mean in found.items()}

    def _resolve_pairs(self, images: Images) -> None:
        """Names of the matched layers; None in the config stands for the last spatial one."""
        if self.pairs:
            return
        defaults: dict[str, str] = {}
        for pair in self.transfer.pairs:
            for side, network in (("student", self.student), ("teacher", self.teacher)):
                if getattr(pair, side) is None and side not in defaults:
                    defaults[side] = last_layer(network, images)
        self.pairs = [
            (pair.student or defaults["student"], pair.teacher or defaults["teacher"], pair.weight)
            for pair in self.transfer.pairs
        ]
        # A layer that can't be explained is told now, not after an epoch.
        training = self.student.training
        self.student.eval()
        self.compare(images)
        self.student.train(training)

    def _cache(self, images: ImageSet, what: str, *, flips: bool) -> TeacherCache:
        """The teacher's answers; the first process asks, the others wait and read."""
        quantities = [self.transfer.quantity] if flips else []
        with Progress(disable=not self.trainer.is_global_zero, transient=True) as bar:
            task = bar.add_task(f"Asking the teacher about {what}", total=None)
            if not self.trainer.is_global_zero:
                self.trainer.strategy.barrier()
            cache = TeacherCache.open_or_build(
                self.teacher,
                images,
                [teacher for _, teacher, _ in self.pairs],
                root=cache_folder(self.cache_dir) / "teachers",
                quantities=quantities,
                flips=flips and self.augment.flip,
                precision="bfloat16" if "bf16" in str(self.trainer.precision) else "float32",
                p=self.transfer.p,
                progress=lambda done, count: bar.update(task, completed=done, total=count),
            )
            if self.trainer.is_global_zero:
                self.trainer.strategy.barrier()
        return cache if self.device.type == "cpu" else cache.to(self.device)

    def _score(self, batch: Batch, found: Comparison) -> None:
        if self._meter is None:
            pairs = {own: teacher for own, teacher, _ in self.pairs}
            self._meter = FidelityMeter(pairs, self.mean_map_by_layer)
        labels = batch.labels if self._labels_count else torch.full_like(batch.labels, -1)
        self._meter.update(
            found.student_logits,
            found.teacher_logits,
            labels,
            found.student_maps_by_layer,
            found.teacher_maps_by_layer,
            batch.counted,
            batch.ids,
        )

    def _log_fidelity(self, rename: Callable[[str], str] = str) -> None:
        assert self._meter is not None, "an epoch has a batch"
        self.table, self._meter = self._meter.table(), None
        student = summary(self.table)["student"]
        shown = {tags.ACCURACY_STUDENT: student["accuracy"], tags.AGREEMENT: student["agreement"]}
        for name in ("pearson", "spearman", "cosine", "skill"):
            shown[getattr(tags, name.upper())] = student[name]
            if len(self.pairs) > 1:
                for layer, values in student["layers"].items():
                    shown[getattr(tags, name)(layer)] = values[name]
        known = {rename(tag): value for tag, value in shown.items() if value is not None}
        self.log_dict(known, prog_bar=False, rank_zero_only=True)


_NOT_SETTINGS = ("self", "__class__", "cached", "cache_dir")


def _check_weights(ce: float, kd: float, beta: float, temperature: float) -> None:
    for name, weight in (("ce", ce), ("kd", kd), ("beta", beta)):
        if weight < 0:
            raise UserError(f"{name} is {weight}; a weight of the loss is 0 or more")
    if ce == kd == beta == 0:
        raise UserError("ce, kd and beta are all 0: there is nothing to learn; give one a weight")
    if temperature <= 0:
        raise UserError(f"temperature is {temperature}; give a number above 0, usually 4")


def _labels_do_not_fit(found: int, wanted: int, ce: float) -> str:
    if not found:
        return f"the images have no labels, but ce is {ce}; --model.ce 0 trains without"
    return (
        f"the images have {found} classes, the teacher {wanted}; --model.ce 0 distils the teacher's "
        "own classes, or fine-tune a teacher for yours with Classifier"
    )
