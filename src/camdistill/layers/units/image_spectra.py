"""Images parameterized by their spectrum, in decorrelated colors.

Olah et al. 2017, https://distill.pub/2017/feature-visualization, "The Enemy of Feature
Visualization".
"""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from camdistill.types import Images

# How colors of natural images vary together: the square root of their covariance over ImageNet,
# in the direction of its largest column (lucid's `param.color`, rounded).
COLORS = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
CONTRAST = 4.0  # what the inverse transform is divided by before the sigmoid


def draw_spectra(
    count: int, channels: int, size: tuple[int, int], generator: torch.Generator
) -> Float[Tensor, "count channels rows half 2"]:
    """Real and imaginary parts, standard normal, drawn on the CPU."""
    return torch.randn(count, channels, size[0], size[1] // 2 + 1, 2, generator=generator)


def render_spectra(
    spectrum: Complex[Tensor, "units channels rows half"], shape: tuple[int, int, int, int]
) -> Images:
    """Images in (0, 1) of spectra: sigmoid(M irfft2(Z s(f)) / 4), s(f) = sqrt(H W) / f.

    M mixes decorrelated colors; f is at least one period an image.
    """
    _, channels, height, width = shape
    rows = torch.fft.fftfreq(height, device=spectrum.device)[:, None]
    columns = torch.fft.rfftfreq(width, device=spectrum.device)[None]
    lowest = 1.0 / max(height, width)
    scale = math.sqrt(height * width) / torch.hypot(rows, columns).clamp_min(lowest)
    flat = torch.fft.irfft2(spectrum * scale, s=(height, width)) / CONTRAST
    if channels == 3:
        mix = (COLORS / COLORS.norm(dim=0).max()).to(flat)
        flat = torch.einsum("dc,ncij->ndij", mix, flat)
    return torch.sigmoid(flat)
