"""Why not another class: maps of what speaks against a class, and of one class against another."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.engine.recording import clone_if_inference
from camdistill.explain.engine.request import Classes, ClassNumbers, upcast
from camdistill.explain.engine.tokens import Layout
from camdistill.explain.gradcam import explain_images, last_layer
from camdistill.types import Images, Labels, Logits, PerImage


def counterfactual(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None = None,
    classes: Classes = None,
    *,
    layout: Layout = "auto",
    logits: Callable[..., Tensor] | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """What would have to go for the class to be likelier: Grad-CAM with -dS/dA.

    Selvaraju et al. 2017, "Counterfactual explanations", https://arxiv.org/abs/1610.02391. Grad-CAM
    is linear in the gradient, so the raw map is minus Grad-CAM's, and its positive part is
    Grad-CAM's negative one.
    """
    explanation = explain_images(network, images, layers, classes, layout=layout, logits=logits)
    return {name: -maps for name, maps in explanation.maps.items()}


def contrast(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None = None,
    classes: ClassNumbers = None,
    against: ClassNumbers = None,
    *,
    gamma: float | int = 1.0,
    layout: Layout = "auto",
    logits: Callable[..., Tensor] | None = None,
) -> dict[str, Float[Tensor, "batch rows columns"]]:
    """Why this class rather than that: Grad-CAM of S_c - gamma S_d.

    Grad-CAM is linear in the score, so this is raw_c - gamma raw_d (Prabhushankar et al. 2020,
    https://arxiv.org/abs/2008.00178; with gamma 0.6 it is what Finer-CAM compares, Zhang et al.
    2025, https://arxiv.org/abs/2501.11309).

    Args:
        network: Network as for `explain.gradcam.explain_images`, like all that isn't named here.
        images: Images as for `explain_images`.
        layers: Layers as for `explain_images`.
        classes: c: None is the top class; else one number, or [B].
        against: d: None is the likeliest class but c; else one number, or [B].
        gamma: Weight of the other class.
        layout: Layout as for `explain_images`.
        logits: Logits as for `explain_images`.

    Raises:
        UserError: Both classes of an image are the same, or don't exist.
    """
    if layers is None:
        layers = [last_layer(network, images, logits=logits)]

    def margin(values: Logits) -> PerImage:
        known_logits = upcast(values.detach())
        if known_logits.shape[1] == 1:
            raise UserError(
                "the network has a single logit, so there is no other class to contrast with; "
                "`counterfactual` shows what speaks against it"
            )
        first = known_logits.argmax(1) if classes is None else _class_numbers(classes, known_logits)
        if against is None:
            second = known_logits.scatter(1, first[:, None], float("-inf")).argmax(1)
        else:
            second = _class_numbers(against, known_logits)
        if bool((first == second).any()):
            raise UserError(
                "a class was contrasted with itself: give another class as against=, or None for "
                "the likeliest other one"
            )
        scores = upcast(values)
        class_scores, other_scores = (
            scores.gather(1, chosen[:, None])[:, 0] for chosen in (first, second)
        )
        return class_scores - gamma * other_scores

    explanation = explain_images(
        network, images, layers, score=margin, layout=layout, logits=logits
    )
    return explanation.maps


def _class_numbers(classes: int | Sequence[int] | Tensor, values: Logits) -> Labels:
    numbers = torch.as_tensor(classes, device=values.device).long()
    if numbers.dim() > 1 or (numbers.dim() == 1 and len(numbers) != len(values)):
        raise UserError(
            f"classes have the shape {list(numbers.shape)} for {len(values)} images: a contrast "
            f"takes one number, or [{len(values)}]"
        )
    if int(numbers.min()) < 0 or int(numbers.max()) >= values.shape[1]:
        raise UserError(
            f"class {int(numbers.max())} does not exist: the network has {values.shape[1]} "
            f"classes, 0 to {values.shape[1] - 1}"
        )
    return clone_if_inference(numbers).expand(len(values))
