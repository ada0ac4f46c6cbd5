"""Control maps that students learn from in place of a method's maps, on the same grid.

All are pure functions of rectified maps [n, h, w] and keep their shape. What is random depends on
the seed alone. Adebayo et al. 2018 (https://arxiv.org/abs/1810.03292) for edges and randomized
weights, Rong et al. 2022 (https://arxiv.org/abs/2202.00449) for the bias towards blur.
"""

import copy
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from camdistill.explain.maps import resize, upsample
from camdistill.measure.controls import center, sobel_edges
from camdistill.networks.teachers import Teacher
from camdistill.types import Images, Labels

Maps = Float[Tensor, "batch rows columns"]  # of another size than the images
Control = Literal[
    "random",
    "spectrum",
    "shuffled",
    "shuffled_in_class",
    "mean",
    "class_mean",
    "center",
    "edges",
    "randomized",
    "inverted",
    "blurred",
]
CONTROLS: tuple[Control, ...] = get_args(Control)
OF_NO_METHOD: tuple[Control, ...] = ("random", "center", "edges")  # the same for every method
ROWS = 4096  # images whose classes are compared with all at once
VERSION = 2  # goes up when any control changes


def control_maps(
    kind: Control,
    maps: Maps,
    classes: Int[Tensor, "labels"],
    images: Float[Tensor, "images channels height width"],
    seed: int,
) -> Maps:
    """The control of some maps; "randomized" needs the maps of `randomized` teacher instead.

    Args:
        kind: Which control.
        maps: The method's, rectified.
        classes: The class that each map is of.
        images: In [0, 1]; of any size.
        seed: Seed of what is random.
    """
    if len(maps) != len(classes) or len(maps) != len(images):
        raise ValueError(f"{len(maps)} maps, {len(classes)} classes, {len(images)} images")
    grid = (maps.shape[-2], maps.shape[-1])
    if kind == "random":
        return uniform(maps, seed)
    if kind == "spectrum":
        return spectrum_noise(maps, seed)
    if kind == "shuffled":
        return shuffle_in_class(maps, torch.zeros_like(classes), seed)
    if kind == "shuffled_in_class":
        return shuffle_in_class(maps, classes, seed)
    if kind == "mean":
        return maps.mean(0, keepdim=True).expand_as(maps).contiguous()
    if kind == "class_mean":
        return class_mean(maps, classes)
    if kind == "center":
        return resize(center(images), grid).to(maps).contiguous()
    if kind == "edges":
        return resize(sobel_edges(images), grid).to(maps)
    if kind == "inverted":
        return maps.amax((1, 2), keepdim=True) - maps
    if kind == "blurred":
        return blur_and_restore(maps)
    raise ValueError(f"{kind!r} is not made from maps; it is one of {CONTROLS} but 'randomized'")


def uniform(maps: Maps, seed: int) -> Maps:
    """Every cell uniform in [0, 1)."""
    return torch.rand(maps.shape, generator=_generator(seed)).to(maps)


def spectrum_noise(maps: Maps, seed: int) -> Maps:
    """Noise with the mean and the power spectrum of each map: random phases, nothing else.

    The phases are those of white noise, so that the result is real. Values may be negative.
    """
    wide = maps.double()
    noise = torch.fft.rfft2(torch.randn(maps.shape, generator=_generator(seed)).double())
    phases = noise / noise.abs()
    phases[..., 0, 0] = 1
    spectrum = torch.fft.rfft2(wide.cpu())
    spectrum[..., 1:, :] = spectrum[..., 1:, :].abs().to(spectrum.dtype)
    spectrum[..., 0, 1:] = spectrum[..., 0, 1:].abs().to(spectrum.dtype)
    size = (maps.shape[-2], maps.shape[-1])
    colored_noise: Tensor = torch.fft.irfft2(spectrum * phases, s=size)
    return colored_noise.to(maps)


def shuffle_in_class(maps: Maps, classes: Labels, seed: int) -> Maps:
    """Every image gets the map of another image of its class; one alone in its class keeps its own.

    Of one class, this is a shuffle of all.
    """
    order = torch.randperm(len(maps), generator=_generator(seed)).to(classes.device)
    order = order[classes[order].argsort(stable=True)]
    ends = classes.bincount().cumsum(0).tolist()
    by_class = [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    donors = torch.cat([members.roll(1) for members in by_class])
    shuffled_maps = torch.empty_like(maps)
    shuffled_maps[order] = maps[donors]
    return shuffled_maps


def class_mean(maps: Maps, classes: Labels) -> Maps:
    """The mean map of each image's class."""
    means = []
    for some in torch.split(classes, ROWS):
        same = (some[:, None] == classes[None, :]).to(maps)
        means.append(same @ maps.flatten(1) / same.sum(1, keepdim=True))
    return torch.cat(means).view_as(maps)


def blur_and_restore(maps: Maps) -> Maps:
    """Each map averaged to half its grid and interpolated back."""
    height, width = maps.shape[1:]
    coarse = resize(maps, (max(1, height // 2), max(1, width // 2)))
    return upsample(coarse, (height, width))


def mix_maps(maps: Maps, others: Maps, share: float) -> Maps:
    """Maps times `share` and others times 1 - share, each map divided by its L2 norm before.

    Args:
        maps: Rectified maps.
        others: Such as shuffled ones.
        share: In [0, 1]; 1 is `maps`, 0 `others`.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it lies in [0, 1]")
    first, second = (F.normalize(part.flatten(1)).view_as(part) for part in (maps, others))
    return share * first + (1 - share) * second


def randomize_weights(teacher: Teacher, images: Images, seed: int) -> Teacher:
    """A copy of a teacher with every weight drawn anew (He et al. 2015): the architecture alone.

    Normalizations get weight 1 and bias 0, and those of batches the statistics of the given images:
    with those of the trained weights a deep random network's activations overflow or die out.

    Args:
        teacher: It is not changed.
        images: Some hundred training images in [0, 1].
        seed: Seed of the weights.
    """
    bare = copy.deepcopy(teacher.network).train()
    generator = _generator(seed)
    for module in bare.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_parameters()
            module.momentum = None  # a plain average over the images
            continue
        parameters = dict(module.named_parameters(recurse=False))
        scales = all(value.ndim < 2 for value in parameters.values())  # a normalization
        for name, weight in parameters.items():
            random_weight = torch.randn(weight.shape, generator=generator)
            # He's deviation for weights; biases, which have one axis, are 0
            deviation = (2 / weight[0].numel()) ** 0.5 if weight.ndim > 1 else 0.0
            weight.data.copy_(
                random_weight * deviation + float(scales and not name.endswith("bias"))
            )
    with torch.no_grad():
        bare(teacher.normalize(images))
    return Teacher.from_network(
        bare, teacher.mean.flatten().tolist(), teacher.std.flatten().tolist()
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
