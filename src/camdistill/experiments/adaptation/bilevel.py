"""Learns an explainer's parameters through one differentiated step of a student.

    theta' = theta - eta grad_theta L_train(theta, phi)      one step of a student on its maps
    min over phi of L_sim(theta'(phi))                       how it simulates the teacher then

SMaT (Fernandes et al. 2022, https://arxiv.org/abs/2204.10810) with one-step unrolling at every
step, as in DARTS (Liu et al. 2019, https://arxiv.org/abs/1806.09055). L_train is that of the
students of a ranking: distillation and beta times the distance of maps; L_sim is distillation on
images that the student is not taught with, and no map is looked at there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from camdistill.data.views import view_maps
from camdistill.distill.losses import map_distance, soft_targets_kl
from camdistill.distill.training import as_images, build_with_seed
from camdistill.errors import UserError
from camdistill.experiments.ranking.ranking_arms import Family
from camdistill.experiments.ranking.student_task import ImagePool, Recipe, StudentBatch, batch_at
from camdistill.explain.learnable import LearnableCAM, unit_contributions
from camdistill.explain.maps import relu, resize
from camdistill.networks.capture import capture
from camdistill.networks.heads import find_head
from camdistill.networks.teachers import Preprocessed, Teacher, build_preprocessed
from camdistill.types import Images, Logits, Pixels

CHUNK = 64  # images of which the teacher is asked at once
Weights = dict[str, Tensor]


class AdaptationTask(NamedTuple):
    """What an explainer's parameters are learned on.

    Attributes:
        pool: What students are taught with.
        contributions: What each unit of the teacher adds to Grad-CAM, for each image of the pool
            and its mirror image, by layer: [n, 2, K, h, w].
        simulation_pixels: Pixels of the images on which students are tested.
        simulation_logits: The teacher's for them.
    """

    pool: ImagePool
    contributions: Mapping[str, Float[Tensor, "..."]]
    simulation_pixels: Pixels
    simulation_logits: Float[Tensor, "asked classes"]

    def targets(self, explainer: LearnableCAM, grid: tuple[int, int]) -> Tensor:
        """What students are taught by an explainer as it is now: [n, 2, rows, columns]."""
        with torch.no_grad():
            views = [
                torch.cat(
                    [
                        resize(relu(explainer.maps(self._select_rows(rows, view))), grid)
                        for rows in torch.split(torch.arange(len(self.pool.pixels)), CHUNK)
                    ]
                )
                for view in range(2)
            ]
        return torch.stack(views, 1)

    def batch_contributions(self, student_batch: StudentBatch) -> dict[str, Tensor]:
        """The contributions that belong to a batch."""
        return self._select_rows(student_batch.positions, student_batch.view.flip.long())

    def _select_rows(self, rows: Tensor, views: Tensor | int) -> dict[str, Tensor]:
        return {
            name: contribution[rows, views] for name, contribution in self.contributions.items()
        }


def pool_contributions(
    teacher: Teacher,
    pool: ImagePool,
    layers: Sequence[str],
    on_progress: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """A teacher's contributions of the pool, for the top classes that the pool's logits say."""
    parts_by_layer: dict[str, list[list[Tensor]]] = {name: [[], []] for name in layers}
    device = teacher.mean.device
    for start in range(0, len(pool.pixels), CHUNK):
        rows = slice(start, start + CHUNK)
        for view in range(2):
            pixels = pool.pixels[rows].flip(-1) if view else pool.pixels[rows]
            classes = pool.logits[rows, view].argmax(1).to(device)
            parts = unit_contributions(teacher, as_images(pixels.to(device)), layers, classes)
            for name, part in parts.items():
                parts_by_layer[name][view].append(part.float())
        on_progress(min(start + CHUNK, len(pool.pixels)), len(pool.pixels))
    return {
        name: torch.stack([torch.cat(view) for view in views], 1)
        for name, views in parts_by_layer.items()
    }


class DifferentiableStudent:
    """A student whose weights are given to it, so that a step of them can be differentiated.

    Attributes:
        weights: Its own: leaves of the graph.
        buffers: Buffers of its normalizations.
    """

    def __init__(self, network: Preprocessed, layer: str) -> None:
        self._network = network.train()
        self._layer = layer
        self._head = f"network.{find_head(network.network)[0]}.weight"
        self.weights: Weights = dict(network.named_parameters())
        self.buffers: Weights = dict(network.named_buffers())

    def forward(
        self, weights: Weights, buffers: Weights, images: Images
    ) -> tuple[Logits, Float[Tensor, "batch units rows columns"]]:
        """Logits and the last layer's activations in train mode; buffers are updated in place."""
        with capture(self._network, [self._layer]) as activations:
            logits = functional_call(self._network, {**weights, **buffers}, (images,))
        return logits, activations[self._layer]

    def training_loss(
        self,
        student_batch: StudentBatch,
        teacher_logits: Logits,
        maps: Tensor,
        beta: float,
        recipe: Recipe,
    ) -> Float[Tensor, ""]:
        """L_train of a batch, as `stacked.teach` has it.

        Args:
            student_batch: The batch.
            teacher_logits: The teacher's logits of these views.
            maps: The explainer's of these images (mirrored where they are), rectified, on the
                student's grid.
            beta: Their weight.
            recipe: Temperature and distance.
        """
        logits, activations = self.forward(self.weights, self.buffers, student_batch.images)
        class_weights = self.weights[self._head].flatten(1)[teacher_logits.argmax(1)]
        student_maps = (
            torch.einsum("bu,buhw->bhw", class_weights, activations) / activations[0, 0].numel()
        )
        moved_maps = view_maps(maps, student_batch.view, flipped=True)
        distance = map_distance(relu(student_maps), moved_maps, recipe.distance, rectify=False)
        kl = soft_targets_kl(logits, teacher_logits, recipe.temperature)
        return kl.mean() + beta * distance.mean()

    def simulation_loss(
        self, weights: Weights, images: Images, teacher_logits: Logits, temperature: float
    ) -> Float[Tensor, ""]:
        """L_sim with other weights than its own; nothing is noted in its buffers."""
        buffer_copies = {name: buffer.clone() for name, buffer in self.buffers.items()}
        logits, _ = self.forward(weights, buffer_copies, images)
        return soft_targets_kl(logits, teacher_logits, temperature).mean()


class UnrolledStep(NamedTuple):
    """A student's step, and what it would be worth.

    Attributes:
        training_loss: L_train before the step.
        simulation_loss: L_sim after it; it carries the graph to the explainer's parameters.
        gradients: Gradients of L_train with respect to the student's weights.
    """

    training_loss: Tensor
    simulation_loss: Tensor
    gradients: Weights


def look_ahead(
    student: DifferentiableStudent,
    explainer: LearnableCAM,
    task: AdaptationTask,
    student_batch: StudentBatch,
    simulation_rows: Tensor,
    *,
    grid: tuple[int, int],
    beta: float,
    eta: float,
    recipe: Recipe,
) -> UnrolledStep:
    """One plain gradient step of a student on an explainer's maps, and its simulation after it.

    Args:
        student: The student; its normalizations note the batch, its weights stay.
        explainer: Its maps are taught.
        task: Task whose images are used.
        student_batch: The student's batch.
        simulation_rows: Which images of the task it is asked about.
        grid: Grid of the student's maps.
        beta: Weight of the maps.
        eta: Length of the step.
        recipe: How students are trained.
    """
    dtype = next(iter(student.weights.values())).dtype
    flips = student_batch.view.flip.long()
    teacher_logits = task.pool.logits[student_batch.positions, flips].to(dtype)
    maps = resize(relu(explainer.maps(task.batch_contributions(student_batch))), grid)
    batch = student_batch._replace(images=student_batch.images.to(dtype))
    training_loss = student.training_loss(batch, teacher_logits, maps, beta, recipe)
    names = list(student.weights)
    step_gradients = torch.autograd.grad(
        training_loss, [student.weights[name] for name in names], create_graph=True
    )
    gradients = dict(zip(names, step_gradients, strict=True))
    next_weights = {name: student.weights[name] - eta * gradients[name] for name in names}
    images = as_images(task.simulation_pixels[simulation_rows]).to(dtype)
    simulation_loss = student.simulation_loss(
        next_weights, images, task.simulation_logits[simulation_rows].to(dtype), recipe.temperature
    )
    return UnrolledStep(training_loss, simulation_loss, gradients)


def adapt_once(
    explainer: LearnableCAM,
    task: AdaptationTask,
    family: Family,
    recipe: Recipe,
    *,
    seed: int,
    beta: float,
    lr: float,
    eta: float | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Trains one student from its start to its end, and the explainer's parameters beside it.

    At every step the parameters take one of AdamW's down the unrolled gradient; then the student
    takes its own. Everything that is random depends on the seed alone.

    Args:
        explainer: Changed in place.
        task: What it is learned on.
        family: Family of the student.
        recipe: Recipe of its training; float32, whatever its precision.
        seed: Seed of its start, its batches and the images that it is asked about.
        beta: Weight of the maps.
        lr: Learning rate of the explainer's parameters.
        eta: Length of the step that is differentiated; the student's own learning rate if None.
        on_step: Told how many steps are done of how many.

    Raises:
        UserError: A loss is not a number.
    """
    classes = task.simulation_logits.shape[1]
    device = task.pool.pixels.device
    network = build_with_seed(seed, lambda: build_preprocessed(family.spec, classes=classes)).to(
        device
    )
    student = DifferentiableStudent(network, family.layer)
    optimizer = recipe.optimization.build_optimizer(
        [weight for weight in student.weights.values() if weight.ndim > 1],
        [weight for weight in student.weights.values() if weight.ndim <= 1],
    )
    phi = [parameter for parameter in explainer.parameters() if parameter.requires_grad]
    outer_optimizer = torch.optim.AdamW(phi, lr=lr, weight_decay=0.0)
    for step in range(recipe.steps):
        rate = recipe.optimization.lr * recipe.optimization.lr_factor(step / recipe.steps)
        unrolled_step = look_ahead(
            student,
            explainer,
            task,
            batch_at(task.pool, recipe, seed, step),
            _draw_simulation_rows(len(task.simulation_pixels), recipe.batch_size, seed, step).to(
                device
            ),
            grid=family.grid,
            beta=beta,
            eta=rate if eta is None else eta,
            recipe=recipe,
        )
        for parameter, gradient in zip(
            phi, torch.autograd.grad(unrolled_step.simulation_loss, phi), strict=True
        ):
            parameter.grad = gradient
        if not all(
            bool(torch.isfinite(parameter.grad).all())
            for parameter in phi
            if parameter.grad is not None
        ):
            raise UserError(
                f"the explainer's gradient is not a number at step {step}; try a third of "
                f"the student's learning rate ({recipe.optimization.lr}) or of beta ({beta:g})"
            )
        outer_optimizer.step()
        explainer.settle()
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, weight in student.weights.items():
            weight.grad = unrolled_step.gradients[name].detach()
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, recipe.steps)


def _draw_simulation_rows(count: int, size: int, seed: int, step: int) -> Tensor:
    """Which images a step is judged on."""
    generator = np.random.default_rng([seed, step, *b"asked"])
    return torch.from_numpy(generator.permutation(count)[:size])
