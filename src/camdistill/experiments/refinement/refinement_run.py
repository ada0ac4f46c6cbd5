"""Refines networks towards a metric of their own maps, from several starts, with controls.

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

from camdistill.experiments.refinement.refinement_checks import check_refinement
from camdistill.experiments.refinement.refinement_config import CE, START, STUDENT, RefinementPlan
from camdistill.experiments.refinement.refinement_measurement import MAP, OWN_MAP, START_MAP, Column
from camdistill.experiments.refinement.refinement_records import Job, RefinementRecord
from camdistill.experiments.refinement.refinement_worker import RefinementWorker
from camdistill.experiments.shared.worker_pool import WorkerPool
from camdistill.measure.metrics import METRICS
from camdistill.store.array_files import lock_cache
from camdistill.store.run_log import RunLog

RUN_LOG = "runs.jsonl"
ROUNDING = 1e-6  # of a share of images, which no number of them is as small as
Progress = Callable[[str, int, int], None]
Scores = NDArray[np.float64]
"""[starts, images]"""


@dataclass(frozen=True, eq=False)
class RefinementRuns:
    """What a refinement gave.

    Attributes:
        plan: What was asked.
        records: By (start, arm).
        labeled: Whether accuracy is that of labels.
    """

    plan: RefinementPlan
    records: Mapping[tuple[str, str], RefinementRecord]
    labeled: bool

    @property
    def arms(self) -> list[str]:
        """Names of the arms, cross-entropy alone first; without "start"."""
        return list(self.plan.objectives_by_arm)

    @property
    def retention_metric(self) -> str:
        """What arms are matched by: accuracy, or without labels agreement with the start."""
        return "accuracy" if self.labeled and self.plan.recipe.keep != "start" else "agreement"

    @property
    def main_arm(self) -> str:
        """Name of the objective's own arm."""
        return self.plan.main_arm

    def has(self, column: str) -> bool:
        """Whether it was measured."""
        return column in self.records[self.plan.starts[0], CE].columns

    def metrics(self, explainer: str = MAP) -> list[str]:
        """What was measured of an explainer's maps, as far as every image has a value."""
        record = self.records[self.plan.starts[0], CE]
        columns = [Column(*name.split("|")) for name in record.columns if "|" in name]
        return [
            column.metric
            for column in columns
            if (column.explainer, column.owner) == (explainer, OWN_MAP)
        ]

    def scores(self, arm: str, column: str) -> Scores:
        """One value of a start and test image."""
        return np.stack([self.records[name, arm].values(column) for name in self.plan.starts])

    def maps(self, arm: str, metric: str, explainer: str = MAP, owner: str = OWN_MAP) -> Scores:
        """A metric of an arm's networks, larger being better."""
        column_owner = OWN_MAP if arm == START else owner
        scores = self.scores(arm, Column(explainer, column_owner, metric).name)
        return scores * metric_sign(metric)

    def total_gain(self, arm: str, metric: str, explainer: str = MAP) -> Scores:
        """What an arm's maps on its networks are better than the starts' maps on the starts."""
        gain: Scores = self.maps(arm, metric, explainer) - self.maps(START, metric, explainer)
        return gain

    def by_map(self, arm: str, metric: str, explainer: str = MAP) -> Scores:
        """The map's own part: the new map less the start's, both on the new network."""
        before = self.maps(arm, metric, explainer, START_MAP)
        gain: Scores = self.maps(arm, metric, explainer) - before
        return gain

    def by_answers(self, arm: str, metric: str, explainer: str = MAP) -> Scores:
        """The rest: the start's map on the new network less the same on the start."""
        before = self.maps(arm, metric, explainer, START_MAP)
        gain: Scores = before - self.maps(START, metric, explainer)
        return gain

    def has_parts(self, metric: str, explainer: str = MAP) -> bool:
        """Whether the gain can be split."""
        record = self.records[self.plan.starts[0], CE]
        return Column(explainer, START_MAP, metric).name in record.columns


def metric_sign(metric: str) -> int:
    """1 where higher is better, else -1."""
    return 1 if metric not in METRICS or METRICS[metric].higher else -1


def run_refinement(
    plan: RefinementPlan,
    *,
    workers: int = 0,
    device: str = "cpu",
    on_progress: Progress | None = None,
    on_unused: Callable[[int], None] | None = None,
) -> RefinementRuns:
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
        worker = RefinementWorker(plan, device)
        check_refinement(worker)
        run_log = RunLog(plan.folder / RUN_LOG, RefinementRecord)
        if on_unused is not None and (unused := run_log.count_unused(_plan_keys(worker, run_log))):
            on_unused(unused)
        with WorkerPool(worker, workers) as pool:
            runner = _JobRunner(worker, run_log, pool, on_progress)
            records = runner.run("start networks", [Job(name, START) for name in plan.starts])
            records |= runner.run(CE, [Job(name, CE) for name in plan.starts])
            jobs = [job for name in plan.starts for job in list_arm_jobs(plan, records[name, CE])]
            records |= runner.run("other arms", jobs)
            if plan.students is not None and plan.main_arm in plan.objectives_by_arm:
                baseline_jobs = [Job(name, STUDENT + CE) for name in plan.starts]
                records |= runner.run("students", baseline_jobs)
                student_jobs = [
                    replace(job, arm=STUDENT + job.arm) for job in jobs if job.arm == plan.main_arm
                ]
                records |= runner.run("students of refined networks", student_jobs)
        labeled = bool(worker.image_sets().full_data.classes)
    return RefinementRuns(plan, records, labeled)


def list_arm_jobs(plan: RefinementPlan, baseline: RefinementRecord) -> list[Job]:
    """The arms of a start beside cross-entropy alone, matched to its accuracy."""
    # "at most so much below" counts images, whatever float32 makes of their share
    floor = baseline.accuracies[baseline.epoch - 1] - plan.recipe.tolerance - ROUNDING
    return [Job(baseline.start, arm, floor) for arm in plan.objectives_by_arm if arm != CE]


def _plan_keys(worker: RefinementWorker, run_log: RunLog[RefinementRecord]) -> set[str]:
    """Of every job that the plan has, as far as what it is matched to was done."""
    plan, jobs = worker.plan, list[Job]()
    for name in plan.starts:
        jobs += [Job(name, START), Job(name, CE)]
        baseline = run_log.records.get(worker.key(Job(name, CE)))
        if baseline is not None:
            jobs += list_arm_jobs(plan, replace(baseline, start=name))
    if plan.students is not None:
        jobs += [
            replace(job, arm=STUDENT + job.arm) for job in jobs if job.arm in (CE, plan.main_arm)
        ]
    return {worker.key(job) for job in jobs}


class _JobRunner:
    """Jobs on processes, and what is done of them."""

    def __init__(
        self,
        worker: RefinementWorker,
        run_log: RunLog[RefinementRecord],
        pool: WorkerPool[Job, RefinementRecord],
        on_progress: Progress | None,
    ) -> None:
        self._worker, self._run_log, self._pool = worker, run_log, pool
        self._on_progress = on_progress

    def run(self, stage: str, jobs: Sequence[Job]) -> dict[tuple[str, str], RefinementRecord]:
        """What is missing of some jobs, and the records of all."""
        keys = {job: self._worker.key(job) for job in jobs}
        missing = [job for job in jobs if not self._is_done(job, keys[job])]
        done_count = len(jobs) - len(missing)
        self._report(stage, done_count, len(jobs))
        for _, record in self._pool.results(missing):
            self._run_log.add([record])
            done_count += 1
            self._report(stage, done_count, len(jobs))
        records = {}
        for job in jobs:
            # names and folders may have been others when the same run was made
            checkpoint = str(self._worker.path(job))
            record = self._run_log.records[keys[job]]
            records[job.start, job.arm] = replace(
                record, start=job.start, arm=job.arm, checkpoint=checkpoint
            )
        return records

    def _is_done(self, job: Job, key: str) -> bool:
        """Whether a job's numbers and its network are there."""
        return key in self._run_log.records and Path(self._worker.path(job)).exists()

    def _report(self, stage: str, done: int, total: int) -> None:
        if self._on_progress is not None and total:
            self._on_progress(stage, done, total)
