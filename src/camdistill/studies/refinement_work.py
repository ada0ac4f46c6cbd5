"""One run of a refinement: a start network trained and measured, or an arm from it."""

import base64
import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from camdistill.data.datasets import ImageSet, limited
from camdistill.data.modules import ImageData
from camdistill.distill.checkpoints import load, save
from camdistill.distill.classifier import Classifier
from camdistill.distill.refiner import Refiner, masks_of
from camdistill.distill.training import as_images, plain
from camdistill.errors import UserError
from camdistill.explain.methods import at_image
from camdistill.networks.heads import head_size
from camdistill.networks.teachers import NetworkSpec, Preprocessed, preprocessed
from camdistill.networks.weights import sha256_of
from camdistill.studies import refinement_judging
from camdistill.studies.refinement_judging import Judge, Values
from camdistill.studies.refinement_plan import START, Plan
from camdistill.studies.refinement_training import Chosen, trained
from camdistill.studies.teacher_work import digest_of
from camdistill.types import Images, Labels, Maps

VERSION = 1  # goes up when the same run would give other numbers


@dataclass(frozen=True)
class Job:
    """A start network, or an arm from one.

    Attributes:
        start: Name of the start network.
        arm: "start" for itself.
        floor: Validation accuracy that the chosen epoch must have; None takes the last.
    """

    start: str
    arm: str
    floor: float | None = None


@dataclass(frozen=True)
class Refined:
    """What came out of one job.

    Attributes:
        key: Of everything that decides it: equal keys, equal runs.
        start: Name of the start network.
        arm: "start", "ce", the objective's kind, or a control.
        accuracies: On validation images after each epoch; without labels agreement with the start.
        epoch: The chosen one, from 1; 0 for the start.
        matched: Whether it is as accurate as cross-entropy alone, within the tolerance.
        columns: By name, one value a test image, packed.
        images: How many test images.
        checkpoint: The network's file.
        seconds: Wall clock.
    """

    key: str
    start: str
    arm: str
    accuracies: list[float]
    epoch: int
    matched: bool
    columns: dict[str, str]
    images: int
    checkpoint: str
    seconds: float

    def values(self, column: str) -> Float[np.ndarray, "images"]:
        """One value a test image."""
        raw = base64.b64decode(self.columns[column])
        return np.frombuffer(raw, "<f4").astype(np.float64)


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
        if job.arm == START:
            network, chosen = self._started(job.start), Chosen(accuracies=[])
            values = self.judge()(network, network)
        else:
            network, chosen = self._refined(job)
            start = self.network(job.start)
            values = self.judge()(network, start)
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
            "version": [VERSION, refinement_judging.VERSION],
            "test": sets.whole.fingerprints["test"],
            "judged": [plain(plan.judging), len(sets.test), plan.seed],
            "maps": plain(_of_maps(plan)),
            "start": self._start_digest(job.start),
        }
        if job.arm == START:
            return digest_of(common)
        objective, arm = plan.refined[job.arm]
        own = {
            "objective": plain(objective) if arm != "ce" else None,
            "arm": arm,
            "recipe": plain(plan.recipe),
            "floor": job.floor,
            "order": self._order(job.start),
            "images": self._images(),
        }
        return digest_of(common | own)

    def path(self, job: Job) -> Path:
        """Where a job's network is."""
        if job.arm == START and self.plan.checkpoints:
            return self.plan.checkpoints[self.plan.starts.index(job.start)]
        key = self._start_digest(job.start) if job.arm == START else self.key(job)
        return self.plan.folder / "networks" / f"{job.start}-{job.arm}-{key[:8]}.safetensors"

    def network(self, start: str) -> Preprocessed:
        """A start network, from its file."""
        found = load(self.path(Job(start, START)), trust=self.plan.trust).network
        return found.to(self.device).eval()

    def made(self, job: Job, record: Refined, images: Images, classes: Labels) -> Maps:
        """The refined explainer's maps of what a job made."""
        found = load(Path(record.checkpoint), trust=self.plan.trust).network
        return self.judge().explain(found.to(self.device).eval(), images, classes).detach()

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
            refining = copy.copy(data)
            refining.train_set = limited(train, plan.recipe.images, plan.seed)
            order = np.random.default_rng([plan.seed, *b"refine"]).permutation(len(test))
            rows = np.sort(order[: plan.judging.images])
            self._sets = _Sets(data, refining, test.subset(rows))
        return self._sets

    def demand_possible(self) -> None:
        """Refuse what can't be done, before anything is spent.

        Raises:
            UserError: No masks for energy, another number of classes, no such layer.
        """
        plan, sets = self.plan, self.sets()
        for objective, _ in plan.refined.values():
            if objective.kind == "energy":
                masks_of(_known(sets.whole.train_set))
        classes = len(sets.whole.classes)
        if plan.network is not None:
            if not classes:
                raise UserError(
                    "the images have no labels, so no start network can be trained; give "
                    "--checkpoints"
                )
            networks = [preprocessed(plan.network, classes=classes).eval()]
        else:
            networks = [self.network(name) for name in plan.starts]
        images = as_images(sets.test.batch(np.arange(1)).pixels).to(self.device)
        for network in networks:
            own = head_size(network.network)
            if classes and own != classes and plan.recipe.keep != "start":
                raise UserError(
                    f"the images have {classes} classes, a start network {own}; give the data "
                    "that it was trained with, or --recipe.keep start, which needs no label"
                )
            for objective, _ in plan.refined.values():
                at_image(objective.cam, objective.layer)(network, images, _top(network, images))
            for name in plan.judging.held_out:
                method, _, layer = name.partition("@")
                at_image(method, layer or None)(network, images, _top(network, images))

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
            trained(
                module,
                copy.copy(self.sets().whole),
                epochs=plan.start.epochs,
                seed=seed,
                precision=plan.start.precision,
                device=self.device,
            )
            save(module, path)
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
        save(module, self.path(job))
        return module.network.to(self.device).eval(), chosen

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
        """Seed of the order of training: the same for all arms of a start."""
        return self.plan.seed + 1 + self.plan.starts.index(start)

    def _start_digest(self, start: str) -> str:
        """Of a given network its content; of one that is trained here how."""
        plan = self.plan
        if plan.network is None:
            return sha256_of(self.path(Job(start, START)))
        seed = plan.seeds[plan.starts.index(start)]
        told = [plain(plan.network), plain(plan.start), seed, self._images()]
        return digest_of({"version": VERSION, "start": told})

    def _images(self) -> list[object]:
        """Which images networks learn from, and in which batches."""
        whole = self.sets().whole
        found = {name: whole.fingerprints[name] for name in ("train", "val")}
        counts = [len(_known(whole.train_set)), len(_known(whole.val_set))]
        return [found, counts, self.plan.data.split_seed, self.plan.data.batch_size]


def packed(values: Values) -> dict[str, str]:
    """Values by column as text."""
    return {
        name: base64.b64encode(np.asarray(value, "<f4").tobytes()).decode()
        for name, value in values.items()
    }


def _of_maps(plan: Plan) -> Mapping[str, object]:
    """What of the objective decides what is measured."""
    one = plan.objective
    extra = [one.views, one.teacher, one.teacher_layer]
    return {
        "cam": [one.cam, one.layer, one.shown],
        "extra": plain(extra) if one.kind in ("consistency", "fidelity") else None,
        "kind": one.kind if one.kind in ("consistency", "fidelity") else None,
    }


def _top(network: Preprocessed, images: Images) -> Labels:
    with torch.no_grad():
        top: Labels = network(images).argmax(1)
    return top


def _known(images: ImageSet | None) -> ImageSet:
    assert images is not None, "setup made it"
    return images
