"""Row 13: maps of the negated gradient show what speaks against a class."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.claims.claim import Lab, Row, gain, mean
from camdistill.claims.two_object_scenes import held_out, rendered
from camdistill.explain.methods import at_image
from camdistill.measure.localization import energy_pointing_game
from camdistill.perturb.batched_forward import logits_of
from camdistill.perturb.imputers import blurred
from camdistill.perturb.ranks import first_pixels, ranks
from camdistill.types import Images, Labels, Maps, PerImage

REMOVED = 0.15  # of the image: two objects' worth
ENERGY, RISE = "energy on the other object", "rise of the class's probability"


def counterfactuals(lab: Lab) -> Row:
    """Row 13: maps of -dS/dA of one object's class cover the other; without it p rises."""
    scenes = held_out(lab)
    images, first, other = scenes.images, scenes.classes[:, 0], scenes.masks[:, 1]
    maps = {
        name: at_image(name)(lab.teacher, images, first) for name in ("counterfactual", "grad_cam")
    }
    on_other = {name: energy_pointing_game(one, other) for name, one in maps.items()}
    covers = gain(
        "counterfactual - grad_cam", on_other["counterfactual"], on_other["grad_cam"], lab, ENERGY
    )
    rises = {
        name: removal_gain(lab.teacher, images, first, one, lab.generator(f"removal {name}"))
        for name, one in (
            ("counterfactual", maps["counterfactual"]),
            ("random", torch.zeros_like(images[:, 0])),
        )
    }
    alone = rendered(lab, dataclasses.replace(lab.shapes, objects=2), ["second"])
    rises["the other object, drawn without it"] = _gained(lab.teacher, images, alone, first)
    removes = gain("counterfactual - random", rises["counterfactual"], rises["random"], lab, RISE)
    return Row(
        number="13",
        claim="Counterfactual maps, of the negated gradient, show the regions whose removal would "
        "make the network surer of a class",
        paper="pictures alone (figure 3)",
        ours=(
            *(mean(name, values, lab, ENERGY) for name, values in on_other.items()),
            covers,
            *(mean(name, values, lab, RISE) for name, values in rises.items()),
            removes,
        ),
        criterion="of two objects, the counterfactual of the one's class has more of its energy on "
        "the other than Grad-CAM has, and blurring its first "
        f"{REMOVED:.0%} of the pixels raises the class's probability more than blurring as many "
        "random ones: both differences above 0, whole intervals",
        passed=covers.above and removes.above,
        note="where the probability is near 1 already it can't rise, so its means are small beside "
        "what drawing the image without the other object gives",
    )


def removal_gain(
    network: nn.Module, images: Images, classes: Labels, maps: Maps, generator: torch.Generator
) -> PerImage:
    """How much a class's probability rises when the map's first pixels are blurred."""
    count = round(REMOVED * images[0, 0].numel())
    taken = first_pixels(ranks(maps, generator), [count])
    return _gained(network, images, torch.where(taken, blurred(images), images), classes)


def _gained(
    network: nn.Module, images: Images, others: Images, classes: Labels
) -> Float[Tensor, "n"]:
    before, after = (
        logits_of(network, one).softmax(1).gather(1, classes[:, None])[:, 0]
        for one in (images, others)
    )
    return after - before
