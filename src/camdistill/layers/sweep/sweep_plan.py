"""The plan of a sweep: layers, statistics and their empty states."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from camdistill.errors import UserError
from camdistill.layers.sweep.layer_selection import Layer
from camdistill.layers.sweep.statistics.cka import CkaSums
from camdistill.layers.sweep.statistics.histograms import HistogramCounts
from camdistill.layers.sweep.statistics.layer_cams import CamSums, has_maps
from camdistill.layers.sweep.statistics.linear_probes import ProbeSums
from camdistill.layers.sweep.statistics.top_images import TopKeys
from camdistill.layers.sweep.statistics.unit_activity import UnitSums
from camdistill.layers.sweep.statistics.unit_matching import MatchSums, pair_layers
from camdistill.layers.sweep.sweep_state import ImageCounts, State

MATCH_BYTES = 12 << 20  # bytes for the correlations of two networks' units


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep measures besides histograms, units, sparsity, rank and top images.

    Args:
        top: Images kept of each unit.
        cka: Whether layers are compared by CKA, within and between networks.
        matching: Whether the units of two networks are matched.
        probes: Number of labels for a linear probe at each layer; 0 asks for none. An untrained
            copy of each network runs beside it.
        cam_share: Share of the images, in [0, 1], of which every layer's Grad-CAM is measured; 0
            asks for none. Costs a forward and a backward of these images.
        seed: Seed of the choice of images and of untrained weights.
    """

    top: int = 9
    cka: bool = True
    matching: bool = True
    probes: int = 0
    cam_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"top is {self.top}; keep 1 or more images of each unit")
        if self.probes < 0 or self.probes == 1:
            raise UserError(f"probes is {self.probes}; give the number of labels, 2 or more")
        if not 0 <= self.cam_share <= 1:
            raise UserError(f"explained is {self.cam_share}; give a share of the images, 0 to 1")


@dataclass(frozen=True)
class SweepPlan:
    """Layers by network, and what is measured at them.

    Attributes:
        layers: By network.
        options: What is measured.
        left_out: Names of layers that were meant too, by network, as they give [B, h, w, C].
    """

    layers: Mapping[str, tuple[Layer, ...]]
    options: SweepOptions
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def networks(self) -> tuple[str, ...]:
        """Names."""
        return tuple(self.layers)

    @property
    def matched(self) -> bool:
        """Whether units of two networks are matched."""
        return self.options.matching and len(self.layers) == 2

    @cached_property
    def pairs(self) -> tuple[range, ...]:
        """The first network's layers that each layer of the second is matched with."""
        first, second = (self.channels(name) for name in self.networks)
        return pair_layers(first, second, MATCH_BYTES)

    def channels(self, network: str) -> list[int]:
        """Of each layer."""
        return [layer.shape[0] for layer in self.layers[network]]

    def layers_with_maps(self, network: str) -> tuple[Layer, ...]:
        """The layers that have Grad-CAM maps."""
        return tuple(layer for layer in self.layers[network] if has_maps(layer))

    def empty_states(self) -> dict[str, State]:
        """States of no image, by what they are of."""
        states: dict[str, State] = {"seen": ImageCounts.empty()}
        for network, layers in self.layers.items():
            for layer in layers:
                key, channels = f"{network}/{layer.name}", layer.shape[0]
                # A ReLU's output is told by its input.
                if layer.activated:
                    states[f"{key}/pre"] = HistogramCounts.empty()
                if not layer.relu:
                    states[f"{key}/post"] = HistogramCounts.empty()
                states[f"{key}/units"] = UnitSums.empty(channels)
                states[f"{key}/top"] = TopKeys.empty(channels, self.options.top)
            if self.options.probes:
                for kind in ("probe", "untrained"):
                    channel_counts = self.channels(network)
                    states[f"{network}/{kind}"] = ProbeSums.empty(
                        channel_counts, self.options.probes
                    )
        if self.options.cka:
            states["cka"] = CkaSums.empty(sum(map(len, self.layers.values())))
        if self.matched:
            first, second = (self.channels(name) for name in self.networks)
            states["match"] = MatchSums.empty(first, second, self.pairs)
        if self.options.cam_share:
            states["cams"] = CamSums.empty(
                [len(self.layers_with_maps(name)) for name in self.networks]
            )
        return states

    def fingerprint(self) -> Tensor:
        """The plan as text in bytes, so that only states of one plan are merged."""
        description = {
            "layers": {
                network: [[layer.name, layer.key, list(layer.shape)] for layer in layers]
                for network, layers in self.layers.items()
            },
            "options": asdict(self.options),
        }
        return torch.tensor(
            list(json.dumps(description, sort_keys=True).encode()), dtype=torch.uint8
        )

    def check_same_plan(self, fingerprint: Tensor) -> None:
        """Refuse the state of another plan.

        Raises:
            UserError: If it was made with other layers or options.
        """
        if torch.equal(fingerprint, self.fingerprint()):
            return
        try:
            other = json.loads(bytes(fingerprint.tolist()))
        except ValueError:
            other = {}
        difference = "options" if other.get("options") != asdict(self.options) else "layers"
        raise UserError(
            f"that sweep was made with other {difference}; sweep anew, or use its {difference}"
        )
