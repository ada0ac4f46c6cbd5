"""Finds the layers whose units are the first convolution's, so that cards show its filters."""

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from camdistill.layers.filters import FilterBank
from camdistill.layers.sweep.sweep_summary import Point
from camdistill.networks.capture import (
    inspection_mode,
    layer_names,
    unwrap,
    unwrap_outer,
    visit_layers,
)
from camdistill.types import Images

MIXING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.MultiheadAttention)


def points_of_first_filters(
    network: nn.Module, images: Images, bank: FilterBank, points: Sequence[Point]
) -> Collection[Point]:
    """Points with as many units as the first convolution, after which no other weights ran yet.

    Between them are normalizations, non-linearities and pooling then, which leave units apart.

    Args:
        network: Bare or wrapped.
        images: Images as it takes them; the first is run.
        bank: Weights of its first convolution.
        points: Outputs of layers.
    """
    inner = unwrap(network)
    mixing = {
        name for name in layer_names(network) if isinstance(inner.get_submodule(name), MIXING)
    }
    keys = {f"{point.path}#{point.call}": point for point in points}
    run_names: list[str] = []
    fitting_points: list[Point] = []

    def note(name: str, output: object) -> None:
        if name in mixing:
            run_names.append(name)
        fits = isinstance(output, Tensor) and output.shape[1:2] == bank.weights.shape[:1]
        if name in keys and run_names == [bank.layer] and fits:
            fitting_points.append(keys[name])

    with inspection_mode(network), visit_layers(network, [*mixing, *keys], note, required=False):
        unwrap_outer(network)(images[:1])
    return fitting_points
