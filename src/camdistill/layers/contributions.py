"""Contributions of units to a class's logit, at any layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.engine.hidden_gradients import refuse_reentrant
from camdistill.explain.engine.request import Classes, upcast
from camdistill.explain.gradcam import explain_images
from camdistill.types import Images, Labels


@dataclass(frozen=True)
class Contribution:
    """A layer's activations and the gradients of a class's logit there.

    Attributes:
        activations: [B, K, h, w].
        gradients: Likewise.
    """

    activations: Float[Tensor, "batch units height width"]
    gradients: Float[Tensor, "batch units height width"]

    @property
    def alphas(self) -> Float[Tensor, "batch units"]:
        """Grad-CAM's weights: the gradients' mean over cells."""
        return self.gradients.mean((2, 3))

    @property
    def grad_cam(self) -> Float[Tensor, "batch height width"]:
        """Grad-CAM in logits per cell, as `explain.gradcam.grad_cam` gives it."""
        return torch.einsum("bk,bkij->bij", self.alphas, self.activations)

    @property
    def layer_cam(self) -> Float[Tensor, "batch height width"]:
        """LayerCAM (Jiang et al. 2021, eq. 2 and 3), in logits per cell too.

        Each cell by its own gradient: at early layers, where a unit's gradients differ from cell to
        cell, their mean says little.
        """
        return (self.gradients.clamp_min(0) * self.activations).sum(1)

    def strongest(self, image: int, count: int) -> Int[Tensor, "chosen"]:
        """Units whose alpha is largest in magnitude in one image, the largest first."""
        units = self.alphas.shape[1]
        return self.alphas[image].abs().topk(min(count, units)).indices


def contributions(
    network: nn.Module, images: Images, layers: Sequence[str], classes: Classes = None
) -> tuple[Float[Tensor, "batch classes"], Labels, dict[str, Contribution]]:
    """Activations and gradients of layers, from one forward and one backward.

    Args:
        network: In eval mode, bare or wrapped.
        images: Images as the network takes them.
        layers: See `networks.capture`.
        classes: One class an image; None is each image's own top class.

    Returns:
        Logits, classes, and what each layer contributes, on the CPU in float32; of no layers,
        nothing.

    Raises:
        UserError: A class has no gradient at one of the layers.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Frozen weights alone would record no graph.
        traced_images = images.detach().clone().requires_grad_()
        explanation = explain_images(
            network, traced_images, layers, classes, grad="activations", maps=False
        )
        total_logit = explanation.logits.gather(1, explanation.classes.view(-1, 1)).sum()
        outputs = [explanation.activations[layer] for layer in layers]
        with refuse_reentrant():
            gradients = (
                torch.autograd.grad(total_logit, outputs, allow_unused=True) if outputs else ()
            )
    contribution_by_layer = {}
    for layer, output, gradient in zip(layers, outputs, gradients, strict=True):
        if gradient is None:
            raise UserError(
                f"the logits don't depend on layer '{layer}': ask for layers that they are "
                "computed from"
            )
        contribution_by_layer[layer] = Contribution(
            upcast(output.detach()).float().cpu(), upcast(gradient.detach()).float().cpu()
        )
    return (
        explanation.logits.detach().float().cpu(),
        explanation.classes.detach().cpu(),
        contribution_by_layer,
    )
