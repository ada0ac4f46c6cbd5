"""How many bytes one image takes in a forward, so that many of them can be asked in chunks."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from camdistill.networks.capture import (
    inspection_mode,
    structure_fingerprint,
    unwrap,
    unwrap_outer,
    visit_layers,
)
from camdistill.types import Images

# A CPU is fastest while a forward fits its caches: ResNet-20, occlusion of 8 images of 32 pixels
# took 1.2 s of CPU time with 32 MiB at once, 3.3 s with 256 MiB.
CPU_MEMORY, OTHER_MEMORY = 2**25, 2**29
# Of the largest layer: its input, its output, and what the operation itself needs.
ALIVE = 3
# A graph keeps most layers' outputs, and their gradients come one after the other.
GRAPH_FACTOR = 2


@dataclass(frozen=True)
class Footprint:
    """Bytes of one image, estimated from the sizes of the layers' outputs.

    Attributes:
        image: The image itself.
        outputs: Outputs of every module without parts, in the order in which they ran, by name.
    """

    image: int
    outputs: tuple[tuple[str, int], ...]

    @property
    def without_graph(self) -> int:
        """Of a forward that records nothing."""
        return self.behind("")

    @property
    def with_graph(self) -> int:
        """Of a forward that is recorded whole, and its backward."""
        return GRAPH_FACTOR * (self.image + sum(size for _, size in self.outputs))

    def behind(self, layer: str) -> int:
        """Of the part of a forward that follows a layer; "" is the whole."""
        base, separator, number = layer.partition("#")
        calls = [place for place, (name, _) in enumerate(self.outputs) if name == base]
        if separator and int(number) < len(calls):
            return ALIVE * max(size for _, size in self.outputs[calls[int(number)] :])
        inside = [n for n, (name, _) in enumerate(self.outputs) if name.startswith(f"{base}.")]
        inside = calls or inside
        if not base or not inside:
            return ALIVE * max([self.image, *(size for _, size in self.outputs)])
        return ALIVE * max(size for _, size in self.outputs[inside[-1] :])


def memory_budget(images: Images, memory: int | None) -> int:
    """Bytes that a forward of changed images may take: 32 MiB on a CPU, 512 MiB elsewhere."""
    if memory is not None:
        return memory
    return CPU_MEMORY if images.device.type == "cpu" else OTHER_MEMORY


def footprint(network: nn.Module, images: Images) -> Footprint:
    """Measures a network by running it on one image; it is remembered."""
    inner = unwrap(network)
    footprints = _FOOTPRINTS.setdefault(inner, {})
    key = (tuple(images.shape[1:]), images.element_size(), structure_fingerprint(inner))
    if key not in footprints:
        outputs: list[tuple[str, int]] = []

        def note(name: str, output: object) -> None:
            if isinstance(output, Tensor):
                outputs.append((name, output.numel() * output.element_size()))

        names = [name for name, part in inner.named_modules() if name and not list(part.children())]
        with inspection_mode(network), visit_layers(network, names, note, required=False):
            unwrap_outer(network)(images[:1])
        footprints[key] = Footprint(images[:1].numel() * images.element_size(), tuple(outputs))
    return footprints[key]


_FOOTPRINTS: WeakKeyDictionary[nn.Module, dict[tuple[tuple[int, ...], int, int], Footprint]] = (
    WeakKeyDictionary()
)
