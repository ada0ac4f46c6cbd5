"""The configuration of a refinement, and the checks of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from camdistill.data.modules import ImageData
from camdistill.data.views import Augment
from camdistill.distill.optimization import Optimization
from camdistill.distill.refinement_targets import ARMS, Objective, RefinementArm
from camdistill.distill.refiner import RECIPE
from camdistill.distill.training import to_plain_data
from camdistill.errors import UserError, check_each_once, check_folder_name, check_number
from camdistill.explain.methods import AT_PIXELS, find_method
from camdistill.measure.removal import ROAD_LEVELS
from camdistill.networks.teachers import NetworkSpec
from camdistill.store.digest import sha256_of

START: Literal["start"] = "start"
CE: RefinementArm = "ce"
STUDENT = "student of "
"""Before the arm whose network taught it."""
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class StartRecipe:
    """How start networks are trained, where none are given.

    Args:
        epochs: Times that each training image is seen.
        optimization: The optimizer and its schedule.
        augment: Views of the training images.
        precision: "bfloat16" is autocast.
    """

    epochs: int = 14
    optimization: Optimization = field(default_factory=lambda: Optimization(lr=0.1))
    augment: Augment = field(default_factory=Augment)
    precision: Precision = "bfloat16"

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UserError(f"start.epochs is {self.epochs}; give 1 or more")


@dataclass(frozen=True)
class RefineRecipe:
    """How every arm is trained: all alike.

    Args:
        epochs: Times that each training image is seen.
        keep: What the answers are held to: labels, start, or auto (labels where there are any).
        tolerance: An arm's last epoch counts whose validation accuracy (without labels agreement
            with the start) is at most so much below that of cross-entropy alone.
        images: Train on so many of the training images; null is all.
        frozen_statistics: Keep the statistics of batch normalization, and leave out dropout.
        optimization: The optimizer and its schedule.
        augment: Views of the training images.
        precision: "bfloat16" is autocast; maps and objectives are float32.
    """

    epochs: int = 10
    keep: Literal["auto", "labels", "start"] = "auto"
    tolerance: float = 0.01
    images: int | None = None
    frozen_statistics: bool = True
    optimization: Optimization = RECIPE
    augment: Augment = field(default_factory=Augment)
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UserError(f"recipe.epochs is {self.epochs}; give 1 or more")
        if self.images is not None and self.images < 2:
            raise UserError(f"recipe.images is {self.images}; give 2 or more, or null for all")
        if not 0 <= self.tolerance < 1:
            raise UserError(f"recipe.tolerance is {self.tolerance}; give a share in [0, 1)")


@dataclass(frozen=True)
class StudentRecipe:
    """How students of refined networks are distilled: without labels, maps included.

    Args:
        network: What is distilled.
        epochs: Times that each training image is seen.
        beta: Weight of the maps' distance, beside 1 of distillation.
        images: Train on so many of the training images; null is all.
        optimization: The optimizer and its schedule.
        augment: Views of the training images; maps move with them.
    """

    network: NetworkSpec
    epochs: int = 8
    beta: float = 10.0
    images: int | None = None
    optimization: Optimization = field(default_factory=lambda: Optimization(lr=0.1))
    augment: Augment = field(default_factory=lambda: Augment(flip=True))

    def __post_init__(self) -> None:
        if self.network.weights is not None:
            raise UserError("students.network has weights; students start untrained")
        check_number("students.epochs", self.epochs, "[1, inf)", "give at least 1 epoch")
        check_number("students.beta", self.beta, "(0, inf)", "give a weight above 0")
        if self.images is not None and self.images < 2:
            raise UserError(f"students.images is {self.images}; give 2 or more, or null for all")


@dataclass(frozen=True)
class JudgingOptions:
    """How start and refined networks are measured, on test images.

    Args:
        images: At most so many.
        held_out: Explainers that were not refined, by method@layer.
        road: Shares of the image that ROAD removes.
        batch: Images at once.
    """

    images: int = 500
    held_out: tuple[str, ...] = ("gradient", "guided_backprop")
    road: tuple[float, ...] = ROAD_LEVELS
    batch: int = 100

    def __post_init__(self) -> None:
        if self.images < 2 or self.batch < 1:
            raise UserError(
                f"judging.images {self.images} and batch {self.batch}; give at least 2 images and "
                "a batch of 1"
            )
        if not self.road or not all(0 < share < 1 for share in self.road):
            raise UserError(f"judging.road is {list(self.road)}; give shares between 0 and 1")
        check_each_once("judging.road", self.road)
        for name in self.held_out:
            method, _, layer = name.partition("@")
            find_method(method)
            if method in AT_PIXELS and layer:
                raise UserError(f"'{method}' explains at the pixels; leave out '@{layer}'")


@dataclass(frozen=True)
class RefinementPlan:
    """A refinement of several start networks, with the arms that it has to beat.

    Args:
        data: Where images come from.
        objective: What the maps are trained to be; its controls are the study's.
        checkpoints: Start networks; or, where there are none,
        network: what is trained as start networks,
        seeds: one with each of these.
        arms: Which of the objective and its controls run; cross-entropy alone always does.
        also: Further objectives by name, without controls of their own.
        start: How start networks are trained.
        recipe: How every arm is.
        judging: How networks are measured.
        students: Taught by the refined networks and by cross-entropy's; None for none.
        seed: Seed of the order of training, of what is random in arms, and of which images are
            taken.
        trust: Packages that class paths in checkpoints may come from.
        folder: Folder of the runs.
    """

    data: ImageData
    objective: Objective
    checkpoints: Sequence[Path] = ()
    network: NetworkSpec | None = None
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    arms: Sequence[RefinementArm] = ARMS
    also: Mapping[str, Objective] = field(default_factory=dict)
    start: StartRecipe = field(default_factory=StartRecipe)
    recipe: RefineRecipe = field(default_factory=RefineRecipe)
    judging: JudgingOptions = field(default_factory=JudgingOptions)
    students: StudentRecipe | None = None
    seed: int = 0
    trust: Sequence[str] = ()
    folder: Path = Path("runs/refine")

    def __post_init__(self) -> None:
        if self.checkpoints and self.network is not None:
            raise UserError("give either checkpoints, or a network to train start networks of")
        if not self.checkpoints and self.network is None:
            raise UserError(
                "no start network: give --checkpoints FILE ..., or --network.name and --seeds to "
                "train some"
            )
        if self.network is not None and self.network.weights is not None:
            raise UserError(
                "network has weights; give them as --checkpoints, or leave them out to train it"
            )
        for name in ("checkpoints", "seeds", "arms"):
            values = [str(entry) for entry in getattr(self, name)]
            if len(set(values)) < len(values):
                raise UserError(f"{name} is {values}; give each once")
        if not self.checkpoints and not self.seeds:
            raise UserError("seeds is empty; give one for each start network")
        if min([self.seed, *self.seeds]) < 0:
            raise UserError(f"a seed is {min([self.seed, *self.seeds])}; seeds are 0 or more")
        for name in self.also:
            check_folder_name("the objective", name)
        if clashes := sorted(set(self.also) & {*ARMS, START, self.objective.kind}):
            raise UserError(
                f"also has '{clashes[0]}', which is another arm's name; call it otherwise"
            )
        self._check_one_explainer()
        for name in self.starts:  # which have to be told apart
            check_folder_name("the start network", name)

    def _check_one_explainer(self) -> None:
        """Refuse objectives of other maps, and the refined explainer as one that was not."""
        target = (self.objective.cam, self.objective.layer)
        for name, other in self.also.items():
            if (other.cam, other.layer) != target:
                raise UserError(
                    f"also.{name} refines {other.cam} at layer {other.layer}, the objective "
                    f"{target[0]} at {target[1]}: all arms are judged by the objective's map, so "
                    "give the same cam and layer, or run it as the objective of another --out"
                )
        if len(set(self.judging.held_out)) < len(self.judging.held_out):
            raise UserError(f"judging.held_out is {list(self.judging.held_out)}; give each once")
        for name in self.judging.held_out:
            method, _, layer = name.partition("@")
            if (method, layer or None) == target:
                raise UserError(
                    f"judging.held_out has {name}, which is what is refined; name another method, "
                    f"or another layer: {method}@layer2"
                )

    @property
    def starts(self) -> list[str]:
        """Names of the start networks."""
        if not self.checkpoints:
            return [f"seed{seed}" for seed in self.seeds]
        parts = [path.with_suffix("").parts for path in self.checkpoints]
        for length in range(1, max(map(len, parts)) + 1):
            names = ["-".join(path_parts[-length:]).replace("/", "") for path_parts in parts]
            if len(set(names)) == len(names):
                return names
        raise UserError(
            f"checkpoints is {[str(path) for path in self.checkpoints]}; give each once, as "
            "FOLDER/NAME.safetensors"
        )

    @property
    def main_arm(self) -> str:
        """Name of the objective's own arm."""
        return self.objective.kind

    @property
    def objectives_by_arm(self) -> dict[str, tuple[Objective, RefinementArm]]:
        """Every arm by name, cross-entropy alone first: what the others are matched to."""
        objectives: dict[str, tuple[Objective, RefinementArm]] = {CE: (self.objective, CE)}
        for arm in self.objective.arms:
            if arm in self.arms and arm != CE:
                objectives[self.main_arm if arm == "objective" else arm] = (self.objective, arm)
        return objectives | {
            name: (objective, "objective") for name, objective in self.also.items()
        }


def identify_objective(objective: Objective) -> dict[str, object]:
    """All that decides what is trained: of files what is in them, not where they are."""
    identity: dict[str, object] = to_plain_data(objective)
    del identity["file"]
    if objective.teacher is not None:
        identity["teacher"] = _identify_network(objective.teacher)
    return (
        identity
        if objective.file is None
        else {**identity, "metric": sha256_of(Path(objective.file))}
    )


def _identify_network(network: NetworkSpec) -> dict[str, object]:
    """A network's settings, with what is in its file of weights where it has one."""
    identity: dict[str, object] = to_plain_data(network)
    file = Path(network.weights or "")
    return identity | {"weights": sha256_of(file)} if file.is_file() else identity


def identify_maps(plan: RefinementPlan) -> Mapping[str, object]:
    """What of the objective decides what is measured."""
    objective = plan.objective
    teacher = None
    if objective.kind == "fidelity" and objective.teacher is not None:
        teacher = [_identify_network(objective.teacher), objective.teacher_layer]
    file = None if objective.file is None else sha256_of(Path(objective.file))
    return {
        "cam": [objective.cam, objective.layer, objective.replacement],
        "views": to_plain_data(objective.views),
        "teacher": teacher,
        "metric": file,
    }
