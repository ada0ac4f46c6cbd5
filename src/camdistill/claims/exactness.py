"""What is a theorem: Grad-CAM of a network whose head is pooling and a linear layer."""

from camdistill.claims.claim import (
    ClaimMeasurement,
    ClaimResult,
    ClaimSetup,
    draw_batch,
    exact_number,
)
from camdistill.explain.gradcam import last_layer
from camdistill.explain.gradients import build_request, pixel_pass
from camdistill.networks.capture import unwrap
from camdistill.networks.heads import find_head
from camdistill.networks.teachers import Preprocessed

TOLERANCE = 1e-5


def run_cam_equality(setup: ClaimSetup) -> ClaimResult:
    """Row 1: the gradient's mean, times the number of cells, is the head's weight."""
    networks = {"teacher": setup.teacher, "student": setup.student}
    ours = tuple(_error(setup, name, network) for name, network in networks.items())
    return ClaimResult(
        number="1",
        claim="Grad-CAM generalizes CAM: with pooling and a linear head, Z alpha = w",
        paper="a proof (section 3.1)",
        ours=ours,
        criterion=f"largest |Z alpha - w| / max |w| below {TOLERANCE:g} in both networks, the "
        "gradients taken by autograd and not by our closed form",
        passed=all(measurement.value < TOLERANCE for measurement in ours),
        note="in float32, at the last layer, of each image's own top class",
    )


def _error(setup: ClaimSetup, name: str, network: Preprocessed) -> ClaimMeasurement:
    images = draw_batch(setup).images
    layer = last_layer(network, images)
    recorded = pixel_pass(build_request(network, images, [layer], None, score="logit"))
    gradients = recorded.gradients(0, [layer])
    assert gradients is not None, "the score is computed from the last layer"
    scaled_alphas = gradients[layer].sum((2, 3))
    weights = find_head(unwrap(network))[1].weight.detach()[recorded.classes]
    worst = (scaled_alphas - weights).abs().amax() / weights.abs().amax()
    return exact_number(name, float(worst), setup.count, "largest relative error")
