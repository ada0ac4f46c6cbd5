"""Sweeps a data set once, in bounded memory, for every statistic of every layer.

Both networks run on the same batch; each layer's tensor is reduced inside the forward, where later
in-place operations haven't touched it, and is never kept. What a batch gave is merged into the
state in one assignment after both forwards, so a sweep that is interrupted holds whole batches.
The state's size depends on the layers, not on the number or size of the images; with probes it
grows until 1,000 images are held out.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain

import torch
from jaxtyping import Int
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.layers.sweep.layer_patterns import Patterns, select_layers_by_network
from camdistill.layers.sweep.recorder import ForwardRecorder
from camdistill.layers.sweep.reduction import add_spatial_axes
from camdistill.layers.sweep.sampling import sample_mask
from camdistill.layers.sweep.statistics.cka import CkaSums
from camdistill.layers.sweep.statistics.layer_cams import CamSums, layer_maps
from camdistill.layers.sweep.statistics.linear_probes import ProbeSums, copy_untrained
from camdistill.layers.sweep.statistics.unit_matching import MatchSums
from camdistill.layers.sweep.sweep_plan import SweepOptions, SweepPlan
from camdistill.layers.sweep.sweep_result import summarize
from camdistill.layers.sweep.sweep_state import (
    ImageCounts,
    State,
    byte_size,
    from_tensors,
    to_tensors,
)
from camdistill.layers.sweep.sweep_summary import SweepResult
from camdistill.networks.capture import check_tensor, inspection_mode, unwrap_outer, visit_layers
from camdistill.types import Batch, Images, Labels

STATISTICS_IMAGES = 64  # images that the untrained copies' batch statistics are of, at most


class LayerSweep:
    """Statistics of every layer of one or two networks, batch after batch.

    Two sweeps of the same networks over parts of a data set, merged, tell what one over all of it
    does, in whatever order; CKA compares images within a batch, so there the same batches do.

    Attributes:
        networks: By name; the first is the one that a second is compared with.
        plan: Layers and options.

    Args:
        networks: One or two, bare or wrapped; run in eval mode, and left as they were.
        example: Some images as the networks take them: one shows which layers there are, and up
            to 64 give untrained copies their batch statistics (4 or more, the same in every
            process).
        layers: Names or patterns, see `points.find_layers`; by network, or for every network that
            has such layers. None is the blocks and the non-linearities outside them.
        options: What is measured besides.

    Raises:
        UserError: If a layer doesn't exist, or there are not one or two networks.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        example: Images,
        *,
        layers: Patterns = None,
        options: SweepOptions | None = None,
    ) -> None:
        if not 1 <= len(networks) <= 2:
            raise UserError(f"{len(networks)} networks were given; a sweep takes one or two")
        self.networks = dict(networks)
        options = options or SweepOptions()
        selection = select_layers_by_network(self.networks, example, layers)
        self.plan = SweepPlan(
            {name: selected for name, (selected, _) in selection.items()},
            options,
            {name: left_out for name, (_, left_out) in selection.items()},
        )
        self._states = self.plan.empty_states()
        self._untrained: dict[str, nn.Module] = {}
        if options.probes:
            self._untrained = {
                name: copy_untrained(network, example[:STATISTICS_IMAGES], options.seed)
                for name, network in self.networks.items()
            }

    @property
    def images(self) -> int:
        """How many were seen; where to go on after an interruption."""
        image_counts = self._states["seen"]
        assert isinstance(image_counts, ImageCounts), "counted from the first batch"
        return int(image_counts.images)

    @property
    def bytes(self) -> int:
        """Size of the state."""
        return sum(byte_size(state) for state in self._states.values())

    @torch.no_grad()
    def update(
        self, images: Images, ids: Int[Tensor, "batch"], labels: Labels | None = None
    ) -> None:
        """Looks at a batch.

        Args:
            images: Images as the networks take them, on their device.
            ids: The images' numbers in the data set, whatever the order: 0 to 2^32 - 1.
            labels: For the probes; -1 for an image without.

        Raises:
            UserError: If images aren't floats, or the numbers don't fit.
        """
        if not images.is_floating_point():
            raise UserError(f"images are {images.dtype}: give floats, such as pixels / 255")
        if len(ids) != len(images):
            raise UserError(f"{len(ids)} numbers for {len(images)} images: give one an image")
        if len(images) == 0:
            return
        ids = ids.cpu()
        labels = torch.full_like(ids, -1) if labels is None else labels.cpu()
        recorders = {name: self._run_network(name, images, ids) for name in self.networks}
        batch_states: dict[str, State] = {"seen": ImageCounts.of(len(images))}
        for recorder in recorders.values():
            batch_states |= recorder.states
        batch_states |= self._compare_layers(recorders)
        if self.plan.options.probes:
            for name, recorder in recorders.items():
                batch_states |= self._probe_layers(name, recorder, images, ids, labels)
        if self.plan.options.cam_share:
            batch_states |= self._explain_layers(images, ids)
        self._states = {
            key: state.merge(batch_states[key]) if key in batch_states else state
            for key, state in self._states.items()
        }

    def merge(self, other: "LayerSweep") -> "LayerSweep":
        """Takes in what another sweep of the same networks saw.

        Raises:
            UserError: If its layers or options are others.
        """
        self.plan.check_same_plan(other.plan.fingerprint())
        self._states = {key: state.merge(other._states[key]) for key, state in self._states.items()}
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """What was seen, as tensors by name; `sweep_state.save_sweep_state` writes it."""
        tensors = {
            f"{key}:{name}": value
            for key, state in self._states.items()
            for name, value in to_tensors(state).items()
        }
        return {**tensors, "plan": self.plan.fingerprint()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> "LayerSweep":
        """Goes on from what `state_dict` gave, in place of what was seen.

        Raises:
            UserError: If it was of other layers or options.
        """
        self.plan.check_same_plan(tensors.get("plan", torch.zeros(0, dtype=torch.uint8)))
        tensors_by_key: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            key, separator, field = name.rpartition(":")
            if separator:
                tensors_by_key.setdefault(key, {})[field] = value
        self._states = {
            key: from_tensors(type(state), tensors_by_key.get(key, {}))
            for key, state in self._states.items()
        }
        return self

    def result(self) -> SweepResult:
        """What was seen so far."""
        return summarize(self.plan, self._states)

    def _run_network(self, name: str, images: Images, ids: Tensor) -> ForwardRecorder:
        recorder = ForwardRecorder(name, self.plan, self._states, ids)
        keys = [layer.key for layer in self.plan.layers[name]]
        network = self.networks[name]
        with (
            inspection_mode(network),
            visit_layers(network, keys, recorder.record_output, before=recorder.record_input),
        ):
            unwrap_outer(network)(images)
        return recorder

    def _compare_layers(self, recorders: Mapping[str, ForwardRecorder]) -> dict[str, State]:
        """CKA and unit matching: what needs all layers of all networks."""
        finite = [
            torch.stack([reduction.finite for reduction in recorder.reductions])
            for recorder in recorders.values()
        ]
        states: dict[str, State] = {}
        if self.plan.options.cka:
            products = [
                reduction for recorder in recorders.values() for reduction in recorder.products
            ]
            states["cka"] = CkaSums.of(products, torch.cat(finite))
        if self.plan.matched:
            first, second = (
                [reduction.mean for reduction in recorder.reductions]
                for recorder in recorders.values()
            )
            states["match"] = MatchSums.of(first, second, self.plan.pairs, (finite[0], finite[1]))
        return states

    def _probe_layers(
        self, name: str, recorder: ForwardRecorder, images: Images, ids: Tensor, labels: Tensor
    ) -> dict[str, State]:
        options, layers = self.plan.options, self.plan.layers[name]
        means: dict[str, Tensor] = {}

        def visit(key: str, output: object) -> None:
            means[key] = add_spatial_axes(check_tensor(key, output)).mean((2, 3)).cpu().double()

        untrained_network = self._untrained[name]
        with visit_layers(untrained_network, [layer.key for layer in layers], visit):
            untrained_network(images)
        states: dict[str, State] = {}
        for kind, features in (
            ("probe", [layer_features.mean for layer_features in recorder.reductions]),
            ("untrained", [means[layer.key] for layer in layers]),
        ):
            # Each layer's probe is of what is finite there; these are finite nowhere.
            finite = torch.stack(
                [torch.isfinite(layer_features).all(1) for layer_features in features]
            ).any(0)
            features = [layer_features[finite] for layer_features in features]
            states[f"{name}/{kind}"] = ProbeSums.of(
                features, labels[finite], ids[finite], options.probes, options.seed
            )
        return states

    def _explain_layers(self, images: Images, ids: Tensor) -> dict[str, State]:
        options = self.plan.options
        sampled_rows = sample_mask(ids, options.cam_share, options.seed).nonzero().flatten()
        if not len(sampled_rows):
            return {}
        layers = {name: self.plan.layers_with_maps(name) for name in self.networks}
        if not any(layers.values()):
            return {}
        maps = layer_maps(self.networks, layers, images[sampled_rows.to(images.device)])
        return {"cams": CamSums.of(maps)}


def sweep_layers(
    networks: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    *,
    layers: Patterns = None,
    options: SweepOptions | None = None,
    on_batch: Callable[[LayerSweep], None] | None = None,
) -> SweepResult:
    """Sweeps over batches of a loader: a fixed probe set at an epoch's end, or a whole test set.

    Args:
        networks: One or two, by name, all on one device; pixels become floats in [0, 1] there.
        batches: Batches as our loaders give them; images that only fill up a shard are left out.
        layers: See `LayerSweep`.
        options: See `LayerSweep`.
        on_batch: Called after each batch, for a progress bar or a partial report.

    Raises:
        UserError: As `LayerSweep`, or if there is no batch.
    """
    batch_iterator = iter(batches)
    first = next(batch_iterator, None)
    if first is None:
        raise UserError("no batch was given; a sweep needs images")
    # A frozen teacher has buffers alone: its network is not among its registered modules.
    device = next(
        (
            tensor_held.device
            for net in networks.values()
            for tensor_held in chain(net.parameters(), net.buffers())
        ),
        torch.device("cpu"),
    )
    layer_sweep = LayerSweep(networks, _to_floats(first, device), layers=layers, options=options)
    for batch in chain([first], batch_iterator):
        counted_rows = batch.counted
        layer_sweep.update(
            _to_floats(batch, device), batch.ids[counted_rows], batch.labels[counted_rows]
        )
        if on_batch is not None:
            on_batch(layer_sweep)
    return layer_sweep.result()


def _to_floats(batch: Batch, device: torch.device) -> Images:
    pixels = batch.pixels[batch.counted].to(device)
    images = pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels
    return images.contiguous(memory_format=torch.channels_last)
