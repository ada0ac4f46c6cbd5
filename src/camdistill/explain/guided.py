"""Guided backpropagation, the deconvnet rule, and Guided Grad-CAM.

For a ReLU with input x and R the gradient at its output, the gradient at its input is

    plain      1[x > 0] R
    deconvnet  relu(R)               (Zeiler and Fergus 2014, https://arxiv.org/abs/1311.2901)
    guided     1[x > 0] relu(R)      (Springenberg et al. 2015, https://arxiv.org/abs/1412.6806)

The rule is applied where the ReLU is in autograd's graph of one forward, and to that graph alone:
the network is neither changed nor hooked, it doesn't matter whether a ReLU is a module, a function,
in place or called twice, and what else reads a ReLU's input (the skip of a pre-activation block) is
left alone. ReLU, ReLU6, `threshold` and `clamp` at 0 count as ReLUs; GELU, SiLU and leaky ones do
not, and have their plain gradient.

Both rules show image structure more than evidence: maps change little when weights are randomized
(Adebayo et al. 2018, https://arxiv.org/abs/1810.03292).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import Node

from camdistill.errors import UserError
from camdistill.explain.attribution import Channels, reduce_channels
from camdistill.explain.engine.request import Classes, Request, Score
from camdistill.explain.engine.tokens import Layout
from camdistill.explain.gradients import (
    PIXELS,
    GradientPass,
    build_request,
    no_gradient_error,
    pixel_pass,
    stack_classes,
)
from camdistill.explain.maps import relu, upsample
from camdistill.networks.capture import unwrap
from camdistill.types import Images

Rule = Literal["guided", "deconvnet"]


def guided_gradient(
    network: nn.Module,
    images: Images,
    classes: Classes = None,
    *,
    rule: Rule = "guided",
    score: Score = "logit",
    logits: Callable[..., Tensor] | None = None,
) -> Float[Tensor, "batch *classes channels height width"]:
    """The gradient at the pixels with every ReLU's rule replaced, signed.

    Args:
        network: Network as for `explain.gradcam.explain_images`.
        images: Images as for `explain_images`.
        classes: Classes as for `explain_images`; [B, C] gives [B, C, channels, H, W].
        rule: See the module.
        score: Score as for `explain_images`.
        logits: Logits as for `explain_images`.

    Raises:
        UserError: If the network has no ReLU on the way from the pixels to the score.
    """
    request = build_request(network, images, [], classes, score=score, logits=logits)
    gradient_pass = pixel_pass(request)
    with replace_relu_rule(request, gradient_pass, rule):
        gradients = [
            _pixel_gradient(request, gradient_pass, column)
            for column in range(gradient_pass.scores.shape[1])
        ]
    return stack_classes(gradients, gradient_pass.classes)


def guided_backprop(
    network: nn.Module,
    images: Images,
    classes: Classes = None,
    *,
    rule: Rule = "guided",
    channels: Channels = "max_abs",
    score: Score = "logit",
    logits: Callable[..., Tensor] | None = None,
) -> Float[Tensor, "batch *classes height width"]:
    """One map of `guided_gradient`: the largest magnitude over the channels, or their sum."""
    gradients = guided_gradient(network, images, classes, rule=rule, score=score, logits=logits)
    return reduce_channels(gradients, channels)


def deconvnet(
    network: nn.Module, images: Images, classes: Classes = None
) -> Float[Tensor, "batch *classes height width"]:
    """`guided_backprop` with the deconvnet's rule; pooling goes back by its own switches."""
    return guided_backprop(network, images, classes, rule="deconvnet")


def guided_grad_cam(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None = None,
    classes: Classes = None,
    *,
    channels: Channels = "max_abs",
    score: Score = "logit",
    layout: Layout = "auto",
    logits: Callable[..., Tensor] | None = None,
) -> dict[str, Float[Tensor, "batch *classes height width"]]:
    """Guided Grad-CAM by layer, at the pixels: guided backpropagation times relu(Grad-CAM).

    Selvaraju et al. 2017, section 3.2, https://arxiv.org/abs/1610.02391; Grad-CAM is enlarged
    bilinearly, as there. One forward serves both, and all layers.

    Args:
        network: Network as for `explain.gradcam.explain_images`, like all that isn't named here.
        images: Images as for `explain_images`.
        layers: Layers as for `explain_images`.
        classes: Classes as for `explain_images`.
        channels: How the colored product becomes a map.
        score: Score as for `explain_images`.
        layout: Layout as for `explain_images`.
        logits: Logits as for `explain_images`.
    """
    request = build_request(
        network, images, layers, classes, score=score, layout=layout, logits=logits
    )
    gradient_pass = pixel_pass(request)
    size = (images.shape[-2], images.shape[-1])
    count = gradient_pass.scores.shape[1]
    layer_gradients = [gradient_pass.gradients(column, request.names) for column in range(count)]
    with replace_relu_rule(request, gradient_pass, "guided"):
        pixel_gradients = [
            _pixel_gradient(request, gradient_pass, column) for column in range(count)
        ]
    maps_by_layer = {}
    for name in request.names:
        parts = []
        for gradients, pixels in zip(layer_gradients, pixel_gradients, strict=True):
            if gradients is None:
                raise no_gradient_error(request)
            alpha = gradients[name].mean((2, 3), keepdim=True)
            cam = upsample(relu((alpha * gradient_pass.activations(name)).sum(1)), size)
            parts.append(reduce_channels(pixels * cam[:, None], channels))
        maps_by_layer[name] = stack_classes(parts, gradient_pass.classes)
    return maps_by_layer


def _pixel_gradient(request: Request, gradient_pass: GradientPass, column: int) -> Tensor:
    gradients = gradient_pass.gradients(column, [PIXELS])
    if gradients is None:
        raise no_gradient_error(request)
    return gradients[PIXELS]


@contextmanager
def replace_relu_rule(request: Request, gradient_pass: GradientPass, rule: Rule) -> Iterator[None]:
    """Replace the rule of every ReLU in the graph of a forward."""
    if rule not in ("guided", "deconvnet"):
        raise ValueError(f"rule is {rule!r}; it is 'guided' or 'deconvnet'")
    relus = [node for node in _nodes(gradient_pass.scores) if _is_relu(node)]
    if not relus:
        raise UserError(
            f"{type(unwrap(request.network)).__name__} has no ReLU between the pixels and the "
            "score, so "
            "guided backpropagation would be the plain gradient: ask for that"
        )

    def change_gradient(
        input_gradients: tuple[Tensor | None, ...], output_gradients: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        first = input_gradients[0] if rule == "guided" else output_gradients[0]
        return (None if first is None else first.clamp(min=0), *input_gradients[1:])

    with ExitStack() as stack:
        for node in relus:
            stack.callback(node.register_hook(change_gradient).remove)
        yield


def _nodes(scores: Tensor) -> set[Node]:
    """Every operation that the scores came from."""
    assert scores.grad_fn is not None, "a pass has a graph"
    waiting, nodes = [scores.grad_fn], {scores.grad_fn}
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in nodes:
                nodes.add(node)
                waiting.append(node)
    return nodes


def _is_relu(node: Node) -> bool:
    """By what autograd calls the operation, and where it clips."""
    operation = node.name().rstrip("0123456789")
    if operation == "ReluBackward":
        return True
    bound = {
        "HardtanhBackward": "_saved_min_val",
        "ThresholdBackward": "_saved_threshold",
        "ClampBackward": "_saved_min",
        "ClampMinBackward": "_saved_min",
    }.get(operation)
    return bound is not None and getattr(node, bound) == 0
