"""What one forward of one network leaves behind."""

from collections.abc import Mapping

from jaxtyping import Int
from torch import Tensor

from camdistill.errors import UserError
from camdistill.layers.sweep.layer_selection import Layer
from camdistill.layers.sweep.reduction import Reduced, reduced, spatial
from camdistill.layers.sweep.statistics.cka import grams
from camdistill.layers.sweep.statistics.histograms import HistogramCounts
from camdistill.layers.sweep.statistics.top_images import TopKeys
from camdistill.layers.sweep.statistics.unit_activity import UnitSums
from camdistill.layers.sweep.sweep_plan import Plan
from camdistill.layers.sweep.sweep_state import State
from camdistill.networks.capture import check_tensor


class Glance:
    """Reduces each layer's tensor as it comes by; keeps small numbers by image alone."""

    def __init__(
        self, network: str, plan: Plan, seen: Mapping[str, State], ids: Int[Tensor, "batch"]
    ) -> None:
        self.network, self.plan, self.seen, self.ids = network, plan, seen, ids
        self.layers = {layer.key: layer for layer in plan.layers[network]}
        self.states: dict[str, State] = {}
        self._numbers: dict[str, Reduced] = {}
        self._products: dict[str, list[Tensor]] = {}

    @property
    def numbers(self) -> list[Reduced]:
        """By layer, in the plan's order."""
        return [self._numbers[key] for key in self.layers]

    @property
    def products(self) -> list[list[Tensor]]:
        """What `cka.grams` gave, by layer in the plan's order."""
        return [self._products[key] for key in self.layers]

    def before(self, key: str, given: object) -> None:
        """What a layer is given, before it may overwrite it."""
        layer = self.layers[key]
        if layer.activated:
            self.states[self._key(layer, "pre")] = _counted(check_tensor(key, given))

    def after(self, key: str, gave: object) -> None:
        """What a layer gave."""
        layer = self.layers[key]
        output = spatial(self._checked(layer, check_tensor(key, gave)))
        numbers = reduced(output, rectified=layer.rectified, bound=layer.bound)
        self._numbers[key] = numbers
        self.states[self._key(layer, "units")] = UnitSums.of(numbers)
        before = self.seen[top := self._key(layer, "top")]
        assert isinstance(before, TopKeys), "planned"
        self.states[top] = TopKeys.of(output, numbers.largest, self.ids, numbers.sound, before)
        if not layer.relu:
            self.states[self._key(layer, "post")] = _counted(output)
        if self.plan.options.cka:
            self._products[key] = grams(output)

    def _checked(self, layer: Layer, output: Tensor) -> Tensor:
        if output.shape[:2] != (len(self.ids), layer.shape[0]):
            raise UserError(
                f"layer '{layer.name}' gives {list(output.shape)} for {len(self.ids)} images, not "
                f"[{len(self.ids)}, {layer.shape[0]}, ...]: leave it out by --layers"
            )
        return output

    def _key(self, layer: Layer, what: str) -> str:
        return f"{self.network}/{layer.name}/{what}"


def _counted(values: Tensor) -> HistogramCounts:
    found = HistogramCounts.of(values)
    return HistogramCounts(found.raw.cpu(), found.infinite.cpu())
