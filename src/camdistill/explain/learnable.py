"""Grad-CAM with parameters: gates of channels, a slope, a power, and a mix of layers.

What SMaT (Fernandes et al. 2022, https://arxiv.org/abs/2204.10810) learns over the heads of a
transformer, for the layers and channels of a convolutional network. For layer l with activations A,
Grad-CAM's channel weights alpha, and s_l the root mean square of m_l:

    m_l   = leaky(sum_k gate_lk alpha_lk A_lk)        negative evidence times slope_l
    u_l   = power(m_l / s_l), of root mean square 1    power(x) = x (|x| + 0.001)^(p_l - 1)
    map   = (sum_l mix_l u_l) (sum_l mix_l s_l)        on the grid of the last layer

All gates, slopes and powers 1 and the whole mix on the last layer is Grad-CAM there, and that is
how it begins.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.engine.request import Classes
from camdistill.explain.gradcam import last_layer
from camdistill.explain.gradients import gradient_maps
from camdistill.explain.maps import resize
from camdistill.networks.weights import WeightFile, read_weights, save_safetensors
from camdistill.types import Activations, Images, Labels

SETTINGS = "camdistill_explainer"  # under which a file's metadata keep the layers
POWERS = (0.25, 4.0)
# Keeps the slope of a power below 1 finite where a map is 0.
SOFT = 1e-3

Units = Float[Tensor, "batch units rows columns"]
LayerMaps = Float[Tensor, "batch rows columns"]
UnitsByLayer = Mapping[str, Float[Tensor, "..."]]  # [B, K, h, w], each layer with its own grid


class LearnableCAM(nn.Module):
    """An explainer with parameters; called with (network, images, classes) it gives raw maps.

    Args:
        units: How many units each layer has, in the order of the network; maps have the grid of the
            last one.

    Attributes:
        units: Likewise.
        mix: Mix of the layers; `settle` keeps it on the simplex.
        power: Power of each layer's map.
        slope: What negative evidence of each layer counts, in [0, 1].
        gates: Gates of each layer's units, 0 or more.
    """

    def __init__(self, units: Mapping[str, int]) -> None:
        super().__init__()
        if not units or min(units.values()) < 1:
            raise UserError(f"layers are {dict(units)}; give one or more, with their units")
        self.units = dict(units)
        count = len(units)
        self.mix = nn.Parameter(torch.eye(count)[-1].clone())
        self.power = nn.Parameter(torch.ones(count))
        self.slope = nn.Parameter(torch.ones(count))
        self.gates = nn.ParameterList(
            nn.Parameter(torch.ones(unit_count)) for unit_count in units.values()
        )

    @classmethod
    def of(
        cls, network: nn.Module, images: Images, layers: Sequence[str] | None = None
    ) -> "LearnableCAM":
        """For a network's layers, its last spatial one by default; it starts as Grad-CAM."""
        names = list(dict.fromkeys(layers or [last_layer(network, images)]))
        contributions_by_layer = unit_contributions(network, images[:1], names)
        return cls({name: contributions_by_layer[name].shape[1] for name in names})

    def forward(self, network: nn.Module, images: Images, classes: Labels) -> LayerMaps:
        """Raw, signed maps on the grid of the last layer; layers of no weight aren't asked for."""
        with torch.no_grad():
            mix = sparsemax(self.mix)
        last = len(self.units) - 1
        names = [
            name
            for place, name in enumerate(self.units)
            if place == last or torch.is_grad_enabled() or float(mix[place]) != 0
        ]
        return self.maps(unit_contributions(network, images, names, classes))

    def maps(self, contributions_by_layer: UnitsByLayer) -> LayerMaps:
        """Maps from what `unit_contributions` gave; differentiable by the parameters.

        Args:
            contributions_by_layer: Contributions of the last layer, and of every other
                that has a weight.
        """
        grid = self._grid(contributions_by_layer)
        mix = sparsemax(self.mix)
        shape: Tensor | float = 0.0
        size: Tensor | float = 0.0
        for place, name in enumerate(self.units):
            if name not in contributions_by_layer:
                continue
            unit_map, rms = self._layer(place, contributions_by_layer[name])
            shape = shape + mix[place].to(unit_map) * resize(unit_map, grid)
            size = size + mix[place].to(rms) * rms
        assert isinstance(shape, Tensor), "the last layer is there"
        return shape * size

    def _grid(self, contributions_by_layer: UnitsByLayer) -> tuple[int, int]:
        for name, count in self.units.items():
            contributions = contributions_by_layer.get(name)
            if contributions is not None and contributions.shape[1] != count:
                raise UserError(
                    f"the explainer has {count} gates for layer '{name}', where the network has "
                    f"{contributions.shape[1]} units: take an explainer of this network"
                )
        last = contributions_by_layer[list(self.units)[-1]]
        return last.shape[-2], last.shape[-1]

    def _layer(
        self, place: int, contributions: Units
    ) -> tuple[LayerMaps, Float[Tensor, "batch 1 1"]]:
        """A layer's map with root mean square 1, and what its root mean square was."""
        raw = torch.einsum("k,bkhw->bhw", self.gates[place].to(contributions), contributions)
        rectified = torch.where(raw > 0, raw, self.slope[place].to(raw) * raw)
        unit_map, size = _unit(rectified)
        powered = unit_map * (unit_map.abs() + SOFT) ** (self.power[place].to(unit_map) - 1)
        return _unit(powered)[0], size

    @torch.no_grad()
    def settle(self) -> None:
        """Puts the parameters back into their ranges; to be called after every step.

        A layer without weight lies on the simplex's edge then, where its gradient is alive.
        """
        self.mix.copy_(sparsemax(self.mix).clamp_min(0))
        self.power.clamp_(*POWERS)
        self.slope.clamp_(0, 1)
        for gates in self.gates:
            gates.clamp_(min=0)

    def save(self, path: str | Path, about: Mapping[str, object] | None = None) -> str:
        """Writes a small safetensors file; returns its sha256.

        Args:
            path: The file.
            about: Whatever should be known of how it was made, as JSON.
        """
        settings = {"units": self.units, "about": dict(about or {})}
        return save_safetensors(path, self.state_dict(), {SETTINGS: json.dumps(settings)})


def load_explainer(path: str | Path) -> LearnableCAM:
    """An explainer that `save` wrote, frozen.

    Raises:
        UserError: If the file is damaged, or holds something else.
    """
    weights = read_weights(path)
    if not holds_explainer(weights):
        raise UserError(f"'{path}' holds no explainer; give a file that `camdistill adapt` wrote")
    try:
        units = json.loads(weights.metadata[SETTINGS])["units"]
        explainer = LearnableCAM({str(name): int(count) for name, count in units.items()})
        explainer.load_state_dict(weights.state)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"the explainer in '{path}' can't be read ({type(error).__name__}); write it again"
        ) from error
    return explainer.requires_grad_(False).eval()


def holds_explainer(weights: WeightFile) -> bool:
    """Whether a file's weights are a `LearnableCAM`'s."""
    return SETTINGS in weights.metadata


def unit_contributions(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None = None,
    classes: Classes = None,
) -> dict[str, Float[Tensor, "..."]]:
    """What each unit adds to Grad-CAM, alpha_k A_k, by layer: summed over units it is the map."""

    def formula(activations: Activations, gradients: Activations) -> Activations:
        return gradients.mean((2, 3), keepdim=True) * activations

    return gradient_maps(network, images, layers, classes, formula)


def sparsemax(scores: Float[Tensor, "layers"]) -> Float[Tensor, "layers"]:
    """The closest point of the simplex (Martins and Astudillo 2016, Alg. 1, arXiv:1602.02068).

    The gradient of an entry that is just 0 is that of the entries beside it: it may rise again.
    """
    with torch.no_grad():
        ordered = scores.sort(descending=True).values
        ranks = torch.arange(1, len(scores) + 1, device=scores.device)
        sums = ordered.cumsum(0)
        count = int((1 + ranks * ordered > sums).sum())
        edge = (sums[count - 1] - 1) / count
        inside = scores >= edge - 1e-6
    edge = (torch.where(inside, scores, 0).sum() - 1) / inside.sum()
    return torch.where(inside, scores - edge, 0)


def _unit(maps: LayerMaps) -> tuple[LayerMaps, Float[Tensor, "batch 1 1"]]:
    """Maps of root mean square 1, and what it was; a blank map stays blank."""
    peak = maps.detach().abs().amax((1, 2), keepdim=True)  # the square of a small number may be 0
    relative = maps / torch.where(peak > 0, peak, 1)
    square = relative.square().mean((1, 2), keepdim=True)
    size = torch.where(square > 0, square, 1).sqrt()
    return relative / size, peak * size
