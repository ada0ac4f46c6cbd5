"""Trains many small students side by side: stacked on a GPU, one at a time on a CPU.

This is the one training loop of ours beside Lightning's: a study needs hundreds of students of
seconds each, and a Trainer's start alone takes that long. A student is the same in a stack as
alone, to rounding.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torchvision.ops import StochasticDepth

from camdistill.data.views import View, view_maps
from camdistill.distill.losses import map_distance, soft_targets_kl
from camdistill.distill.training import as_images, build_with_seed
from camdistill.errors import UserError
from camdistill.experiments.ranking.student_task import ImagePool, Recipe, StudentTask, batch_at
from camdistill.explain.gradcam import explain_images, last_layer
from camdistill.explain.maps import relu
from camdistill.networks.capture import capture, check_forward
from camdistill.networks.heads import find_head
from camdistill.networks.teachers import NetworkSpec, Preprocessed, build_preprocessed
from camdistill.perturb.probability import predict_labels
from camdistill.types import Images, Pixels

LOOKS = 500  # images in one forward where nothing is trained
Targets = Float[Tensor, "students batch rows columns"]


class StudentScores(NamedTuple):
    """How students answer images that they were not taught with.

    Attributes:
        agrees: Whether the student's top class is the teacher's.
        kl: From the teacher's probabilities to the student's, in nats, at temperature 1.
    """

    agrees: Bool[Tensor, "students images"]
    kl: Float[Tensor, "students images"]


class Students:
    """Networks of one family that are trained together, each on its own lesson.

    A student's map is its class activation map at the last layer, which equals Grad-CAM for a head
    of global average pooling and a linear layer (`find_pooled_layer` makes sure), so that nothing
    is differentiated twice.

    Args:
        networks: At least one; several are stacked and run as one (`torch.func.vmap`).
        layer: The last spatial layer's name.

    Attributes:
        decayed: Weights, which the optimizer lets decay.
        others: Norms and biases.
    """

    def __init__(self, networks: Sequence[Preprocessed], layer: str) -> None:
        self.count = len(networks)
        self.layer = layer
        self._head = f"network.{find_head(networks[0].network)[0]}.weight"
        self._buffers: dict[str, Tensor] = {}
        if self.count == 1:
            self._network = networks[0].to(memory_format=torch.channels_last)
            self._parameters: dict[str, Tensor] = dict(self._network.named_parameters())
        else:
            self._parameters, self._buffers = stack_module_state(list(networks))
            self._network = copy.deepcopy(networks[0]).to("meta")
        flat = {name for name, weight in networks[0].named_parameters() if weight.ndim <= 1}
        self.decayed = [weight for name, weight in self._parameters.items() if name not in flat]
        self.others = [self._parameters[name] for name in sorted(flat)]

    @classmethod
    def from_seeds(
        cls,
        family: NetworkSpec,
        classes: int,
        seeds: Sequence[int],
        *,
        layer: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Students":
        """Students that start from their seeds: equal seeds, equal weights."""
        starts = {
            seed: build_with_seed(seed, lambda: build_preprocessed(family, classes=classes)).to(
                device, dtype
            )
            for seed in dict.fromkeys(seeds)
        }
        return cls([copy.deepcopy(starts[seed]) for seed in seeds], layer)

    def state(self, number: int) -> dict[str, Tensor]:
        """One student's weights and buffers."""
        network_state = self._network.state_dict()
        if self.count == 1:
            return dict(network_state)
        tensors = self._parameters | self._buffers
        return {name: tensors[name][number].detach() for name in network_state}

    def train(self, mode: bool) -> None:
        """Whether batch normalization takes the batch's statistics and notes them."""
        self._network.train(mode)

    def answers(
        self, images: Float[Tensor, "..."], *, shared: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logits [K, B, C] and the last layer's activations [K, B, U, h, w].

        Args:
            images: In [0, 1]: [K, B, 3, H, W], or [B, 3, H, W] for all.
            shared: The latter.
        """
        if self.count == 1:
            only = images if shared else images[0]
            with capture(self._network, [self.layer]) as captured:
                logits = self._network(only)
            return logits[None], captured[self.layer][None]
        run = vmap(self._stacked, in_dims=(0, 0, None if shared else 0))
        logits, activations = run(self._parameters, self._buffers, images)
        return logits, activations

    def _stacked(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], images: Images
    ) -> tuple[Tensor, Tensor]:
        with capture(self._network, [self.layer]) as captured:
            logits = functional_call(self._network, {**parameters, **buffers}, (images,))
        return logits, captured[self.layer]

    def maps(self, activations: Tensor, classes: Tensor) -> Targets:
        """Class activation maps of each student's images for the given classes [K, B]."""
        weight = self._parameters[self._head]
        stacked = weight.flatten(1)[None] if self.count == 1 else weight.flatten(2)
        chosen = stacked[torch.arange(self.count, device=classes.device)[:, None], classes]
        wide = activations if activations.dtype == torch.float64 else activations.float()
        return torch.einsum("kbu,kbuhw->kbhw", chosen, wide) / wide[0, 0, 0].numel()


def find_pooled_layer(
    family: NetworkSpec, classes: int, images: Images
) -> tuple[str, tuple[int, int]]:
    """The last layer of a family of students, and the grid of its maps.

    Raises:
        UserError: The class activation map there is not Grad-CAM, as the head is not global average
            pooling and one linear layer.
    """
    network = build_with_seed(0, lambda: build_preprocessed(family, classes=classes)).eval()
    cure = "give another --data.size, or other students"
    check_forward({f"student '{family.name}'": network}, images, cure=cure)
    layer = last_layer(network, images)
    explanation = explain_images(network, images, [layer])
    student_maps = None
    if find_head(network.network)[1].weight.shape[1] == explanation.activations[layer].shape[1]:
        students = Students([network], layer)
        with torch.no_grad():
            _, activations = students.answers(images, shared=True)
            student_maps = students.maps(activations, explanation.classes[None])[0]
    error = (
        torch.inf
        if student_maps is None
        else float((student_maps - explanation.maps[layer]).abs().amax())
    )
    if student_maps is None or not error <= 1e-3 * float(
        explanation.maps[layer].abs().amax().clamp_min(1e-12)
    ):
        raise UserError(
            f"the students '{family.name}' don't end in global average pooling and one linear "
            f"layer after '{layer}'; take shallow_cnn, a CIFAR ResNet or a wide ResNet"
        )
    _check_no_dropout(family.name, network)
    return layer, (student_maps.shape[1], student_maps.shape[2])


def _check_no_dropout(name: str, network: nn.Module) -> None:
    """Refuse students that draw at random in training: those of one seed would not be alike."""
    for place, part in network.named_modules():
        dropped = isinstance(part, nn.modules.dropout._DropoutNd | StochasticDepth)
        if dropped and part.p > 0:
            raise UserError(
                f"the students '{name}' have dropout ({place}, p {part.p}), and students of one "
                "seed have to draw alike: set it to 0 in their args, or take another network"
            )


def train_students(
    students: Students, pool: ImagePool, tasks: Sequence[StudentTask], recipe: Recipe
) -> None:
    """Trains every student on its lesson, in place.

    Args:
        students: Students, one for each task, started from the tasks' seeds.
        pool: What all learn from, on the students' device.
        tasks: Their maps have one grid.
        recipe: How.

    Raises:
        UserError: A student's weights are not numbers at the end.
    """
    if len(tasks) != students.count:
        raise ValueError(f"{len(tasks)} lessons for {students.count} students")
    seeds = list(dict.fromkeys(task.seed for task in tasks))
    device, dtype = pool.pixels.device, students.decayed[0].dtype
    row = torch.tensor([seeds.index(task.seed) for task in tasks], device=device)
    guide = _Guide.of(tasks, row, dtype)
    optimizer = recipe.optimization.build_optimizer(students.decayed, students.others)
    half = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")
    students.train(True)
    loss = torch.zeros(len(tasks), device=device)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.optimization.lr * recipe.optimization.lr_factor(
                step / recipe.steps
            )
        batches = _Batches.of(pool, recipe, seeds, step)
        images = batches.images.to(dtype)
        with half:
            logits, activations = students.answers(images if len(row) == 1 else images[row])
        teacher_logits = pool.logits[batches.positions, batches.flips].to(dtype)[row]
        kl = soft_targets_kl(logits.flatten(0, 1), teacher_logits.flatten(0, 1), recipe.temperature)
        loss = kl.view(len(tasks), -1).mean(1)
        if guide is not None:
            maps = students.maps(activations, teacher_logits.argmax(2))
            loss = loss.index_add(0, guide.places, guide.loss(maps, batches, recipe))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss.sum())
        optimizer.step()
    students.train(False)
    if not bool(torch.isfinite(loss).all()):
        raise UserError(
            f"a student's loss is not a number after {recipe.steps} steps (learning rate "
            f"{recipe.optimization.lr}); try a third of it: --recipe.optimization.lr"
        )


class _Batches(NamedTuple):
    """One step's batches, one for each seed."""

    images: Float[Tensor, "seeds batch channels height width"]
    positions: Int[Tensor, "seeds batch"]
    flips: Int[Tensor, "seeds batch"]
    boxes: Float[Tensor, "seeds batch 4"]

    @classmethod
    def of(cls, pool: ImagePool, recipe: Recipe, seeds: Sequence[int], step: int) -> "_Batches":
        taught = [batch_at(pool, recipe, seed, step) for seed in seeds]
        return cls(
            torch.stack([batch.images for batch in taught]),
            torch.stack([batch.positions for batch in taught]),
            torch.stack([batch.view.flip.long() for batch in taught]),
            torch.stack([batch.view.box for batch in taught]),
        )


class _Guide(NamedTuple):
    """The maps of those lessons that have some."""

    places: Int[Tensor, "guided"]
    rows: Int[Tensor, "guided"]
    beta: Float[Tensor, "guided"]
    maps: Float[Tensor, "guided images 2 rows columns"]

    @classmethod
    def of(cls, tasks: Sequence[StudentTask], row: Tensor, dtype: torch.dtype) -> "_Guide | None":
        taught = [k for k, task in enumerate(tasks) if task.maps is not None and task.beta > 0]
        maps = [tasks[k].maps for k in taught]
        if not maps:
            return None
        places = torch.tensor(taught, device=row.device)
        beta = torch.tensor([tasks[k].beta for k in taught], device=row.device, dtype=dtype)
        return cls(
            places, row[places], beta, torch.stack([m.to(dtype) for m in maps if m is not None])
        )

    def loss(self, maps: Targets, batches: _Batches, recipe: Recipe) -> Float[Tensor, "guided"]:
        """Beta times the distance of the students' maps from theirs under the views."""
        positions, flips = batches.positions[self.rows], batches.flips[self.rows]
        every = torch.arange(len(self.places), device=maps.device)[:, None]
        view = View(flips.flatten().bool(), batches.boxes[self.rows].flatten(0, 1))
        teacher_maps = view_maps(
            self.maps[every, positions, flips].flatten(0, 1), view, flipped=True
        )
        student_maps = relu(maps[self.places]).flatten(0, 1)
        distance = map_distance(student_maps, teacher_maps, recipe.distance, rectify=False)
        return self.beta * distance.view(positions.shape).mean(1)


@torch.no_grad()
def measure_students(
    students: Students, pixels: Pixels, logits: Float[Tensor, "batch classes"]
) -> StudentScores:
    """Students and teacher on images that are not mirrored; no map is looked at."""
    students.train(False)
    agrees, divergences = [], []
    dtype = students.decayed[0].dtype
    for start in range(0, len(pixels), LOOKS):
        part, teacher_logits = pixels[start : start + LOOKS], logits[start : start + LOOKS]
        student_logits, _ = students.answers(as_images(part).to(dtype), shared=True)
        labels = torch.stack(
            [predict_labels(logits_of_student) for logits_of_student in student_logits]
        )
        agrees.append(labels == predict_labels(teacher_logits))
        rows = teacher_logits.to(student_logits).expand_as(student_logits)
        kl = soft_targets_kl(student_logits.flatten(0, 1), rows.flatten(0, 1), 1.0)
        divergences.append(kl.view(student_logits.shape[:2]))
    return StudentScores(torch.cat(agrees, 1), torch.cat(divergences, 1))
