"""What replaces the removed pixels of an image.

The pictures (`gaussian_blur`, `mean_color`, `constant_images`) are made once for each image and
show wherever pixels are removed. `noisy_linear` depends on what is removed. It hides the shape of
the hole, which by itself reveals the class to a network (Rong et al. 2022,
https://arxiv.org/abs/2202.00449). A data set that can draw its images again gives a callable in
place of any of these.

Images are in [0, 1], so that black is 0 and gray is 0.5, and the network normalizes them itself.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from camdistill.errors import UserError, nearest
from camdistill.types import Images

Baseline = Literal["blur", "mean", "gray", "black"]
Removed = Bool[Tensor, "batch height width"]
Filler = Callable[[Images, Removed], Images]
"""Gives whole images: the given ones where nothing is removed, something else where it is."""

BASELINES: tuple[Baseline, ...] = ("blur", "mean", "gray", "black")
_DIRECT, _DIAGONAL = 1 / 6, 1 / 12  # weights of a pixel's neighbors (Rong et al., section 4.2)
_STEPS_BETWEEN_LOOKS = 8  # reading the residuals waits for an accelerator


def baseline(images: Images, kind: Baseline) -> Images:
    """Returns the picture that shows where an image is removed.

    Args:
        images: In [0, 1].
        kind: "blur" keeps colors and loses shapes. "mean" is the image's mean color. "gray" is 0.5.
            "black" is 0, which at 32 pixels measures the black more than the removal.

    Raises:
        UserError: If no baseline has that name.
    """
    if kind == "blur":
        return gaussian_blur(images)
    if kind == "mean":
        return mean_color(images)
    if kind not in BASELINES:
        raise UserError(f"no baseline '{kind}'; {nearest(kind, BASELINES)}")
    return constant_images(images, 0.5 if kind == "gray" else 0.0)


def gaussian_blur(images: Images, sigma: float | int | None = None) -> Images:
    """Blurs images with a Gaussian and reflected borders.

    Args:
        images: Any scale.
        sigma: Standard deviation in pixels. None is an eighth of the shorter side, as a weaker blur
            leaks outlines.
    """
    height, width = images.shape[-2:]
    if sigma is None:
        sigma = min(height, width) / 8
    float_images = images if images.dtype == torch.float64 else images.float()
    rows = _blur_matrix(height, sigma).to(float_images)
    columns = _blur_matrix(width, sigma).to(float_images)
    with torch.autocast(images.device.type, enabled=False):
        return (rows @ float_images @ columns.T).to(images.dtype)


def mean_color(images: Images) -> Images:
    """Returns images that have each image's mean color in every pixel."""
    float_images = images if images.dtype == torch.float64 else images.float()
    return float_images.mean((2, 3), keepdim=True).to(images.dtype).expand_as(images)


def constant_images(images: Images, value: float | int) -> Images:
    """Returns images that have one value in every pixel."""
    return images.new_full((), value).expand_as(images)


def noisy_linear(
    images: Images,
    removed: Removed,
    *,
    noise: float | int = 0.01,
    generator: torch.Generator | None = None,
    tolerance: float = 1e-5,
) -> Images:
    """Replaces each removed pixel by the weighted mean of its eight neighbors, plus a little noise.

    Rong et al. 2022, section 4.2: direct neighbors have the weight 1/6, diagonal ones 1/12. At the
    border the weights are shared among the neighbors that exist. All images' equations are solved
    at once, on their device, by conjugate gradients.

    Args:
        images: Any scale.
        removed: True where a pixel is to be filled in.
        noise: Standard deviation of the Gaussian noise on the filled pixels. The linear fill is
            smoother than any image, and a network can detect that.
        generator: Generator of the noise; not needed without noise.
        tolerance: Norm of the equations' residual at which an image is finished, relative to the
            right-hand side's. At 1e-5 the largest error was 2e-5 at 32 pixels, 1e-4 at 64 (16 holes
            each, up to 98 % of the image) and 7e-4 at 224 (3 holes, up to 90 %).

    Raises:
        ValueError: If an image has no pixel left to fill it from, or noise has no generator.
    """
    if noise and generator is None:
        raise ValueError("noise needs a generator: give one, or noise=0")
    if bool(removed.flatten(1).all(1).any()):
        raise ValueError("an image has nothing left to be filled in from: remove fewer pixels")
    float_images = images.detach() if images.dtype == torch.float64 else images.detach().float()
    float_images = float_images.contiguous()
    hole = removed[:, None]
    with torch.autocast(images.device.type, enabled=False):
        filled = _solve_holes(float_images, hole.to(float_images.dtype), tolerance)
    if noise:
        assert generator is not None, "asked above"
        noise_samples = torch.randn(filled.shape, generator=generator, device=generator.device)
        filled = filled + noise * noise_samples.to(filled)
    return torch.where(hole, filled, float_images).to(images.dtype)


def _blur_matrix(length: int, sigma: float | int) -> Float[Tensor, "length length"]:
    """A blur along one axis as a matrix; mirrored borders fold its tails back."""
    reach = min(int(4 * sigma + 0.5), length - 1)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    places = torch.arange(length)[:, None] + offsets
    places = torch.where(places < 0, -places - 1, places)
    places = torch.where(places >= length, 2 * length - 1 - places, places)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    matrix.scatter_add_(1, places, (weights / weights.sum()).expand(length, -1).contiguous())
    return matrix


def _solve_holes(images: Tensor, hole: Tensor, tolerance: float) -> Tensor:
    """Solves (degree - W) u = W known on the holes, independently for every image and channel.

    The matrix is symmetric and positive definite, because every hole touches a known pixel. Images
    that are finished leave the batch, so that easy ones don't wait for hard ones.
    """
    known = images * (1 - hole)
    degree = _neighbors(torch.ones_like(hole[:1]))
    target = hole * _neighbors(known)
    # Beside black pixels the right-hand side is 0: the second term allows for float32's rounding.
    goal = tolerance * _norm(target) + 1e-6 * _norm(known)
    solution = hole * _guess(known, 1 - hole)
    active = torch.arange(len(images), device=images.device)
    guess, inside = solution, hole
    residual = target - inside * (degree * guess - _neighbors(guess))
    direction = residual / degree
    energy = _dot(residual, direction)
    # Exact arithmetic needs at most as many steps as pixels; rounding may add some.
    for step in range(4 * hole[0].numel()):
        if step % _STEPS_BETWEEN_LOOKS == 0:
            unfinished = (_norm(residual) > goal).flatten(1).any(1)
            count = int(unfinished.sum())
            if count < len(active):
                solution = solution.index_copy(0, active, guess)
                if count == 0:
                    return solution
                active, inside, goal = active[unfinished], inside[unfinished], goal[unfinished]
                guess, residual = guess[unfinished], residual[unfinished]
                direction, energy = direction[unfinished], energy[unfinished]
        product = _neighbors(direction).neg_().addcmul_(degree, direction).mul_(inside)
        curvature = _dot(direction, product)
        step_size = torch.where(curvature > 0, energy / torch.where(curvature > 0, curvature, 1), 0)
        guess.addcmul_(step_size, direction)
        residual.addcmul_(step_size, product, value=-1)
        scaled = residual / degree
        before, energy = energy, _dot(residual, scaled)
        beta = torch.where(before > 0, energy / torch.where(before > 0, before, 1), 0)
        direction = direction.mul_(beta).add_(scaled)
    return solution.index_copy(0, active, guess)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Sum over each channel's pixels of the products."""
    return (first * second).sum((2, 3), keepdim=True)


def _norm(values: Tensor) -> Tensor:
    return _dot(values, values).sqrt()


def _neighbors(values: Tensor) -> Tensor:
    """Weighted sum of each pixel's neighbors; pixels outside the image count as 0."""
    row = [_DIAGONAL, _DIRECT, _DIAGONAL]
    kernel = values.new_tensor([row, [_DIRECT, 0.0, _DIRECT], row])
    planes = values.shape[0] * values.shape[1]
    # All images as channels of one image: twice as fast as a batch on a CPU.
    flat = values.reshape(1, planes, *values.shape[2:])
    sums = F.conv2d(flat, kernel.expand(planes, 1, 3, 3), padding=1, groups=planes)
    return sums.view_as(values)


def _guess(known: Tensor, weight: Tensor) -> Tensor:
    """Holes filled from a pyramid of means: close to the solution, so that few steps remain."""
    if min(known.shape[-2:]) == 1:
        total = weight.sum((2, 3), keepdim=True)
        return known.sum((2, 3), keepdim=True) / torch.where(total > 0, total, 1)
    share = F.avg_pool2d(weight, 2, ceil_mode=True)
    mean = F.avg_pool2d(known, 2, ceil_mode=True) / torch.where(share > 0, share, 1)
    filled = (share > 0).to(known.dtype)
    coarse = mean * filled + _guess(mean * filled, filled) * (1 - filled)
    return F.interpolate(coarse, size=known.shape[-2:], mode="bilinear", align_corners=False)
