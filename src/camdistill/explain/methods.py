"""All methods by name, with one signature, for whatever compares them."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, cast, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.errors import UserError, nearest
from camdistill.explain.ablation import ablation_cam
from camdistill.explain.attribution import (
    gradient,
    gradient_x_input,
    integrated_gradients,
    smooth_grad,
)
from camdistill.explain.contrast import contrast, counterfactual
from camdistill.explain.engine.request import Classes, TopClasses
from camdistill.explain.gradcam import explain_images as engine
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.guided import deconvnet, guided_backprop, guided_grad_cam
from camdistill.explain.maps import upsample
from camdistill.explain.perturbation import occlusion, rise, score_cam
from camdistill.explain.variants import (
    cam,
    eigen_cam,
    grad_cam_plus_plus,
    hires_cam,
    layer_cam,
    x_grad_cam,
)
from camdistill.types import Explain, Images, Labels, Maps

INPUT = "input"
"""Under which name methods at the pixels give their map."""
Method = Literal[
    "grad_cam",
    "cam",
    "hires_cam",
    "grad_cam_plus_plus",
    "x_grad_cam",
    "layer_cam",
    "eigen_cam",
    "score_cam",
    "ablation_cam",
    "counterfactual",
    "contrast",
    "guided_grad_cam",
    "guided_backprop",
    "deconvnet",
    "gradient",
    "gradient_x_input",
    "smooth_grad",
    "integrated_gradients",
    "occlusion",
    "rise",
]
METHODS: tuple[Method, ...] = get_args(Method)
AT_PIXELS: frozenset[Method] = frozenset(
    {
        "guided_backprop",
        "deconvnet",
        "gradient",
        "gradient_x_input",
        "smooth_grad",
        "integrated_gradients",
        "occlusion",
        "rise",
    }
)
"""The methods that look at no layer: their only map is `INPUT`'s."""


@runtime_checkable
class ExplanationMethod(Protocol):
    """Raw maps by layer.

    They have the layer's resolution; guided_grad_cam's, and those of `INPUT`, the images'.
    """

    def __call__(
        self,
        network: nn.Module,
        images: Images,
        layers: Sequence[str] | None = None,
        classes: Classes = None,
    ) -> dict[str, Float[Tensor, "..."]]:
        """Maps [B, h, w]; of classes [B, C] maps [B, C, h, w]."""


def find_method(method: str) -> ExplanationMethod:
    """A method by its name, with its defaults.

    Raises:
        UserError: If there is none of that name.
    """
    explain_layers = _BY_NAME.get(cast(Method, method))
    if explain_layers is None:
        raise UserError(f"no method '{method}'; {nearest(method, METHODS)}")
    return explain_layers


def image_explainer(method: str, layer: str | None = None) -> Explain:
    """A method at one layer as metrics ask for it: maps at the images' resolution."""
    explain_layers = find_method(method)

    def explain(network: nn.Module, images: Images, classes: Labels) -> Maps:
        layers = None if layer is None else [layer]
        (maps,) = explain_layers(network, images, layers, classes).values()
        return upsample(maps, (images.shape[-2], images.shape[-1]))

    return explain


def _at_pixels(
    method: Callable[[nn.Module, Images, Classes], Float[Tensor, "..."]],
) -> ExplanationMethod:
    @functools.wraps(method, assigned=(), updated=())  # stored maps know the method's own file
    def explain(
        network: nn.Module,
        images: Images,
        layers: Sequence[str] | None = None,
        classes: Classes = None,
    ) -> dict[str, Float[Tensor, "..."]]:
        return {INPUT: method(network, images, classes)}

    return explain


def _contrast(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None = None,
    classes: Classes = None,
) -> dict[str, Float[Tensor, "..."]]:
    """Against the likeliest other class; [B, C] asks for each of the C."""
    if isinstance(classes, TopClasses):
        classes = engine(network, images, [], classes).classes
    class_numbers = None if classes is None else torch.as_tensor(classes)
    if class_numbers is None or class_numbers.dim() < 2:
        return contrast(network, images, layers, class_numbers)
    maps_by_column = [
        contrast(network, images, layers, column) for column in class_numbers.unbind(1)
    ]
    return {
        name: torch.stack([maps[name] for maps in maps_by_column], 1) for name in maps_by_column[0]
    }


_BY_NAME: dict[Method, ExplanationMethod] = {
    "grad_cam": grad_cam,
    "cam": cam,
    "hires_cam": hires_cam,
    "grad_cam_plus_plus": grad_cam_plus_plus,
    "x_grad_cam": x_grad_cam,
    "layer_cam": layer_cam,
    "eigen_cam": eigen_cam,
    "score_cam": score_cam,
    "ablation_cam": ablation_cam,
    "counterfactual": counterfactual,
    "contrast": _contrast,
    "guided_grad_cam": guided_grad_cam,
    "guided_backprop": _at_pixels(guided_backprop),
    "deconvnet": _at_pixels(deconvnet),
    "gradient": _at_pixels(gradient),
    "gradient_x_input": _at_pixels(gradient_x_input),
    "smooth_grad": _at_pixels(smooth_grad),
    "integrated_gradients": _at_pixels(integrated_gradients),
    "occlusion": _at_pixels(occlusion),
    "rise": _at_pixels(rise),
}
