"""The paper's ablations: ReLU, pooling of gradients, other backward rules (rows 23 to 25).

All on the network with fully connected layers, as on the paper's VGG-16: where pooling and a linear
layer follow, the gradient is the same at every cell and there is no ReLU to change.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.explain.gradcam import grad_cam, last_layer
from camdistill.explain.gradients import gradient_maps, pixel_pass, request
from camdistill.explain.guided import Rule, relus_changed
from camdistill.explain.maps import normalise, relu, upsample
from camdistill.measure.localisation import energy_pointing_game
from camdistill.studies.claims import backbones
from camdistill.studies.claims.located import (
    PAPER,
    best_threshold,
    box_error,
    choosing,
    made,
    tops,
)
from camdistill.studies.claims.rows import Lab, Measured, Row, drawn, gain, mean
from camdistill.types import Activations, Explain, Images, Labels, Maps, PerImage

OWN = "grad_cam"
AT_CHOSEN = "box error, Grad-CAM's threshold"
_Weights = Callable[[Activations], Tensor]


def plain(network: nn.Module, images: Images, classes: Labels) -> Maps:
    """Grad-CAM, raw, at the images' resolution."""
    (maps,) = grad_cam(network, images, None, classes).values()
    return _at_pixels(maps, images)


def pooled_by(weights: _Weights) -> Explain:
    """Grad-CAM with other weights of the units, made from the gradient at every cell."""

    def formula(activations: Activations, gradients: Activations) -> Maps:
        return torch.einsum("bk,bkhw->bhw", weights(gradients), activations)

    def explain(network: nn.Module, images: Images, classes: Labels) -> Maps:
        found = gradient_maps(network, images, None, classes, formula)
        (maps,) = found.values()
        return _at_pixels(maps, images)

    return explain


def ruled(rule: Rule) -> Explain:
    """Grad-CAM whose gradient goes through ReLUs by another rule."""

    def explain(network: nn.Module, images: Images, classes: Labels) -> Maps:
        layer = last_layer(network, images)
        ask = request(network, images, [layer], classes, score="logit")
        done = pixel_pass(ask)
        with relus_changed(ask, done, rule):
            gradients = done.gradients(0, [layer])
        assert gradients is not None, "the score is computed from the last layer"
        weights = gradients[layer].mean((2, 3))
        maps = torch.einsum("bk,bkhw->bhw", weights, done.activations(layer))
        return _at_pixels(maps.detach(), images)

    return explain


VARIANTS: dict[str, Explain] = {
    OWN: plain,
    "largest gradient": pooled_by(lambda gradients: gradients.amax((2, 3))),
    "|gradients|": pooled_by(lambda gradients: gradients.abs().mean((2, 3))),
    "guided ReLU": ruled("guided"),
    "deconvnet ReLU": ruled("deconvnet"),
}


def without_relu(lab: Lab) -> Row:
    """Row 23: the map's negative part is cut away, or not."""
    network = backbones.flattened(lab)
    scene, other = drawn(lab), choosing(lab)
    maps = made(plain, network, scene.images, tops(network, scene.images))
    before = made(plain, network, other.images, tops(network, other.images))
    masks = scene.masks["object"]
    ranges = {"with ReLU": normalise(relu(maps)), "without": normalise(maps)}
    earlier = {"with ReLU": normalise(relu(before)), "without": normalise(before)}
    own = {
        name: best_threshold(box_error, one, other.masks["object"], higher=False)
        for name, one in earlier.items()
    }
    chosen = own["with ReLU"]
    return judged_relu(
        lab,
        {
            AT_CHOSEN: {name: box_error(one, masks, chosen) for name, one in ranges.items()},
            f"the same, {PAPER:.0%}": {
                n: box_error(one, masks, PAPER) for n, one in ranges.items()
            },
            "the same, own threshold": {
                name: box_error(one, masks, own[name]) for name, one in ranges.items()
            },
            "share of the map in the object": {
                name: energy_pointing_game(one, masks) for name, one in ranges.items()
            },
        },
    )


def judged_relu(lab: Lab, found: dict[str, dict[str, PerImage]]) -> Row:
    """Row 23 of each measure with and without ReLU."""
    at_chosen = found[AT_CHOSEN]
    worse = gain("without - with", at_chosen["without"], at_chosen["with ReLU"], lab, "error more")
    return Row(
        number="23",
        claim="The ReLU makes maps better",
        paper="a higher box error without (appendix)",
        ours=(
            *(
                mean(name, one, lab, of)
                for of, table in found.items()
                for name, one in table.items()
            ),
            worse,
        ),
        criterion="without - with above 0 in box error, both maps scaled to their range and cut at "
        "the threshold that is best with the ReLU on other images",
        passed=worse.above,
        note="fully connected network; without the ReLU 0 is no longer the lowest value, so one "
        "threshold means two things",
    )


def pooling(lab: Lab) -> Row:
    """Row 24: gradients averaged over cells, or their largest."""
    return judged_pooling(lab, _errors(lab, (OWN, "largest gradient")))


def judged_pooling(lab: Lab, errors: dict[str, PerImage]) -> Row:
    """Row 24 of box errors."""
    more = gain(
        "largest gradient - mean",
        errors["largest gradient"],
        errors[OWN],
        lab,
        "box error more",
    )
    assert more.high is not None, "a mean over images has an interval"
    return Row(
        number="24",
        claim="The mean of the gradients is no worse than their largest",
        paper="a slightly lower box error with the mean (appendix)",
        ours=(*(mean(name, one, lab, AT_CHOSEN) for name, one in errors.items()), more),
        criterion="the interval of largest - mean, in box error, isn't wholly below 0",
        passed=more.high >= 0,
        note="a tie was expected",
    )


def backward_rules(lab: Lab) -> Row:
    """Row 25: other ways back through the network."""
    names = (OWN, "|gradients|", "guided ReLU", "deconvnet ReLU")
    return judged_rules(lab, _errors(lab, names))


def judged_rules(lab: Lab, errors: dict[str, PerImage]) -> Row:
    """Row 25 of box errors."""
    more: list[Measured] = [
        gain(f"{name} - {OWN}", one, errors[OWN], lab, "box error more")
        for name, one in errors.items()
        if name != OWN
    ]
    deconvnet = more[list(errors).index("deconvnet ReLU") - 1]
    return Row(
        number="25",
        claim="Of other backward rules, the deconvnet's spoils the map",
        paper="box errors of |gradients| and guided ReLU near Grad-CAM's, the deconvnet's far "
        "above (appendix)",
        ours=(*(mean(name, one, lab, AT_CHOSEN) for name, one in errors.items()), *more),
        criterion=f"deconvnet ReLU - {OWN} above 0 in box error; the others are only told",
        passed=deconvnet.above,
        note="fully connected network: its head has the one ReLU that a rule can change",
    )


def _errors(lab: Lab, names: tuple[str, ...]) -> dict[str, PerImage]:
    """Box errors of variants, all at the threshold that is best for Grad-CAM on other images."""
    network = backbones.flattened(lab)
    scene, other = drawn(lab), choosing(lab)
    before = made(plain, network, other.images, tops(network, other.images))
    chosen = best_threshold(box_error, before, other.masks["object"], higher=False)
    classes = tops(network, scene.images)
    return {
        name: box_error(
            made(VARIANTS[name], network, scene.images, classes), scene.masks["object"], chosen
        )
        for name in names
    }


def _at_pixels(maps: Float[Tensor, "batch rows columns"], images: Images) -> Maps:
    return upsample(maps, (images.shape[-2], images.shape[-1]))
