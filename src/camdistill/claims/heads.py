"""Any head will do, and CAM's costs accuracy (rows 2 and 6)."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.claims.claim import Lab, Row, drawn, exact, mean, trained_gain
from camdistill.claims.localization_maps import at_best, box_error, tops
from camdistill.claims.networks import backbones
from camdistill.errors import UserError
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.variants import cam
from camdistill.networks.heads import head_of
from camdistill.networks.teachers import NetworkSpec, Preprocessed, preprocessed
from camdistill.types import Images, PerImage

Answers = Float[Tensor, "tested"]
BOXES = "box error more"
TESTED = 2000  # images for accuracies near 1; drawing and one forward cost little


def any_head(lab: Lab) -> Row:
    """Row 2: the same call explains networks with other heads, and leaves them as they are."""
    networks: dict[str, nn.Module] = {
        "pooling": lab.teacher,
        "fully connected": backbones.flattened(lab),
        "transformer": _transformer(lab),
    }
    images = drawn(lab).images[:32]
    ours = [
        exact(name, float(_explained(network, images)), len(images), "explained by Grad-CAM")
        for name, network in networks.items()
    ]
    has_cam = [
        exact(name, float(_has_cam(network, images)), len(images), "has a CAM")
        for name, network in networks.items()
    ]
    return Row(
        number="2",
        claim="Grad-CAM needs no other architecture and no new training",
        paper="no number",
        ours=(*ours, *has_cam),
        criterion="in all three networks one call gives a finite map, constant in no image, and "
        "logits and weights are the same bit for bit afterwards",
        passed=all(one.value == 1 for one in ours),
        note="1 is yes; the transformer is a ViT of 2 layers with random weights",
    )


def _transformer(lab: Lab) -> Preprocessed:
    args: dict[str, int | float | str | list[int] | list[float] | list[str] | None] = {
        "image_size": lab.shapes.size,
        "patch_size": 4,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 32,
        "mlp_dim": 64,
        "num_classes": lab.shapes.classes,
    }
    spec = NetworkSpec("torchvision.models.VisionTransformer", args=args)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lab.seed)
        network = preprocessed(spec)
        nn.init.normal_(head_of(network.network)[1].weight)  # torchvision's start is 0
    return network.eval().requires_grad_(False).to(lab.device)


def _explained(network: nn.Module, images: Images) -> bool:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    logits = network(images)
    (maps,) = grad_cam(network, images).values()
    same = torch.equal(network(images), logits) and all(
        torch.equal(value, before[key]) for key, value in network.state_dict().items()
    )
    varied = (maps.amax((1, 2)) > maps.amin((1, 2))).all()
    return bool(same and varied and torch.isfinite(maps).all())


def _has_cam(network: nn.Module, images: Images) -> bool:
    try:
        cam(network, images)
    except UserError:
        return False
    return True


def no_cost(lab: Lab) -> Row:
    """Row 6: pooling, which CAM asks for, costs accuracy; Grad-CAM's boxes are no worse."""
    many = replace(lab, ids=np.arange(TESTED))
    test = drawn(many, replace(lab.shapes, length=TESTED))
    right: dict[str, list[Answers]] = {"flattened": [], "pooled": []}
    errors: dict[str, list[PerImage]] = {"grad_cam": [], "cam": []}
    for run in range(backbones.RUNS):
        for head, method, network in (
            ("flattened", "grad_cam", backbones.flattened(lab, run)),
            ("pooled", "cam", backbones.pooled(lab, run)),
        ):
            right[head].append((tops(network, test.images) == test.labels).double())
            errors[method].append(at_best(lab, network, method, box_error, higher=False))
    return judged_cost(lab, right, errors)


def judged_cost(
    lab: Lab, right: dict[str, list[Answers]], errors: dict[str, list[PerImage]]
) -> Row:
    """Row 6 of what each training got right, and its maps' box errors."""
    costs = trained_gain(
        "flattened - pooled", right["flattened"], right["pooled"], lab, "accuracy more"
    )
    worse = trained_gain("cam - grad_cam", errors["cam"], errors["grad_cam"], lab, BOXES)
    means = [
        mean(name, torch.stack(each).double().mean(0), lab, of)
        for of, table in (("accuracy", right), ("box error", errors))
        for name, each in table.items()
    ]
    return Row(
        number="6",
        claim="CAM's pooling costs accuracy, and Grad-CAM's boxes without it are better",
        paper="CAM's VGG-16 is 2.98 points worse at top-1, and its boxes are worse",
        ours=(*means, costs, worse),
        criterion="flattened - pooled above 0 in accuracy, and cam - grad_cam above 0 in box error",
        passed=costs.above and worse.above,
        note=f"one trunk, two heads, both trained alike {len(right['pooled'])} times; differences "
        "over trainings and images, thresholds chosen on other images",
    )
