"""What is asked of a network: the scores that are explained, and the mistakes one can make."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from camdistill.errors import UserError
from camdistill.explain.engine.image_separation import measure_mixing
from camdistill.explain.engine.tokens import Kind, Layout
from camdistill.networks.capture import list_modules, unwrap
from camdistill.networks.network_checks import SUSPECT, check_explainable
from camdistill.perturb.probability import probabilities
from camdistill.types import Images

Grad = Literal["none", "activations", "full"]
Score = Literal["logit", "probability"] | Callable[..., Tensor]


@dataclass(frozen=True)
class TopClasses:
    """Each image's own likeliest classes, the likeliest first; all of them where there are fewer.

    Attributes:
        count: How many, at least 1.
    """

    count: int


ClassNumbers = int | Sequence[int] | Tensor | None
Classes = ClassNumbers | TopClasses


@dataclass(frozen=True)
class Request:
    """The arguments of `explain_images`."""

    network: nn.Module
    images: Images
    names: tuple[str, ...]
    classes: Classes
    score: Score
    grad: Grad
    maps: bool
    layout: Layout = "auto"
    logits: Callable[..., Tensor] | None = None
    memory: int | None = None


def score_columns(
    request: Request, output: object, classes: Tensor
) -> Float[Tensor, "batch asked"]:
    """S of every image and class."""
    if not isinstance(request.score, str):
        scores = request.score(output)
        if not isinstance(scores, Tensor) or scores.shape != request.images.shape[:1]:
            description = (
                list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            )
            raise UserError(
                f"the score callable gave {description} for {len(request.images)} images: "
                f"it must return one score an image, [{len(request.images)}]"
            )
        if request.grad == "none" and len(request.images) > 1:
            _check_independent_scores(request.score, output)
        return upcast(scores)[:, None]
    logits = upcast(check_output_logits(request, output))
    class_scores = probabilities(logits) if request.score == "probability" else logits
    return class_scores.gather(1, class_columns(classes))


def _check_independent_scores(score: Callable[..., Tensor], output: object) -> None:
    """Refuse a score that mixes images: each one's depends on its own output alone."""
    leaves, structure = tree_flatten(output)
    detached_leaves = [
        leaf.detach().requires_grad_()
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
        else leaf
        for leaf in leaves
    ]
    with torch.enable_grad():
        scores = score(tree_unflatten(detached_leaves, structure))
    batch_leaves = [
        leaf for leaf in detached_leaves if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    batch_leaves = [leaf for leaf in batch_leaves if leaf.dim() > 0 and len(leaf) == len(scores)]
    if batch_leaves and scores.requires_grad and any(measure_mixing(scores, batch_leaves)):
        raise UserError(
            "the score callable mixes the images of a batch: let each image's score depend on "
            "its own output alone, or give one image at a time"
        )


def class_columns(classes: Tensor) -> Tensor:
    """Classes as [B, N]."""
    return classes if classes.dim() == 2 else classes[:, None]


def resolve_classes(request: Request, output: object) -> Tensor:
    """Classes as [B] or [B, C] on the images' device."""
    count, device = len(request.images), request.images.device
    if not isinstance(request.score, str):
        return torch.full((count,), -1, device=device)
    if request.classes is None:
        return check_output_logits(request, output).detach().argmax(1)
    if isinstance(request.classes, TopClasses):
        if request.classes.count < 1:
            raise UserError(
                f"the top {request.classes.count} classes were asked for; give 1 or more"
            )
        logits = check_output_logits(request, output).detach()
        return logits.topk(min(request.classes.count, logits.shape[1]), 1).indices
    try:
        class_numbers = torch.as_tensor(request.classes)
    except (TypeError, ValueError):
        raise UserError(f"classes are {request.classes!r}: give class numbers (integers)") from None
    if class_numbers.is_floating_point() or class_numbers.dtype == torch.bool:
        raise UserError(f"classes are {class_numbers.dtype}: give class numbers (integers)")
    class_numbers = class_numbers.long()
    if class_numbers.dim() == 0:
        class_numbers = class_numbers.expand(count)
    if class_numbers.dim() > 2 or class_numbers.shape[0] != count:
        raise UserError(
            f"classes have the shape {list(class_numbers.shape)} for {count} images: give None, "
            "one "
            f"number, [{count}], or [{count}, C] for several classes an image"
        )
    outputs = check_output_logits(request, output).shape[1]
    # Looking at numbers on an accelerator would wait for it; there indexing itself checks.
    if class_numbers.device.type == "cpu" and class_numbers.numel():
        low, high = int(class_numbers.min()), int(class_numbers.max())
        if low < 0 or high >= outputs:
            invalid = low if low < 0 else high
            raise UserError(
                f"class {invalid} does not exist: the network has {outputs} classes, "
                f"0 to {outputs - 1}"
            )
    return class_numbers.to(device)


def check_output_logits(request: Request, output: object) -> Tensor:
    """The network's output if it is logits [B, classes], else a UserError that says what to do."""
    has_image_rows = (
        isinstance(output, Tensor) and output.dim() == 2 and len(output) == len(request.images)
    )
    is_dense = isinstance(output, Tensor) and output.layout == torch.strided
    if isinstance(output, Tensor) and has_image_rows and is_dense and output.is_floating_point():
        return output
    description = f"a {type(output).__name__}"
    if isinstance(output, Tensor) and not is_dense:
        description = f"a sparse tensor {list(output.shape)}"
    elif isinstance(output, Tensor):
        description = (
            f"{list(output.shape)}{'' if output.is_floating_point() else f' {output.dtype}'}"
        )
    raise UserError(
        f"{type(unwrap(request.network)).__name__} gives {description}, not logits "
        f"[{len(request.images)}, classes]: give logits=, a function that takes them out of it, or "
        "score=, a function of that output which returns one score an image"
    )


def check_request_options(score: Score, classes: Classes, grad: Grad, layout: Layout) -> None:
    """Refuse words that mean nothing, before anything runs."""
    if isinstance(score, str) and score not in ("logit", "probability"):
        raise UserError(f"no score '{score}'; there are: 'logit', 'probability', or a callable")
    if not isinstance(score, str) and classes is not None:
        raise UserError(
            "classes and a callable score were both given: let the callable choose the class, "
            "and leave out classes"
        )
    if grad not in ("none", "activations", "full"):
        raise UserError(f"no grad '{grad}'; there are: 'none', 'activations', 'full'")
    if isinstance(layout, str) and layout not in get_args(Kind):
        raise UserError(
            f"no layout '{layout}'; there are: 'auto', 'channels_first', 'channels_last', "
            "'tokens', or a callable"
        )


def check_image_batch(images: Tensor) -> None:
    """Refuse what is no batch of images, before anything runs."""
    if not images.is_floating_point():
        raise UserError(f"images are {images.dtype}: give floats, such as pixels / 255")
    if images.dim() != 4:
        raise UserError(
            f"images have the shape {list(images.shape)}: give [batch, channels, height, width]; "
            "a single image is images[None]"
        )
    if not len(images):
        raise UserError(f"images have the shape {list(images.shape)}: give at least one image")


def check_separate_images(network: nn.Module, count: int) -> None:
    """Refuse what mixes images: one gradient serves all where none changes another's score.

    And what can't be explained at all.
    """
    inner, suspects = unwrap(network), check_explainable_network(network)
    if not any(_mixes(module, count) for module in suspects):
        return
    name, module = next(entry for entry in inner.named_modules() if _mixes(entry[1], count))
    if module.training:
        raise UserError(
            f"'{name}' is in train mode, where batch normalization mixes the images of a "
            "batch: call .eval() on the network first (grad='full' and 'activations' are for "
            "a training step)"
        )
    raise UserError(
        f"'{name}' keeps no running statistics, so batch normalization mixes the images "
        "of a batch even in eval mode: give one image at a time"
    )


def check_explainable_network(network: nn.Module) -> list[nn.Module]:
    """Refuse what has no layers, gradients or weights; returns the parts that were looked at."""
    inner = unwrap(network)
    suspects = [module for module in list_modules(inner) if isinstance(module, _SUSPECT)]
    check_explainable(inner, type(inner).__name__, suspects)
    return suspects


_SUSPECT = (_BatchNorm, *SUSPECT)


def _mixes(module: nn.Module, count: int) -> bool:
    return isinstance(module, _BatchNorm) and (
        module.training or (module.running_mean is None and count > 1)
    )


def upcast(values: Tensor) -> Tensor:
    """At least float32: what sums are made in."""
    return values if values.dtype == torch.float64 else values.float()
