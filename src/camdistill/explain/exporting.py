"""A network and its maps as one graph: what exports to ONNX and torch.export."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.engine.closed_form import head_weight
from camdistill.explain.gradcam import explain_images, last_layer
from camdistill.networks.capture import capture, unwrap
from camdistill.types import Images


class ClosedExplainer(nn.Module):
    """Logits and the raw maps of all classes, from one forward without a backward.

    The maps are Grad-CAM's of a layer with a closed form (see `explain.engine.closed_form`), so
    there is no gradient in the graph, and every exporter takes it.

    Args:
        network: In eval mode; with its preprocessing, where it is a `Preprocessed`.
        images: Any images of the size that it will see, to prove the closed form.
        layer: None is the last spatial layer before the head.

    Attributes:
        layer: Layer of the maps.
        head: The module that turns the layer's spatial mean into logits.

    Raises:
        UserError: If the layer has no closed form.
    """

    def __init__(self, network: nn.Module, images: Images, layer: str | None = None) -> None:
        super().__init__()
        self.network = network
        self.layer = last_layer(network, images) if layer is None else layer
        head = explain_images(network, images, [self.layer]).heads[self.layer]
        inner = unwrap(network)
        if head is None:
            raise UserError(
                f"layer '{self.layer}' of {type(inner).__name__} has no closed form: its logits "
                "must be a linear layer of its spatial mean, as in ResNets and ShallowCNN; name "
                "such a layer, or give another network"
            )
        self.head = next(name for name, part in inner.named_modules() if part is head)

    def forward(
        self, images: Images
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes rows columns"]]:
        """Logits, and a raw, signed map of every class at the layer's own resolution."""
        with capture(self.network, [self.layer]) as activations_by_layer:
            logits = self.network(images)
        activations = activations_by_layer[self.layer]
        weight = head_weight(unwrap(self.network).get_submodule(self.head))
        cells = activations.shape[2] * activations.shape[3]
        return logits, torch.einsum("ck,bkhw->bchw", weight / cells, activations)
