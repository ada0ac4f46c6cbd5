"""What is a theorem: Grad-CAM of a network whose head is pooling and a linear layer."""

from camdistill.claims.claim import Lab, Measured, Row, drawn, exact
from camdistill.explain.gradcam import last_layer
from camdistill.explain.gradients import pixel_pass, request
from camdistill.networks.capture import bare
from camdistill.networks.heads import head_of
from camdistill.networks.teachers import Preprocessed

TOLERANCE = 1e-5


def generalises_cam(lab: Lab) -> Row:
    """Row 1: the gradient's mean, times the number of cells, is the head's weight."""
    networks = {"teacher": lab.teacher, "student": lab.student}
    ours = tuple(_error(lab, name, network) for name, network in networks.items())
    return Row(
        number="1",
        claim="Grad-CAM generalises CAM: with pooling and a linear head, Z alpha = w",
        paper="a proof (section 3.1)",
        ours=ours,
        criterion=f"largest |Z alpha - w| / max |w| below {TOLERANCE:g} in both networks, the "
        "gradients taken by autograd and not by our closed form",
        passed=all(one.value < TOLERANCE for one in ours),
        note="in float32, at the last layer, of each image's own top class",
    )


def _error(lab: Lab, name: str, network: Preprocessed) -> Measured:
    images = drawn(lab).images
    layer = last_layer(network, images)
    done = pixel_pass(request(network, images, [layer], None, score="logit"))
    gradients = done.gradients(0, [layer])
    assert gradients is not None, "the score is computed from the last layer"
    found = gradients[layer].sum((2, 3))
    weights = head_of(bare(network))[1].weight.detach()[done.classes]
    worst = (found - weights).abs().amax() / weights.abs().amax()
    return exact(name, float(worst), lab.count, "largest relative error")
