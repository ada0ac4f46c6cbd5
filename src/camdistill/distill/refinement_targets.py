"""What a network's maps are refined towards, and the controls that it is held against."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch

from camdistill.data.views import Augment, View, draw_view, uniforms_by_id, view_images, view_maps
from camdistill.distill.differentiable_maps import (
    CamMethod,
    LayerMaps,
    explain_with_graph,
    forward_constant,
)
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

ObjectiveKind = Literal[
    "insertion_deletion", "faithfulness", "consistency", "energy", "fidelity", "learned"
]
RefinementArm = Literal["objective", "ce", "detached", "random", "shuffled"]
ARMS: tuple[RefinementArm, ...] = ("objective", "ce", "detached", "random", "shuffled")
CELLS = 8  # of a random smooth map, along each side
SECOND_VIEW = 7919  # added to the seed: the second view is not the first


@dataclass(frozen=True)
class Objective:
    """What the network's own maps are trained to be.

    Args:
        kind: insertion_deletion (ID-ExpO), faithfulness (correlation with a perturbation bank),
            consistency (contrastive, CGC), energy (in masks or boxes), fidelity (to a teacher),
            learned (the score of a metric that `camdistill learn` made).
        weight: Weight of the objective, beside 1 of cross-entropy.
        schedule: Schedule of the weight.
        cam: Which map: grad_cam, or hires_cam (CGC's).
        layer: Layer of the maps. Default: the last before the head.
        answers: insertion_deletion: "trained" lets the answers to changed images be trained too
            (the paper's), "constant" leaves the map as the only way.
        form: insertion_deletion: of probabilities, or of their logarithms (the paper's), whose
            deletion has no lower bound: at weight 0.1 it took 10 points of accuracy (Shapes, one
            start, 4 epochs).
        deletion: insertion_deletion: weight of deletion beside insertion.
        shares: insertion_deletion: of the image, shown and hidden at each level.
        temperature: Temperature of the soft masks, in deviations of the map; of consistency's
            cosines.
        replacement: What stands where an image is changed.
        subsets: faithfulness: random changes asked about, an image and step.
        cells: faithfulness: an image is cut into so many along each side.
        views: consistency: of the second view.
        teacher: fidelity: whose maps are the target.
        teacher_layer: fidelity: of the teacher's maps. Default: its last.
        distance: fidelity: of the maps.
        file: learned: the metric, FILE.safetensors.
    """

    kind: ObjectiveKind = "insertion_deletion"
    weight: float = 1.0
    schedule: BetaSchedule = "constant"
    cam: CamMethod = "grad_cam"
    layer: str | None = None
    answers: Literal["trained", "constant"] = "trained"
    form: Form = "probability"
    deletion: float = 1.0
    shares: tuple[float, ...] = LEVELS
    temperature: float | None = None
    replacement: Literal["blur", "mean", "gray"] = "blur"
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
            file_text = "no objective.file" if self.file is None else f"a file '{self.file}'"
            raise UserError(
                f"objective.kind is {self.kind} with {file_text}; a learned objective, and no "
                "other, "
                "has the metric.safetensors that `camdistill learn` wrote"
            )

    @property
    def trains_answers(self) -> bool:
        """Whether the network's answers to changed images are trained, and not its map alone."""
        return self.kind == "insertion_deletion" and self.answers == "trained"

    @property
    def arms(self) -> tuple[RefinementArm, ...]:
        """The arms that differ: of a constant map others than these are cross-entropy alone.

        Where the answers are constant too, so is all that a random map stands in for.
        """
        if self.trains_answers:
            return ARMS
        excluded = {"detached", "random"} if self.kind == "insertion_deletion" else {"detached"}
        return tuple(arm for arm in ARMS if arm not in excluded)


class ViewBatch(NamedTuple):
    """A batch as the network sees it.

    Attributes:
        images: In [0, 1], under their view.
        ids: Ids of the images.
        view: What was done to the images.
        classes: Classes of the maps: the network's own top class.
        maps: Maps of these, raw, with a graph, at the layer's resolution.
        masks: Masks of the objects, under the view; None without.
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
        seed: Seed of random targets, views and changes.
    """

    def __init__(self, objective: Objective, arm: RefinementArm, seed: int) -> None:
        self.objective, self.arm, self.seed = objective, arm, seed
        # Built once; a Teacher is in nobody's checkpoint.
        needs_teacher = (
            objective.kind == "fidelity" and objective.teacher is not None and arm != "ce"
        )
        self.teacher = Teacher(objective.teacher) if needs_teacher and objective.teacher else None
        needs_metric = objective.file is not None and arm != "ce"
        self.metric = load_metric(objective.file) if needs_metric and objective.file else None

    def loss(self, network: Preprocessed, batch: ViewBatch, step: int) -> PerImage:
        """One value an image, before its weight."""
        return {
            "insertion_deletion": self._insertion_deletion,
            "faithfulness": self._faithfulness,
            "consistency": self._consistency,
            "energy": self._energy,
            "fidelity": self._fidelity,
            "learned": self._metric_loss,
        }[self.objective.kind](network, batch, step)

    def _insertion_deletion(self, network: Preprocessed, batch: ViewBatch, step: int) -> PerImage:
        objective = self.objective
        maps = batch.maps.detach() if self.arm == "detached" else batch.maps
        if self.arm == "random":
            maps = self._random_maps(batch)
        elif self.arm == "shuffled":
            maps = maps.roll(1, 0)
        return insertion_deletion(
            network if objective.answers == "trained" else partial(forward_constant, network),
            batch.images,
            batch.classes,
            upsample(maps, _image_size(batch.images)),
            baseline(batch.images, objective.replacement),
            shares=objective.shares,
            temperature=objective.temperature or TEMPERATURE,
            form=objective.form,
            deletion=objective.deletion,
        )

    def _faithfulness(self, network: Preprocessed, batch: ViewBatch, step: int) -> PerImage:
        objective = self.objective
        plan = BankPlan(cells=objective.cells, subsets={0.25: objective.subsets}, occluders=())
        replacement = baseline(batch.images, objective.replacement)
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        answer_bank = build_bank(
            network, batch.images, replacement, generator, classes=batch.classes, plan=plan
        )
        maps = upsample(batch.maps, _image_size(batch.images))
        if self.arm == "shuffled":
            maps = maps.roll(1, 0)
        if self.arm == "random":
            perturbations = answer_bank.subsets[0.25]
            target = perturbations.sums(
                upsample(self._random_maps(batch), _image_size(batch.images))
            )
            return 1 - pearson(perturbations.sums(maps)[:, None], target[:, None])
        return unfaithfulness(maps, answer_bank)

    def _consistency(self, network: Preprocessed, batch: ViewBatch, step: int) -> PerImage:
        objective = self.objective
        view = draw_view(
            objective.views,
            batch.ids,
            _image_size(batch.images),
            seed=self.seed + SECOND_VIEW,
            epoch=step,
        )
        moved_images = view_images(batch.images, view)
        _, _, maps = explain_with_graph(
            network, moved_images, objective.cam, objective.layer, batch.classes
        )
        target = self._random_maps(batch) if self.arm == "random" else batch.maps
        target = view_maps(target, view, flipped=False)
        if self.arm == "shuffled":
            target = target.roll(1, 0)
        return contrastive_consistency(maps, target, objective.temperature or 0.5)

    def _energy(self, network: Preprocessed, batch: ViewBatch, step: int) -> PerImage:
        masks = batch.masks
        if masks is None:
            raise UserError("the objective is energy, but the images have no masks and no boxes")
        if self.arm == "shuffled":
            masks = masks.roll(1, 0)
        if self.arm == "random":
            masks = _top_masks(upsample(self._random_maps(batch), _image_size(batch.images)), masks)
        return energy_outside(upsample(batch.maps, _image_size(batch.images)), masks)

    def _fidelity(self, network: Preprocessed, batch: ViewBatch, step: int) -> PerImage:
        teacher, objective = self.teacher, self.objective
        assert teacher is not None, "it is built with the objective"
        if self.arm == "random":
            target = self._random_maps(batch)
        else:
            layers = None if objective.teacher_layer is None else [objective.teacher_layer]
            teacher.to(batch.images.device)
            (target,) = grad_cam(teacher, batch.images, layers, batch.classes).values()
        if self.arm == "shuffled":
            target = target.roll(1, 0)
        return map_distance(batch.maps, target, objective.distance)

    def _metric_loss(self, network: Preprocessed, batch: ViewBatch, step: int) -> PerImage:
        metric = self.metric
        assert metric is not None, "it is loaded with the objective"
        planes = image_context(network, batch.images, batch.classes)
        if self.arm == "shuffled":
            planes = planes.roll(1, 0)
        if self.arm == "random":
            planes = self._random_context(planes, batch)
        maps = upsample(batch.maps, _image_size(batch.images))
        metric.to(maps.device, maps.dtype)
        with torch.autocast(maps.device.type, enabled=False):
            return -metric(maps, planes)  # type: ignore[no-any-return]

    def _random_context(self, planes: Context, batch: ViewBatch) -> Context:
        """A context whose planes of the network are smooth random maps; the image's stay."""
        random_planes = [
            standardize_planes(self._random_maps(batch, number)) for number in range(OF_NETWORK)
        ]
        return torch.cat([torch.stack(random_planes, 1).to(planes), planes[:, OF_NETWORK:]], 1)

    def _random_maps(self, batch: ViewBatch, number: int = 0) -> LayerMaps:
        """A smooth random map for each image, moved with it; others by number."""
        numbers = uniforms_by_id(batch.ids, CELLS * CELLS, seed=self.seed, epoch=number)
        coarse = numbers.view(-1, CELLS // 2, 2, CELLS // 2, 2).mean((2, 4))
        return view_maps(upsample(coarse, (CELLS, CELLS)), batch.view, flipped=False)


def _top_masks(maps: Maps, like: Masks) -> Masks:
    """Masks of the maps' largest values, each as large as another mask."""
    order = maps.flatten(1).argsort(1, descending=True).argsort(1).view(maps.shape)
    return order < like.flatten(1).sum(1)[:, None, None]


def _image_size(images: Images) -> tuple[int, int]:
    return images.shape[2], images.shape[3]
