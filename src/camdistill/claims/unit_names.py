"""Row 17: the units that speak most for a class have names, and the names are its shape's."""

import dataclasses

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from camdistill.claims.claim import Lab, Row, drawn, exact, gain, mean
from camdistill.data.concepts import shape_concepts
from camdistill.explain.gradcam import last_layer
from camdistill.explain.gradients import pixel_pass, request
from camdistill.layers.units.dissection import DETECTOR, Dissection, dissect

IMAGES = 1500  # dissected; not those whose maps are told
TOP = 5


def textual(lab: Lab) -> Row:
    """Row 17: of each image's class, the names of its top and bottom units by alpha."""
    found = dissection(lab)
    alphas, labels = _alphas(lab)
    names = named(found, lab.shapes.class_names)
    shares = precisions(alphas, labels, names)
    above = gain(f"top {TOP} - random", shares["top"], shares["random"], lab, PRECISION)
    below = gain(f"top {TOP} - bottom {TOP}", shares["top"], shares["bottom"], lab, PRECISION)
    nameless = int((names < 0).sum())
    return Row(
        number="17",
        claim="The names of the units with the largest alpha say in words why a class is chosen",
        paper="examples alone (figure 5): names by network dissection, IoU above 0.05",
        ours=(
            mean(f"top {TOP}", shares["top"], lab, PRECISION),
            mean(f"bottom {TOP}", shares["bottom"], lab, PRECISION),
            mean("random", shares["random"], lab, PRECISION),
            above,
            below,
            exact("units with a shape's name", len(names) - nameless, len(names), "units"),
        ),
        criterion=f"the share of the {TOP} units of largest alpha that are named after the image's "
        "own class is above that of random units, and of the bottom ones (whole intervals)",
        passed=above.above and below.above,
        note=f"the last layer's {len(names)} units, dissected on {IMAGES} images of their own; a "
        "unit is named after the class whose objects it covers most above chance, if its IoU is "
        f"{DETECTOR} or more. {_sentence(lab, alphas, labels, names)}",
    )


PRECISION = f"share of {TOP} units that are named after the class"


def dissection(lab: Lab) -> Dissection:
    """The last layer's units on images of one object that are not held out."""
    shapes = dataclasses.replace(lab.shapes, split="val", length=IMAGES)
    ids = np.arange(IMAGES, dtype=np.int64)
    concepts = {
        name: torch.from_numpy(mask).to(lab.device)
        for name, mask in shape_concepts(shapes, ids).items()
        if name in shapes.class_names
    }
    images = drawn(dataclasses.replace(lab, ids=ids), shapes).images
    layer = last_layer(lab.teacher, images[:1])
    return dissect(lab.teacher, images, concepts, [layer])[layer]


def named(found: Dissection, classes: tuple[str, ...]) -> Int[Tensor, "units"]:
    """The class that each unit is named after; -1 where its IoU is too small for a name."""
    order = torch.tensor([classes.index(name) for name in found.concepts])
    iou = found.iou.cpu()
    best = (iou - found.chance.cpu()).argmax(1)
    told = iou.gather(1, best[:, None])[:, 0] >= DETECTOR
    return torch.where(told, order[best], -1)


def precisions(
    alphas: Float[Tensor, "n units"], labels: Int[Tensor, "n"], names: Int[Tensor, "units"]
) -> dict[str, Float[Tensor, "n"]]:
    """Share of the units with the largest and smallest alpha, and of all, named after the label."""
    own = names == labels[:, None]
    order = alphas.argsort(dim=1, descending=True)
    return {
        "top": own.gather(1, order[:, :TOP]).float().mean(1),
        "bottom": own.gather(1, order[:, -TOP:]).float().mean(1),
        "random": own.float().mean(1),
    }


def _alphas(lab: Lab) -> tuple[Float[Tensor, "n units"], Int[Tensor, "n"]]:
    """Of each image's true class, by autograd."""
    found = drawn(lab)
    layer = last_layer(lab.teacher, found.images[:1])
    done = pixel_pass(request(lab.teacher, found.images, [layer], found.labels, score="logit"))
    gradients = done.gradients(0, [layer])
    assert gradients is not None, "the score is computed from the last layer"
    return gradients[layer].mean((2, 3)).cpu(), found.labels.cpu()


def _sentence(
    lab: Lab,
    alphas: Float[Tensor, "n units"],
    labels: Int[Tensor, "n"],
    names: Int[Tensor, "units"],
) -> str:
    classes = lab.shapes.class_names
    order = alphas[0].argsort(descending=True)
    words = [
        [classes[name] if (name := int(names[u])) >= 0 else "-" for u in some]
        for some in (order[:TOP], order[-TOP:])
    ]
    return (
        f"The first image is a {classes[int(labels[0])]}: units named {', '.join(words[0])} speak "
        f"for it, {', '.join(words[1])} against"
    )
