"""Row 16: a network that learnt a shortcut is found out by its maps, and cured.

The shortcut is a coloured patch that agrees with the label in a share rho of the training images.
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

from camdistill.claims.claim import Drawn, Lab, Measured, Row, drawn, mean, trained_gain
from camdistill.claims.networks.claim_training import trained
from camdistill.claims.networks.small_networks import Examples, Recipe, fitted
from camdistill.claims.two_object_scenes import drawn_lessons, taught
from camdistill.data.modules import ShapesData
from camdistill.distill.classifier import Classifier
from camdistill.distill.losses import cross_entropy, map_distance, soft_targets_kl
from camdistill.distill.optimization import Optimisation
from camdistill.explain.gradcam import explain, grad_cam
from camdistill.explain.maps import relu, upsample
from camdistill.measure.localization import energy_lift, energy_pointing_game
from camdistill.networks.teachers import NetworkSpec, Preprocessed
from camdistill.networks.weights import weights_digest
from camdistill.perturb.batched_forward import logits_of
from camdistill.types import PerImage

DIAL = (0.0, 0.5, 0.9, 1.0)
BIASED = 0.9  # of the networks that are cured
SEEDS = 3
TRAIN, EPOCHS = 6000, 8
CURE = Recipe(4, optimisation=Optimisation("adamw", lr=2e-3, weight_decay=0.05))
PENALTY, TEMPERATURE = 2.0, 2.0  # of the energy and map losses; of the logits' distillation
ACCURACY, ON_PATCH, ON_OBJECT = (
    "accuracy where the patch disagrees",
    "map's energy on the patch, over its area",
    "map's energy on the object, over its area",
)


class Seen(NamedTuple):
    """What networks do where the patch disagrees with the label; one row a network.

    Attributes:
        right: Whether the answer is the label.
        on_patch: Energy of the answer's map on the patch, over its area.
        on_object: Likewise.
    """

    right: Float[Tensor, "networks n"]
    on_patch: Float[Tensor, "networks n"]
    on_object: Float[Tensor, "networks n"]


def shortcut_network(lab: Lab, rho: float, seed: int, *, epochs: int | None = None) -> Preprocessed:
    """A little classifier of images whose patch agrees with the label in a share rho of them."""
    module = Classifier(
        NetworkSpec("shallow_cnn", args={"channels": [24, 48, 64, 64], "strides": [1, 2, 2, 1]}),
        optimisation=Optimisation("adamw", lr=8e-3, weight_decay=0.05),
        seed=seed,
    )
    data = ShapesData(
        train=TRAIN, val=1, test=1, shortcut=rho, seed=seed, split_seed=lab.shapes.seed
    )
    return trained(lab, f"shortcut-{rho:g}", module, data, epochs=epochs or EPOCHS)


def conflicting(lab: Lab) -> Drawn:
    """Held-out images whose patch never agrees with the label."""
    return drawn(lab, dataclasses.replace(lab.shapes, split="conflict", shortcut=BIASED))


def seen_through(network: Preprocessed, found: Drawn) -> Seen:
    """Of one network."""
    (maps,) = grad_cam(network, found.images).values()
    maps = upsample(relu(maps), (found.images.shape[-2], found.images.shape[-1]))
    right = logits_of(network, found.images).argmax(1) == found.labels
    return Seen(
        right.float()[None],
        energy_lift(maps, found.masks["shortcut"])[None],
        energy_lift(maps, found.masks["object"])[None],
    )


def bias_found_and_removed(lab: Lab) -> Row:
    """Row 16: maps show that a network goes by a shortcut; each of three cures moves both."""
    found = conflicting(lab)
    dial = {
        f"rho {rho:g}": _all_seen(lab, found, partial(shortcut_network, lab, rho)) for rho in DIAL
    }
    cures = {name: _all_seen(lab, found, partial(cured, lab, name)) for name in CURES}
    moved = _moved(lab, dial[f"rho {BIASED:g}"], dial["rho 0"], f"rho {BIASED:g} - rho 0")
    biased, better = moved[0].high or 0, moved[1]
    cure = {
        name: _moved(lab, seen, cures[LONGER], f"{name} - {LONGER}")
        for name, seen in cures.items()
        if name != LONGER
    }
    promised = [name for name in cure if name != LOGITS]
    return Row(
        number="16",
        claim="Grad-CAM shows that a network goes by a bias of its data; without the bias its maps "
        "move to the object and it generalises",
        paper="doctor or nurse: accuracy 0.82 of the biased network, 0.90 after balancing",
        ours=(
            *_told(lab, dial | cures),
            *moved,
            *(one for measured in cure.values() for one in measured),
        ),
        criterion=f"rho {BIASED:g} against rho 0: accuracy lower, energy on the patch higher; and "
        f"{', '.join(promised)}, each against training on as long with the bias: accuracy higher, "
        "energy on the patch lower (paired differences, whole intervals)",
        passed=biased < 0
        and better.above
        and all(cure[name][0].above and (cure[name][1].high or 0) < 0 for name in promised),
        note=f"means over {SEEDS} networks each; intervals of differences are over networks and "
        "images, the others over images. rho is the share of training images whose patch agrees "
        f"with the label (rho 0 has none). Cures go on for {CURE.epochs} epochs from the network "
        f"of rho {BIASED:g}: balanced has the patch by chance; the others keep the bias, and teach "
        "the true class's map to lie on the object's mask, or the logits of the shipped teacher, "
        "which never saw a patch, with its maps or without. Its logits alone are nearly the "
        "labels, and no cure was expected of them",
    )


def _all_seen(lab: Lab, found: Drawn, network: Callable[[int], Preprocessed]) -> Seen:
    """Of the networks of all seeds."""
    each = [seen_through(network(lab.seed + place), found) for place in range(SEEDS)]
    return Seen(*(torch.cat(values) for values in zip(*each, strict=True)))


def _told(lab: Lab, seen: dict[str, Seen]) -> list[Measured]:
    return [
        mean(name, getattr(one, field).mean(0), lab, of)
        for field, of in zip(Seen._fields, (ACCURACY, ON_PATCH, ON_OBJECT), strict=True)
        for name, one in seen.items()
    ]


def _moved(lab: Lab, first: Seen, second: Seen, name: str) -> tuple[Measured, Measured]:
    """Differences of the accuracy and of the energy on the patch."""
    return (
        trained_gain(name, list(first.right), list(second.right), lab, ACCURACY),
        trained_gain(name, list(first.on_patch), list(second.on_patch), lab, ON_PATCH),
    )


def cured(lab: Lab, name: str, seed: int) -> Preprocessed:
    """A biased network, trained on by one of `CURES`."""
    biased = shortcut_network(lab, BIASED, seed)
    rho = 1 / lab.shapes.classes if name == "balanced" else BIASED
    shapes = taught(lab, TRAIN, shortcut=rho)

    def examples() -> Examples:
        found = drawn_lessons(lab, shapes)
        known = explain(lab.teacher, found.images, classes=found.labels)
        (maps,) = known.maps.values()
        return found.images, found.labels, found.masks["object"], known.logits, maps

    return fitted(
        lab,
        "cured-" + re.sub("[^a-z]+", "-", name),
        lambda: copy.deepcopy(biased).requires_grad_(True),
        examples,
        CURES[name],
        recipe=CURE,
        settings={
            "shapes": shapes.fingerprint,
            "from": weights_digest(biased),
            "teacher": weights_digest(lab.teacher),
            "penalty": PENALTY,
            "temperature": TEMPERATURE,
        },
        seed=seed,
    )


def _labels_alone(network: Preprocessed, examples: Examples) -> PerImage:
    images, labels, *_ = examples
    return cross_entropy(network(images), labels)


def _on_the_object(network: Preprocessed, examples: Examples) -> PerImage:
    """The energy loss of Rao et al. 2023, https://arxiv.org/abs/2303.11932, through Grad-CAM."""
    images, labels, masks, *_ = examples
    done = explain(network, images, classes=labels, grad="full")
    (maps,) = done.maps.values()
    inside = energy_pointing_game(upsample(relu(maps), (masks.shape[1], masks.shape[2])), masks)
    return cross_entropy(done.logits, labels) + PENALTY * (1 - inside)


def _logits_of_the_teacher(network: Preprocessed, examples: Examples) -> PerImage:
    images, _, _, answers, _ = examples
    return soft_targets_kl(network(images), answers, TEMPERATURE)


def _logits_and_maps_of_the_teacher(network: Preprocessed, examples: Examples) -> PerImage:
    images, labels, _, answers, shown = examples
    done = explain(network, images, classes=labels, grad="full")
    (maps,) = done.maps.values()
    near = map_distance(maps, shown)
    return soft_targets_kl(done.logits, answers, TEMPERATURE) + PENALTY * near


LONGER = "as long with the bias"
LOGITS = "teacher's logits"
CURES: dict[str, Callable[[Preprocessed, Examples], PerImage]] = {
    LONGER: _labels_alone,
    "balanced": _labels_alone,
    "masks": _on_the_object,
    "teacher's logits and maps": _logits_and_maps_of_the_teacher,
    LOGITS: _logits_of_the_teacher,
}
