"""The arms of a ranking, and how one student of an arm is trained and tested."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from camdistill.distill.training import as_images
from camdistill.experiments.ranking import student_controls
from camdistill.experiments.ranking.ranking_records import StudentRecord, pack_bits
from camdistill.experiments.ranking.student_controls import (
    OF_NO_METHOD,
    Control,
    control_maps,
    mix_maps,
)
from camdistill.experiments.ranking.student_task import ImagePool, Recipe, StudentTask
from camdistill.experiments.ranking.student_training import (
    Students,
    measure_students,
    train_students,
)
from camdistill.experiments.ranking.teacher_outputs import (
    CachedPart,
    load_held_out,
    pool_of,
    targets,
)
from camdistill.networks.teachers import NetworkSpec
from camdistill.store.digest import digest_of

VERSION = 1  # goes up when the same run would give other numbers


@dataclass(frozen=True)
class Arm:
    """Whose maps a student is taught with.

    Attributes:
        method: Method as the user named it; None for no maps, or a control that needs no method.
        control: What is made of the method's maps; None for the maps themselves.
        share: Share of the method's maps where they are mixed with shuffled ones.
    """

    method: str | None = None
    control: Control | None = None
    share: float | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        if self.share is not None:
            return f"{self.method} mixed {self.share:g}"
        return " ".join(part for part in (self.method, self.control) if part) or "none"

    @property
    def of_method(self) -> bool:
        """Whether these are a method's maps as they are."""
        return self.method is not None and self.control is None and self.share is None


NONE = Arm()


def arms_of(
    methods: Sequence[str],
    chosen: Collection[Control],
    controls_of: Sequence[str],
    shares: Sequence[float],
    control_methods: Collection[str],
) -> list[Arm]:
    """Every arm of a study: none, the methods, their controls and mixtures.

    Args:
        methods: Names.
        chosen: Which controls there are.
        controls_of: The methods that have controls of their own, and mixtures.
        shares: Shares of the mixtures.
        control_methods: The methods that ask the teacher: only these have a "randomized" control.
    """
    arms = [NONE, *(Arm(control=kind) for kind in OF_NO_METHOD if kind in chosen)]
    for method in controls_of:
        method_controls = [kind for kind in chosen if kind not in OF_NO_METHOD]
        arms += [
            Arm(method, kind)
            for kind in method_controls
            if kind != "randomized" or method in control_methods
        ]
        arms += [Arm(method, share=share) for share in shares]
    return [*arms, *(Arm(method) for method in methods)]


@dataclass(frozen=True)
class Run:
    """One student."""

    family: str
    n: int
    arm: Arm
    beta: float
    seed: int


@dataclass(frozen=True)
class Family:
    """Students of one kind.

    Attributes:
        spec: Their architecture.
        layer: The layer of their maps.
        grid: Grid of their maps.
    """

    spec: NetworkSpec
    layer: str
    grid: tuple[int, int]


@dataclass(frozen=True)
class ArmTrainer:
    """All that runs have in common; it does them.

    Attributes:
        cached_answers: The teacher's answers.
        stored: Raw maps by method, and by `(method, "randomized")` of a randomized teacher.
        families: Students by name.
        recipe: Recipe of the training.
        classes: Number of logits.
        control_seed: Seed of what is random in controls.
        device: Where students are trained.
        narrower: The same with smaller pools, by their sizes: a folder's runs of these n go on with
            the pool that they began with.
    """

    cached_answers: CachedPart
    stored: Mapping[tuple[str, str], CachedPart]
    families: Mapping[str, Family]
    recipe: Recipe
    classes: int
    control_seed: int = 0
    device: str = "cpu"
    narrower: Mapping[int, "ArmTrainer"] = field(default_factory=dict)

    def room(self, n: int) -> "ArmTrainer":
        """Where runs of so many images are made: the smallest pool that has them."""
        sizes = [size for size in self.narrower if n <= size]
        return self.narrower[min(sizes)] if sizes else self

    def key(self, run: Run) -> str:
        """A sha256 of everything that decides a run's numbers."""
        if (room := self.room(run.n)) is not self:
            return room.key(run)
        arm, family = run.arm, self.families[run.family]
        is_random = arm.control is not None or arm.share is not None
        return digest_of(
            {
                "version": VERSION,
                "answers": self.cached_answers.sha256,
                "family": asdict(family.spec),
                "layer": family.layer,
                "recipe": asdict(self.recipe),
                "n": run.n,
                "maps": self._cached_maps(arm).sha256 if arm.method is not None else None,
                "control": [arm.control, student_controls.VERSION, self.control_seed]
                if is_random
                else None,
                "share": arm.share,
                "beta": run.beta,
                "seed": run.seed,
            }
        )

    def __call__(self, runs: Sequence[Run]) -> list[StudentRecord]:
        """Trains and judges students of one family and one n together."""
        start = time.monotonic()
        first = runs[0]
        if any((run.family, run.n) != (first.family, first.n) for run in runs):
            raise ValueError("runs of several families or n can't be stacked")
        if (room := self.room(first.n)) is not self:
            return room(runs)
        family = self.families[first.family]
        pool = ImagePool(*(part.to(self.device) for part in pool_of(self.cached_answers, first.n)))
        tasks = []
        for run in runs:
            maps = self.maps(run.arm, run.family, run.n)
            on_device = None if maps is None else maps.to(self.device)
            tasks.append(StudentTask(run.seed, run.beta, on_device))
        students = Students.from_seeds(
            family.spec,
            self.classes,
            [run.seed for run in runs],
            layer=family.layer,
            device=self.device,
        )
        train_students(students, pool, tasks, self.recipe)
        val, test = (
            measure_students(
                students,
                *(part.to(self.device) for part in load_held_out(self.cached_answers, name)),
            )
            for name in ("val", "test")
        )
        seconds = round((time.monotonic() - start) / len(runs), 2)
        return [
            StudentRecord(
                key=self.key(run),
                family=run.family,
                n=run.n,
                arm=run.arm.name,
                beta=run.beta,
                seed=run.seed,
                val=float(val.agrees[k].double().mean()),
                test=float(test.agrees[k].double().mean()),
                kl=float(test.kl[k].double().mean()),
                agrees=pack_bits(test.agrees[k].cpu().numpy()),
                images=test.agrees.shape[1],
                seconds=seconds,
            )
            for k, run in enumerate(runs)
        ]

    def maps(self, arm: Arm, family: str, n: int) -> Float[Tensor, "images 2 rows columns"] | None:
        """What an arm's students are taught: rectified maps, of images and mirror images."""
        if arm == NONE:
            return None
        if (room := self.room(n)) is not self:
            return room.maps(arm, family, n)
        grid = self.families[family].grid
        if arm.method is None:
            maps = torch.zeros(n, 2, *grid)
        else:
            maps = _targets(self._cached_maps(arm), n, grid)
        if arm.control in (None, "randomized") and arm.share is None:
            return maps
        pool = pool_of(self.cached_answers, n)
        views = []
        for view in range(2):
            view_maps, classes = maps[:, view], pool.logits[:, view].argmax(1)
            pixels = pool.pixels.flip(-1) if view else pool.pixels
            seed = 2 * self.control_seed + view
            images = as_images(pixels)
            if arm.share is not None:
                other = control_maps("shuffled", view_maps, classes, images, seed)
                views.append(mix_maps(view_maps, other, arm.share))
            else:
                assert arm.control is not None
                views.append(control_maps(arm.control, view_maps, classes, images, seed))
        return torch.stack(views, 1)

    def _cached_maps(self, arm: Arm) -> CachedPart:
        assert arm.method is not None
        return self.stored[arm.method, "randomized" if arm.control == "randomized" else ""]


@lru_cache(maxsize=4)
def _targets(stored: CachedPart, n: int, grid: tuple[int, int]) -> Tensor:
    return targets(stored, n, grid)
