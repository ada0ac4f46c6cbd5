"""Images made to excite a unit: activation maximisation, many units at a time.

The image is parameterised by its spectrum, so that all frequencies grow alike, in decorrelated
colours, and is moved a little before every step, so that what it shows is robust (Olah et al. 2017,
https://distill.pub/2017/feature-visualization, "The Enemy of Feature Visualization"). The objective
the unit in the middle of the layer before its ReLU: after it, a unit that is off has no gradient;
and the mean over places of a convolution before it knows nothing but the mean colour.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Complex
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.request import wide
from camdistill.networks.capture import bare, plain, tensor, visiting
from camdistill.types import Images, PerImage

# How colours of natural images vary together: the square root of their covariance over ImageNet,
# in the direction of its largest column (lucid's `param.color`, rounded).
COLOURS = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
START = 0.01  # standard deviation of the first spectrum
CONTRAST = 4.0  # what the inverse transform is divided by before the sigmoid


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
    """

    units: tuple[int, ...]
    images: Images
    reached: PerImage
    natural: PerImage

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
        steps: Of Adam.
        rate: Its learning rate.
        seed: Of the start and of the movements; drawn on the CPU, so the same on any device.
        robust: Whether images are moved before every step, by amounts that fit their size.
        on_step: Called with the number of steps done.

    Raises:
        UserError: The layer has no such unit.
    """
    device = next((weight.device for weight in bare(network).parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    shape = (len(units), channels, *size)
    frequencies = (size[0], size[1] // 2 + 1)
    start = torch.randn(len(units), channels, *frequencies, 2, generator=generator) * START
    spectrum = start.to(device).requires_grad_()
    optimiser = torch.optim.Adam([spectrum], lr=rate)
    chosen = torch.arange(len(units), device=device)
    picks = torch.tensor(list(units), device=device)
    with torch.inference_mode(False), torch.enable_grad(), _frozen(network):
        for step in range(steps):
            images = painted(torch.view_as_complex(spectrum), shape)
            moved = _moved(images, generator) if robust else images
            outputs = _outputs(network, layer, moved, picks, before)
            middle = outputs[..., outputs.shape[2] // 2, outputs.shape[3] // 2]
            loss = -middle[chosen, picks].sum()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            if on_step is not None:
                on_step(step + 1)
        with torch.no_grad():
            images = painted(torch.view_as_complex(spectrum), shape)
            # Not what the layer was given: a bounded layer's natural maximum is of another scale.
            outputs = _outputs(network, layer, images, picks, before=False)
            reached = outputs[chosen, picks].amax((1, 2))
    known = torch.full((len(units),), math.nan)
    if natural is not None:
        known = torch.tensor([float(value) for value in natural])
    return Maximised(tuple(units), images.detach().cpu(), reached.float().cpu(), known)


def painted(
    spectrum: Complex[Tensor, "units channels rows half"], shape: tuple[int, int, int, int]
) -> Images:
    """Images in (0, 1) of spectra: sigmoid(M irfft2(Z s(f)) / 4), s(f) = sqrt(H W) / f.

    M mixes decorrelated colours; f is at least one period an image.
    """
    _, channels, height, width = shape
    rows = torch.fft.fftfreq(height, device=spectrum.device)[:, None]
    columns = torch.fft.rfftfreq(width, device=spectrum.device)[None]
    lowest = 1.0 / max(height, width)
    scale = math.sqrt(height * width) / torch.hypot(rows, columns).clamp_min(lowest)
    flat = torch.fft.irfft2(spectrum * scale, s=(height, width)) / CONTRAST
    if channels == 3:
        mix = (COLOURS / COLOURS.norm(dim=0).max()).to(flat)
        flat = torch.einsum("dc,ncij->ndij", mix, flat)
    return torch.sigmoid(flat)


def _outputs(network: nn.Module, layer: str, images: Tensor, units: Tensor, before: bool) -> Tensor:
    seen: list[Tensor] = []

    def entering(name: str, given: object) -> None:
        if before:
            seen.append(tensor(name, given).clone())  # the layer may overwrite it

    def leaving(name: str, output: object) -> Tensor | None:
        if not before:
            seen.append(tensor(name, output))
            return seen[-1].clone()
        return None

    with visiting(network, [layer], leaving, before=entering):
        plain(network)(images)
    found = wide(seen[-1])
    if found.dim() == 2:
        found = found[..., None, None]
    if found.dim() != 4 or int(units.max()) >= found.shape[1] or int(units.min()) < 0:
        raise UserError(
            f"layer '{layer}' gives {list(seen[-1].shape)}, so it has no unit "
            f"{int(units.max())}: choose units of a layer [B, K, h, w]"
        )
    return found


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient of weights, put back afterwards."""
    inner = bare(network)  # a teacher doesn't count its network among its modules
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


def _moved(images: Images, generator: torch.Generator) -> Images:
    """Every image moved, scaled and turned a little, at the size it had.

    The amounts are those of images of 128 pixels, in proportion: a network for 32 pixels gets
    images whose objects keep their size.
    """
    count, _, height, width = images.shape
    side = min(height, width)
    padding = max(round(12 * min(side, 128) / 128), 1)
    images = F.pad(images, (padding,) * 4, value=0.5)
    for jitter in (max(round(side / 16), 1), max(round(side / 32), 1)):
        rows, columns = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
        images = images.roll((rows, columns), (2, 3))
    scales = 0.9 + 0.02 * torch.randint(0, 11, (count,), generator=generator)
    # 6 of 26 aren't turned at all, as most of what networks see is upright.
    turns = torch.randint(-10, 16, (count,), generator=generator)
    angles = torch.where(turns > 10, 0, turns) * (math.pi / 180)
    cos, sin = angles.cos() / scales, angles.sin() / scales
    zeros = torch.zeros(count)
    ratio = images.shape[2] / images.shape[3]
    matrix = torch.stack(
        [
            torch.stack([cos, -sin * ratio, zeros], 1),
            torch.stack([sin / ratio, cos, zeros], 1),
        ],
        1,
    ).to(images)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    turned = F.grid_sample(images - 0.5, grid, mode="bilinear", align_corners=False) + 0.5
    return turned[:, :, padding : padding + height, padding : padding + width]
