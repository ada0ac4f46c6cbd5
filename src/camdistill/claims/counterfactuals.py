"""Row 13: maps of the negated gradient show what speaks against a class."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.claims.claim import ClaimResult, ClaimSetup, gain, mean
from camdistill.claims.two_object_scenes import draw_test_scenes, render_without
from camdistill.explain.methods import image_explainer
from camdistill.measure.localization import energy_pointing_game
from camdistill.perturb.batched_forward import logits_of
from camdistill.perturb.imputers import gaussian_blur
from camdistill.perturb.ranks import first_pixels, ranks
from camdistill.types import Images, Labels, Maps, PerImage

REMOVED = 0.15  # of the image: two objects' worth
ENERGY, RISE = "energy on the other object", "rise of the class's probability"


def run_counterfactuals(setup: ClaimSetup) -> ClaimResult:
    """Row 13: maps of -dS/dA of one object's class cover the other; without it p rises."""
    scenes = draw_test_scenes(setup)
    images, first, other_masks = scenes.images, scenes.classes[:, 0], scenes.masks[:, 1]
    maps = {
        name: image_explainer(name)(setup.teacher, images, first)
        for name in ("counterfactual", "grad_cam")
    }
    on_other = {
        name: energy_pointing_game(method_maps, other_masks) for name, method_maps in maps.items()
    }
    energy_gain = gain(
        "counterfactual - grad_cam", on_other["counterfactual"], on_other["grad_cam"], setup, ENERGY
    )
    gain_by_method = {
        name: removal_gain(
            setup.teacher, images, first, method_maps, setup.generator(f"removal {name}")
        )
        for name, method_maps in (
            ("counterfactual", maps["counterfactual"]),
            ("random", torch.zeros_like(images[:, 0])),
        )
    }
    images_without = render_without(setup, dataclasses.replace(setup.shapes, objects=2), ["second"])
    gain_by_method["the other object, drawn without it"] = _probability_gain(
        setup.teacher, images, images_without, first
    )
    removal_difference = gain(
        "counterfactual - random",
        gain_by_method["counterfactual"],
        gain_by_method["random"],
        setup,
        RISE,
    )
    return ClaimResult(
        number="13",
        claim="Counterfactual maps, of the negated gradient, show the regions whose removal would "
        "make the network surer of a class",
        paper="pictures alone (figure 3)",
        ours=(
            *(mean(name, values, setup, ENERGY) for name, values in on_other.items()),
            energy_gain,
            *(mean(name, values, setup, RISE) for name, values in gain_by_method.items()),
            removal_difference,
        ),
        criterion="of two objects, the counterfactual of the one's class has more of its energy on "
        "the other than Grad-CAM has, and blurring its first "
        f"{REMOVED:.0%} of the pixels raises the class's probability more than blurring as many "
        "random ones: both differences above 0, whole intervals",
        passed=energy_gain.above_zero and removal_difference.above_zero,
        note="where the probability is near 1 already it can't rise, so its means are small beside "
        "what drawing the image without the other object gives",
    )


def removal_gain(
    network: nn.Module, images: Images, classes: Labels, maps: Maps, generator: torch.Generator
) -> PerImage:
    """How much a class's probability rises when the map's first pixels are blurred."""
    count = round(REMOVED * images[0, 0].numel())
    removed = first_pixels(ranks(maps, generator), [count])
    return _probability_gain(
        network, images, torch.where(removed, gaussian_blur(images), images), classes
    )


def _probability_gain(
    network: nn.Module, images: Images, changed_images: Images, classes: Labels
) -> Float[Tensor, "n"]:
    before, after = (
        logits_of(network, inputs).softmax(1).gather(1, classes[:, None])[:, 0]
        for inputs in (images, changed_images)
    )
    return after - before
