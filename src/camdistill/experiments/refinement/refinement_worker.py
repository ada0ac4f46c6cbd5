"""Does one job of a refinement: trains and measures a start network or an arm."""

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from camdistill.data.datasets import ImageSet, limit_set
from camdistill.data.modules import ImageData
from camdistill.distill.checkpoints import load, write_checkpoint
from camdistill.distill.classifier import Classifier
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.distill.refiner import Refiner
from camdistill.distill.training import to_plain_data
from camdistill.errors import UserError
from camdistill.experiments.refinement import refinement_measurement
from camdistill.experiments.refinement.refinement_config import (
    CE,
    START,
    STUDENT,
    RefinementPlan,
    identify_maps,
    identify_objective,
)
from camdistill.experiments.refinement.refinement_measurement import Judge
from camdistill.experiments.refinement.refinement_records import Job, RefinementRecord, pack_columns
from camdistill.experiments.refinement.refinement_training import EpochSelector, fit_silently
from camdistill.networks.teachers import NetworkSpec, Preprocessed, build_preprocessed
from camdistill.store.digest import digest_of, sha256_of
from camdistill.types import Images, Labels, Maps

VERSION = 1  # goes up when the same run would give other numbers


class _ImageSets(NamedTuple):
    full_data: ImageData
    refining_data: ImageData
    test: ImageSet


class RefinementWorker:
    """Does the jobs of a plan; each process loads the images once.

    Args:
        plan: What is asked.
        device: "cpu" or "cuda".
    """

    def __init__(self, plan: RefinementPlan, device: str = "cpu") -> None:
        self.plan, self.device = plan, device
        self._sets: _ImageSets | None = None

    def __getstate__(self) -> dict[str, object]:
        """For another process, which loads the images itself."""
        return {**self.__dict__, "_sets": None}

    def __call__(self, job: Job) -> RefinementRecord:
        """Trains what is missing, and measures it."""
        start_time = time.monotonic()
        selector = EpochSelector()
        if job.arm == START:
            network = reference = self._train_or_load_start(job.start)
        elif job.arm.startswith(STUDENT):
            network = self._distill_student(job)
            baseline = replace(job, arm=STUDENT + CE, floor=None)
            reference = network if job == baseline else self._load_network(self.path(baseline))
        else:
            network, selector = self._refine(job)
            reference = self.network(job.start)
        values = self.build_judge()(network, reference)
        return RefinementRecord(
            key=self.key(job),
            start=job.start,
            arm=job.arm,
            accuracies=selector.accuracies,
            epoch=selector.epoch,
            matched=selector.matched if selector.accuracies else True,
            columns=pack_columns(values),
            images=len(self.image_sets().test),
            checkpoint=str(self.path(job)),
            seconds=round(time.monotonic() - start_time, 2),
        )

    def key(self, job: Job) -> str:
        """A sha256 of everything that decides a job's numbers; a given start's file is read."""
        plan, sets = self.plan, self.image_sets()
        common = {
            "version": [VERSION, refinement_measurement.VERSION],
            "test": sets.full_data.fingerprints["test"],
            **({"truth": sets.test.annotation_digest} if sets.test.annotation_digest else {}),
            "judged": [to_plain_data(plan.judging), len(sets.test), plan.seed],
            "maps": to_plain_data(identify_maps(plan)),
            "start": self._start_digest(job.start),
        }
        if job.arm == START:
            return digest_of(common)
        if job.arm.startswith(STUDENT):
            teacher = replace(job, arm=job.arm.removeprefix(STUDENT))
            student_identity = [to_plain_data(plan.students), self.key(teacher)]
            baseline = replace(job, arm=STUDENT + CE, floor=None)
            baseline_key = None if job == baseline else self.key(baseline)
            return digest_of(common | {"student": student_identity, "against": baseline_key})
        objective, arm = plan.objectives_by_arm[job.arm]
        arm_identity = {
            "objective": identify_objective(objective) if arm != "ce" else None,
            "arm": arm,
            "recipe": to_plain_data(plan.recipe),
            "floor": job.floor,
            "order": self._order_seed(job.start),
            "images": self._image_identity(),
        }
        annotations = (
            _assert_loaded(sets.full_data.train_set).annotation_digest
            if objective.kind == "energy"
            else ""
        )
        return digest_of(common | arm_identity | ({"located": annotations} if annotations else {}))

    def path(self, job: Job) -> Path:
        """Where a job's network is."""
        if job.arm == START and self.plan.checkpoints:
            return self.plan.checkpoints[self.plan.starts.index(job.start)]
        key = self._start_digest(job.start) if job.arm == START else self.key(job)
        name = f"{job.start}-{job.arm}-{key[:8]}.safetensors".replace(" ", "-")
        return self.plan.folder / "networks" / name

    def network(self, start: str) -> Preprocessed:
        """A start network, from its file."""
        return self._load_network(self.path(Job(start, START)))

    def _load_network(self, path: Path) -> Preprocessed:
        network = load(path, trust=self.plan.trust).network
        return network.to(self.device).eval()

    def explain_job(
        self, job: Job, record: RefinementRecord, images: Images, classes: Labels
    ) -> Maps:
        """The refined explainer's maps of what a job made."""
        network = self._load_network(Path(record.checkpoint))
        return self.build_judge().explain(network, images, classes).detach()

    def build_judge(self) -> Judge:
        """What measures."""
        plan = self.plan
        return Judge(self.image_sets().test, plan.objective, plan.judging, plan.seed, self.device)

    def image_sets(self) -> _ImageSets:
        """The images, loaded once."""
        if self._sets is None:
            data, plan = copy.copy(self.plan.data), self.plan
            data.prepare_data()
            data.setup("fit")
            data.setup("test")
            train, test = _assert_loaded(data.train_set), _assert_loaded(data.test_set)
            for recipe in (plan.start, plan.recipe, plan.students):
                if recipe is not None:
                    recipe.augment.check_size(train.size)
            refining = copy.copy(data)
            refining.train_set = limit_set(train, plan.recipe.images, plan.seed)
            shuffled_rows = np.random.default_rng([plan.seed, *b"refine"]).permutation(len(test))
            rows = np.sort(shuffled_rows[: plan.judging.images])
            self._sets = _ImageSets(data, refining, test.subset(rows))
        return self._sets

    def start_networks(self) -> list[Preprocessed]:
        """The start networks; those that are trained here as one that is not, if it can be."""
        plan, classes = self.plan, len(self.image_sets().full_data.classes)
        if plan.network is None:
            return [self.network(name) for name in plan.starts]
        if not classes:
            raise UserError(
                "the images have no labels, so no start network can be trained; give --checkpoints"
            )
        return [build_preprocessed(plan.network, classes=classes).to(self.device).eval()]

    def _train_or_load_start(self, start: str) -> Preprocessed:
        plan, path = self.plan, self.path(Job(start, START))
        if plan.network is not None and not path.exists():
            seed = plan.seeds[plan.starts.index(start)]
            module = Classifier(
                plan.network,
                augment=plan.start.augment,
                optimization=plan.start.optimization,
                seed=seed,
            )
            module.cure = _describe_cure(start, START, "start")
            fit_silently(
                module,
                copy.copy(self.image_sets().full_data),
                epochs=plan.start.epochs,
                seed=seed,
                precision=plan.start.precision,
                device=self.device,
            )
            write_checkpoint(module, path)
        return self.network(start)

    def _refine(self, job: Job) -> tuple[Preprocessed, EpochSelector]:
        plan = self.plan
        objective, arm = plan.objectives_by_arm[job.arm]
        module = Refiner(
            self._network_spec(job.start),
            objective,
            arm=arm,
            keep=plan.recipe.keep,
            frozen_statistics=plan.recipe.frozen_statistics,
            augment=plan.recipe.augment,
            optimization=plan.recipe.optimization,
            seed=plan.seed,
        )
        selector = EpochSelector(job.floor)
        module.cure = _describe_cure(job.start, job.arm, "recipe")
        fit_silently(
            module,
            copy.copy(self.image_sets().refining_data),
            epochs=plan.recipe.epochs,
            seed=self._order_seed(job.start),
            precision=plan.recipe.precision,
            device=self.device,
            callbacks=[selector],
        )
        module.network.network.load_state_dict(selector.state)
        write_checkpoint(module, self.path(job))
        return module.network.to(self.device).eval(), selector

    def _distill_student(self, job: Job) -> Preprocessed:
        """A student of what another job made."""
        recipe, sets = self.plan.students, self.image_sets()
        assert recipe is not None, "there are jobs of students"
        teacher = self.path(replace(job, arm=job.arm.removeprefix(STUDENT)))
        module = DistilledExplainer(
            replace(self._network_spec(job.start), weights=str(teacher)),
            recipe.network,
            ce=0.0,
            kd=1.0,
            beta=recipe.beta,
            augment=recipe.augment,
            optimization=recipe.optimization,
            cached=False,
            seed=self._order_seed(job.start),
        )
        module.cure = _describe_cure(job.start, job.arm, "students")
        data = copy.copy(sets.full_data)
        data.train_set = limit_set(_assert_loaded(data.train_set), recipe.images, self.plan.seed)
        fit_silently(
            module,
            data,
            epochs=recipe.epochs,
            seed=self._order_seed(job.start),
            precision="float32",
            device=self.device,
        )
        write_checkpoint(module, self.path(job))
        return module.student.to(self.device).eval()

    def _network_spec(self, start: str) -> NetworkSpec:
        path = self.path(Job(start, START))
        if self.plan.network is not None:
            return replace(self.plan.network, weights=str(path))
        checkpoint = load(path, trust=self.plan.trust)
        settings = checkpoint.settings["student" if "student" in checkpoint.settings else "network"]
        mean, std = (
            tuple(statistic.flatten().tolist())
            for statistic in (checkpoint.network.mean, checkpoint.network.std)
        )
        return NetworkSpec(
            str(settings["name"]), str(path), dict(settings.get("args") or {}), mean=mean, std=std
        )

    def _order_seed(self, start: str) -> int:
        """Seed of the order of training: the same for all arms of a start, whatever is beside it.

        Given networks have no seed of their own, so theirs is their place in the list.
        """
        plan, index = self.plan, self.plan.starts.index(start)
        return plan.seed + 1 + (plan.seeds[index] if plan.network is not None else index)

    def _start_digest(self, start: str) -> str:
        """Of a given network its content; of one that is trained here how."""
        plan = self.plan
        if plan.network is None:
            return sha256_of(self.path(Job(start, START)))
        seed = plan.seeds[plan.starts.index(start)]
        identity = [
            to_plain_data(plan.network),
            to_plain_data(plan.start),
            seed,
            self._image_identity(),
        ]
        return digest_of({"version": VERSION, "start": identity})

    def _image_identity(self) -> list[object]:
        """Which images networks learn from, and in which batches."""
        full_data = self.image_sets().full_data
        fingerprints = {name: full_data.fingerprints[name] for name in ("train", "val")}
        counts = [len(_assert_loaded(full_data.train_set)), len(_assert_loaded(full_data.val_set))]
        return [fingerprints, counts, self.plan.data.split_seed, self.plan.data.batch_size]


def _describe_cure(start: str, arm: str, recipe: str) -> str:
    """What to do where a run's loss is not a number."""
    weight = " or a smaller weight of its objective" if recipe == "recipe" else ""
    precise = "" if recipe == "students" else f", or --{recipe}.precision float32"
    return f", in {arm} of {start}; try a third of it (--{recipe}.optimization.lr){weight}{precise}"


def _assert_loaded(images: ImageSet | None) -> ImageSet:
    assert images is not None, "setup made it"
    return images
