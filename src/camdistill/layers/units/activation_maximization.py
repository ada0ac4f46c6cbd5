"""Activation maximization: images optimized to excite units, many at a time.

The image is parameterized by its spectrum and is moved a little before every step, so that what it
shows is robust (Olah et al. 2017, https://distill.pub/2017/feature-visualization, "The Enemy of
Feature Visualization"). The objective is the unit in the middle of the layer before its ReLU: after
it, a unit that is off has no gradient; and the mean over places of a convolution before it knows
nothing but the mean color.

A nearly gray image may leave all units off that the layer is made of, and then it has no gradient:
such a start gets more contrast. A unit that is not excited clearly more than by random images
(`random_images`) gets a second try: from the best of many random starts, with an image that
stays where it is, and wherever in the layer it is most excited. What is excited no more than by
random images even then is called failed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from camdistill.layers.units.image_spectra import COLORS, draw_spectra, render_spectra
from camdistill.layers.units.jitter import move_images
from camdistill.layers.units.random_images import RandomLevels, random_levels, unit_values
from camdistill.networks.capture import unwrap
from camdistill.types import Images, PerImage

__all__ = ["COLORS", "ExcitingImages", "maximize_activation", "render_spectra"]

START = 0.01  # standard deviation of the first spectrum
CONTRASTS = (1.0, 3.0, 10.0, 30.0, 100.0)  # factors of it, until there is a gradient
CLEAR_MARGIN = 1.25  # times what random images do: with less there is a second try
SECOND_STARTS = 64  # random spectra of the second try, at contrasts of 0.1 to 1

Score = Callable[[Tensor], Tensor]
Spectra = Float[Tensor, "images channels rows half 2"]


@dataclass(frozen=True)
class ExcitingImages:
    """Images that excite units.

    Attributes:
        units: Channels.
        images: In [0, 1], one a unit.
        reached: What the layer gives for the unit on the image as it is, after its non-linearity
            also where what goes into it was excited: its maximum over places.
        natural: The largest over natural images, NaN where unknown; `reached / natural` above 1
            says that the image is further than anything in the data.
        random: The largest over places that 99.9 % of random images stay below, as `reached` is.
        failed: Whether the image excites the unit no more than that, or leaves it silent.
    """

    units: tuple[int, ...]
    images: Images
    reached: PerImage
    natural: PerImage
    random: PerImage
    failed: Bool[Tensor, "batch"]

    @property
    def ratio(self) -> PerImage:
        """Reached over natural; NaN where the natural maximum is unknown or not positive."""
        natural = torch.where(self.natural > 0, self.natural, math.nan)
        return self.reached / natural


def maximize_activation(
    network: nn.Module,
    layer: str,
    units: Sequence[int],
    *,
    before: bool = False,
    size: tuple[int, int],
    channels: int = 3,
    natural: Sequence[float] | None = None,
    levels: RandomLevels | None = None,
    steps: int = 512,
    rate: float = 0.05,
    seed: int = 0,
    robust: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> ExcitingImages:
    """Images that excite a layer's units, all units at once: one image a unit.

    Args:
        network: Takes images in [0, 1]; left as it is.
        layer: A layer; see `networks.capture`.
        units: Channels.
        before: Whether what the layer is given is meant, not what it gives: say so of a ReLU.
        size: Height and width of the images.
        channels: 3 (decorrelated colors) or another number (independent).
        natural: The units' largest activations at this layer over natural images.
        levels: What random images do to all units of the layer; None asks the network.
        steps: Steps of Adam, in each of at most two tries.
        rate: Its learning rate.
        seed: Seed of the start and of the movements; drawn on the CPU, so the same on any device.
        robust: Whether images are moved before every step, by amounts that fit their size.
        on_step: Called with the number of steps done in the first try.

    Raises:
        UserError: The layer has no such unit.
    """
    device = next((weight.device for weight in unwrap(network).parameters()), torch.device("cpu"))
    targets = _Targets(network, layer, tuple(units), before, size, channels)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad(), _freeze(network):
        start = draw_spectra(len(units), channels, size, generator).to(device) * START
        start = _add_contrast(targets, start)
        if levels is None:
            levels = random_levels(network, {layer: before}, size=size, channels=channels)[layer]
        unit_indices = torch.tensor(targets.units)
        random_excitation, random_output = (
            levels.excitation[unit_indices],
            levels.output[unit_indices],
        )
        jitter_generator = generator if robust else None
        attempt = _ascend(targets, start, _center_value, steps, rate, jitter_generator, on_step)
        rows = (
            attempt.has_failed(random_excitation + (CLEAR_MARGIN - 1) * random_excitation.abs())
            .nonzero()
            .flatten()
        )
        if len(rows):
            retry_targets = targets.select(rows)
            retry_start = _best_starts(
                retry_targets, torch.Generator().manual_seed(seed + 1), device
            )
            retry = _ascend(retry_targets, retry_start, _largest_value, steps, rate, None, None)
            attempt = attempt.keep_better(rows, retry)
        failed = attempt.has_failed(random_excitation)
    natural_maxima = torch.full((len(units),), math.nan)
    if natural is not None:
        natural_maxima = torch.tensor([float(value) for value in natural])
    return ExcitingImages(
        tuple(units), attempt.images, attempt.reached, natural_maxima, random_output, failed
    )


@dataclass(frozen=True)
class _Targets:
    """Units of a layer, and the images that are made for them: one a unit."""

    network: nn.Module
    layer: str
    units: tuple[int, ...]
    before: bool
    size: tuple[int, int]
    channels: int

    def select(self, rows: Tensor) -> "_Targets":
        """Some of the units."""
        units = tuple(self.units[row] for row in rows.tolist())
        return _Targets(self.network, self.layer, units, self.before, self.size, self.channels)

    def images(self, spectra: Spectra) -> Images:
        shape = (len(spectra), self.channels, *self.size)
        return render_spectra(torch.view_as_complex(spectra), shape)

    def values(self, images: Images) -> tuple[Tensor, Tensor]:
        """What excites the layer's units and what they give, [B, K, h, w]."""
        layers = {self.layer: self.before}
        return unit_values(self.network, layers, images, self.units)[self.layer]

    def pick_units(self, values: Tensor) -> Tensor:
        """Of each image its own unit, [B, h, w]."""
        rows = torch.arange(len(self.units), device=values.device)
        return values[rows, torch.tensor(self.units, device=values.device)]


@dataclass(frozen=True)
class _Attempt:
    """Images, and the units' largest values over places there, on the CPU."""

    images: Images
    excitation: PerImage
    reached: PerImage
    silent: Bool[Tensor, "batch"]

    def has_failed(self, level: PerImage) -> Bool[Tensor, "batch"]:
        """Whether random images excite a unit as much, or it gives nothing at all."""
        return ~(self.excitation > level) | self.silent

    def keep_better(self, rows: Tensor, other: "_Attempt") -> "_Attempt":
        """With the images of another try for some units where they excite these more."""
        rows = rows.cpu()
        improved = other.excitation > self.excitation[rows]
        other_rows, rows = improved.nonzero().flatten(), rows[improved]

        def replace_rows(current: Tensor, replacement: Tensor) -> Tensor:
            changed = current.clone()
            changed[rows] = replacement[other_rows]
            return changed

        return _Attempt(
            replace_rows(self.images, other.images),
            replace_rows(self.excitation, other.excitation),
            replace_rows(self.reached, other.reached),
            replace_rows(self.silent, other.silent),
        )


def _ascend(
    targets: _Targets,
    start: Spectra,
    score: Score,
    steps: int,
    rate: float,
    jitter_generator: torch.Generator | None,
    on_step: Callable[[int], None] | None,
) -> _Attempt:
    """What Adam makes of a start; the images are moved where there is a generator for it."""
    spectra = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([spectra], lr=rate)
    for step in range(steps):
        images = targets.images(spectra)
        jittered = images if jitter_generator is None else move_images(images, jitter_generator)
        loss = -score(targets.pick_units(targets.values(jittered)[0])).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if on_step is not None:
            on_step(step + 1)
    with torch.no_grad():
        images = targets.images(spectra)
        # Not only what the layer is given: a bounded layer's natural maximum is of another scale.
        excitation, output = (
            targets.pick_units(values).float().cpu() for values in targets.values(images)
        )
    silent = (output == 0).flatten(1).all(1)
    return _Attempt(images.cpu(), excitation.amax((1, 2)), output.amax((1, 2)), silent)


def _center_value(values: Float[Tensor, "batch rows columns"]) -> PerImage:
    return values[:, values.shape[1] // 2, values.shape[2] // 2]


def _largest_value(values: Float[Tensor, "batch rows columns"]) -> PerImage:
    """The largest over places, and a little of all others, which may have the only gradient."""
    return values.amax((1, 2)) + 0.01 * values.mean((1, 2))


def _has_gradient(targets: _Targets, spectra: Spectra, score: Score) -> Bool[Tensor, "images"]:
    variable = spectra.detach().requires_grad_()
    total = score(targets.pick_units(targets.values(targets.images(variable))[0])).sum()
    if not total.requires_grad:
        return torch.zeros(len(spectra), dtype=torch.bool, device=spectra.device)
    (gradient,) = torch.autograd.grad(total, variable)
    return (gradient != 0).flatten(1).any(1)


def _add_contrast(targets: _Targets, start: Spectra) -> Spectra:
    """The start, with as much more contrast as a unit needs to have a gradient."""
    contrasted = start
    for factor in CONTRASTS:
        without_gradient = ~_has_gradient(targets, contrasted, _center_value)
        if not bool(without_gradient.any()):
            break
        contrasted = torch.where(
            without_gradient[:, None, None, None, None], start * factor, contrasted
        )
    return contrasted


@torch.no_grad()
def _best_starts(targets: _Targets, generator: torch.Generator, device: torch.device) -> Spectra:
    """Each unit's most exciting one of many random spectra, if it can be one with a gradient."""
    starts = draw_spectra(SECOND_STARTS, targets.channels, targets.size, generator).to(device)
    spectra = starts * torch.logspace(-1, 0, len(starts), device=device)[:, None, None, None, None]
    unit_indices = torch.tensor(targets.units, device=device)
    scores = torch.cat(
        [_scores(targets, part) for part in torch.split(spectra, len(unit_indices))]
    )[:, unit_indices]
    order = scores.nan_to_num(-math.inf).argsort(dim=0, descending=True, stable=True)
    best = spectra[order[0]]
    waiting = torch.ones(len(unit_indices), dtype=torch.bool, device=device)
    for rank in order[:8]:
        with torch.enable_grad():
            has_gradient = _has_gradient(targets, spectra[rank], _largest_value) & waiting
        best = torch.where(has_gradient[:, None, None, None, None], spectra[rank], best)
        waiting &= ~has_gradient
        if not bool(waiting.any()):
            break
    return best


def _scores(targets: _Targets, spectra: Spectra) -> Float[Tensor, "images units"]:
    """Of every image, how far it excites each of the layer's units anywhere."""
    values = targets.values(targets.images(spectra))[0]
    return _largest_value(values.flatten(0, 1)).view(values.shape[:2])


@contextmanager
def _freeze(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient of weights, put back afterwards."""
    inner = unwrap(network)  # a teacher doesn't count its network among its modules
    training_modes = [(module, module.training) for module in inner.modules()]
    requires_grad = [(weight, weight.requires_grad) for weight in inner.parameters()]
    try:
        inner.eval()
        for weight, _ in requires_grad:
            weight.requires_grad_(False)
        yield
    finally:
        for module, mode in training_modes:
            module.training = mode
        for weight, required in requires_grad:
            weight.requires_grad_(required)
