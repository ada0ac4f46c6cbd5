"""Runs a ranking by simulatability gain: a method is worth what it teaches a student.

Students learn from images without labels to answer like a teacher, and to have its maps; each arm
has another method's maps, or a control's. An arm's score is the agreement of its students with
the teacher on images that they never saw; no explanation is given there (Pruthi et al. 2021,
https://arxiv.org/abs/2012.00893; Fernandes et al. 2022, https://arxiv.org/abs/2204.10810).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from camdistill.distill.checks import check_data_matches
from camdistill.distill.training import as_images
from camdistill.errors import UserError
from camdistill.experiments.ranking import teacher_outputs
from camdistill.experiments.ranking.map_sources import MapSource, parse_source
from camdistill.experiments.ranking.ranking_arms import NONE, Arm, ArmTrainer, Family, Run, arms_of
from camdistill.experiments.ranking.ranking_config import RankingStudy
from camdistill.experiments.ranking.ranking_records import StudentRecord
from camdistill.experiments.ranking.student_controls import Control, randomize_weights
from camdistill.experiments.ranking.student_training import find_pooled_layer
from camdistill.experiments.ranking.teacher_outputs import CachedPart, Sets
from camdistill.experiments.shared.worker_pool import WorkerPool
from camdistill.networks.capture import capture, check_forward
from camdistill.networks.teachers import Teacher
from camdistill.store.array_files import lock_cache
from camdistill.store.run_log import RunLog

LEDGER = "runs.jsonl"
CALIBRATION = 512  # images that set a randomized teacher's normalizations
GATED: tuple[Control, ...] = ("random", "randomized", "mean", "shuffled")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class RankingRuns:
    """What a study's runs gave so far.

    Attributes:
        study: The study.
        arm_trainer: What its runs have in common.
        arms: All of them.
        records: By (family, n, arm's name, seed), of the study's own seeds.
        betas: The chosen ones, by (family, arm's name).
    """

    study: RankingStudy
    arm_trainer: ArmTrainer
    arms: Sequence[Arm]
    records: Mapping[tuple[str, int, str, int], StudentRecord]
    betas: Mapping[tuple[str, str], float]


def prepare_arm_trainer(
    study: RankingStudy, device: str, on_progress: Progress | None = None
) -> ArmTrainer:
    """The teacher's work, cached in the study's folder, and the students' layers."""
    sources = {name: parse_source(name, study.data, study.trust) for name in study.methods}
    sets = _sets(study)
    teacher = Teacher(study.teacher).to(device)
    check_data_matches(teacher.facts, sets.pool.size, sets.pool.classes, "teacher")
    # what is wrong with the question is told before the teacher is asked for minutes
    images = as_images(sets.pool.batch([0, 1]).pixels)
    check_forward({"teacher": teacher}, images, cure="give another --data.size, or another teacher")
    with (
        torch.no_grad(),
        capture(teacher, [map_source.layer for map_source in sources.values() if map_source.layer]),
    ):
        teacher(images.to(device))
    families = {
        name: Family(spec, *find_pooled_layer(spec, teacher.classes, images))
        for name, spec in study.students.items()
    }
    root = study.folder / "teacher"
    rooms = {}
    for size in _pool_sizes(study, teacher_outputs.list_answered_sizes(root, teacher, sets)):
        cached_answers = teacher_outputs.cache_answers(
            root, teacher, sets.first(size), on_progress=on_progress
        )
        stored = {
            (name, ""): teacher_outputs.cache_maps(
                root, teacher, cached_answers, map_source, on_progress=on_progress
            )
            for name, map_source in sources.items()
        }
        if "randomized" in study.controls:
            stored |= _of_random_weights(study, teacher, cached_answers, sources, on_progress)
        rooms[size] = ArmTrainer(
            cached_answers, stored, families, study.recipe, teacher.classes, study.seed, device
        )
    return replace(rooms.pop(max(rooms)), narrower=rooms)


def _pool_sizes(study: RankingStudy, answered: Sequence[int]) -> list[int]:
    """How large pools are: that of the study's largest n, if its folder has none for an n yet.

    A run's key says its whole pool, so a study that is widened goes on in the pools that it has.
    """
    needed = {*study.n, study.n_of_tuning}
    pool_sizes = {
        min((size for size in answered if n <= size), default=max(needed)) for n in needed
    }
    return sorted(pool_sizes)


def _of_random_weights(
    study: RankingStudy,
    teacher: Teacher,
    cached_answers: CachedPart,
    sources: Mapping[str, MapSource],
    on_progress: Progress | None,
) -> dict[tuple[str, str], CachedPart]:
    names = [name for name in study.with_controls if sources[name].of_teacher]
    if not names:
        return {}
    pixels = teacher_outputs.pool_of(cached_answers, CALIBRATION).pixels
    other = randomize_weights(teacher, as_images(pixels.to(teacher.mean.device)), study.seed)
    other = other.to(teacher.mean.device)
    root = study.folder / "teacher"
    return {
        (name, "randomized"): teacher_outputs.cache_maps(
            root, other, cached_answers, sources[name], on_progress=on_progress
        )
        for name in names
    }


def _sets(study: RankingStudy) -> Sets:
    """All training images in an order by seed alone: a larger n contains the smaller ones."""
    data = study.data
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    train, val, test = data.train_set, data.val_set, data.test_set
    assert train is not None, "setup made it"
    assert val is not None, "setup made it"
    assert test is not None, "setup made it"
    for name, image_count in (("n", max(study.n)), ("tuning.n", study.n_of_tuning)):
        if image_count > len(train):
            raise UserError(
                f"{name} is {image_count}, but there are {len(train)} training images; take fewer"
            )
    study.recipe.augment.check_size(train.size)
    order = np.random.default_rng([study.seed, *b"rank"]).permutation(len(train))
    return Sets(train.subset(order.astype(np.int64)), val, test)


def run_ranking(
    study: RankingStudy,
    *,
    workers: int = 0,
    stack: int = 1,
    device: str = "cpu",
    on_progress: Progress | None = None,
    on_gates: Callable[[RankingRuns], None] | None = None,
    on_unused: Callable[[int], None] | None = None,
) -> RankingRuns:
    """Does every run that is missing, those of the sanity gates first.

    Args:
        study: What to run.
        workers: Processes of one thread each; 0 runs here.
        stack: Students that train as one.
        device: Where.
        on_progress: Told what is being done, and how much of it is done.
        on_gates: Given what there is as soon as the gates' runs are done.
        on_unused: Told how many finished runs in the folder are of other settings, if any.
    """
    study.folder.mkdir(parents=True, exist_ok=True)
    with lock_cache(study.folder / "study", wait=False):
        arm_trainer = prepare_arm_trainer(study, device, on_progress)
        control_methods = {method for method, kind in arm_trainer.stored if kind}
        arms = arms_of(
            study.methods, study.controls, study.with_controls, study.shares, control_methods
        )
        first = [arm for arm in arms if _is_in_gate(arm, study.with_controls)]
        rest = [arm for arm in arms if arm not in first]
        with _RankingRunner(
            study, arm_trainer, RunLog(study.folder / LEDGER, StudentRecord), workers, stack
        ) as work:
            work.announce(arms, on_progress)
            if on_unused is not None and (unused := work.count_unused(arms)):
                on_unused(unused)
            betas = work.tune_betas(first)
            records = work.run_arms(first, betas)
            if on_gates is not None:
                on_gates(RankingRuns(study, arm_trainer, first, records, betas))
            betas |= work.tune_betas(rest)
            records |= work.run_arms(rest, betas)
    return RankingRuns(study, arm_trainer, arms, records, betas)


def _is_in_gate(arm: Arm, methods: Sequence[str]) -> bool:
    """Whether a sanity gate looks at an arm."""
    if arm.method not in (None, *methods):
        return False
    return arm.control is None or arm.control in GATED


class _RankingRunner:
    """Runs on processes, and what is done of them."""

    def __init__(
        self,
        study: RankingStudy,
        arm_trainer: ArmTrainer,
        ledger: RunLog[StudentRecord],
        workers: int,
        stack: int,
    ) -> None:
        self._study, self._arm_trainer, self._ledger = study, arm_trainer, ledger
        self._stack = stack
        self._crew: WorkerPool[list[Run], list[StudentRecord]] = WorkerPool(arm_trainer, workers)
        self._on_progress: Progress | None = None
        self._done = self._total = 0

    def __enter__(self) -> "_RankingRunner":
        self._crew.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._crew.__exit__(*exception)

    def announce(self, arms: Sequence[Arm], on_progress: Progress | None) -> None:
        """Says whom to tell, and counts what there is to do."""
        self._on_progress = on_progress
        self._total = len(self._tries(arms)) + len(self._runs(arms, {}))

    def count_unused(self, arms: Sequence[Arm]) -> int:
        """How many finished runs are none of the study's, whatever beta is chosen."""
        runs = self._tries(arms)
        for beta in self._study.tuning.betas:
            every = {(family, arm.name): beta for family in self._study.students for arm in arms}
            runs += self._runs(arms, every | self._without)
        return self._ledger.count_unused({self._arm_trainer.key(run) for run in runs})

    @property
    def _without(self) -> dict[tuple[str, str], float]:
        """The betas of students without maps."""
        return {(family, NONE.name): 0.0 for family in self._study.students}

    def tune_betas(self, arms: Sequence[Arm]) -> dict[tuple[str, str], float]:
        """The beta of each arm in each family: best agreement on validation images."""
        betas = self._study.tuning.betas
        beta_by_arm = {
            (family, arm.name): betas[0] for family in self._study.students for arm in arms
        }
        beta_by_arm |= self._without
        runs = self._tries(arms)
        records = self._do(runs)
        for family, name in beta_by_arm:
            arm_records = [
                record for record in records if (record.family, record.arm) == (family, name)
            ]
            mean = {
                beta: np.mean([record.val for record in arm_records if record.beta == beta])
                for beta in sorted({record.beta for record in arm_records})
            }
            if mean:  # the smallest of equals
                beta_by_arm[family, name] = max(mean, key=lambda beta: mean[beta])
        return beta_by_arm

    def run_arms(
        self, arms: Sequence[Arm], betas: Mapping[tuple[str, str], float]
    ) -> dict[tuple[str, int, str, int], StudentRecord]:
        """The study's own runs of some arms."""
        records = self._do(self._runs(arms, betas))
        return {(record.family, record.n, record.arm, record.seed): record for record in records}

    def _tries(self, arms: Sequence[Arm]) -> list[Run]:
        tuning = self._study.tuning
        if len(tuning.betas) == 1:
            return []
        return [
            Run(family, self._study.n_of_tuning, arm, beta, seed)
            for seed in tuning.seeds
            for family in self._study.students
            for arm in arms
            if arm != NONE
            for beta in tuning.betas
        ]

    def _runs(self, arms: Sequence[Arm], betas: Mapping[tuple[str, str], float]) -> list[Run]:
        return [
            Run(family, n, arm, betas.get((family, arm.name), 0.0), seed)
            for seed in self._study.seeds
            for family in self._study.students
            for n in self._study.n
            for arm in arms
            if n in self._study.n_of(arm)
        ]

    def _do(self, runs: Sequence[Run]) -> list[StudentRecord]:
        """What is missing of some runs, and the records of all."""
        keys = {run: self._arm_trainer.key(run) for run in runs}
        missing: dict[str, Run] = {}  # by key: arms of two names may be the same run
        for run, key in keys.items():
            if key not in self._ledger.records:
                missing.setdefault(key, run)
        self._report_progress(len(runs) - len(missing))
        for group, records in self._crew.results(_stacks(list(missing.values()), self._stack)):
            self._ledger.add(records)
            self._report_progress(len(group))
        done_records = [self._ledger.records[keys[run]] for run in runs]
        # an arm or a family may have had another name when the same run was made
        return [
            replace(record, arm=run.arm.name, family=run.family)
            for run, record in zip(runs, done_records, strict=True)
        ]

    def _report_progress(self, count: int) -> None:
        self._done += count
        if self._on_progress is not None:
            self._on_progress("students", self._done, self._total)


def _stacks(runs: Sequence[Run], size: int) -> list[list[Run]]:
    """Runs that can train as one, so many at once."""
    together: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        together.setdefault((run.family, run.n), []).append(run)
    return [
        runs_of_stack[start : start + size]
        for runs_of_stack in together.values()
        for start in range(0, len(runs_of_stack), size)
    ]
