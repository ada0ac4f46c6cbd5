"""Boxes in photographs, of a network that is trained on them for a minute (row 5c)."""

import torch

from camdistill.claims.claim import Lab, Row, gain, mean
from camdistill.claims.localization import AT_PAPERS, COMPARED
from camdistill.claims.localization_maps import PAPER, RANDOM, made, tops
from camdistill.claims.networks.claim_training import trained
from camdistill.data.modules import FolderData
from camdistill.data.views import Augment
from camdistill.distill.classifier import Classifier
from camdistill.distill.optimization import Optimisation
from camdistill.distill.training import as_images
from camdistill.errors import UserError
from camdistill.explain.maps import relu
from camdistill.explain.methods import at_image
from camdistill.measure.boxes import localisation_error
from camdistill.measure.controls import random_maps
from camdistill.networks.teachers import NetworkSpec, Preprocessed
from camdistill.types import PerImage

SIDE, EPOCHS = 64, 15
WHOLE = "whole image"


def boxes_in_photographs(lab: Lab) -> Row:
    """Row 5c: the paper's boxes where objects fill much of the image."""
    if lab.boxes is None:
        raise UserError("row 5c is about photographs: name an image folder that has a boxes.csv "
                        "with --boxes FOLDER")  # fmt: skip
    data = FolderData(lab.boxes, size=SIDE, seed=lab.seed)
    data.prepare_data()
    data.setup("test")
    images = data.test_set
    assert images is not None, "setup made it"
    if images.boxes is None or not images.labelled:
        raise UserError(
            f"the test images of {lab.boxes} have no boxes, or no classes: row 5c takes class "
            "folders with a boxes.csv beside them"
        )
    network = _network(lab, data, len(images.classes))
    rows = torch.randperm(len(images), generator=lab.generator("photographs"))[: lab.count]
    batch = images.batch(rows.sort().values.numpy())
    pixels = as_images(batch.pixels.to(lab.device))
    labels = batch.labels.to(lab.device)
    boxes = torch.from_numpy(images.boxes[rows.sort().values.numpy()]).to(lab.device)
    classes = tops(network, pixels)
    maps = {
        method: random_maps(pixels, lab.generator("random maps"))
        if method == RANDOM
        else relu(made(at_image(method), network, pixels, classes))
        for method in COMPARED
    }
    maps[WHOLE] = torch.ones_like(maps[RANDOM])
    right = classes == labels
    return judged_photographs(
        lab,
        right.double(),
        {name: localisation_error(one, boxes, PAPER, right) for name, one in maps.items()},
        {name: localisation_error(one, boxes, PAPER) for name, one in maps.items()},
    )


def judged_photographs(
    lab: Lab, right: PerImage, top1: dict[str, PerImage], alone: dict[str, PerImage]
) -> Row:
    """Row 5c of what was classified, top-1 errors, and errors of the box alone."""
    steps = [
        gain(f"{other} - grad_cam", top1[other], top1["grad_cam"], lab, "error more")
        for other in ("gradient", WHOLE)
    ]
    return Row(
        number="5c",
        claim="Grad-CAM's boxes are better than the gradient's (photographs)",
        paper="VGG-16, ILSVRC-15: top-1 error 56.51 %",
        ours=(
            mean("top-1", right, lab, "accuracy"),
            *(mean(name, one, lab, AT_PAPERS) for name, one in top1.items()),
            *steps,
            *(mean(name, one, lab, "box error alone") for name, one in alone.items()),
        ),
        criterion="the errors of the gradient and of a box around the whole image are above "
        "grad_cam's, both paired intervals above 0",
        passed=all(step.above for step in steps),
        note=f"a shallow network of {SIDE} pixels, trained for {EPOCHS} epochs; maps of its own "
        "top class; a random map's box is the whole image, which is right of most photographs",
    )


def _network(lab: Lab, data: FolderData, classes: int) -> Preprocessed:
    args: dict[str, bool | int | float | str | list[int] | list[float] | list[str] | None] = {
        "classes": classes,
        "channels": [32, 64, 96, 128, 128],
        "strides": [2, 1, 2, 2, 1],
        "residual": True,
    }
    module = Classifier(
        NetworkSpec("shallow_cnn", args=args),
        augment=Augment(crop="pad", padding=6, flip=True),
        optimisation=Optimisation(lr=0.2),
        seed=lab.seed,
    )
    return trained(lab, "photographs", module, data, epochs=EPOCHS)
