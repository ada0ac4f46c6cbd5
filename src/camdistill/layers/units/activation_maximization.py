"""Images made to excite a unit: activation maximisation, many units at a time.

The image is parameterised by its spectrum and is moved a little before every step, so that what it
shows is robust (Olah et al. 2017, https://distill.pub/2017/feature-visualization, "The Enemy of
Feature Visualization"). The objective is the unit in the middle of the layer before its ReLU: after
it, a unit that is off has no gradient; and the mean over places of a convolution before it knows
nothing but the mean colour.

A nearly grey image may leave all units off that the layer is made of, and then it has no gradient:
such a start gets more contrast. A unit that is not excited clearly more than by random images
(`layers.random_images`) gets a second try: from the best of many random starts, with an image that
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

from camdistill.layers.units.image_spectra import COLOURS, draw_spectra, painted
from camdistill.layers.units.jitter import move_images
from camdistill.layers.units.random_images import RandomLevels, random_levels, unit_values
from camdistill.networks.capture import unwrap
from camdistill.types import Images, PerImage

__all__ = ["COLOURS", "Maximised", "maximised", "painted"]

START = 0.01  # standard deviation of the first spectrum
CONTRASTS = (1.0, 3.0, 10.0, 30.0, 100.0)  # factors of it, until there is a gradient
CLEARLY = 1.25  # times what random images do: with less there is a second try
SECOND_STARTS = 64  # random spectra of the second try, at contrasts of 0.1 to 1

Score = Callable[[Tensor], Tensor]
Spectra = Float[Tensor, "images channels rows half 2"]


@dataclass(frozen=True)
class Maximised:
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
        known = torch.where(self.natural > 0, self.natural, math.nan)
        return self.reached / known


def maximised(
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
) -> Maximised:
    """Images that excite a layer's units, all units at once: one image a unit.

    Args:
        network: Takes images in [0, 1]; left as it is.
        layer: A layer; see `networks.capture`.
        units: Channels.
        before: Whether what the layer is given is meant, not what it gives: say so of a ReLU.
        size: Height and width of the images.
        channels: 3 (decorrelated colours) or another number (independent).
        natural: The units' largest activations at this layer over natural images.
        levels: What random images do to all units of the layer; None asks the network.
        steps: Of Adam, in each of at most two tries.
        rate: Its learning rate.
        seed: Of the start and of the movements; drawn on the CPU, so the same on any device.
        robust: Whether images are moved before every step, by amounts that fit their size.
        on_step: Called with the number of steps done in the first try.

    Raises:
        UserError: The layer has no such unit.
    """
    device = next((weight.device for weight in unwrap(network).parameters()), torch.device("cpu"))
    asked = _Asked(network, layer, tuple(units), before, size, channels)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad(), _frozen(network):
        start = draw_spectra(len(units), channels, size, generator).to(device) * START
        start = _with_gradient(asked, start)
        if levels is None:
            levels = random_levels(network, {layer: before}, size=size, channels=channels)[layer]
        picks = torch.tensor(asked.units)
        given, output = levels.given[picks], levels.output[picks]
        moves = generator if robust else None
        found = _ascended(asked, start, _middle, steps, rate, moves, on_step)
        rows = found.fails(given + (CLEARLY - 1) * given.abs()).nonzero().flatten()
        if len(rows):
            again = asked.of(rows)
            best = _best_starts(again, torch.Generator().manual_seed(seed + 1), device)
            second = _ascended(again, best, _anywhere, steps, rate, None, None)
            found = found.better(rows, second)
        failed = found.fails(given)
    known = torch.full((len(units),), math.nan)
    if natural is not None:
        known = torch.tensor([float(value) for value in natural])
    return Maximised(tuple(units), found.images, found.reached, known, output, failed)


@dataclass(frozen=True)
class _Asked:
    """Units of a layer, and the images that are made for them: one a unit."""

    network: nn.Module
    layer: str
    units: tuple[int, ...]
    before: bool
    size: tuple[int, int]
    channels: int

    def of(self, rows: Tensor) -> "_Asked":
        """Some of the units."""
        units = tuple(self.units[row] for row in rows.tolist())
        return _Asked(self.network, self.layer, units, self.before, self.size, self.channels)

    def images(self, spectra: Spectra) -> Images:
        shape = (len(spectra), self.channels, *self.size)
        return painted(torch.view_as_complex(spectra), shape)

    def values(self, images: Images) -> tuple[Tensor, Tensor]:
        """What excites the layer's units and what they give, [B, K, h, w]."""
        layers = {self.layer: self.before}
        return unit_values(self.network, layers, images, self.units)[self.layer]

    def own(self, values: Tensor) -> Tensor:
        """Of each image its own unit, [B, h, w]."""
        rows = torch.arange(len(self.units), device=values.device)
        return values[rows, torch.tensor(self.units, device=values.device)]


@dataclass(frozen=True)
class _Try:
    """Images, and the units' largest values over places there, on the CPU."""

    images: Images
    given: PerImage
    reached: PerImage
    silent: Bool[Tensor, "batch"]

    def fails(self, level: PerImage) -> Bool[Tensor, "batch"]:
        """Whether random images excite a unit as much, or it gives nothing at all."""
        return ~(self.given > level) | self.silent

    def better(self, rows: Tensor, other: "_Try") -> "_Try":
        """With the images of another try for some units where they excite these more."""
        rows = rows.cpu()
        here = other.given > self.given[rows]
        taken, rows = here.nonzero().flatten(), rows[here]

        def merged(mine: Tensor, theirs: Tensor) -> Tensor:
            changed = mine.clone()
            changed[rows] = theirs[taken]
            return changed

        return _Try(
            merged(self.images, other.images),
            merged(self.given, other.given),
            merged(self.reached, other.reached),
            merged(self.silent, other.silent),
        )


def _ascended(
    asked: _Asked,
    start: Spectra,
    score: Score,
    steps: int,
    rate: float,
    moves: torch.Generator | None,
    on_step: Callable[[int], None] | None,
) -> _Try:
    """What Adam makes of a start; the images are moved where there is a generator for it."""
    spectra = start.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([spectra], lr=rate)
    for step in range(steps):
        images = asked.images(spectra)
        moved = images if moves is None else move_images(images, moves)
        loss = -score(asked.own(asked.values(moved)[0])).sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if on_step is not None:
            on_step(step + 1)
    with torch.no_grad():
        images = asked.images(spectra)
        # Not only what the layer is given: a bounded layer's natural maximum is of another scale.
        given, output = (asked.own(values).float().cpu() for values in asked.values(images))
    silent = (output == 0).flatten(1).all(1)
    return _Try(images.cpu(), given.amax((1, 2)), output.amax((1, 2)), silent)


def _middle(values: Float[Tensor, "batch rows columns"]) -> PerImage:
    return values[:, values.shape[1] // 2, values.shape[2] // 2]


def _anywhere(values: Float[Tensor, "batch rows columns"]) -> PerImage:
    """The largest over places, and a little of all others, which may have the only gradient."""
    return values.amax((1, 2)) + 0.01 * values.mean((1, 2))


def _has_gradient(asked: _Asked, spectra: Spectra, score: Score) -> Bool[Tensor, "images"]:
    free = spectra.detach().requires_grad_()
    total = score(asked.own(asked.values(asked.images(free))[0])).sum()
    if not total.requires_grad:
        return torch.zeros(len(spectra), dtype=torch.bool, device=spectra.device)
    (gradient,) = torch.autograd.grad(total, free)
    return (gradient != 0).flatten(1).any(1)


def _with_gradient(asked: _Asked, start: Spectra) -> Spectra:
    """The start, with as much more contrast as a unit needs to have a gradient."""
    found = start
    for factor in CONTRASTS:
        blind = ~_has_gradient(asked, found, _middle)
        if not bool(blind.any()):
            break
        found = torch.where(blind[:, None, None, None, None], start * factor, found)
    return found


@torch.no_grad()
def _best_starts(asked: _Asked, generator: torch.Generator, device: torch.device) -> Spectra:
    """Each unit's most exciting one of many random spectra, if it can be one with a gradient."""
    drawn = draw_spectra(SECOND_STARTS, asked.channels, asked.size, generator).to(device)
    spectra = drawn * torch.logspace(-1, 0, len(drawn), device=device)[:, None, None, None, None]
    picks = torch.tensor(asked.units, device=device)
    scores = torch.cat([_scores(asked, part) for part in torch.split(spectra, len(picks))])[
        :, picks
    ]
    order = scores.nan_to_num(-math.inf).argsort(dim=0, descending=True, stable=True)
    best = spectra[order[0]]
    waiting = torch.ones(len(picks), dtype=torch.bool, device=device)
    for rank in order[:8]:
        with torch.enable_grad():
            sees = _has_gradient(asked, spectra[rank], _anywhere) & waiting
        best = torch.where(sees[:, None, None, None, None], spectra[rank], best)
        waiting &= ~sees
        if not bool(waiting.any()):
            break
    return best


def _scores(asked: _Asked, spectra: Spectra) -> Float[Tensor, "images units"]:
    """Of every image, how far it excites each of the layer's units anywhere."""
    values = asked.values(asked.images(spectra))[0]
    return _anywhere(values.flatten(0, 1)).view(values.shape[:2])


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient of weights, put back afterwards."""
    inner = unwrap(network)  # a teacher doesn't count its network among its modules
    modes = [(module, module.training) for module in inner.modules()]
    asked = [(weight, weight.requires_grad) for weight in inner.parameters()]
    try:
        inner.eval()
        for weight, _ in asked:
            weight.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for weight, wanted in asked:
            weight.requires_grad_(wanted)
