"""One run of a refinement: a start network trained and measured, or an arm from it."""

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
from camdistill.experiments.ranking.teacher_outputs import digest_of
from camdistill.experiments.refinement import refinement_measurement
from camdistill.experiments.refinement.refinement_config import (
    CE,
    START,
    STUDENT,
    Plan,
    of_maps,
    told,
)
from camdistill.experiments.refinement.refinement_measurement import Judge
from camdistill.experiments.refinement.refinement_records import Job, Refined, packed
from camdistill.experiments.refinement.refinement_training import Chosen, trained
from camdistill.networks.teachers import NetworkSpec, Preprocessed, build_preprocessed
from camdistill.networks.weights import sha256_of
from camdistill.types import Images, Labels, Maps

VERSION = 1  # goes up when the same run would give other numbers


class _Sets(NamedTuple):
    whole: ImageData
    refining: ImageData
    test: ImageSet


class Workshop:
    """Does the jobs of a plan; each process loads the images once.

    Args:
        plan: What is asked.
        device: "cpu" or "cuda".
    """

    def __init__(self, plan: Plan, device: str = "cpu") -> None:
        self.plan, self.device = plan, device
        self._sets: _Sets | None = None

    def __getstate__(self) -> dict[str, object]:
        """For another process, which loads the images itself."""
        return {**self.__dict__, "_sets": None}

    def __call__(self, job: Job) -> Refined:
        """Trains what is missing, and measures it."""
        begun = time.monotonic()
        chosen = Chosen()
        if job.arm == START:
            network = before = self._started(job.start)
        elif job.arm.startswith(STUDENT):
            network = self._taught(job)
            base = replace(job, arm=STUDENT + CE, floor=None)
            before = network if job == base else self._at(self.path(base))
        else:
            network, chosen = self._refined(job)
            before = self.network(job.start)
        values = self.judge()(network, before)
        return Refined(
            key=self.key(job),
            start=job.start,
            arm=job.arm,
            accuracies=chosen.accuracies,
            epoch=chosen.epoch,
            matched=chosen.matched if chosen.accuracies else True,
            columns=packed(values),
            images=len(self.sets().test),
            checkpoint=str(self.path(job)),
            seconds=round(time.monotonic() - begun, 2),
        )

    def key(self, job: Job) -> str:
        """A sha256 of everything that decides a job's numbers; a given start's file is read."""
        plan, sets = self.plan, self.sets()
        common = {
            "version": [VERSION, refinement_measurement.VERSION],
            "test": sets.whole.fingerprints["test"],
            **({"truth": sets.test.annotation_digest} if sets.test.annotation_digest else {}),
            "judged": [to_plain_data(plan.judging), len(sets.test), plan.seed],
            "maps": to_plain_data(of_maps(plan)),
            "start": self._start_digest(job.start),
        }
        if job.arm == START:
            return digest_of(common)
        if job.arm.startswith(STUDENT):
            teacher = replace(job, arm=job.arm.removeprefix(STUDENT))
            taught = [to_plain_data(plan.students), self.key(teacher)]
            base = replace(job, arm=STUDENT + CE, floor=None)
            against = None if job == base else self.key(base)
            return digest_of(common | {"student": taught, "against": against})
        objective, arm = plan.refined[job.arm]
        own = {
            "objective": told(objective) if arm != "ce" else None,
            "arm": arm,
            "recipe": to_plain_data(plan.recipe),
            "floor": job.floor,
            "order": self._order(job.start),
            "images": self._images(),
        }
        located = (
            _known(sets.whole.train_set).annotation_digest if objective.kind == "energy" else ""
        )
        return digest_of(common | own | ({"located": located} if located else {}))

    def path(self, job: Job) -> Path:
        """Where a job's network is."""
        if job.arm == START and self.plan.checkpoints:
            return self.plan.checkpoints[self.plan.starts.index(job.start)]
        key = self._start_digest(job.start) if job.arm == START else self.key(job)
        name = f"{job.start}-{job.arm}-{key[:8]}.safetensors".replace(" ", "-")
        return self.plan.folder / "networks" / name

    def network(self, start: str) -> Preprocessed:
        """A start network, from its file."""
        return self._at(self.path(Job(start, START)))

    def _at(self, path: Path) -> Preprocessed:
        found = load(path, trust=self.plan.trust).network
        return found.to(self.device).eval()

    def made(self, job: Job, record: Refined, images: Images, classes: Labels) -> Maps:
        """The refined explainer's maps of what a job made."""
        found = self._at(Path(record.checkpoint))
        return self.judge().explain(found, images, classes).detach()

    def judge(self) -> Judge:
        """What measures."""
        plan = self.plan
        return Judge(self.sets().test, plan.objective, plan.judging, plan.seed, self.device)

    def sets(self) -> _Sets:
        """The images, loaded once."""
        if self._sets is None:
            data, plan = copy.copy(self.plan.data), self.plan
            data.prepare_data()
            data.setup("fit")
            data.setup("test")
            train, test = _known(data.train_set), _known(data.test_set)
            for recipe in (plan.start, plan.recipe, plan.students):
                if recipe is not None:
                    recipe.augment.check_size(train.size)
            refining = copy.copy(data)
            refining.train_set = limit_set(train, plan.recipe.images, plan.seed)
            order = np.random.default_rng([plan.seed, *b"refine"]).permutation(len(test))
            rows = np.sort(order[: plan.judging.images])
            self._sets = _Sets(data, refining, test.subset(rows))
        return self._sets

    def starting(self) -> list[Preprocessed]:
        """The start networks; those that are trained here as one that is not, if it can be."""
        plan, classes = self.plan, len(self.sets().whole.classes)
        if plan.network is None:
            return [self.network(name) for name in plan.starts]
        if not classes:
            raise UserError(
                "the images have no labels, so no start network can be trained; give --checkpoints"
            )
        return [build_preprocessed(plan.network, classes=classes).to(self.device).eval()]

    def _started(self, start: str) -> Preprocessed:
        plan, path = self.plan, self.path(Job(start, START))
        if plan.network is not None and not path.exists():
            seed = plan.seeds[plan.starts.index(start)]
            module = Classifier(
                plan.network,
                augment=plan.start.augment,
                optimisation=plan.start.optimisation,
                seed=seed,
            )
            module.cure = _cure(start, START, "start")
            trained(
                module,
                copy.copy(self.sets().whole),
                epochs=plan.start.epochs,
                seed=seed,
                precision=plan.start.precision,
                device=self.device,
            )
            write_checkpoint(module, path)
        return self.network(start)

    def _refined(self, job: Job) -> tuple[Preprocessed, Chosen]:
        plan = self.plan
        objective, arm = plan.refined[job.arm]
        module = Refiner(
            self._spec(job.start),
            objective,
            arm=arm,
            keep=plan.recipe.keep,
            frozen_statistics=plan.recipe.frozen_statistics,
            augment=plan.recipe.augment,
            optimisation=plan.recipe.optimisation,
            seed=plan.seed,
        )
        chosen = Chosen(job.floor)
        module.cure = _cure(job.start, job.arm, "recipe")
        trained(
            module,
            copy.copy(self.sets().refining),
            epochs=plan.recipe.epochs,
            seed=self._order(job.start),
            precision=plan.recipe.precision,
            device=self.device,
            callbacks=[chosen],
        )
        module.network.network.load_state_dict(chosen.state)
        write_checkpoint(module, self.path(job))
        return module.network.to(self.device).eval(), chosen

    def _taught(self, job: Job) -> Preprocessed:
        """A student of what another job made."""
        recipe, sets = self.plan.students, self.sets()
        assert recipe is not None, "there are jobs of students"
        teacher = self.path(replace(job, arm=job.arm.removeprefix(STUDENT)))
        module = DistilledExplainer(
            replace(self._spec(job.start), weights=str(teacher)),
            recipe.network,
            ce=0.0,
            kd=1.0,
            beta=recipe.beta,
            augment=recipe.augment,
            optimisation=recipe.optimisation,
            cached=False,
            seed=self._order(job.start),
        )
        module.cure = _cure(job.start, job.arm, "students")
        data = copy.copy(sets.whole)
        data.train_set = limit_set(_known(data.train_set), recipe.images, self.plan.seed)
        trained(
            module,
            data,
            epochs=recipe.epochs,
            seed=self._order(job.start),
            precision="float32",
            device=self.device,
        )
        write_checkpoint(module, self.path(job))
        return module.student.to(self.device).eval()

    def _spec(self, start: str) -> NetworkSpec:
        path = self.path(Job(start, START))
        if self.plan.network is not None:
            return replace(self.plan.network, weights=str(path))
        found = load(path, trust=self.plan.trust)
        told = found.settings["student" if "student" in found.settings else "network"]
        mean, std = (
            tuple(part.flatten().tolist()) for part in (found.network.mean, found.network.std)
        )
        return NetworkSpec(
            str(told["name"]), str(path), dict(told.get("args") or {}), mean=mean, std=std
        )

    def _order(self, start: str) -> int:
        """Seed of the order of training: the same for all arms of a start, whatever is beside it.

        Given networks have no seed of their own, so theirs is their place in the list.
        """
        plan, place = self.plan, self.plan.starts.index(start)
        return plan.seed + 1 + (plan.seeds[place] if plan.network is not None else place)

    def _start_digest(self, start: str) -> str:
        """Of a given network its content; of one that is trained here how."""
        plan = self.plan
        if plan.network is None:
            return sha256_of(self.path(Job(start, START)))
        seed = plan.seeds[plan.starts.index(start)]
        made = [to_plain_data(plan.network), to_plain_data(plan.start), seed, self._images()]
        return digest_of({"version": VERSION, "start": made})

    def _images(self) -> list[object]:
        """Which images networks learn from, and in which batches."""
        whole = self.sets().whole
        found = {name: whole.fingerprints[name] for name in ("train", "val")}
        counts = [len(_known(whole.train_set)), len(_known(whole.val_set))]
        return [found, counts, self.plan.data.split_seed, self.plan.data.batch_size]


def _cure(start: str, arm: str, recipe: str) -> str:
    """What to do where a run's loss is not a number."""
    weight = " or a smaller weight of its objective" if recipe == "recipe" else ""
    precise = "" if recipe == "students" else f", or --{recipe}.precision float32"
    return f", in {arm} of {start}; try a third of it (--{recipe}.optimisation.lr){weight}{precise}"


def _known(images: ImageSet | None) -> ImageSet:
    assert images is not None, "setup made it"
    return images
