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
from camdistill.explain.engine.forward import AnotherWayError, Explanation, explained
from camdistill.explain.engine.hidden_gradients import refusing_reentrant, why_no_gradient
from camdistill.explain.engine.recording import may_be_last, recordable, spatial_shape
from camdistill.explain.engine.request import (
    Classes,
    Grad,
    Request,
    Score,
    Top,
    check_images,
    demand_explainable,
    demand_known,
    demand_separate_images,
)
from camdistill.explain.engine.tokens import Layout
from camdistill.networks.capture import (
    bare,
    exclusive,
    parts,
    plain,
    uncompiled,
    undisturbed,
    watching,
)
from camdistill.types import Images

__all__ = ["Explanation", "Top", "explain", "grad_cam", "last_layer"]

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
    """Raw Grad-CAM maps by layer; `explain` says all, and gives logits and activations too."""
    found = explain(
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
    return found.maps


def explain(
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
        images: As the network takes them; in [0, 1] for a `Preprocessed` one.
        layers: Names inside the bare network ("layer4", "layer1.0.relu#1"; see
            `networks.capture`). None is the last spatial layer before the head; an empty list
            asks for logits alone.
        classes: None is each image's own top class; an int, or [B], is one class an image; [B, C]
            is several classes for each image and gives maps [B, C, h, w], and so does Top(C): each
            image's own C likeliest classes.
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
            networks, transformers with tokens, and Swin; see `explain.tokens`.
        logits: Takes the logits out of an output that is a tuple or dict.
        memory: Bytes that gradients of several classes may take at once. None is 32 MiB on a CPU,
            512 MiB elsewhere.

    Returns:
        The explanation. alpha is a gradient of the scores' sum over the batch: in train mode,
        where batch normalisation mixes images, it includes what an image's activations do to the
        others' scores ("activations" and "full"; "none" refuses such networks).

    Raises:
        UserError: If a layer, a class or the network can't be explained as asked.
    """
    demand_known(score, classes, grad, layout)
    check_images(images)
    with exclusive(), torch.inference_mode(False), torch.set_grad_enabled(grad != "none"):
        if grad == "none":
            demand_separate_images(network, len(images))
        else:
            demand_explainable(network)
        images = recordable(images)
        if isinstance(classes, Tensor):
            classes = recordable(classes)
        names = (layers,) if isinstance(layers, str) else tuple(dict.fromkeys(layers or ()))
        ask = Request(network, images, names, classes, score, grad, maps, layout, logits, memory)
        return _explanation(ask) if layers is not None else _at_last_layer(ask)


def _explanation(ask: Request, *, is_last: bool = False) -> Explanation:
    with refusing_reentrant():
        found = explained(ask, record=ask.grad != "none", is_last=is_last)
        if found is None and ask.grad == "none":
            # The network switches the graph off itself somewhere; record all of it.
            with torch.enable_grad():
                found = explained(ask, record=True, is_last=is_last)
    if found is None:
        raise UserError(why_no_gradient(ask.network, ask.images, ask.names))
    return found


def _at_last_layer(ask: Request) -> Explanation:
    """Explains at the layer that is last in this very forward.

    The last layer of an earlier forward is tried first, which saves a look at one image; a training
    step, which can't run again, looks every time.
    """
    remembered = _LAST_LAYERS.get(bare(ask.network))
    if remembered is not None and ask.grad == "none":
        try:
            return _explanation(replace(ask, names=(remembered,)), is_last=True)
        except (AnotherWayError, UserError):
            pass  # what is wrong besides is told below
    layer = last_layer(ask.network, ask.images, score=ask.score, logits=ask.logits)
    return _explanation(replace(ask, names=(layer,)))


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
    reads: with a class token that is the normalisation before the last attention.

    Raises:
        UserError: If no module gives such an output.
    """
    inner = bare(network)
    finished: list[tuple[nn.Module, torch.Size]] = []
    size = (images.shape[-2], images.shape[-1])

    def note(module: nn.Module, output: object) -> None:
        if (shape := spatial_shape(output, size)) is not None:
            finished.append((module, shape))

    with undisturbed(network), uncompiled(network), watching(may_be_last(parts(inner)), note):
        plain(network)(images[:1])
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
    alike = list(dict.fromkeys(names[module] for module, other in finished if other == shape))
    with undisturbed(network):
        maps = explain(network, images[:1], alike, score=score, logits=logits).maps
    return next((name for name in reversed(alike) if maps[name].count_nonzero()), names[last])
