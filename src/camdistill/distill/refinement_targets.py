"""What a network's maps are refined towards, and the controls that it is held against."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch

from camdistill.data.views import Augment, View, draw_view, uniforms, view_images, view_maps
from camdistill.distill.differentiable_maps import Cam, LayerMaps, constant_answers, explained
from camdistill.distill.losses import BetaSchedule, MapDistance, map_distance
from camdistill.distill.objectives import (
    LEVELS,
    TEMPERATURE,
    Form,
    contrastive_consistency,
    energy_outside,
    insertion_deletion,
    unfaithfulness,
)
from camdistill.errors import UserError, check_each_once, check_number
from camdistill.explain.compare import pearson
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.maps import upsample
from camdistill.measure.learned import (
    OF_NETWORK,
    Context,
    image_context,
    load_metric,
    standardize_planes,
)
from camdistill.networks.teachers import NetworkSpec, Preprocessed, Teacher
from camdistill.perturb.bank import BankPlan, build_bank
from camdistill.perturb.imputers import baseline
from camdistill.types import Images, Labels, Maps, Masks, PerImage

Kind = Literal["insertion_deletion", "faithfulness", "consistency", "energy", "fidelity", "learned"]
Arm = Literal["objective", "ce", "detached", "random", "shuffled"]
ARMS: tuple[Arm, ...] = ("objective", "ce", "detached", "random", "shuffled")
CELLS = 8  # of a random smooth map, along each side
SECOND_VIEW = 7919  # added to the seed: the second view is not the first


@dataclass(frozen=True)
class Objective:
    """What the network's own maps are trained to be.

    Args:
        kind: insertion_deletion (ID-ExpO), faithfulness (correlation with a perturbation bank),
            consistency (contrastive, CGC), energy (in masks or boxes), fidelity (to a teacher),
            learned (the score of a metric that `camdistill learn` made).
        weight: Of the objective, beside 1 of cross-entropy.
        schedule: Of the weight.
        cam: Which map: grad_cam, or hires_cam (CGC's).
        layer: Of the maps. Default: the last before the head.
        answers: insertion_deletion: "trained" lets the answers to changed images be trained too
            (the paper's), "constant" leaves the map as the only way.
        form: insertion_deletion: of probabilities, or of their logarithms (the paper's), whose
            deletion has no lower bound: at weight 0.1 it took 10 points of accuracy (Shapes, one
            start, 4 epochs).
        deletion: insertion_deletion: weight of deletion beside insertion.
        shares: insertion_deletion: of the image, shown and hidden at each level.
        temperature: Of the soft masks, in deviations of the map; of consistency's cosines.
        shown: What stands where an image is changed.
        subsets: faithfulness: random changes asked about, an image and step.
        cells: faithfulness: an image is cut into so many along each side.
        views: consistency: of the second view.
        teacher: fidelity: whose maps are the target.
        teacher_layer: fidelity: of the teacher's maps. Default: its last.
        distance: fidelity: of the maps.
        file: learned: the metric, FILE.safetensors.
    """

    kind: Kind = "insertion_deletion"
    weight: float = 1.0
    schedule: BetaSchedule = "constant"
    cam: Cam = "grad_cam"
    layer: str | None = None
    answers: Literal["trained", "constant"] = "trained"
    form: Form = "probability"
    deletion: float = 1.0
    shares: tuple[float, ...] = LEVELS
    temperature: float | None = None
    shown: Literal["blur", "mean", "grey"] = "blur"
    subsets: int = 32
    cells: int = 8
    views: Augment = field(
        default_factory=lambda: Augment(crop="resized", scale=(0.5, 1.0), flip=True)
    )
    teacher: NetworkSpec | None = None
    teacher_layer: str | None = None
    distance: MapDistance = "pearson"
    file: str | None = None

    def __post_init__(self) -> None:
        check_number(
            "objective.weight", self.weight, "[0, inf)", "a weight of the loss is 0 or more"
        )
        check_number("objective.deletion", self.deletion, "[0, inf)", "give 0 or more")
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise UserError(f"objective.shares is {list(self.shares)}; give shares between 0 and 1")
        if self.temperature is not None:
            check_number("objective.temperature", self.temperature, "(0, inf)", "give one above 0")
        check_each_once("objective.shares", self.shares)
        if self.subsets < 3 or self.cells < 2:
            raise UserError(
                f"objective.subsets {self.subsets} and cells {self.cells}; a correlation needs at "
                "least 3 subsets, of at least 2 cells a side"
            )
        if self.kind == "fidelity" and self.teacher is None:
            raise UserError(
                "objective.kind is fidelity, but there is no objective.teacher; name it"
            )
        if (self.kind == "learned") != (self.file is not None):
            given = "no objective.file" if self.file is None else f"a file '{self.file}'"
            raise UserError(
                f"objective.kind is {self.kind} with {given}; a learned objective, and no other, "
                "has the metric.safetensors that `camdistill learn` wrote"
            )

    @property
    def asks_trained(self) -> bool:
        """Whether the network's answers to changed images are trained, and not its map alone."""
        return self.kind == "insertion_deletion" and self.answers == "trained"

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that differ: of a constant map others than these are cross-entropy alone.

        Where the answers are constant too, so is all that a random map stands in for.
        """
        if self.asks_trained:
            return ARMS
        given = {"detached", "random"} if self.kind == "insertion_deletion" else {"detached"}
        return tuple(arm for arm in ARMS if arm not in given)


class Seen(NamedTuple):
    """A batch as the network sees it.

    Attributes:
        images: In [0, 1], under their view.
        ids: Of the images.
        view: What was done to the images.
        classes: Whose maps: the network's own top class.
        maps: Of these, raw, with a graph, at the layer's resolution.
        masks: Of the objects, under the view; None without.
    """

    images: Images
    ids: Labels
    view: View
    classes: Labels
    maps: LayerMaps
    masks: Masks | None = None


class Refinement:
    """An objective of one network, or one of its controls.

    Args:
        objective: What is wanted.
        arm: "objective", or what it is held against. "detached": the map is a constant, so only
            the answers change. "random": the target (of insertion and deletion the map itself) is
            a smooth random map, the same for an image each time. "shuffled": another image's.
        seed: Of random targets, views and changes.
    """

    def __init__(self, objective: Objective, arm: Arm, seed: int) -> None:
        self.objective, self.arm, self.seed = objective, arm, seed
        # Built once; a Teacher is in nobody's checkpoint.
        wanted = objective.kind == "fidelity" and objective.teacher is not None and arm != "ce"
        self.teacher = Teacher(objective.teacher) if wanted and objective.teacher else None
        scored = objective.file is not None and arm != "ce"
        self.metric = load_metric(objective.file) if scored and objective.file else None

    def loss(self, network: Preprocessed, seen: Seen, step: int) -> PerImage:
        """One value an image, before its weight."""
        return {
            "insertion_deletion": self._insertion_deletion,
            "faithfulness": self._faithfulness,
            "consistency": self._consistency,
            "energy": self._energy,
            "fidelity": self._fidelity,
            "learned": self._learned,
        }[self.objective.kind](network, seen, step)

    def _insertion_deletion(self, network: Preprocessed, seen: Seen, step: int) -> PerImage:
        wanted = self.objective
        maps = seen.maps.detach() if self.arm == "detached" else seen.maps
        if self.arm == "random":
            maps = self._random(seen)
        elif self.arm == "shuffled":
            maps = maps.roll(1, 0)
        return insertion_deletion(
            network if wanted.answers == "trained" else partial(constant_answers, network),
            seen.images,
            seen.classes,
            upsample(maps, _size(seen.images)),
            baseline(seen.images, wanted.shown),
            shares=wanted.shares,
            temperature=wanted.temperature or TEMPERATURE,
            form=wanted.form,
            deletion=wanted.deletion,
        )

    def _faithfulness(self, network: Preprocessed, seen: Seen, step: int) -> PerImage:
        wanted = self.objective
        plan = BankPlan(cells=wanted.cells, subsets={0.25: wanted.subsets}, occluders=())
        shown = baseline(seen.images, wanted.shown)
        drawn = torch.Generator().manual_seed((self.seed << 32) + step)
        asked = build_bank(network, seen.images, shown, drawn, classes=seen.classes, plan=plan)
        maps = upsample(seen.maps, _size(seen.images))
        if self.arm == "shuffled":
            maps = maps.roll(1, 0)
        if self.arm == "random":
            probe = asked.subsets[0.25]
            target = probe.sums(upsample(self._random(seen), _size(seen.images)))
            return 1 - pearson(probe.sums(maps)[:, None], target[:, None])
        return unfaithfulness(maps, asked)

    def _consistency(self, network: Preprocessed, seen: Seen, step: int) -> PerImage:
        wanted = self.objective
        view = draw_view(
            wanted.views, seen.ids, _size(seen.images), seed=self.seed + SECOND_VIEW, epoch=step
        )
        moved = view_images(seen.images, view)
        _, _, maps = explained(network, moved, wanted.cam, wanted.layer, seen.classes)
        target = self._random(seen) if self.arm == "random" else seen.maps
        target = view_maps(target, view, flipped=False)
        if self.arm == "shuffled":
            target = target.roll(1, 0)
        return contrastive_consistency(maps, target, wanted.temperature or 0.5)

    def _energy(self, network: Preprocessed, seen: Seen, step: int) -> PerImage:
        masks = seen.masks
        if masks is None:
            raise UserError("the objective is energy, but the images have no masks and no boxes")
        if self.arm == "shuffled":
            masks = masks.roll(1, 0)
        if self.arm == "random":
            masks = _largest(upsample(self._random(seen), _size(seen.images)), masks)
        return energy_outside(upsample(seen.maps, _size(seen.images)), masks)

    def _fidelity(self, network: Preprocessed, seen: Seen, step: int) -> PerImage:
        teacher, wanted = self.teacher, self.objective
        assert teacher is not None, "it is built with the objective"
        if self.arm == "random":
            target = self._random(seen)
        else:
            layers = None if wanted.teacher_layer is None else [wanted.teacher_layer]
            teacher.to(seen.images.device)
            (target,) = grad_cam(teacher, seen.images, layers, seen.classes).values()
        if self.arm == "shuffled":
            target = target.roll(1, 0)
        return map_distance(seen.maps, target, wanted.distance)

    def _learned(self, network: Preprocessed, seen: Seen, step: int) -> PerImage:
        metric = self.metric
        assert metric is not None, "it is loaded with the objective"
        known = image_context(network, seen.images, seen.classes)
        if self.arm == "shuffled":
            known = known.roll(1, 0)
        if self.arm == "random":
            known = self._of_chance(known, seen)
        maps = upsample(seen.maps, _size(seen.images))
        metric.to(maps.device, maps.dtype)
        with torch.autocast(maps.device.type, enabled=False):
            return -metric(maps, known)  # type: ignore[no-any-return]

    def _of_chance(self, known: Context, seen: Seen) -> Context:
        """A context whose planes of the network are smooth random maps; the image's stay."""
        drawn = [standardize_planes(self._random(seen, number)) for number in range(OF_NETWORK)]
        return torch.cat([torch.stack(drawn, 1).to(known), known[:, OF_NETWORK:]], 1)

    def _random(self, seen: Seen, number: int = 0) -> LayerMaps:
        """A smooth random map for each image, moved with it; others by number."""
        drawn = uniforms(seen.ids, CELLS * CELLS, seed=self.seed, epoch=number)
        coarse = drawn.view(-1, CELLS // 2, 2, CELLS // 2, 2).mean((2, 4))
        return view_maps(upsample(coarse, (CELLS, CELLS)), seen.view, flipped=False)


def _largest(maps: Maps, like: Masks) -> Masks:
    """Masks of the maps' largest values, each as large as another mask."""
    order = maps.flatten(1).argsort(1, descending=True).argsort(1).view(maps.shape)
    return order < like.flatten(1).sum(1)[:, None, None]


def _size(images: Images) -> tuple[int, int]:
    return images.shape[2], images.shape[3]
