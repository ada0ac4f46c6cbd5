"""One pass over a data set, bounded memory, every statistic of every layer of two networks.

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
from camdistill.layers.sweep.layer_patterns import Patterns, choices
from camdistill.layers.sweep.recorder import Glance
from camdistill.layers.sweep.reduction import spatial
from camdistill.layers.sweep.sampling import chosen
from camdistill.layers.sweep.statistics.cka import CkaSums
from camdistill.layers.sweep.statistics.layer_cams import CamSums, layer_maps
from camdistill.layers.sweep.statistics.linear_probes import ProbeSums, untrained
from camdistill.layers.sweep.statistics.unit_matching import MatchSums
from camdistill.layers.sweep.sweep_plan import Options, Plan
from camdistill.layers.sweep.sweep_result import told
from camdistill.layers.sweep.sweep_state import Seen, State, from_tensors, size_of, to_tensors
from camdistill.layers.sweep.sweep_summary import Sweep
from camdistill.networks.capture import check_tensor, inspection_mode, unwrap_outer, visit_layers
from camdistill.types import Batch, Images, Labels

ROWS = 64  # images that the untrained copies' batch statistics are of, at most


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
        options: Options | None = None,
    ) -> None:
        if not 1 <= len(networks) <= 2:
            raise UserError(f"{len(networks)} networks were given; a sweep takes one or two")
        self.networks = dict(networks)
        options = options or Options()
        found = choices(self.networks, example, layers)
        self.plan = Plan(
            {name: chosen for name, (chosen, _) in found.items()},
            options,
            {name: others for name, (_, others) in found.items()},
        )
        self._states = self.plan.empty()
        self._untrained: dict[str, nn.Module] = {}
        if options.probes:
            self._untrained = {
                name: untrained(network, example[:ROWS], options.seed)
                for name, network in self.networks.items()
            }

    @property
    def images(self) -> int:
        """How many were seen; where to go on after an interruption."""
        seen = self._states["seen"]
        assert isinstance(seen, Seen), "counted from the first batch"
        return int(seen.images)

    @property
    def bytes(self) -> int:
        """Size of the state."""
        return sum(size_of(state) for state in self._states.values())

    @torch.no_grad()
    def update(
        self, images: Images, ids: Int[Tensor, "batch"], labels: Labels | None = None
    ) -> None:
        """Looks at a batch.

        Args:
            images: As the networks take them, on their device.
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
        glances = {name: self._glance(name, images, ids) for name in self.networks}
        batch: dict[str, State] = {"seen": Seen.of(len(images))}
        for glance in glances.values():
            batch |= glance.states
        batch |= self._compared(glances)
        if self.plan.options.probes:
            for name, glance in glances.items():
                batch |= self._probed(name, glance, images, ids, labels)
        if self.plan.options.explained:
            batch |= self._explained(images, ids)
        self._states = {
            key: state.merged(batch[key]) if key in batch else state
            for key, state in self._states.items()
        }

    def merge(self, other: "LayerSweep") -> "LayerSweep":
        """Takes in what another sweep of the same networks saw.

        Raises:
            UserError: If its layers or options are others.
        """
        self.plan.demand_same(other.plan.fingerprint())
        self._states = {
            key: state.merged(other._states[key]) for key, state in self._states.items()
        }
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """What was seen, as tensors by name; `state.save_state` writes it."""
        found = {
            f"{key}:{name}": value
            for key, state in self._states.items()
            for name, value in to_tensors(state).items()
        }
        return {**found, "plan": self.plan.fingerprint()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> "LayerSweep":
        """Goes on from what `state_dict` gave, in place of what was seen.

        Raises:
            UserError: If it was of other layers or options.
        """
        self.plan.demand_same(tensors.get("plan", torch.zeros(0, dtype=torch.uint8)))
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            key, mark, field = name.rpartition(":")
            if mark:
                parts.setdefault(key, {})[field] = value
        self._states = {
            key: from_tensors(type(state), parts.get(key, {}))
            for key, state in self._states.items()
        }
        return self

    def result(self) -> Sweep:
        """What was seen so far."""
        return told(self.plan, self._states)

    def _glance(self, name: str, images: Images, ids: Tensor) -> Glance:
        glance = Glance(name, self.plan, self._states, ids)
        keys = [layer.key for layer in self.plan.layers[name]]
        network = self.networks[name]
        with (
            inspection_mode(network),
            visit_layers(network, keys, glance.after, before=glance.before),
        ):
            unwrap_outer(network)(images)
        return glance

    def _compared(self, glances: Mapping[str, Glance]) -> dict[str, State]:
        """CKA and unit matching: what needs all layers of all networks."""
        sound = [torch.stack([one.sound for one in g.numbers]) for g in glances.values()]
        found: dict[str, State] = {}
        if self.plan.options.cka:
            products = [one for g in glances.values() for one in g.products]
            found["cka"] = CkaSums.of(products, torch.cat(sound))
        if self.plan.matched:
            first, second = ([one.mean for one in g.numbers] for g in glances.values())
            found["match"] = MatchSums.of(first, second, self.plan.pairs, (sound[0], sound[1]))
        return found

    def _probed(
        self, name: str, glance: Glance, images: Images, ids: Tensor, labels: Tensor
    ) -> dict[str, State]:
        options, layers = self.plan.options, self.plan.layers[name]
        means: dict[str, Tensor] = {}

        def visit(key: str, output: object) -> None:
            means[key] = spatial(check_tensor(key, output)).mean((2, 3)).cpu().double()

        fresh = self._untrained[name]
        with visit_layers(fresh, [layer.key for layer in layers], visit):
            fresh(images)
        found: dict[str, State] = {}
        for kind, features in (
            ("probe", [one.mean for one in glance.numbers]),
            ("untrained", [means[layer.key] for layer in layers]),
        ):
            # Each layer's probe is of what is finite there; these are finite nowhere.
            sound = torch.stack([torch.isfinite(one).all(1) for one in features]).any(0)
            features = [one[sound] for one in features]
            found[f"{name}/{kind}"] = ProbeSums.of(
                features, labels[sound], ids[sound], options.probes, options.seed
            )
        return found

    def _explained(self, images: Images, ids: Tensor) -> dict[str, State]:
        options = self.plan.options
        wanted = chosen(ids, options.explained, options.seed).nonzero().flatten()
        if not len(wanted):
            return {}
        layers = {name: self.plan.explained(name) for name in self.networks}
        if not any(layers.values()):
            return {}
        maps = layer_maps(self.networks, layers, images[wanted.to(images.device)])
        return {"cams": CamSums.of(maps)}


def sweep(
    networks: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    *,
    layers: Patterns = None,
    options: Options | None = None,
    seen: Callable[[LayerSweep], None] | None = None,
) -> Sweep:
    """Sweeps over batches of a loader: a fixed probe set at an epoch's end, or a whole test set.

    Args:
        networks: One or two, by name, all on one device; pixels become floats in [0, 1] there.
        batches: As our loaders give them; images that only fill up a shard are left out.
        layers: See `LayerSweep`.
        options: See `LayerSweep`.
        seen: Called after each batch, for a progress bar or a partial report.

    Raises:
        UserError: As `LayerSweep`, or if there is no batch.
    """
    source = iter(batches)
    first = next(source, None)
    if first is None:
        raise UserError("no batch was given; a sweep needs images")
    # A frozen teacher has buffers alone: its network is not among its registered modules.
    device = next(
        (
            held.device
            for net in networks.values()
            for held in chain(net.parameters(), net.buffers())
        ),
        torch.device("cpu"),
    )
    looking = LayerSweep(networks, _floats(first, device), layers=layers, options=options)
    for batch in chain([first], source):
        counted = batch.counted
        looking.update(_floats(batch, device), batch.ids[counted], batch.labels[counted])
        if seen is not None:
            seen(looking)
    return looking.result()


def _floats(batch: Batch, device: torch.device) -> Images:
    pixels = batch.pixels[batch.counted].to(device)
    images = pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels
    return images.contiguous(memory_format=torch.channels_last)
