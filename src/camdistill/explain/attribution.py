"""Maps at the pixels: gradient, gradient x input, SmoothGrad, integrated gradients.

Images x have channels; a map has one number a pixel. `Channels` says how: "sum" keeps the sign and
what a method promises of sums; "max_abs" is the largest magnitude (Simonyan et al. 2014, section
3.1).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.engine.memory import footprint, room
from camdistill.explain.engine.request import Classes, Request, Score, wide
from camdistill.explain.gradients import PIXELS, pixel_pass, request, stacked, unreachable
from camdistill.types import Images

Channels = Literal["sum", "max_abs"]
Logits = Callable[..., Tensor] | None
PixelMaps = Float[Tensor, "batch *classes height width"]
Attributions = Float[Tensor, "batch *classes channels height width"]


def over_channels(values: Attributions, channels: Channels) -> PixelMaps:
    """One number a pixel."""
    if channels not in ("sum", "max_abs"):
        raise ValueError(f"channels is {channels!r}; it is 'sum' or 'max_abs'")
    return values.sum(-3) if channels == "sum" else values.abs().amax(-3)


def gradient(
    network: nn.Module,
    images: Images,
    classes: Classes = None,
    *,
    channels: Channels = "max_abs",
    score: Score = "logit",
    logits: Logits = None,
) -> PixelMaps:
    """dS/dx, a saliency map: Simonyan et al. 2014, section 3, https://arxiv.org/abs/1312.6034.

    Arguments are those of `explain.gradcam.explain`.
    """
    found, _ = _gradients(request(network, images, [], classes, score=score, logits=logits))
    return over_channels(found, channels)


def gradient_x_input(
    network: nn.Module,
    images: Images,
    classes: Classes = None,
    *,
    channels: Channels = "sum",
    score: Score = "logit",
    logits: Logits = None,
) -> PixelMaps:
    """Gradient times input, x dS/dx: Shrikumar et al. 2016, https://arxiv.org/abs/1605.01713.

    Arguments are those of `explain.gradcam.explain`. x is the image as it is given: in [0, 1] black
    has no attribution.
    """
    found, asked = _gradients(request(network, images, [], classes, score=score, logits=logits))
    return over_channels(found * _beside(wide(images.detach()), asked), channels)


def smooth_grad(
    network: nn.Module,
    images: Images,
    classes: Classes = None,
    *,
    samples: int = 50,
    noise: float | int = 0.15,
    seed: int = 0,
    channels: Channels = "max_abs",
    score: Score = "logit",
    logits: Logits = None,
    memory: int | None = None,
) -> PixelMaps:
    """The mean gradient of noisy copies: Smilkov et al. 2017, https://arxiv.org/abs/1706.03825.

    Args:
        network: As for `explain.gradcam.explain`, like all that isn't named here.
        images: Likewise.
        classes: Likewise; None is the top class of the image without noise.
        samples: Noisy copies; the paper sees little gain above 50.
        noise: Standard deviation as a share of the image's range, max x - min x; the paper finds
            0.1 to 0.2 good.
        seed: Of the noise, which is the same for every image of a batch.
        channels: How the mean gradient becomes a map.
        score: Likewise.
        logits: Likewise.
        memory: Bytes that one forward and backward may take, about; None is 32 MiB on
            a CPU, 512 MiB elsewhere.
    """
    _demand_count("samples", samples)
    ask = _with_classes(request(network, images, [], classes, score=score, logits=logits))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(samples, *images.shape[1:], generator=generator)
    spread = noise * (images.amax((1, 2, 3)) - images.amin((1, 2, 3)))[:, None, None, None]

    def noisy(image: Tensor, step: Tensor) -> Images:
        return images[image] + spread[image] * drawn[step.cpu()].to(images)

    weights = torch.full((samples,), 1 / samples, dtype=torch.float64)
    return over_channels(_mean_gradient(ask, noisy, weights, memory), channels)


def integrated_gradients(
    network: nn.Module,
    images: Images,
    classes: Classes = None,
    *,
    baseline: float | int | Images = 0.0,
    steps: int = 50,
    channels: Channels = "sum",
    score: Score = "logit",
    logits: Logits = None,
    memory: int | None = None,
) -> PixelMaps:
    """(x - x') times the mean gradient between a baseline x' and x.

    Sundararajan et al. 2017, eq. 1, https://arxiv.org/abs/1703.01365. The integral is
    Gauss-Legendre's, exact for polynomials of degree 2 steps - 1. With enough steps a map sums to
    S(x) - S(x').

    Args:
        network: As for `explain.gradcam.explain`, like all that isn't named here.
        images: Likewise.
        classes: Likewise.
        baseline: The image that shows nothing: one value, such as black, or images.
        steps: Gradients taken on the way.
        channels: How the attributions become a map; only "sum" is complete.
        score: Likewise.
        logits: Likewise.
        memory: Bytes that one forward and backward may take, about; None is 32 MiB on
            a CPU, 512 MiB elsewhere.
    """
    _demand_count("steps", steps)
    ask = _with_classes(request(network, images, [], classes, score=score, logits=logits))
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    shares = torch.from_numpy((nodes + 1) / 2).to(images.device, wide(images).dtype)
    start = torch.as_tensor(baseline, dtype=images.dtype, device=images.device)
    start = start.expand_as(images)
    path = images.detach() - start

    def between(image: Tensor, step: Tensor) -> Images:
        there = wide(start[image]) + shares[step][:, None, None, None] * wide(path[image])
        return there.to(images.dtype)

    found = _mean_gradient(ask, between, torch.from_numpy(weights / 2), memory)
    assert isinstance(ask.classes, Tensor) or ask.classes is None, "they were made so"
    asked = torch.zeros(len(images)) if ask.classes is None else ask.classes
    return over_channels(found * _beside(wide(path), asked), channels)


def _gradients(ask: Request) -> tuple[Attributions, Tensor]:
    """dS/dx of every class asked for, and the classes."""
    done = pixel_pass(ask)
    found = []
    count = done.scores.shape[1]
    for column in range(count):
        gradients = done.gradients(column, last=column + 1 == count)
        if gradients is None:
            raise unreachable(ask)
        found.append(gradients[PIXELS])
    return stacked(found, done.classes), done.classes


def _mean_gradient(
    ask: Request,
    changed: Callable[[Tensor, Tensor], Images],
    weights: Tensor,
    memory: int | None,
) -> Attributions:
    """The weighted sum of gradients at changed images, in chunks of a stated size.

    Args:
        ask: With fixed classes.
        changed: Images by numbers of an image and of a step, both [n].
        weights: Of each step.
        memory: Bytes for one chunk.
    """
    images, steps = ask.images, len(weights)
    count = max(1, room(images, memory) // footprint(ask.network, images).with_graph)
    weights = weights.to(images.device, wide(images).dtype)
    pairs = torch.arange(len(images) * steps, device=images.device)
    total: Tensor | None = None
    for part in torch.split(pairs, count):
        image, step = part % len(images), part // len(images)
        classes = ask.classes[image] if isinstance(ask.classes, Tensor) else None
        asked = replace(ask, images=changed(image, step).detach(), classes=classes)
        with torch.no_grad():
            found, _ = _gradients(asked)
            weighted = found * weights[step].view(-1, *[1] * (found.dim() - 1))
            if total is None:
                total = weighted.new_zeros(len(images), *weighted.shape[1:])
            total.index_add_(0, image, weighted)
    assert total is not None, "there is a step"
    return total


def _with_classes(ask: Request) -> Request:
    """The request with the classes that the unchanged images have; none for a callable score."""
    if not isinstance(ask.score, str):
        return ask
    return replace(ask, classes=pixel_pass(ask).classes)


def _beside(images: Images, classes: Tensor) -> Tensor:
    """Images that multiply attributions [B, ...] or [B, C, ...]."""
    return images[:, None] if classes.dim() == 2 else images


def _demand_count(name: str, number: int) -> None:
    if number < 1:
        raise UserError(f"{name} is {number}: give 1 or more")
