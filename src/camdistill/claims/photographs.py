"""Boxes in photographs, of a network that is trained on them for a minute (row 5c)."""

import torch

from camdistill.claims.claim import ClaimResult, ClaimSetup, gain, mean
from camdistill.claims.localization import AT_PAPER_THRESHOLD, COMPARED
from camdistill.claims.localization_maps import (
    PAPER_THRESHOLD,
    RANDOM,
    explain_in_batches,
    top_classes,
)
from camdistill.claims.networks.claim_training import train_or_load
from camdistill.data.modules import FolderData
from camdistill.data.views import Augment
from camdistill.distill.classifier import Classifier
from camdistill.distill.optimization import Optimization
from camdistill.distill.training import as_images
from camdistill.errors import UserError
from camdistill.explain.maps import relu
from camdistill.explain.methods import image_explainer
from camdistill.measure.boxes import localization_error
from camdistill.measure.controls import random_maps
from camdistill.networks.teachers import NetworkSpec, Preprocessed
from camdistill.types import PerImage

SIDE, EPOCHS = 64, 15
WHOLE = "whole image"


def run_photograph_boxes(setup: ClaimSetup) -> ClaimResult:
    """Row 5c: the paper's boxes where objects fill much of the image."""
    if setup.boxes is None:
        raise UserError("row 5c is about photographs: name an image folder that has a boxes.csv "
                        "with --boxes FOLDER")  # fmt: skip
    data = FolderData(setup.boxes, size=SIDE, seed=setup.seed)
    data.prepare_data()
    data.setup("test")
    images = data.test_set
    assert images is not None, "setup made it"
    if images.boxes is None or not images.labeled:
        raise UserError(
            f"the test images of {setup.boxes} have no boxes, or no classes: row 5c takes class "
            "folders with a boxes.csv beside them"
        )
    network = _train_on_photographs(setup, data, len(images.classes))
    rows = torch.randperm(len(images), generator=setup.generator("photographs"))[: setup.count]
    batch = images.batch(rows.sort().values.numpy())
    pixels = as_images(batch.pixels.to(setup.device))
    labels = batch.labels.to(setup.device)
    boxes = torch.from_numpy(images.boxes[rows.sort().values.numpy()]).to(setup.device)
    classes = top_classes(network, pixels)
    maps = {
        method: random_maps(pixels, setup.generator("random maps"))
        if method == RANDOM
        else relu(explain_in_batches(image_explainer(method), network, pixels, classes))
        for method in COMPARED
    }
    maps[WHOLE] = torch.ones_like(maps[RANDOM])
    correct = classes == labels
    return judge_photographs(
        setup,
        correct.double(),
        {
            name: localization_error(method_maps, boxes, PAPER_THRESHOLD, correct)
            for name, method_maps in maps.items()
        },
        {
            name: localization_error(method_maps, boxes, PAPER_THRESHOLD)
            for name, method_maps in maps.items()
        },
    )


def judge_photographs(
    setup: ClaimSetup, correct: PerImage, top1: dict[str, PerImage], box_errors: dict[str, PerImage]
) -> ClaimResult:
    """Row 5c of what was classified, top-1 errors, and errors of the box alone."""
    differences = [
        gain(f"{other} - grad_cam", top1[other], top1["grad_cam"], setup, "error more")
        for other in ("gradient", WHOLE)
    ]
    return ClaimResult(
        number="5c",
        claim="Grad-CAM's boxes are better than the gradient's (photographs)",
        paper="VGG-16, ILSVRC-15: top-1 error 56.51 %",
        ours=(
            mean("top-1", correct, setup, "accuracy"),
            *(mean(name, errors, setup, AT_PAPER_THRESHOLD) for name, errors in top1.items()),
            *differences,
            *(mean(name, errors, setup, "box error alone") for name, errors in box_errors.items()),
        ),
        criterion="the errors of the gradient and of a box around the whole image are above "
        "grad_cam's, both paired intervals above 0",
        passed=all(difference.above_zero for difference in differences),
        note=f"a shallow network of {SIDE} pixels, trained for {EPOCHS} epochs; maps of its own "
        "top class; a random map's box is the whole image, which is right of most photographs",
    )


def _train_on_photographs(setup: ClaimSetup, data: FolderData, classes: int) -> Preprocessed:
    args: dict[str, bool | int | float | str | list[int] | list[float] | list[str] | None] = {
        "classes": classes,
        "channels": [32, 64, 96, 128, 128],
        "strides": [2, 1, 2, 2, 1],
        "residual": True,
    }
    module = Classifier(
        NetworkSpec("shallow_cnn", args=args),
        augment=Augment(crop="pad", padding=6, flip=True),
        optimization=Optimization(lr=0.2),
        seed=setup.seed,
    )
    return train_or_load(setup, "photographs", module, data, epochs=EPOCHS)
