"""Activations on random images: the control of activation maximization.

A unit may be excited by noise. So an image that was made for it has to excite it more than nearly
all random images do: 1,000 of white noise (pixels uniform in [0, 1]) and 1,000 with the spectrum of
natural images (amplitude 1 / f), from faint to strong. (Noise in pure black and white would be what
a small filter likes best.)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.engine.request import upcast
from camdistill.layers.units.image_spectra import draw_spectra, render_spectra
from camdistill.networks.capture import (
    check_tensor,
    inspection_mode,
    unwrap,
    unwrap_outer,
    visit_layers,
)
from camdistill.types import Images

COUNT = 1000  # random images of each kind
SHARE = 0.999  # of the random images, below which they stay
_PIXELS = 2**16  # of one forward
_SEED = 20_170  # of all random images: a unit's level depends on the network alone


@dataclass(frozen=True)
class RandomLevels:
    """Each unit's largest value over places, in 99.9 % of the random images at most.

    Of the two kinds of random images the larger level counts.

    Attributes:
        excitation: Values of the layer's input; of its output where that is what is excited.
        output: Values that the layer's output reaches.
    """

    excitation: Float[Tensor, "units"]
    output: Float[Tensor, "units"]


def random_levels(
    network: nn.Module,
    layers: Mapping[str, bool],
    *,
    size: tuple[int, int],
    channels: int = 3,
    count: int = COUNT,
) -> dict[str, RandomLevels]:
    """The levels of every unit of some layers, from one forward of each random image.

    Args:
        network: Takes images in [0, 1]; asked in eval mode, left as it is.
        layers: Names (see `networks.capture`); whether what the layer is given is excited.
        size: Height and width of the images.
        channels: Channels of the images.
        count: How many images of each kind.
    """
    device = next((weight.device for weight in unwrap(network).parameters()), torch.device("cpu"))
    kinds: dict[str, list[list[Tensor]]] = {name: [[], []] for name in layers}
    with inspection_mode(network):
        for kind in (0, 1):
            for images in _random_images(kind, count, channels, size):
                values_by_layer = unit_values(network, layers, images.to(device))
                for name, values in values_by_layer.items():
                    largest = [part.amax((2, 3)).float().cpu() for part in values]
                    kinds[name][kind].append(torch.stack(largest))
    levels = {}
    for name, parts in kinds.items():
        # Of all images of a kind, [2, images, units].
        high = [torch.cat(part, 1).quantile(SHARE, dim=1) for part in parts]
        excitation, output = torch.maximum(*high)
        levels[name] = RandomLevels(excitation, output)
    return levels


def unit_values(
    network: nn.Module,
    layers: Mapping[str, bool],
    images: Images,
    units: Sequence[int] = (),
) -> dict[str, tuple[Tensor, Tensor]]:
    """What excites the units of some layers and what these give, each [B, K, h, w].

    Args:
        network: Takes the images.
        layers: Names; whether what the layer is given is meant, else its output counts twice.
        images: In [0, 1].
        units: Channels that every layer must have.

    Raises:
        UserError: A layer has no such unit, or no units at all.
    """
    layer_inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep_input(name: str, value: object) -> None:
        if layers[name]:
            layer_inputs[name] = check_tensor(name, value).clone()  # the layer may overwrite it

    def keep_output(name: str, value: object) -> Tensor:
        outputs[name] = check_tensor(name, value)
        return outputs[name].clone()  # so may what comes after

    with visit_layers(network, list(layers), keep_output, before=keep_input):
        unwrap_outer(network)(images)
    return {
        name: (
            _check_units(name, layer_inputs.get(name, outputs[name]), units),
            _check_units(name, outputs[name], units),
        )
        for name in layers
    }


def _check_units(layer: str, output: Tensor, units: Sequence[int]) -> Tensor:
    spatial_output = upcast(output)
    if spatial_output.dim() == 2:
        spatial_output = spatial_output[..., None, None]
    if spatial_output.dim() != 4 or (
        units and not 0 <= min(units) <= max(units) < spatial_output.shape[1]
    ):
        unit = f"unit {max(units)}" if units else "units"
        raise UserError(
            f"layer '{layer}' gives {list(output.shape)}, so it has no {unit}: choose units of a "
            "layer [B, K, h, w]"
        )
    return spatial_output


def _random_images(kind: int, count: int, channels: int, size: tuple[int, int]) -> Iterator[Images]:
    """White noise (0), or images with a natural spectrum (1), a part at a time."""
    generator = torch.Generator().manual_seed(_SEED + kind)
    remaining, chunk_size = count, max(_PIXELS // (size[0] * size[1]), 4)
    while remaining:
        size_of_chunk = min(remaining, chunk_size)
        remaining -= size_of_chunk
        if kind == 0:
            yield torch.rand(size_of_chunk, channels, *size, generator=generator)
        else:
            spectra = draw_spectra(size_of_chunk, channels, size, generator)
            # Standard deviations of 0.1 (faint) to 1 (fills the range), evenly in powers of ten.
            contrasts = 10 ** (torch.rand(size_of_chunk, 1, 1, 1, 1, generator=generator) - 1)
            yield render_spectra(
                torch.view_as_complex(spectra * contrasts), (size_of_chunk, channels, *size)
            )
