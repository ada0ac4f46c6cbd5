"""An explainer's parameters learnt from what it teaches: one step of a student, differentiated.

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
from camdistill.experiments.ranking.student_task import Pool, Recipe, Taught, batch_at
from camdistill.explain.learnable import LearnableCAM, unit_contributions
from camdistill.explain.maps import relu, resize
from camdistill.networks.capture import capture
from camdistill.networks.heads import find_head
from camdistill.networks.teachers import Preprocessed, Teacher, build_preprocessed
from camdistill.types import Images, Logits, Pixels

CHUNK = 64  # images of which the teacher is asked at once
Weights = dict[str, Tensor]


class Task(NamedTuple):
    """What an explainer's parameters are learnt on.

    Attributes:
        pool: What students are taught with.
        parts: What each unit of the teacher adds to Grad-CAM, for each image of the pool and its
            mirror image, by layer: [n, 2, K, h, w].
        pixels: Of the images on which students are asked.
        logits: The teacher's for them.
    """

    pool: Pool
    parts: Mapping[str, Float[Tensor, "..."]]
    pixels: Pixels
    logits: Float[Tensor, "asked classes"]

    def targets(self, explainer: LearnableCAM, grid: tuple[int, int]) -> Tensor:
        """What students are taught by an explainer as it is now: [n, 2, rows, columns]."""
        with torch.no_grad():
            views = [
                torch.cat(
                    [
                        resize(relu(explainer.maps(self._rows(rows, view))), grid)
                        for rows in torch.split(torch.arange(len(self.pool.pixels)), CHUNK)
                    ]
                )
                for view in range(2)
            ]
        return torch.stack(views, 1)

    def of(self, taught: Taught) -> dict[str, Tensor]:
        """The contributions that belong to a batch."""
        return self._rows(taught.positions, taught.view.flip.long())

    def _rows(self, rows: Tensor, views: Tensor | int) -> dict[str, Tensor]:
        return {name: part[rows, views] for name, part in self.parts.items()}


def parts_of(
    teacher: Teacher, pool: Pool, layers: Sequence[str], on_progress: Callable[[int, int], None]
) -> dict[str, Tensor]:
    """A teacher's contributions of the pool, for the top classes that the pool's logits say."""
    found: dict[str, list[list[Tensor]]] = {name: [[], []] for name in layers}
    device = teacher.mean.device
    for start in range(0, len(pool.pixels), CHUNK):
        rows = slice(start, start + CHUNK)
        for view in range(2):
            pixels = pool.pixels[rows].flip(-1) if view else pool.pixels[rows]
            classes = pool.logits[rows, view].argmax(1).to(device)
            parts = unit_contributions(teacher, as_images(pixels.to(device)), layers, classes)
            for name, part in parts.items():
                found[name][view].append(part.float())
        on_progress(min(start + CHUNK, len(pool.pixels)), len(pool.pixels))
    return {
        name: torch.stack([torch.cat(view) for view in views], 1) for name, views in found.items()
    }


class Learner:
    """A student whose weights are given to it, so that a step of them can be differentiated.

    Attributes:
        weights: Its own: leaves of the graph.
        buffers: Of its normalisations.
    """

    def __init__(self, network: Preprocessed, layer: str) -> None:
        self._network = network.train()
        self._layer = layer
        self._head = f"network.{find_head(network.network)[0]}.weight"
        self.weights: Weights = dict(network.named_parameters())
        self.buffers: Weights = dict(network.named_buffers())

    def answers(
        self, weights: Weights, buffers: Weights, images: Images
    ) -> tuple[Logits, Float[Tensor, "batch units rows columns"]]:
        """Logits and the last layer's activations in train mode; buffers are updated in place."""
        with capture(self._network, [self._layer]) as found:
            logits = functional_call(self._network, {**weights, **buffers}, (images,))
        return logits, found[self._layer]

    def training_loss(
        self, taught: Taught, wanted: Logits, maps: Tensor, beta: float, recipe: Recipe
    ) -> Float[Tensor, ""]:
        """L_train of a batch, as `stacked.teach` has it.

        Args:
            taught: The batch.
            wanted: The teacher's logits of these views.
            maps: The explainer's of these images (mirrored where they are), rectified, on the
                student's grid.
            beta: Their weight.
            recipe: Temperature and distance.
        """
        logits, activations = self.answers(self.weights, self.buffers, taught.images)
        chosen = self.weights[self._head].flatten(1)[wanted.argmax(1)]
        own = torch.einsum("bu,buhw->bhw", chosen, activations) / activations[0, 0].numel()
        moved = view_maps(maps, taught.view, flipped=True)
        distance = map_distance(relu(own), moved, recipe.distance, rectify=False)
        kl = soft_targets_kl(logits, wanted, recipe.temperature)
        return kl.mean() + beta * distance.mean()

    def simulation_loss(
        self, weights: Weights, images: Images, wanted: Logits, temperature: float
    ) -> Float[Tensor, ""]:
        """L_sim with other weights than its own; nothing is noted in its buffers."""
        copies = {name: buffer.clone() for name, buffer in self.buffers.items()}
        logits, _ = self.answers(weights, copies, images)
        return soft_targets_kl(logits, wanted, temperature).mean()


class Ahead(NamedTuple):
    """A student's step, and what it would be worth.

    Attributes:
        train: L_train before the step.
        simulation: L_sim after it; it carries the graph to the explainer's parameters.
        gradients: Of L_train by the student's weights.
    """

    train: Tensor
    simulation: Tensor
    gradients: Weights


def look_ahead(
    learner: Learner,
    explainer: LearnableCAM,
    task: Task,
    taught: Taught,
    asked: Tensor,
    *,
    grid: tuple[int, int],
    beta: float,
    eta: float,
    recipe: Recipe,
) -> Ahead:
    """One plain gradient step of a student on an explainer's maps, and its simulation after it.

    Args:
        learner: The student; its normalisations note the batch, its weights stay.
        explainer: Its maps are taught.
        task: Whose images.
        taught: The student's batch.
        asked: Which images of the task it is asked about.
        grid: Of the student's maps.
        beta: Weight of the maps.
        eta: Length of the step.
        recipe: How students are trained.
    """
    dtype = next(iter(learner.weights.values())).dtype
    flips = taught.view.flip.long()
    wanted = task.pool.logits[taught.positions, flips].to(dtype)
    maps = resize(relu(explainer.maps(task.of(taught))), grid)
    batch = taught._replace(images=taught.images.to(dtype))
    train = learner.training_loss(batch, wanted, maps, beta, recipe)
    names = list(learner.weights)
    found = torch.autograd.grad(train, [learner.weights[name] for name in names], create_graph=True)
    gradients = dict(zip(names, found, strict=True))
    ahead = {name: learner.weights[name] - eta * gradients[name] for name in names}
    images = as_images(task.pixels[asked]).to(dtype)
    simulation = learner.simulation_loss(
        ahead, images, task.logits[asked].to(dtype), recipe.temperature
    )
    return Ahead(train, simulation, gradients)


def adapt_once(
    explainer: LearnableCAM,
    task: Task,
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
        task: What it is learnt on.
        family: Of the student.
        recipe: Of its training; float32, whatever its precision.
        seed: Of its start, its batches and the images that it is asked about.
        beta: Weight of the maps.
        lr: Of the explainer's parameters.
        eta: Length of the step that is differentiated; the student's own learning rate if None.
        on_step: Told how many steps are done of how many.

    Raises:
        UserError: A loss is not a number.
    """
    classes = task.logits.shape[1]
    device = task.pool.pixels.device
    network = build_with_seed(seed, lambda: build_preprocessed(family.spec, classes=classes)).to(
        device
    )
    learner = Learner(network, family.layer)
    optimiser = recipe.optimisation.build_optimizer(
        [weight for weight in learner.weights.values() if weight.ndim > 1],
        [weight for weight in learner.weights.values() if weight.ndim <= 1],
    )
    phi = [own for own in explainer.parameters() if own.requires_grad]
    outer = torch.optim.AdamW(phi, lr=lr, weight_decay=0.0)
    for step in range(recipe.steps):
        rate = recipe.optimisation.lr * recipe.optimisation.lr_factor(step / recipe.steps)
        ahead = look_ahead(
            learner,
            explainer,
            task,
            batch_at(task.pool, recipe, seed, step),
            _asked(len(task.pixels), recipe.batch_size, seed, step).to(device),
            grid=family.grid,
            beta=beta,
            eta=rate if eta is None else eta,
            recipe=recipe,
        )
        for own, gradient in zip(phi, torch.autograd.grad(ahead.simulation, phi), strict=True):
            own.grad = gradient
        if not all(bool(torch.isfinite(own.grad).all()) for own in phi if own.grad is not None):
            raise UserError(
                f"the explainer's gradient is not a number at step {step}; try a third of "
                f"the student's learning rate ({recipe.optimisation.lr}) or of beta ({beta:g})"
            )
        outer.step()
        explainer.settle()
        for group in optimiser.param_groups:
            group["lr"] = rate
        for name, weight in learner.weights.items():
            weight.grad = ahead.gradients[name].detach()
        optimiser.step()
        if on_step is not None:
            on_step(step + 1, recipe.steps)


def _asked(count: int, size: int, seed: int, step: int) -> Tensor:
    """Which images a step is judged on."""
    generator = np.random.default_rng([seed, step, *b"asked"])
    return torch.from_numpy(generator.permutation(count)[:size])
