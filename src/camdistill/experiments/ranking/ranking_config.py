"""The configuration of a ranking, and the checks of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from camdistill.data.modules import ImageData
from camdistill.errors import UserError, check_folder_name, nearest
from camdistill.experiments.ranking.ranking_arms import NONE, Arm
from camdistill.experiments.ranking.student_controls import CONTROLS, Control
from camdistill.experiments.ranking.student_task import Recipe
from camdistill.networks.teachers import NetworkSpec


@dataclass(frozen=True)
class Tuning:
    """How each arm's beta is chosen: by agreement on validation images, all arms alike.

    Args:
        betas: Weights of the maps that are tried.
        n: Images that the tried students learn from; the middle one of the study's by default.
        seeds: Seeds of the tried students; not those of the study, or their luck would count twice.
    """

    betas: list[float] = field(default_factory=lambda: [1.0, 3.0, 10.0, 30.0])
    n: int | None = None
    seeds: list[int] = field(default_factory=lambda: [1000, 1001])

    def __post_init__(self) -> None:
        are_finite = all(0 < beta < float("inf") for beta in self.betas)
        if not self.betas or not are_finite or len(set(self.betas)) < len(self.betas):
            raise UserError(
                f"tuning.betas is {self.betas}; give weights above 0, each once (the arm 'none' "
                "has 0)"
            )
        if len(self.betas) > 1 and not self.seeds:
            raise UserError("tuning.seeds is empty; give at least one, or a single beta")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"tuning.seeds is {self.seeds}; give each once")
        if self.n is not None and self.n < 8:
            raise UserError(f"tuning.n is {self.n}; students need 8 images or more")


@dataclass(frozen=True)
class RankingStudy:
    """A ranking of explanation methods.

    Args:
        teacher: Whom students simulate.
        data: Where images come from; labels are not used.
        methods: What is ranked (see `explanations.source`).
        students: Families of students by name.
        n: Images that students learn from.
        seeds: Seeds of the students.
        controls: What methods have to beat.
        controls_of: Methods that get the controls made of their own maps.
        controls_n: At which n controls run.
        shares: Shares of mixtures of a method's maps with shuffled ones.
        tuning: How beta is chosen.
        recipe: How students are trained.
        seed: Seed of controls and of which images are taken.
        trust: Packages from which functions may be called.
        folder: Folder of the runs and of the teacher's work.
    """

    teacher: NetworkSpec
    data: ImageData
    methods: Sequence[str]
    students: Mapping[str, NetworkSpec]
    n: Sequence[int]
    seeds: Sequence[int]
    controls: Sequence[Control] = CONTROLS
    controls_of: Sequence[str] = ()
    controls_n: Sequence[int] = ()
    shares: Sequence[float] = (0.25, 0.5, 0.75)
    tuning: Tuning = field(default_factory=Tuning)
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    trust: Sequence[str] = ()
    folder: Path = Path("runs/rank")

    def __post_init__(self) -> None:
        for name in ("methods", "n", "seeds", "students"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} is {values}; give at least one, each once")
        for name in ("controls", "controls_of", "controls_n", "shares"):
            values = list(getattr(self, name))
            if len(set(values)) < len(values):
                raise UserError(f"{name} is {values}; give each once")
        if (least := min([self.seed, *self.seeds, *self.tuning.seeds])) < 0:
            raise UserError(f"a seed is {least}; seeds are 0 or more")
        if min(self.n) < 8:
            raise UserError(f"n is {list(self.n)}; students need 8 images or more")
        if both := sorted(set(self.seeds) & set(self.tuning.seeds)):
            raise UserError(
                f"seed {both[0]} is in both seeds and tuning.seeds: beta would be chosen by the "
                "luck of the student that is judged; take other tuning.seeds"
            )
        for name, known_values in (("controls_of", self.methods), ("controls_n", self.n)):
            for value in getattr(self, name):
                if value not in known_values:
                    hint = nearest(str(value), [str(one) for one in known_values])
                    raise UserError(f"{name} has {value!r}, which is not among the study's; {hint}")
        if any(not 0 < share < 1 for share in self.shares):
            raise UserError(f"shares is {list(self.shares)}; they lie between 0 and 1")
        for name in self.students:
            check_folder_name("the family of students", name)
        if trained := [name for name, spec in self.students.items() if spec.weights]:
            raise UserError(f"students.{trained[0]} has weights; students start untrained")

    @property
    def with_controls(self) -> Sequence[str]:
        """The methods that have controls of their own."""
        return self.controls_of or self.methods[:1]

    @property
    def n_of_controls(self) -> Sequence[int]:
        """At which n controls run."""
        return self.controls_n or self.n

    @property
    def n_of_tuning(self) -> int:
        """At which n beta is chosen."""
        return self.tuning.n or sorted(self.n)[len(self.n) // 2]

    def n_of(self, arm: Arm) -> Sequence[int]:
        """At which n an arm runs."""
        return self.n if arm == NONE or arm.of_method else self.n_of_controls
