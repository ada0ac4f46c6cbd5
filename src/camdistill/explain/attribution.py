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
from camdistill.explain.engine.memory import footprint, memory_budget
from camdistill.explain.engine.request import Classes, Request, Score, upcast
from camdistill.explain.gradients import (
    PIXELS,
    build_request,
    no_gradient_error,
    pixel_pass,
    stack_classes,
)
from camdistill.types import Images

Channels = Literal["sum", "max_abs"]
Logits = Callable[..., Tensor] | None
PixelMaps = Float[Tensor, "batch *classes height width"]
Attributions = Float[Tensor, "batch *classes channels height width"]


def reduce_channels(values: Attributions, channels: Channels) -> PixelMaps:
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

    Arguments are those of `explain.gradcam.explain_images`.
    """
    gradients, _ = _gradients(
        build_request(network, images, [], classes, score=score, logits=logits)
    )
    return reduce_channels(gradients, channels)


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

    Arguments are those of `explain.gradcam.explain_images`. x is the image as it is given: in
    [0, 1] black has no attribution.
    """
    gradients, target_classes = _gradients(
        build_request(network, images, [], classes, score=score, logits=logits)
    )
    return reduce_channels(
        gradients * _broadcast_images(upcast(images.detach()), target_classes), channels
    )


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
        network: Network as for `explain.gradcam.explain_images`, like all that isn't named here.
        images: Images as for `explain_images`.
        classes: Classes as for `explain_images`; None is the top class of the image without noise.
        samples: Noisy copies; the paper sees little gain above 50.
        noise: Standard deviation as a share of the image's range, max x - min x; the paper finds
            0.1 to 0.2 good.
        seed: Seed of the noise, which is the same for every image of a batch.
        channels: How the mean gradient becomes a map.
        score: Score as for `explain_images`.
        logits: Logits as for `explain_images`.
        memory: Bytes that one forward and backward may take, about; None is 32 MiB on
            a CPU, 512 MiB elsewhere.
    """
    _check_count("samples", samples)
    request = _fix_classes(build_request(network, images, [], classes, score=score, logits=logits))
    generator = torch.Generator().manual_seed(seed)
    noise_samples = torch.randn(samples, *images.shape[1:], generator=generator)
    spread = noise * (images.amax((1, 2, 3)) - images.amin((1, 2, 3)))[:, None, None, None]

    def noisy(image: Tensor, step: Tensor) -> Images:
        return images[image] + spread[image] * noise_samples[step.cpu()].to(images)

    weights = torch.full((samples,), 1 / samples, dtype=torch.float64)
    return reduce_channels(_mean_gradient(request, noisy, weights, memory), channels)


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
        network: Network as for `explain.gradcam.explain_images`, like all that isn't named here.
        images: Images as for `explain_images`.
        classes: Classes as for `explain_images`.
        baseline: The image that shows nothing: one value, such as black, or images.
        steps: Gradients taken on the way.
        channels: How the attributions become a map; only "sum" is complete.
        score: Score as for `explain_images`.
        logits: Logits as for `explain_images`.
        memory: Bytes that one forward and backward may take, about; None is 32 MiB on
            a CPU, 512 MiB elsewhere.
    """
    _check_count("steps", steps)
    request = _fix_classes(build_request(network, images, [], classes, score=score, logits=logits))
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    shares = torch.from_numpy((nodes + 1) / 2).to(images.device, upcast(images).dtype)
    start = torch.as_tensor(baseline, dtype=images.dtype, device=images.device)
    start = start.expand_as(images)
    path = images.detach() - start

    def between(image: Tensor, step: Tensor) -> Images:
        point = upcast(start[image]) + shares[step][:, None, None, None] * upcast(path[image])
        return point.to(images.dtype)

    mean_gradient = _mean_gradient(request, between, torch.from_numpy(weights / 2), memory)
    assert isinstance(request.classes, Tensor) or request.classes is None, "they were made so"
    target_classes = torch.zeros(len(images)) if request.classes is None else request.classes
    return reduce_channels(
        mean_gradient * _broadcast_images(upcast(path), target_classes), channels
    )


def _gradients(request: Request) -> tuple[Attributions, Tensor]:
    """dS/dx of every class asked for, and the classes."""
    gradient_pass = pixel_pass(request)
    gradients_by_class = []
    count = gradient_pass.scores.shape[1]
    for column in range(count):
        gradients = gradient_pass.gradients(column, last=column + 1 == count)
        if gradients is None:
            raise no_gradient_error(request)
        gradients_by_class.append(gradients[PIXELS])
    return stack_classes(gradients_by_class, gradient_pass.classes), gradient_pass.classes


def _mean_gradient(
    request: Request,
    change_images: Callable[[Tensor, Tensor], Images],
    weights: Tensor,
    memory: int | None,
) -> Attributions:
    """The weighted sum of gradients at changed images, in chunks of a stated size.

    Args:
        request: With fixed classes.
        change_images: Images by numbers of an image and of a step, both [n].
        weights: Weights of each step.
        memory: Bytes for one chunk.
    """
    images, steps = request.images, len(weights)
    count = max(1, memory_budget(images, memory) // footprint(request.network, images).with_graph)
    weights = weights.to(images.device, upcast(images).dtype)
    pairs = torch.arange(len(images) * steps, device=images.device)
    total: Tensor | None = None
    for part in torch.split(pairs, count):
        image, step = part % len(images), part // len(images)
        classes = request.classes[image] if isinstance(request.classes, Tensor) else None
        chunk_request = replace(
            request, images=change_images(image, step).detach(), classes=classes
        )
        with torch.no_grad():
            gradients, _ = _gradients(chunk_request)
            weighted = gradients * weights[step].view(-1, *[1] * (gradients.dim() - 1))
            if total is None:
                total = weighted.new_zeros(len(images), *weighted.shape[1:])
            total.index_add_(0, image, weighted)
    assert total is not None, "there is a step"
    return total


def _fix_classes(request: Request) -> Request:
    """The request with the classes that the unchanged images have; none for a callable score."""
    if not isinstance(request.score, str):
        return request
    return replace(request, classes=pixel_pass(request).classes)


def _broadcast_images(images: Images, classes: Tensor) -> Tensor:
    """Images that multiply attributions [B, ...] or [B, C, ...]."""
    return images[:, None] if classes.dim() == 2 else images


def _check_count(name: str, number: int) -> None:
    if number < 1:
        raise UserError(f"{name} is {number}: give 1 or more")
