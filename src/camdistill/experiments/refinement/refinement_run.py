"""A network's weights adapted to a metric of its own maps, from several starts, with controls.

A map can be trained without anything else changing (Heo et al. 2019,
https://arxiv.org/abs/1902.02041), and a network's answers to changed images can be trained without
its map changing. So every arm is measured twice on the network that it made: with that network's
map, and with its start's map of the same class. What the second gains is the answers', not the
map's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camdistill.experiments.refinement.refinement_checks import demand_possible
from camdistill.experiments.refinement.refinement_config import CE, START, STUDENT, Plan
from camdistill.experiments.refinement.refinement_measurement import BEFORE, MAP, OWN, Column
from camdistill.experiments.refinement.refinement_records import Job, Refined
from camdistill.experiments.refinement.refinement_worker import Workshop
from camdistill.experiments.shared.worker_pool import Crew
from camdistill.measure.metrics import METRICS
from camdistill.store.array_files import lock_cache
from camdistill.store.run_log import Ledger

LEDGER = "runs.jsonl"
ROUNDING = 1e-6  # of a share of images, which no number of them is as small as
Progress = Callable[[str, int, int], None]
Scores = NDArray[np.float64]
"""[starts, images]"""


@dataclass(frozen=True, eq=False)
class Found:
    """What a refinement gave.

    Attributes:
        plan: What was asked.
        records: By (start, arm).
        labelled: Whether accuracy is that of labels.
    """

    plan: Plan
    records: Mapping[tuple[str, str], Refined]
    labelled: bool

    @property
    def arms(self) -> list[str]:
        """Names of the arms, cross-entropy alone first; without "start"."""
        return list(self.plan.refined)

    @property
    def kept(self) -> str:
        """What arms are matched by: accuracy, or without labels agreement with the start."""
        return "accuracy" if self.labelled and self.plan.recipe.keep != "start" else "agreement"

    @property
    def main(self) -> str:
        """Name of the objective's own arm."""
        return self.plan.main

    def has(self, column: str) -> bool:
        """Whether it was measured."""
        return column in self.records[self.plan.starts[0], CE].columns

    def metrics(self, explainer: str = MAP) -> list[str]:
        """What was measured of an explainer's maps, as far as every image has a value."""
        first = self.records[self.plan.starts[0], CE]
        names = [Column(*name.split("|")) for name in first.columns if "|" in name]
        return [one.metric for one in names if (one.explainer, one.whose) == (explainer, OWN)]

    def scores(self, arm: str, column: str) -> Scores:
        """One value of a start and test image."""
        return np.stack([self.records[name, arm].values(column) for name in self.plan.starts])

    def maps(self, arm: str, metric: str, explainer: str = MAP, whose: str = OWN) -> Scores:
        """A metric of an arm's networks, larger being better."""
        who = OWN if arm == START else whose
        found = self.scores(arm, Column(explainer, who, metric).name)
        return found * signed(metric)

    def gained(self, arm: str, metric: str, explainer: str = MAP) -> Scores:
        """What an arm's maps on its networks are better than the starts' maps on the starts."""
        found: Scores = self.maps(arm, metric, explainer) - self.maps(START, metric, explainer)
        return found

    def by_map(self, arm: str, metric: str, explainer: str = MAP) -> Scores:
        """The map's own part: the new map less the start's, both on the new network."""
        before = self.maps(arm, metric, explainer, BEFORE)
        found: Scores = self.maps(arm, metric, explainer) - before
        return found

    def by_answers(self, arm: str, metric: str, explainer: str = MAP) -> Scores:
        """The rest: the start's map on the new network less the same on the start."""
        before = self.maps(arm, metric, explainer, BEFORE)
        found: Scores = before - self.maps(START, metric, explainer)
        return found

    def has_parts(self, metric: str, explainer: str = MAP) -> bool:
        """Whether the gain can be split."""
        first = self.records[self.plan.starts[0], CE]
        return Column(explainer, BEFORE, metric).name in first.columns


def signed(metric: str) -> int:
    """1 where higher is better, else -1."""
    return 1 if metric not in METRICS or METRICS[metric].higher else -1


def refined(
    plan: Plan,
    *,
    workers: int = 0,
    device: str = "cpu",
    on_progress: Progress | None = None,
    on_unused: Callable[[int], None] | None = None,
) -> Found:
    """Does every run that is missing: start networks, cross-entropy alone, then the other arms.

    Killed and started again, or with more seeds, arms or objectives, it does what is missing.

    Args:
        plan: What to do.
        workers: Processes of one thread each; 0 runs here.
        device: Where.
        on_progress: Told what is being done, and how much of it is done.
        on_unused: Told how many finished runs in the folder are of other settings, if any.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with lock_cache(plan.folder / "study", wait=False):
        workshop = Workshop(plan, device)
        demand_possible(workshop)
        ledger = Ledger(plan.folder / LEDGER, Refined)
        if on_unused is not None and (unused := ledger.unused(_known_keys(workshop, ledger))):
            on_unused(unused)
        with Crew(workshop, workers) as crew:
            work = _Work(workshop, ledger, crew, on_progress)
            found = work.done("start networks", [Job(name, START) for name in plan.starts])
            found |= work.done(CE, [Job(name, CE) for name in plan.starts])
            jobs = [job for name in plan.starts for job in matched_jobs(plan, found[name, CE])]
            found |= work.done("other arms", jobs)
            if plan.students is not None and plan.main in plan.refined:
                first = [Job(name, STUDENT + CE) for name in plan.starts]
                found |= work.done("students", first)
                second = [
                    replace(job, arm=STUDENT + job.arm) for job in jobs if job.arm == plan.main
                ]
                found |= work.done("students of refined networks", second)
        labelled = bool(workshop.sets().whole.classes)
    return Found(plan, found, labelled)


def matched_jobs(plan: Plan, alone: Refined) -> list[Job]:
    """The arms of a start beside cross-entropy alone, matched to its accuracy."""
    # "at most so much below" counts images, whatever float32 makes of their share
    floor = alone.accuracies[alone.epoch - 1] - plan.recipe.tolerance - ROUNDING
    return [Job(alone.start, arm, floor) for arm in plan.refined if arm != CE]


def _known_keys(workshop: Workshop, ledger: Ledger[Refined]) -> set[str]:
    """Of every job that the plan has, as far as what it is matched to was done."""
    plan, jobs = workshop.plan, list[Job]()
    for name in plan.starts:
        jobs += [Job(name, START), Job(name, CE)]
        alone = ledger.records.get(workshop.key(Job(name, CE)))
        if alone is not None:
            jobs += matched_jobs(plan, replace(alone, start=name))
    if plan.students is not None:
        jobs += [replace(job, arm=STUDENT + job.arm) for job in jobs if job.arm in (CE, plan.main)]
    return {workshop.key(job) for job in jobs}


class _Work:
    """Jobs on processes, and what is done of them."""

    def __init__(
        self,
        workshop: Workshop,
        ledger: Ledger[Refined],
        crew: Crew[Job, Refined],
        on_progress: Progress | None,
    ) -> None:
        self._workshop, self._ledger, self._crew = workshop, ledger, crew
        self._on_progress = on_progress

    def done(self, what: str, jobs: Sequence[Job]) -> dict[tuple[str, str], Refined]:
        """What is missing of some jobs, and the records of all."""
        keys = {job: self._workshop.key(job) for job in jobs}
        missing = [job for job in jobs if not self._known(job, keys[job])]
        ready = len(jobs) - len(missing)
        self._tell(what, ready, len(jobs))
        for _, record in self._crew.results(missing):
            self._ledger.add([record])
            ready += 1
            self._tell(what, ready, len(jobs))
        found = {}
        for job in jobs:
            # names and folders may have been others when the same run was made
            where = str(self._workshop.path(job))
            record = self._ledger.records[keys[job]]
            found[job.start, job.arm] = replace(
                record, start=job.start, arm=job.arm, checkpoint=where
            )
        return found

    def _known(self, job: Job, key: str) -> bool:
        """Whether a job's numbers and its network are there."""
        return key in self._ledger.records and Path(self._workshop.path(job)).exists()

    def _tell(self, what: str, done: int, total: int) -> None:
        if self._on_progress is not None and total:
            self._on_progress(what, done, total)
