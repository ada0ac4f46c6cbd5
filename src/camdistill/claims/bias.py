"""Row 16: a network that learned a shortcut is found out by its maps, and cured.

The shortcut is a colored patch that agrees with the label in a share rho of the training images.
"""

import copy
import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from camdistill.claims.claim import (
    ClaimMeasurement,
    ClaimResult,
    ClaimSetup,
    ShapesBatch,
    draw_batch,
    gain_over_trainings,
    mean,
)
from camdistill.claims.networks.claim_training import train_or_load
from camdistill.claims.networks.small_networks import Examples, SmallNetworkRecipe, fit_or_load
from camdistill.claims.two_object_scenes import draw_all_images, training_shapes
from camdistill.data.modules import ShapesData
from camdistill.distill.classifier import Classifier
from camdistill.distill.losses import cross_entropy, map_distance, soft_targets_kl
from camdistill.distill.optimization import Optimization
from camdistill.explain.gradcam import explain_images, grad_cam
from camdistill.explain.maps import relu, upsample
from camdistill.measure.localization import energy_lift, energy_pointing_game
from camdistill.networks.teachers import NetworkSpec, Preprocessed
from camdistill.networks.weights import weights_digest
from camdistill.perturb.batched_forward import logits_of
from camdistill.types import PerImage

RHOS = (0.0, 0.5, 0.9, 1.0)
BIASED = 0.9  # of the networks that are cured
SEEDS = 3
TRAIN, EPOCHS = 6000, 8
CURE = SmallNetworkRecipe(4, optimization=Optimization("adamw", lr=2e-3, weight_decay=0.05))
PENALTY, TEMPERATURE = 2.0, 2.0  # of the energy and map losses; of the logits' distillation
ACCURACY, ON_PATCH, ON_OBJECT = (
    "accuracy where the patch disagrees",
    "map's energy on the patch, over its area",
    "map's energy on the object, over its area",
)


class ShortcutScores(NamedTuple):
    """What networks do where the patch disagrees with the label; one row a network.

    Attributes:
        right: Whether the answer is the label.
        on_patch: Energy of the answer's map on the patch, over its area.
        on_object: Likewise.
    """

    right: Float[Tensor, "networks n"]
    on_patch: Float[Tensor, "networks n"]
    on_object: Float[Tensor, "networks n"]


def shortcut_network(
    setup: ClaimSetup, rho: float, seed: int, *, epochs: int | None = None
) -> Preprocessed:
    """A little classifier of images whose patch agrees with the label in a share rho of them."""
    module = Classifier(
        NetworkSpec("shallow_cnn", args={"channels": [24, 48, 64, 64], "strides": [1, 2, 2, 1]}),
        optimization=Optimization("adamw", lr=8e-3, weight_decay=0.05),
        seed=seed,
    )
    data = ShapesData(
        train=TRAIN, val=1, test=1, shortcut=rho, seed=seed, split_seed=setup.shapes.seed
    )
    return train_or_load(setup, f"shortcut-{rho:g}", module, data, epochs=epochs or EPOCHS)


def draw_conflicting_batch(setup: ClaimSetup) -> ShapesBatch:
    """Held-out images whose patch never agrees with the label."""
    return draw_batch(setup, dataclasses.replace(setup.shapes, split="conflict", shortcut=BIASED))


def shortcut_scores(network: Preprocessed, batch: ShapesBatch) -> ShortcutScores:
    """Of one network."""
    (maps,) = grad_cam(network, batch.images).values()
    maps = upsample(relu(maps), (batch.images.shape[-2], batch.images.shape[-1]))
    right = logits_of(network, batch.images).argmax(1) == batch.labels
    return ShortcutScores(
        right.float()[None],
        energy_lift(maps, batch.masks["shortcut"])[None],
        energy_lift(maps, batch.masks["object"])[None],
    )


def run_bias_removal(setup: ClaimSetup) -> ClaimResult:
    """Row 16: maps show that a network goes by a shortcut; each of three cures moves both."""
    batch = draw_conflicting_batch(setup)
    scores_by_rho = {
        f"rho {rho:g}": _scores_over_seeds(setup, batch, partial(shortcut_network, setup, rho))
        for rho in RHOS
    }
    scores_by_cure = {
        name: _scores_over_seeds(setup, batch, partial(cure_network, setup, name)) for name in CURES
    }
    bias_differences = _score_differences(
        setup, scores_by_rho[f"rho {BIASED:g}"], scores_by_rho["rho 0"], f"rho {BIASED:g} - rho 0"
    )
    biased, patch_difference = bias_differences[0].high or 0, bias_differences[1]
    cure_differences = {
        name: _score_differences(setup, scores, scores_by_cure[LONGER], f"{name} - {LONGER}")
        for name, scores in scores_by_cure.items()
        if name != LONGER
    }
    promised_cures = [name for name in cure_differences if name != LOGITS]
    return ClaimResult(
        number="16",
        claim="Grad-CAM shows that a network goes by a bias of its data; without the bias its maps "
        "move to the object and it generalizes",
        paper="doctor or nurse: accuracy 0.82 of the biased network, 0.90 after balancing",
        ours=(
            *_mean_scores(setup, scores_by_rho | scores_by_cure),
            *bias_differences,
            *(
                measurement
                for measurements in cure_differences.values()
                for measurement in measurements
            ),
        ),
        criterion=f"rho {BIASED:g} against rho 0: accuracy lower, energy on the patch higher; and "
        f"{', '.join(promised_cures)}, each against training on as long with the bias: accuracy "
        "higher, "
        "energy on the patch lower (paired differences, whole intervals)",
        passed=biased < 0
        and patch_difference.above_zero
        and all(
            cure_differences[name][0].above_zero and (cure_differences[name][1].high or 0) < 0
            for name in promised_cures
        ),
        note=f"means over {SEEDS} networks each; intervals of differences are over networks and "
        "images, the others over images. rho is the share of training images whose patch agrees "
        f"with the label (rho 0 has none). Cures go on for {CURE.epochs} epochs from the network "
        f"of rho {BIASED:g}: balanced has the patch by chance; the others keep the bias, and teach "
        "the true class's map to lie on the object's mask, or the logits of the shipped teacher, "
        "which never saw a patch, with its maps or without. Its logits alone are nearly the "
        "labels, and no cure was expected of them",
    )


def _scores_over_seeds(
    setup: ClaimSetup, batch: ShapesBatch, network: Callable[[int], Preprocessed]
) -> ShortcutScores:
    """Of the networks of all seeds."""
    scores_by_seed = [
        shortcut_scores(network(setup.seed + offset), batch) for offset in range(SEEDS)
    ]
    return ShortcutScores(*(torch.cat(values) for values in zip(*scores_by_seed, strict=True)))


def _mean_scores(
    setup: ClaimSetup, scores_by_name: dict[str, ShortcutScores]
) -> list[ClaimMeasurement]:
    return [
        mean(name, getattr(scores, field).mean(0), setup, measure)
        for field, measure in zip(
            ShortcutScores._fields, (ACCURACY, ON_PATCH, ON_OBJECT), strict=True
        )
        for name, scores in scores_by_name.items()
    ]


def _score_differences(
    setup: ClaimSetup, first: ShortcutScores, second: ShortcutScores, name: str
) -> tuple[ClaimMeasurement, ClaimMeasurement]:
    """Differences of the accuracy and of the energy on the patch."""
    return (
        gain_over_trainings(name, list(first.right), list(second.right), setup, ACCURACY),
        gain_over_trainings(name, list(first.on_patch), list(second.on_patch), setup, ON_PATCH),
    )


def cure_network(setup: ClaimSetup, name: str, seed: int) -> Preprocessed:
    """A biased network, trained on by one of `CURES`."""
    biased = shortcut_network(setup, BIASED, seed)
    rho = 1 / setup.shapes.classes if name == "balanced" else BIASED
    shapes = training_shapes(setup, TRAIN, shortcut=rho)

    def examples() -> Examples:
        batch = draw_all_images(setup, shapes)
        explanation = explain_images(setup.teacher, batch.images, classes=batch.labels)
        (maps,) = explanation.maps.values()
        return batch.images, batch.labels, batch.masks["object"], explanation.logits, maps

    return fit_or_load(
        setup,
        "cured-" + re.sub("[^a-z]+", "-", name),
        lambda: copy.deepcopy(biased).requires_grad_(True),
        examples,
        CURES[name],
        recipe=CURE,
        settings={
            "shapes": shapes.fingerprint,
            "from": weights_digest(biased),
            "teacher": weights_digest(setup.teacher),
            "penalty": PENALTY,
            "temperature": TEMPERATURE,
        },
        seed=seed,
    )


def _label_loss(network: Preprocessed, examples: Examples) -> PerImage:
    images, labels, *_ = examples
    return cross_entropy(network(images), labels)


def _energy_loss(network: Preprocessed, examples: Examples) -> PerImage:
    """The energy loss of Rao et al. 2023, https://arxiv.org/abs/2303.11932, through Grad-CAM."""
    images, labels, masks, *_ = examples
    explanation = explain_images(network, images, classes=labels, grad="full")
    (maps,) = explanation.maps.values()
    inside = energy_pointing_game(upsample(relu(maps), (masks.shape[1], masks.shape[2])), masks)
    return cross_entropy(explanation.logits, labels) + PENALTY * (1 - inside)


def _logit_loss(network: Preprocessed, examples: Examples) -> PerImage:
    images, _, _, teacher_logits, _ = examples
    return soft_targets_kl(network(images), teacher_logits, TEMPERATURE)


def _logit_and_map_loss(network: Preprocessed, examples: Examples) -> PerImage:
    images, labels, _, teacher_logits, teacher_maps = examples
    explanation = explain_images(network, images, classes=labels, grad="full")
    (maps,) = explanation.maps.values()
    distance = map_distance(maps, teacher_maps)
    return soft_targets_kl(explanation.logits, teacher_logits, TEMPERATURE) + PENALTY * distance


LONGER = "as long with the bias"
LOGITS = "teacher's logits"
CURES: dict[str, Callable[[Preprocessed, Examples], PerImage]] = {
    LONGER: _label_loss,
    "balanced": _label_loss,
    "masks": _energy_loss,
    "teacher's logits and maps": _logit_and_map_loss,
    LOGITS: _logit_loss,
}
