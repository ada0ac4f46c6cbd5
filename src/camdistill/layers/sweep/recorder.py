"""Records what one forward of one network leaves for the statistics."""

from collections.abc import Mapping

from jaxtyping import Int
from torch import Tensor

from camdistill.errors import UserError
from camdistill.layers.sweep.layer_selection import Layer
from camdistill.layers.sweep.reduction import BatchReduction, add_spatial_axes, reduce_output
from camdistill.layers.sweep.statistics.cka import gram_matrices
from camdistill.layers.sweep.statistics.histograms import HistogramCounts
from camdistill.layers.sweep.statistics.top_images import TopKeys
from camdistill.layers.sweep.statistics.unit_activity import UnitSums
from camdistill.layers.sweep.sweep_plan import SweepPlan
from camdistill.layers.sweep.sweep_state import State
from camdistill.networks.capture import check_tensor


class ForwardRecorder:
    """Reduces each layer's tensor as it comes by; keeps small numbers by image alone."""

    def __init__(
        self,
        network: str,
        plan: SweepPlan,
        earlier_states: Mapping[str, State],
        ids: Int[Tensor, "batch"],
    ) -> None:
        self.network, self.plan, self.earlier_states, self.ids = network, plan, earlier_states, ids
        self.layers = {layer.key: layer for layer in plan.layers[network]}
        self.states: dict[str, State] = {}
        self._reductions: dict[str, BatchReduction] = {}
        self._products: dict[str, list[Tensor]] = {}

    @property
    def reductions(self) -> list[BatchReduction]:
        """By layer, in the plan's order."""
        return [self._reductions[key] for key in self.layers]

    @property
    def products(self) -> list[list[Tensor]]:
        """What `cka.grams` gave, by layer in the plan's order."""
        return [self._products[key] for key in self.layers]

    def record_input(self, key: str, layer_input: object) -> None:
        """What a layer is given, before it may overwrite it."""
        layer = self.layers[key]
        if layer.activated:
            self.states[self._key(layer, "pre")] = _count_values(check_tensor(key, layer_input))

    def record_output(self, key: str, layer_output: object) -> None:
        """What a layer gave."""
        layer = self.layers[key]
        output = add_spatial_axes(self._check_shape(layer, check_tensor(key, layer_output)))
        reduction = reduce_output(output, rectified=layer.rectified, bound=layer.bound)
        self._reductions[key] = reduction
        self.states[self._key(layer, "units")] = UnitSums.of(reduction)
        earlier_keys = self.earlier_states[top_key := self._key(layer, "top")]
        assert isinstance(earlier_keys, TopKeys), "planned"
        self.states[top_key] = TopKeys.of(
            output, reduction.largest, self.ids, reduction.finite, earlier_keys
        )
        if not layer.relu:
            self.states[self._key(layer, "post")] = _count_values(output)
        if self.plan.options.cka:
            self._products[key] = gram_matrices(output)

    def _check_shape(self, layer: Layer, output: Tensor) -> Tensor:
        if output.shape[:2] != (len(self.ids), layer.shape[0]):
            raise UserError(
                f"layer '{layer.name}' gives {list(output.shape)} for {len(self.ids)} images, not "
                f"[{len(self.ids)}, {layer.shape[0]}, ...]: leave it out by --layers"
            )
        return output

    def _key(self, layer: Layer, what: str) -> str:
        return f"{self.network}/{layer.name}/{what}"


def _count_values(values: Tensor) -> HistogramCounts:
    counts = HistogramCounts.of(values)
    return HistogramCounts(counts.raw.cpu(), counts.infinite.cpu())
