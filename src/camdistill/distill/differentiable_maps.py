"""A network's own maps and answers with a graph, as what refines it needs them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from camdistill.explain.engine.request import upcast
from camdistill.explain.gradcam import explain_images
from camdistill.networks.teachers import Preprocessed
from camdistill.types import Images, Labels, Logits

CamMethod = Literal["grad_cam", "hires_cam"]
LayerMaps = Float[Tensor, "batch rows columns"]


def explain_with_graph(
    network: Preprocessed,
    images: Images,
    cam: CamMethod = "grad_cam",
    layer: str | None = None,
    classes: Labels | None = None,
) -> tuple[Logits, Labels, LayerMaps]:
    """Logits, own top classes (or those given) and their maps, all with a graph.

    HiResCAM is sum_k A_k dS/dA_k (Draelos and Carin 2020, https://arxiv.org/abs/2011.08891).
    """
    layers = None if layer is None else [layer]
    if cam == "grad_cam":
        explanation = explain_images(network, images, layers, classes, grad="full")
        (maps,) = explanation.maps.values()
        return explanation.logits, explanation.classes, maps
    explanation = explain_images(network, images, layers, classes, grad="full", maps=False)
    (activations,) = explanation.activations.values()
    with torch.autocast(images.device.type, enabled=False):
        scores = explanation.logits.float().gather(1, explanation.classes[:, None]).sum()
        (gradient,) = torch.autograd.grad(scores, activations, create_graph=True)
        maps = (upcast(activations) * upcast(gradient)).sum(1)
    return explanation.logits, explanation.classes, maps


def forward_constant(network: nn.Module, images: Images) -> Logits:
    """A network's logits with a graph to the images, and none to the weights."""
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    logits: Logits = functional_call(network, weights, (images,))
    return logits


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """In eval mode: what is explained is the network that will be used, and no image another's."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
