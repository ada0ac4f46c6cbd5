"""Any head will do, and CAM's costs accuracy (rows 2 and 6)."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.claims.claim import (
    ClaimResult,
    ClaimSetup,
    draw_batch,
    exact_number,
    gain_over_trainings,
    mean,
)
from camdistill.claims.localization_maps import box_error, score_at_best_threshold, top_classes
from camdistill.claims.networks import backbones
from camdistill.errors import UserError
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.variants import cam
from camdistill.networks.heads import find_head
from camdistill.networks.teachers import NetworkSpec, Preprocessed, build_preprocessed
from camdistill.types import Images, PerImage

Correctness = Float[Tensor, "tested"]
BOXES = "box error more"
TESTED = 2000  # images for accuracies near 1; drawing and one forward cost little


def run_any_head(setup: ClaimSetup) -> ClaimResult:
    """Row 2: the same call explains networks with other heads, and leaves them as they are."""
    networks: dict[str, nn.Module] = {
        "pooling": setup.teacher,
        "fully connected": backbones.fully_connected_network(setup),
        "transformer": _transformer(setup),
    }
    images = draw_batch(setup).images[:32]
    ours = [
        exact_number(
            name, float(_is_explainable(network, images)), len(images), "explained by Grad-CAM"
        )
        for name, network in networks.items()
    ]
    has_cam = [
        exact_number(name, float(_has_cam(network, images)), len(images), "has a CAM")
        for name, network in networks.items()
    ]
    return ClaimResult(
        number="2",
        claim="Grad-CAM needs no other architecture and no new training",
        paper="no number",
        ours=(*ours, *has_cam),
        criterion="in all three networks one call gives a finite map, constant in no image, and "
        "logits and weights are the same bit for bit afterwards",
        passed=all(measurement.value == 1 for measurement in ours),
        note="1 is yes; the transformer is a ViT of 2 layers with random weights",
    )


def _transformer(setup: ClaimSetup) -> Preprocessed:
    args: dict[str, int | float | str | list[int] | list[float] | list[str] | None] = {
        "image_size": setup.shapes.size,
        "patch_size": 4,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 32,
        "mlp_dim": 64,
        "num_classes": setup.shapes.classes,
    }
    spec = NetworkSpec("torchvision.models.VisionTransformer", args=args)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.seed)
        network = build_preprocessed(spec)
        nn.init.normal_(find_head(network.network)[1].weight)  # torchvision's start is 0
    return network.eval().requires_grad_(False).to(setup.device)


def _is_explainable(network: nn.Module, images: Images) -> bool:
    weights_before = {key: value.clone() for key, value in network.state_dict().items()}
    logits = network(images)
    (maps,) = grad_cam(network, images).values()
    same = torch.equal(network(images), logits) and all(
        torch.equal(value, weights_before[key]) for key, value in network.state_dict().items()
    )
    varied = (maps.amax((1, 2)) > maps.amin((1, 2))).all()
    return bool(same and varied and torch.isfinite(maps).all())


def _has_cam(network: nn.Module, images: Images) -> bool:
    try:
        cam(network, images)
    except UserError:
        return False
    return True


def run_pooling_cost(setup: ClaimSetup) -> ClaimResult:
    """Row 6: pooling, which CAM asks for, costs accuracy; Grad-CAM's boxes are no worse."""
    larger_setup = replace(setup, ids=np.arange(TESTED))
    batch = draw_batch(larger_setup, replace(setup.shapes, length=TESTED))
    correct_by_head: dict[str, list[Correctness]] = {"flattened": [], "pooled": []}
    errors_by_method: dict[str, list[PerImage]] = {"grad_cam": [], "cam": []}
    for run in range(backbones.RUNS):
        for head, method, network in (
            ("flattened", "grad_cam", backbones.fully_connected_network(setup, run)),
            ("pooled", "cam", backbones.pooling_network(setup, run)),
        ):
            correct_by_head[head].append(
                (top_classes(network, batch.images) == batch.labels).double()
            )
            errors_by_method[method].append(
                score_at_best_threshold(setup, network, method, box_error, higher=False)
            )
    return judge_pooling_cost(setup, correct_by_head, errors_by_method)


def judge_pooling_cost(
    setup: ClaimSetup,
    correct_by_head: dict[str, list[Correctness]],
    errors_by_method: dict[str, list[PerImage]],
) -> ClaimResult:
    """Row 6 of what each training got right, and its maps' box errors."""
    accuracy_gain = gain_over_trainings(
        "flattened - pooled",
        correct_by_head["flattened"],
        correct_by_head["pooled"],
        setup,
        "accuracy more",
    )
    error_gain = gain_over_trainings(
        "cam - grad_cam", errors_by_method["cam"], errors_by_method["grad_cam"], setup, BOXES
    )
    means = [
        mean(name, torch.stack(runs).double().mean(0), setup, measure)
        for measure, table in (("accuracy", correct_by_head), ("box error", errors_by_method))
        for name, runs in table.items()
    ]
    return ClaimResult(
        number="6",
        claim="CAM's pooling costs accuracy, and Grad-CAM's boxes without it are better",
        paper="CAM's VGG-16 is 2.98 points worse at top-1, and its boxes are worse",
        ours=(*means, accuracy_gain, error_gain),
        criterion="flattened - pooled above 0 in accuracy, and cam - grad_cam above 0 in box error",
        passed=accuracy_gain.above_zero and error_gain.above_zero,
        note=f"one trunk, two heads, both trained alike {len(correct_by_head['pooled'])} times; "
        "differences "
        "over trainings and images, thresholds chosen on other images",
    )
