"""The rounds in which an explainer's parameters are learnt: a new student each."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from camdistill.errors import UserError, check_each_once, check_number
from camdistill.experiments.adaptation.bilevel import Task, adapt_once, parts_of
from camdistill.experiments.ranking import student_controls
from camdistill.experiments.ranking.ranking_arms import Classroom
from camdistill.experiments.ranking.ranking_config import Study
from camdistill.experiments.ranking.ranking_run import Progress
from camdistill.experiments.ranking.student_task import Lesson
from camdistill.experiments.ranking.student_training import Students, judged, teach
from camdistill.experiments.ranking.teacher_outputs import digest_of, held_out, pool_of
from camdistill.explain.learnable import SETTINGS, LearnableCAM, load_explainer
from camdistill.networks.teachers import Teacher
from camdistill.networks.weights import read_weights

VERSION = 1  # goes up when the same rounds would give other parameters
ROUNDS = "rounds"


@dataclass(frozen=True)
class Adaptation:
    """How an explainer's parameters are learnt.

    Args:
        layers: Of the teacher, in its order: their maps are mixed, on the grid of the last one.
            Default: the last spatial layer alone.
        n: How many images its students learn from; the study's largest by default.
        rounds: At most so many students, one after the other.
        patience: Rounds without a better one after which it ends.
        beta: Weight of the maps.
        lr: Of the parameters (AdamW).
        eta: Length of the student's step that is differentiated. Default: its learning rate then.
        seed: Of the first round's student; later ones follow.
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
                    "give one above 0, or nothing is learnt",
                )
        if self.n is not None:
            check_number("adaptation.n", self.n, "[8, inf)", "students need 8 images or more")
        check_each_once("adaptation.layers", self.layers)
        if not self.judges or min([self.seed, *self.judges]) < 0:
            raise UserError("adaptation.judges: give one or more seeds, 0 or more")
        if len(set(self.judges)) < len(self.judges):
            raise UserError(f"adaptation.judges is {self.judges}; give each once")
        if both := sorted(set(self.judges) & set(self._taught)):
            raise UserError(
                f"seed {both[0]} is in adaptation.judges and of a round ({self.seed} to "
                f"{self._taught[-1]}): it would be judged by its own student; take other judges"
            )

    @property
    def _taught(self) -> Sequence[int]:
        """Seeds of the rounds' students."""
        return range(self.seed, self.seed + self.rounds)

    def demand_fresh(self, study: Study) -> None:
        """Refuse seeds that the parameters have seen: students must be new to them."""
        known = {*self.judges, *self._taught}
        for name, seeds in (("seeds", study.seeds), ("tuning.seeds", study.tuning.seeds)):
            if both := sorted(known & set(seeds)):
                raise UserError(
                    f"seed {both[0]} is in both {name} and the adaptation's (seed, judges): the "
                    "explainer would be judged by a student that it was learnt with"
                )


class Round(NamedTuple):
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
class Learnt:
    """An explainer that was adapted to one teacher.

    Attributes:
        explainer: That of the best round.
        rounds: All of them.
        best: The best one's number; 0 if none was better than Grad-CAM.
    """

    explainer: LearnableCAM
    rounds: Sequence[Round]
    best: int


def learnt(
    name: str,
    teacher: Teacher,
    classroom: Classroom,
    how: Adaptation,
    folder: Path,
    on_progress: Progress | None,
) -> Learnt:
    """The rounds of one teacher, each from its file where it was done before."""

    def tell(what: str) -> Callable[[int, int], None]:
        def told(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(f"{name}: {what}", done, total)

        return told

    task, stop = _task(teacher, classroom, how, tell("what units add"))
    units = {layer: part.shape[2] for layer, part in task.parts.items()}
    family = next(iter(classroom.families.values()))
    key = digest_of(
        {
            "version": VERSION,
            "answers": classroom.known.sha256,
            "teacher": name,
            "control": [student_controls.VERSION, classroom.control_seed]
            if name == "randomised"
            else None,
            "family": asdict(family.spec),
            "recipe": asdict(classroom.recipe),
            **{part: value for part, value in asdict(how).items() if part not in _OPEN},
        }
    )
    made: list[tuple[LearnableCAM, Round]] = []
    for number in range(how.rounds + 1):
        path = folder / ROUNDS / f"{name}-{key[:16]}-{number}.safetensors"
        if number and number - 1 - _best(made) >= how.patience:
            break
        if path.is_file():
            made.append(_stored(path))
            continue
        fresh = LearnableCAM(units).to(task.pool.pixels.device)
        if number:
            fresh.load_state_dict(made[-1][0].state_dict())
            adapt_once(
                fresh, task, family, classroom.recipe, seed=how.seed + number - 1, beta=how.beta,
                lr=how.lr, eta=how.eta, on_step=tell(f"round {number}"),
            )  # fmt: skip
        found = _judged(fresh, task, stop, classroom, how, number)
        fresh.save(path, found._asdict())
        made.append((fresh, found))
    best = _best(made)
    return Learnt(made[best][0].requires_grad_(False), [one for _, one in made], best)


def _best(made: Sequence[tuple[LearnableCAM, Round]]) -> int:
    return min(range(len(made)), key=lambda number: made[number][1].kl)


_OPEN = ("rounds", "patience")  # more rounds go on from those that there are


def _stored(path: Path) -> tuple[LearnableCAM, Round]:
    about = json.loads(read_weights(path).metadata[SETTINGS])["about"]
    return load_explainer(path), Round(**about)


class _Stop(NamedTuple):
    """Images that the parameters were not learnt on, to end the rounds by."""

    pixels: Tensor
    logits: Tensor


def _task(
    teacher: Teacher, classroom: Classroom, how: Adaptation, told: Callable[[int, int], None]
) -> tuple[Task, _Stop]:
    """What the parameters are learnt on: half of the validation images is kept for judging."""
    pool = pool_of(classroom.known, how.n)
    pool = type(pool)(*(part.to(classroom.device) for part in pool))
    parts = parts_of(teacher, pool, how.layers, told)
    pixels, logits = held_out(classroom.known, "val")
    if len(pixels) < 4:
        raise UserError(
            f"there are {len(pixels)} validation images: half of them teach the explainer and half "
            "judge it, so give at least 4"
        )
    order = np.random.default_rng([how.seed, *b"half"]).permutation(len(pixels))
    halves = [torch.from_numpy(np.sort(half)) for half in np.array_split(order, 2)]
    (asked, answers), stop = (
        (pixels[half].to(classroom.device), logits[half].to(classroom.device)) for half in halves
    )
    return Task(pool, parts, asked, answers), _Stop(*stop)


def _judged(
    explainer: LearnableCAM,
    task: Task,
    stop: _Stop,
    classroom: Classroom,
    how: Adaptation,
    number: int,
) -> Round:
    """Fresh students on the explainer as it is: always the same seeds, so rounds are paired."""
    family = next(iter(classroom.families.values()))
    maps = task.targets(explainer, family.grid)
    kl, agreement = [], []
    for seed in how.judges:
        students = Students.untrained(
            family.spec, classroom.classes, [seed], layer=family.layer, device=classroom.device
        )
        teach(students, task.pool, [Lesson(seed, how.beta, maps)], classroom.recipe)
        found = judged(students, stop.pixels, stop.logits)
        kl.append(float(found.kl.double().mean()))
        agreement.append(float(found.agrees.double().mean()))
    return Round(number, float(np.mean(kl)), float(np.mean(agreement)))
