"""Grad-CAM: every layer and every class asked for, from one forward.

Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, section 3. For a layer's output A of
Z = h w cells and a score S of each image:

    alpha_k = 1/Z sum_ij dS/dA_kij        (eq. 1)
    map_ij  = sum_k alpha_k A_kij         (eq. 2, without its ReLU: `explain.maps.relu`)

A map of a logit is in logits per cell: at the last layer of a network that ends in average pooling
and a linear layer, its sum over cells is the logit minus the bias. All pictures and numbers of the
project have this scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.engine.forward import Explanation, NotLastLayerError, explain_forward
from camdistill.explain.engine.hidden_gradients import describe_missing_gradient, refuse_reentrant
from camdistill.explain.engine.recording import clone_if_inference, may_be_last, spatial_shape
from camdistill.explain.engine.request import (
    Classes,
    Grad,
    Request,
    Score,
    TopClasses,
    check_explainable_network,
    check_image_batch,
    check_request_options,
    check_separate_images,
)
from camdistill.explain.engine.tokens import Layout
from camdistill.networks.capture import (
    disable_compile,
    examination_lock,
    inspection_mode,
    list_modules,
    unwrap,
    unwrap_outer,
    watch_modules,
)
from camdistill.types import Images

__all__ = ["Explanation", "TopClasses", "explain_images", "grad_cam", "last_layer"]

# The last layer that was found in each network, if it gives a grid; the next forward confirms it.
_LAST_LAYERS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def grad_cam(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None = None,
    classes: Classes = None,
    *,
    score: Score = "logit",
    grad: Grad = "none",
    layout: Layout = "auto",
    logits: Callable[..., Tensor] | None = None,
    memory: int | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """Raw Grad-CAM maps by layer; `explain_images` says more, and gives logits and activations."""
    explanation = explain_images(
        network,
        images,
        layers,
        classes,
        score=score,
        grad=grad,
        layout=layout,
        logits=logits,
        memory=memory,
    )
    return explanation.maps


def explain_images(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None = None,
    classes: Classes = None,
    *,
    score: Score = "logit",
    grad: Grad = "none",
    maps: bool = True,
    layout: Layout = "auto",
    logits: Callable[..., Tensor] | None = None,
    memory: int | None = None,
) -> Explanation:
    """Grad-CAM of any layers, with the logits and activations of the same forward.

    Nothing is left behind: no hook, no `.grad`, no changed mode, no graph (with `grad="none"`).
    Frozen networks, `no_grad`, `inference_mode`, autocast and half precision are all fine; sums
    over cells and units are in float32 (float64 for float64 networks), as are the maps.

    Args:
        network: Bare, or wrapped by `Preprocessed`, torch.compile, DDP.
        images: Images as the network takes them; in [0, 1] for a `Preprocessed` one.
        layers: Names inside the bare network ("layer4", "layer1.0.relu#1"; see
            `networks.capture`). None is the last spatial layer before the head; an empty list
            asks for logits alone.
        classes: None is each image's own top class; an int, or [B], is one class an image; [B, C]
            is several classes for each image and gives maps [B, C, h, w], and so does
            TopClasses(C): each image's own C likeliest classes.
        score: What is explained. "logit" is the class's logit, "probability" its softmax, or
            the sigmoid of a network's single logit. A callable takes whatever the network gave (a
            tuple or dict too) and returns one score an image, [B]; `classes` must then be None.
        grad: "none": maps, logits and activations carry no graph, and there is none before the
            first layer asked for. "activations" and "full" are for training: everything carries the
            graph of this one forward, whatever mode surrounds the call. With "activations" alpha
            is a constant, so that gradients of a map flow through A alone; with "full" the map is
            differentiated completely.
        maps: False leaves out the maps, and with them any backward.
        layout: Where units and cells are in the layers' outputs. "auto" knows convolutional
            networks, transformers with tokens, and Swin; see `explain.engine.tokens`.
        logits: Takes the logits out of an output that is a tuple or dict.
        memory: Bytes that gradients of several classes may take at once. None is 32 MiB on a CPU,
            512 MiB elsewhere.

    Returns:
        The explanation. alpha is a gradient of the scores' sum over the batch: in train mode,
        where batch normalization mixes images, it includes what an image's activations do to the
        others' scores ("activations" and "full"; "none" refuses such networks).

    Raises:
        UserError: If a layer, a class or the network can't be explained as asked.
    """
    check_request_options(score, classes, grad, layout)
    check_image_batch(images)
    with examination_lock(), torch.inference_mode(False), torch.set_grad_enabled(grad != "none"):
        if grad == "none":
            check_separate_images(network, len(images))
        else:
            check_explainable_network(network)
        images = clone_if_inference(images)
        if isinstance(classes, Tensor):
            classes = clone_if_inference(classes)
        names = (layers,) if isinstance(layers, str) else tuple(dict.fromkeys(layers or ()))
        request = Request(
            network, images, names, classes, score, grad, maps, layout, logits, memory
        )
        return _explain_layers(request) if layers is not None else _explain_last_layer(request)


def _explain_layers(request: Request, *, is_last: bool = False) -> Explanation:
    with refuse_reentrant():
        explanation = explain_forward(request, record=request.grad != "none", is_last=is_last)
        if explanation is None and request.grad == "none":
            # The network switches the graph off itself somewhere; record all of it.
            with torch.enable_grad():
                explanation = explain_forward(request, record=True, is_last=is_last)
    if explanation is None:
        raise UserError(describe_missing_gradient(request.network, request.images, request.names))
    return explanation


def _explain_last_layer(request: Request) -> Explanation:
    """Explains at the layer that is last in this very forward.

    The last layer of an earlier forward is tried first, which saves a look at one image; a training
    step, which can't run again, looks every time.
    """
    known_layer = _LAST_LAYERS.get(unwrap(request.network))
    if known_layer is not None and request.grad == "none":
        try:
            return _explain_layers(replace(request, names=(known_layer,)), is_last=True)
        except (NotLastLayerError, UserError):
            pass  # what is wrong besides is told below
    layer = last_layer(request.network, request.images, score=request.score, logits=request.logits)
    return _explain_layers(replace(request, names=(layer,)))


def last_layer(
    network: nn.Module,
    images: Images,
    *,
    score: Score = "logit",
    logits: Callable[..., Tensor] | None = None,
) -> str:
    """The last spatial layer before the head, found by running the network on one image.

    It is the module that is last to finish with an output [B, K, h, w] (or a Swin's [B, h, w, K])
    of more than one cell, pooling, dropout and identities aside; of nested modules that finish
    together, the outermost. ResNets: "layer4" (CIFAR: "layer3"); VGG and DenseNet: "features".
    Where tokens come after it, it is the last of them of the final width whose patches the score
    reads: with a class token that is the normalization before the last attention.

    Raises:
        UserError: If no module gives such an output.
    """
    inner = unwrap(network)
    finished: list[tuple[nn.Module, torch.Size]] = []
    size = (images.shape[-2], images.shape[-1])

    def note(module: nn.Module, output: object) -> None:
        if (cell_shape := spatial_shape(output, size)) is not None:
            finished.append((module, cell_shape))

    with (
        inspection_mode(network),
        disable_compile(network),
        watch_modules(may_be_last(list_modules(inner)), note),
    ):
        unwrap_outer(network)(images[:1])
    if not finished:
        raise UserError(
            f"{type(inner).__name__} has no layer with a spatial output for images of "
            f"{images.shape[-2]}x{images.shape[-1]}: give larger images, or another network"
        )
    names: dict[nn.Module, str] = {part: name for name, part in inner.named_modules()}
    last, shape = finished[-1]
    if len(shape) == 4:
        _LAST_LAYERS[inner] = names[last]
        return names[last]
    names_of_same_shape = list(
        dict.fromkeys(names[module] for module, other_shape in finished if other_shape == shape)
    )
    with inspection_mode(network):
        maps = explain_images(
            network, images[:1], names_of_same_shape, score=score, logits=logits
        ).maps
    return next(
        (name for name in reversed(names_of_same_shape) if maps[name].count_nonzero()), names[last]
    )
