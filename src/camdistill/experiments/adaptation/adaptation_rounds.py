"""Learns an explainer's parameters in rounds, with a new student in each."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from camdistill.errors import UserError, check_each_once, check_number
from camdistill.experiments.adaptation.bilevel import AdaptationTask, adapt_once, pool_contributions
from camdistill.experiments.ranking import student_controls
from camdistill.experiments.ranking.ranking_arms import ArmTrainer
from camdistill.experiments.ranking.ranking_config import RankingStudy
from camdistill.experiments.ranking.ranking_run import Progress
from camdistill.experiments.ranking.student_task import StudentTask
from camdistill.experiments.ranking.student_training import (
    Students,
    measure_students,
    train_students,
)
from camdistill.experiments.ranking.teacher_outputs import load_held_out, pool_of
from camdistill.explain.learnable import SETTINGS, LearnableCAM, load_explainer
from camdistill.networks.teachers import Teacher
from camdistill.networks.weights import read_weights
from camdistill.store.digest import digest_of

VERSION = 1  # goes up when the same rounds would give other parameters
ROUNDS = "rounds"


@dataclass(frozen=True)
class Adaptation:
    """How an explainer's parameters are learned.

    Args:
        layers: Layers of the teacher, in its order: their maps are mixed, on the grid of the last
            one. Default: the last spatial layer alone.
        n: How many images its students learn from; the study's largest by default.
        rounds: At most so many students, one after the other.
        patience: Rounds without a better one after which it ends.
        beta: Weight of the maps.
        lr: Learning rate of the parameters (AdamW).
        eta: Length of the student's step that is differentiated. Default: its learning rate then.
        seed: Seed of the first round's student; later ones follow.
        judges: Seeds of the students that each round is judged by.
    """

    layers: list[str] = field(default_factory=list)
    n: int | None = None
    rounds: int = 4
    patience: int = 2
    beta: float = 30.0
    lr: float = 1e-3
    eta: float | None = None
    seed: int = 3000
    judges: list[int] = field(default_factory=lambda: [2000, 2001, 2002, 2003])

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.patience < 1:
            raise UserError(
                f"adaptation.rounds {self.rounds} and patience {self.patience}; give 1 or more"
            )
        for name, value in (("beta", self.beta), ("lr", self.lr), ("eta", self.eta)):
            if value is not None:
                check_number(
                    f"adaptation.{name}",
                    value,
                    "(0, inf)",
                    "give one above 0, or nothing is learned",
                )
        if self.n is not None:
            check_number("adaptation.n", self.n, "[8, inf)", "students need 8 images or more")
        check_each_once("adaptation.layers", self.layers)
        if not self.judges or min([self.seed, *self.judges]) < 0:
            raise UserError("adaptation.judges: give one or more seeds, 0 or more")
        if len(set(self.judges)) < len(self.judges):
            raise UserError(f"adaptation.judges is {self.judges}; give each once")
        if shared := sorted(set(self.judges) & set(self._seeds)):
            raise UserError(
                f"seed {shared[0]} is in adaptation.judges and of a round ({self.seed} to "
                f"{self._seeds[-1]}): it would be judged by its own student; take other judges"
            )

    @property
    def _seeds(self) -> Sequence[int]:
        """Seeds of the rounds' students."""
        return range(self.seed, self.seed + self.rounds)

    def check_fresh_seeds(self, study: RankingStudy) -> None:
        """Refuse seeds that the parameters have seen: students must be new to them."""
        used_seeds = {*self.judges, *self._seeds}
        for name, seeds in (("seeds", study.seeds), ("tuning.seeds", study.tuning.seeds)):
            if shared := sorted(used_seeds & set(seeds)):
                raise UserError(
                    f"seed {shared[0]} is in both {name} and the adaptation's (seed, judges): the "
                    "explainer would be judged by a student that it was learned with"
                )


class AdaptationRound(NamedTuple):
    """What became of the parameters in a round.

    Attributes:
        number: 0 is before any: Grad-CAM.
        kl: From the teacher to the judging students, in nats, on images that were not asked about;
            lower is better.
        agreement: Of the same.
    """

    number: int
    kl: float
    agreement: float


@dataclass(frozen=True, eq=False)
class AdaptedExplainer:
    """An explainer that was adapted to one teacher.

    Attributes:
        explainer: That of the best round.
        rounds: All of them.
        best: The best one's number; 0 if none was better than Grad-CAM.
    """

    explainer: LearnableCAM
    rounds: Sequence[AdaptationRound]
    best: int


def run_rounds(
    name: str,
    teacher: Teacher,
    arm_trainer: ArmTrainer,
    adaptation: Adaptation,
    folder: Path,
    on_progress: Progress | None,
) -> AdaptedExplainer:
    """The rounds of one teacher, each from its file where it was done before."""

    def make_reporter(stage: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(f"{name}: {stage}", done, total)

        return report

    task, stop_images = _build_task(
        teacher, arm_trainer, adaptation, make_reporter("what units add")
    )
    units_by_layer = {layer: part.shape[2] for layer, part in task.contributions.items()}
    family = next(iter(arm_trainer.families.values()))
    key = digest_of(
        {
            "version": VERSION,
            "answers": arm_trainer.cached_answers.sha256,
            "teacher": name,
            "control": [student_controls.VERSION, arm_trainer.control_seed]
            if name == "randomized"
            else None,
            "family": asdict(family.spec),
            "recipe": asdict(arm_trainer.recipe),
            **{
                part: value for part, value in asdict(adaptation).items() if part not in _EXTENDABLE
            },
        }
    )
    rounds: list[tuple[LearnableCAM, AdaptationRound]] = []
    for number in range(adaptation.rounds + 1):
        path = folder / ROUNDS / f"{name}-{key[:16]}-{number}.safetensors"
        if number and number - 1 - _best_round(rounds) >= adaptation.patience:
            break
        if path.is_file():
            rounds.append(_load_round(path))
            continue
        explainer = LearnableCAM(units_by_layer).to(task.pool.pixels.device)
        if number:
            explainer.load_state_dict(rounds[-1][0].state_dict())
            adapt_once(
                explainer,
                task,
                family,
                arm_trainer.recipe,
                seed=adaptation.seed + number - 1,
                beta=adaptation.beta,
                lr=adaptation.lr,
                eta=adaptation.eta,
                on_step=make_reporter(f"round {number}"),
            )
        scores = _evaluate_round(explainer, task, stop_images, arm_trainer, adaptation, number)
        explainer.save(path, scores._asdict())
        rounds.append((explainer, scores))
    best = _best_round(rounds)
    return AdaptedExplainer(
        rounds[best][0].requires_grad_(False), [scored_round for _, scored_round in rounds], best
    )


def _best_round(rounds: Sequence[tuple[LearnableCAM, AdaptationRound]]) -> int:
    return min(range(len(rounds)), key=lambda number: rounds[number][1].kl)


_EXTENDABLE = ("rounds", "patience")  # more rounds go on from those that there are


def _load_round(path: Path) -> tuple[LearnableCAM, AdaptationRound]:
    scores = json.loads(read_weights(path).metadata[SETTINGS])["about"]
    return load_explainer(path), AdaptationRound(**scores)


class _StopImages(NamedTuple):
    """Images that the parameters were not learned on, to end the rounds by."""

    pixels: Tensor
    logits: Tensor


def _build_task(
    teacher: Teacher,
    arm_trainer: ArmTrainer,
    adaptation: Adaptation,
    on_progress: Callable[[int, int], None],
) -> tuple[AdaptationTask, _StopImages]:
    """What the parameters are learned on: half of the validation images is kept for judging."""
    pool = pool_of(arm_trainer.cached_answers, adaptation.n)
    pool = type(pool)(*(tensor.to(arm_trainer.device) for tensor in pool))
    contributions = pool_contributions(teacher, pool, adaptation.layers, on_progress)
    pixels, logits = load_held_out(arm_trainer.cached_answers, "val")
    if len(pixels) < 4:
        raise UserError(
            f"there are {len(pixels)} validation images: half of them teach the explainer and half "
            "judge it, so give at least 4"
        )
    order = np.random.default_rng([adaptation.seed, *b"half"]).permutation(len(pixels))
    halves = [torch.from_numpy(np.sort(half)) for half in np.array_split(order, 2)]
    (task_pixels, task_logits), stop_images = (
        (pixels[half].to(arm_trainer.device), logits[half].to(arm_trainer.device))
        for half in halves
    )
    return AdaptationTask(pool, contributions, task_pixels, task_logits), _StopImages(*stop_images)


def _evaluate_round(
    explainer: LearnableCAM,
    task: AdaptationTask,
    stop_images: _StopImages,
    arm_trainer: ArmTrainer,
    adaptation: Adaptation,
    number: int,
) -> AdaptationRound:
    """Fresh students on the explainer as it is: always the same seeds, so rounds are paired."""
    family = next(iter(arm_trainer.families.values()))
    maps = task.targets(explainer, family.grid)
    kl, agreement = [], []
    for seed in adaptation.judges:
        students = Students.from_seeds(
            family.spec, arm_trainer.classes, [seed], layer=family.layer, device=arm_trainer.device
        )
        train_students(
            students, task.pool, [StudentTask(seed, adaptation.beta, maps)], arm_trainer.recipe
        )
        judgment = measure_students(students, stop_images.pixels, stop_images.logits)
        kl.append(float(judgment.kl.double().mean()))
        agreement.append(float(judgment.agrees.double().mean()))
    return AdaptationRound(number, float(np.mean(kl)), float(np.mean(agreement)))
