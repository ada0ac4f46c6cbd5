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
from camdistill.explain.separation import mixed
from camdistill.explain.tokens import Kind, Layout
from camdistill.networks.capture import bare, parts
from camdistill.networks.network_checks import SUSPECT, check_explainable
from camdistill.perturb.probability import probabilities
from camdistill.types import Images

Grad = Literal["none", "activations", "full"]
Score = Literal["logit", "probability"] | Callable[..., Tensor]


@dataclass(frozen=True)
class Top:
    """Each image's own likeliest classes, the likeliest first; all of them where there are fewer.

    Attributes:
        count: How many, at least 1.
    """

    count: int


ClassNumbers = int | Sequence[int] | Tensor | None
Classes = ClassNumbers | Top


@dataclass(frozen=True)
class Request:
    """The arguments of `explain`."""

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


def score_columns(ask: Request, output: object, classes: Tensor) -> Float[Tensor, "batch asked"]:
    """S of every image and class."""
    if not isinstance(ask.score, str):
        scores = ask.score(output)
        if not isinstance(scores, Tensor) or scores.shape != ask.images.shape[:1]:
            gave = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise UserError(
                f"the score callable gave {gave} for {len(ask.images)} images: "
                f"it must return one score an image, [{len(ask.images)}]"
            )
        if ask.grad == "none" and len(ask.images) > 1:
            _demand_own_outputs(ask.score, output)
        return wide(scores)[:, None]
    logits = wide(demand_logits(ask, output))
    values = probabilities(logits) if ask.score == "probability" else logits
    return values.gather(1, columns(classes))


def _demand_own_outputs(score: Callable[..., Tensor], output: object) -> None:
    """Refuse a score that mixes images: each one's depends on its own output alone."""
    leaves, form = tree_flatten(output)
    free = [
        leaf.detach().requires_grad_()
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
        else leaf
        for leaf in leaves
    ]
    with torch.enable_grad():
        scores = score(tree_unflatten(free, form))
    asked = [leaf for leaf in free if isinstance(leaf, Tensor) and leaf.requires_grad]
    asked = [leaf for leaf in asked if leaf.dim() > 0 and len(leaf) == len(scores)]
    if asked and scores.requires_grad and any(mixed(scores, asked)):
        raise UserError(
            "the score callable mixes the images of a batch: let each image's score depend on "
            "its own output alone, or give one image at a time"
        )


def columns(classes: Tensor) -> Tensor:
    """Classes as [B, N]."""
    return classes if classes.dim() == 2 else classes[:, None]


def asked_classes(ask: Request, output: object) -> Tensor:
    """Classes as [B] or [B, C] on the images' device."""
    count, device = len(ask.images), ask.images.device
    if not isinstance(ask.score, str):
        return torch.full((count,), -1, device=device)
    if ask.classes is None:
        return demand_logits(ask, output).detach().argmax(1)
    if isinstance(ask.classes, Top):
        if ask.classes.count < 1:
            raise UserError(f"the top {ask.classes.count} classes were asked for; give 1 or more")
        logits = demand_logits(ask, output).detach()
        return logits.topk(min(ask.classes.count, logits.shape[1]), 1).indices
    try:
        given = torch.as_tensor(ask.classes)
    except (TypeError, ValueError):
        raise UserError(f"classes are {ask.classes!r}: give class numbers (integers)") from None
    if given.is_floating_point() or given.dtype == torch.bool:
        raise UserError(f"classes are {given.dtype}: give class numbers (integers)")
    given = given.long()
    if given.dim() == 0:
        given = given.expand(count)
    if given.dim() > 2 or given.shape[0] != count:
        raise UserError(
            f"classes have the shape {list(given.shape)} for {count} images: give None, one "
            f"number, [{count}], or [{count}, C] for several classes an image"
        )
    outputs = demand_logits(ask, output).shape[1]
    # Looking at numbers on an accelerator would wait for it; there indexing itself checks.
    if given.device.type == "cpu" and given.numel():
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= outputs:
            wrong = low if low < 0 else high
            raise UserError(
                f"class {wrong} does not exist: the network has {outputs} classes, "
                f"0 to {outputs - 1}"
            )
    return given.to(device)


def demand_logits(ask: Request, output: object) -> Tensor:
    """The network's output if it is logits [B, classes], else a UserError that says what to do."""
    given = isinstance(output, Tensor) and output.dim() == 2 and len(output) == len(ask.images)
    dense = isinstance(output, Tensor) and output.layout == torch.strided
    if isinstance(output, Tensor) and given and dense and output.is_floating_point():
        return output
    gave = f"a {type(output).__name__}"
    if isinstance(output, Tensor) and not dense:
        gave = f"a sparse tensor {list(output.shape)}"
    elif isinstance(output, Tensor):
        gave = f"{list(output.shape)}{'' if output.is_floating_point() else f' {output.dtype}'}"
    raise UserError(
        f"{type(bare(ask.network)).__name__} gives {gave}, not logits "
        f"[{len(ask.images)}, classes]: give logits=, a function that takes them out of it, or "
        "score=, a function of that output which returns one score an image"
    )


def demand_known(score: Score, classes: Classes, grad: Grad, layout: Layout) -> None:
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


def check_images(images: Tensor) -> None:
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


def demand_separate_images(network: nn.Module, count: int) -> None:
    """Refuse what mixes images: one gradient serves all where none changes another's score.

    And what can't be explained at all.
    """
    inner, suspects = bare(network), demand_explainable(network)
    if not any(_mixes(module, count) for module in suspects):
        return
    name, module = next(one for one in inner.named_modules() if _mixes(one[1], count))
    if module.training:
        raise UserError(
            f"'{name}' is in train mode, where batch normalisation mixes the images of a "
            "batch: call .eval() on the network first (grad='full' and 'activations' are for "
            "a training step)"
        )
    raise UserError(
        f"'{name}' keeps no running statistics, so batch normalisation mixes the images "
        "of a batch even in eval mode: give one image at a time"
    )


def demand_explainable(network: nn.Module) -> list[nn.Module]:
    """Refuse what has no layers, gradients or weights; returns the parts that were looked at."""
    inner = bare(network)
    suspects = [module for module in parts(inner) if isinstance(module, _SUSPECT)]
    check_explainable(inner, type(inner).__name__, suspects)
    return suspects


_SUSPECT = (_BatchNorm, *SUSPECT)


def _mixes(module: nn.Module, count: int) -> bool:
    return isinstance(module, _BatchNorm) and (
        module.training or (module.running_mean is None and count > 1)
    )


def wide(values: Tensor) -> Tensor:
    """At least float32: what sums are made in."""
    return values if values.dtype == torch.float64 else values.float()
