"""Row 17: the units that speak most for a class have names, and the names are its shape's."""

import dataclasses

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from camdistill.claims.claim import ClaimResult, ClaimSetup, draw_batch, exact_number, gain, mean
from camdistill.data.concepts import shape_concepts
from camdistill.explain.gradcam import last_layer
from camdistill.explain.gradients import build_request, pixel_pass
from camdistill.layers.units.dissection import DETECTOR, Dissection, dissect

IMAGES = 1500  # dissected; not those whose maps are told
TOP = 5


def run_unit_naming(setup: ClaimSetup) -> ClaimResult:
    """Row 17: of each image's class, the names of its top and bottom units by alpha."""
    unit_concepts = dissect_last_layer(setup)
    alphas, labels = _alphas(setup)
    names = name_units(unit_concepts, setup.shapes.class_names)
    shares = precisions(alphas, labels, names)
    random_gain = gain(f"top {TOP} - random", shares["top"], shares["random"], setup, PRECISION)
    bottom_gain = gain(
        f"top {TOP} - bottom {TOP}", shares["top"], shares["bottom"], setup, PRECISION
    )
    nameless = int((names < 0).sum())
    return ClaimResult(
        number="17",
        claim="The names of the units with the largest alpha say in words why a class is chosen",
        paper="examples alone (figure 5): names by network dissection, IoU above 0.05",
        ours=(
            mean(f"top {TOP}", shares["top"], setup, PRECISION),
            mean(f"bottom {TOP}", shares["bottom"], setup, PRECISION),
            mean("random", shares["random"], setup, PRECISION),
            random_gain,
            bottom_gain,
            exact_number("units with a shape's name", len(names) - nameless, len(names), "units"),
        ),
        criterion=f"the share of the {TOP} units of largest alpha that are named after the image's "
        "own class is above that of random units, and of the bottom ones (whole intervals)",
        passed=random_gain.above_zero and bottom_gain.above_zero,
        note=f"the last layer's {len(names)} units, dissected on {IMAGES} images of their own; a "
        "unit is named after the class whose objects it covers most above chance, if its IoU is "
        f"{DETECTOR} or more. {_sentence(setup, alphas, labels, names)}",
    )


PRECISION = f"share of {TOP} units that are named after the class"


def dissect_last_layer(setup: ClaimSetup) -> Dissection:
    """The last layer's units on images of one object that are not held out."""
    shapes = dataclasses.replace(setup.shapes, split="val", length=IMAGES)
    ids = np.arange(IMAGES, dtype=np.int64)
    concepts = {
        name: torch.from_numpy(mask).to(setup.device)
        for name, mask in shape_concepts(shapes, ids).items()
        if name in shapes.class_names
    }
    images = draw_batch(dataclasses.replace(setup, ids=ids), shapes).images
    layer = last_layer(setup.teacher, images[:1])
    return dissect(setup.teacher, images, concepts, [layer])[layer]


def name_units(unit_concepts: Dissection, classes: tuple[str, ...]) -> Int[Tensor, "units"]:
    """The class that each unit is named after; -1 where its IoU is too small for a name."""
    order = torch.tensor([classes.index(name) for name in unit_concepts.concepts])
    iou = unit_concepts.iou.cpu()
    best = (iou - unit_concepts.chance.cpu()).argmax(1)
    is_named = iou.gather(1, best[:, None])[:, 0] >= DETECTOR
    return torch.where(is_named, order[best], -1)


def precisions(
    alphas: Float[Tensor, "n units"], labels: Int[Tensor, "n"], names: Int[Tensor, "units"]
) -> dict[str, Float[Tensor, "n"]]:
    """Share of the units with the largest and smallest alpha, and of all, named after the label."""
    matches = names == labels[:, None]
    order = alphas.argsort(dim=1, descending=True)
    return {
        "top": matches.gather(1, order[:, :TOP]).float().mean(1),
        "bottom": matches.gather(1, order[:, -TOP:]).float().mean(1),
        "random": matches.float().mean(1),
    }


def _alphas(setup: ClaimSetup) -> tuple[Float[Tensor, "n units"], Int[Tensor, "n"]]:
    """Of each image's true class, by autograd."""
    batch = draw_batch(setup)
    layer = last_layer(setup.teacher, batch.images[:1])
    recorded = pixel_pass(
        build_request(setup.teacher, batch.images, [layer], batch.labels, score="logit")
    )
    gradients = recorded.gradients(0, [layer])
    assert gradients is not None, "the score is computed from the last layer"
    return gradients[layer].mean((2, 3)).cpu(), batch.labels.cpu()


def _sentence(
    setup: ClaimSetup,
    alphas: Float[Tensor, "n units"],
    labels: Int[Tensor, "n"],
    names: Int[Tensor, "units"],
) -> str:
    classes = setup.shapes.class_names
    order = alphas[0].argsort(descending=True)
    words = [
        [classes[name] if (name := int(names[u])) >= 0 else "-" for u in units]
        for units in (order[:TOP], order[-TOP:])
    ]
    return (
        f"The first image is a {classes[int(labels[0])]}: units named {', '.join(words[0])} speak "
        f"for it, {', '.join(words[1])} against"
    )
