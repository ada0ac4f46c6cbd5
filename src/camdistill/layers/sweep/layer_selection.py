"""Selects the layers of a sweep by running the network on an image.

By default these are the network's blocks and the non-linearities outside them: a residual
network's stem and residual blocks, the stages of a student, each ReLU of a VGG. A block is a
module of its own class that holds convolutions larger than 1x1 and no other such block.

Outputs are read as [B, C, h, w]. A layer that gives [B, h, w, C] (Swin, the inside of a ConvNeXt's
block) is left out: its rows would be taken for units.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from camdistill.errors import UserError, nearest
from camdistill.networks.capture import inspection_mode, unwrap, unwrap_outer, visit_layers
from camdistill.types import Images

RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus)
NON_LINEARITIES = (
    *RECTIFIERS,
    *(nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.Softsign),
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """One call of one module, and where its tensors are read.

    Attributes:
        name: What people call it: the block's path, or the module's, with "#1" where it is called
            more than once.
        path: Path of the module whose output is read; a block that ends in a ReLU is read there.
        call: Which call of that module.
        activated: Whether that module is a non-linearity, so that its input is read too.
        shape: Channels, height and width of the output; (1, 1) for a vector.
        rectified: Whether the module is known to give no negative values.
        relu: Whether it is a plain ReLU: the input's histogram then tells the output's.
        gated: Whether it gives 0 for whatever is below 0 (ReLU, ReLU6), so that a unit that never
            does so might as well have no non-linearity. Outputs that merely aren't negative
            (a sigmoid's, a pooling's after a ReLU) say nothing like it.
        bound: The largest magnitude that the module can give; None if there is none.
    """

    name: str
    path: str
    call: int
    activated: bool
    shape: tuple[int, int, int]
    rectified: bool = False
    relu: bool = False
    gated: bool = False
    bound: float | None = None

    @property
    def key(self) -> str:
        """As `networks.capture` names the call."""
        return f"{self.path}#{self.call}"


@dataclass
class _Event:
    """A call that gave a tensor, and what stands behind it."""

    path: str
    call: int
    module: nn.Module
    output: Tensor
    version: int
    activation: "_Event | None" = None
    units_last: bool = False

    def is_block(self, *, large_kernels: bool) -> bool:
        """Whether the module is of its own class and convolves, with kernels larger than 1."""
        return not isinstance(self.module, nn.Sequential) and any(
            isinstance(part, CONVOLUTIONS) and (max(part.kernel_size) > 1 or not large_kernels)
            for part in self.module.modules()
            if part != self.module
        )


def find_layers(
    network: nn.Module, images: Images, patterns: Sequence[str] | None = None
) -> tuple[Layer, ...]:
    """The layers that are meant, in the order in which they run; see `choice`."""
    return select_layers(network, images, patterns)[0]


def select_layers(
    network: nn.Module, images: Images, patterns: Sequence[str] | None = None
) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """The layers that are meant, in the order in which they run, and names of those left out.

    Args:
        network: Bare or wrapped.
        images: Images as the network takes them; the first is run.
        patterns: Names or patterns as of a shell: "layer3.*", "stage?", "layer1.0.relu#1"; without
            a call's number every call is meant. None is what the module's docstring says.

    Returns:
        The layers, and which are meant too but give [B, h, w, C].

    Raises:
        UserError: If a pattern fits no layer, or none that gives [B, C, h, w], or the network has
            no layers to look at.
    """
    events = _record_events(network, images)
    if patterns is None:
        selected = _default_events(events)
    else:
        wanted_ids: set[int] = set()
        for pattern in patterns:
            fitting = [
                event for event in events if fits_pattern(f"{event.path}#{event.call}", pattern)
            ]
            if not fitting:
                suggestion = nearest(pattern, dict.fromkeys(_event_names(events)))
                raise UserError(
                    f"no layer '{pattern}' in {type(unwrap(network)).__name__}; {suggestion}. "
                    "Patterns such as 'layer3.*' work too"
                )
            _check_units_first(f"layers '{pattern}'", fitting)
            wanted_ids |= {id(event) for event in fitting}
        selected = [event for event in events if id(event) in wanted_ids]
    if not selected:
        raise UserError(
            f"{type(unwrap(network)).__name__} has no convolution and no non-linearity as a "
            "module: "
            "name layers by --layers"
        )
    if patterns is None:
        _check_units_first("the layers looked at by default", selected)
    names = {id(event): name for event, name in zip(events, _event_names(events), strict=True)}
    units_first = [event for event in selected if not event.units_last]
    units_last = [event for event in selected if event.units_last]
    return _build_layers(units_first, events), tuple(names[id(event)] for event in units_last)


def list_call_names(network: nn.Module, images: Images) -> tuple[str, ...]:
    """What every call of every module that gives a tensor [B, ...] is called."""
    return tuple(_event_names(_record_events(network, images)))


def fits_pattern(name: str, pattern: str) -> bool:
    """Whether a pattern means a call: by the module's path, or with the call's number."""
    return any(fnmatchcase(candidate, pattern) for candidate in (name, name.partition("#")[0]))


def list_layers(network: nn.Module, images: Images) -> tuple[Layer, ...]:
    """Every call of every module that gives a tensor [B, C, h, w] or [B, C]."""
    return find_layers(network, images, ["*"])


def _record_events(network: nn.Module, images: Images) -> list[_Event]:
    inner = unwrap(network)
    # A module that stands in two places has two names; it is one layer, under the first.
    modules = {path: module for path, module in inner.named_modules() if path}
    calls: Counter[str] = Counter()
    events: list[_Event] = []
    open_inputs: dict[str, list[object]] = {}  # of calls that haven't returned

    def note_input(path: str, value: object) -> None:
        open_inputs.setdefault(path, []).append(value)

    def note_output(path: str, output: object) -> None:
        call, calls[path] = calls[path], calls[path] + 1
        value = open_inputs[path].pop()
        if not isinstance(output, Tensor) or output.dim() not in (2, 4) or not len(output):
            return
        event = _Event(path, call, modules[path], output, output._version)
        if isinstance(event.module, NON_LINEARITIES):
            event.activation = event
        else:
            # A block whose output is a non-linearity's, untouched since.
            activations = (
                other.activation
                for other in reversed(events)
                if other.output is output and other.version == output._version
            )
            event.activation = next(activations, None) if list(event.module.children()) else None
        event.units_last = _has_units_last(event, value, events)
        events.append(event)

    with (
        inspection_mode(network),
        visit_layers(network, modules, note_output, before=note_input, required=False),
    ):
        unwrap_outer(network)(images[:1])
    return events


def _has_units_last(event: _Event, layer_input: object, earlier: list[_Event]) -> bool:
    """Whether an output is [B, h, w, C], as far as modules tell that take their units last.

    Notes the same of the output that such a module was given, if it came from a permutation.
    """
    output, module = event.output, event.module
    if output.dim() != 4:
        return False
    source = next((other for other in reversed(earlier) if other.output is layer_input), None)
    if isinstance(module, nn.Linear) or _normalizes_last(module, output):
        # Not of a convolution's output, whose columns a linear layer may well mix.
        if source is not None and not list(source.module.parameters()):
            source.units_last = source.output.dim() == 4
        return True
    if source is not None and source.units_last and source.output.shape == output.shape:
        return source.output.stride() == output.stride()  # else it permutes
    inside = earlier[-1] if earlier and earlier[-1].path.startswith(f"{event.path}.") else None
    return inside is not None and inside.units_last and inside.output.shape == output.shape


def _normalizes_last(module: nn.Module, output: Tensor) -> bool:
    if not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) != 1:
        return False
    (units,) = module.normalized_shape
    # Some subclasses permute before and after.
    return output.shape[-1] == units and (type(module) is nn.LayerNorm or output.shape[1] != units)


def _check_units_first(subject: str, fitting: list[_Event]) -> None:
    if all(event.units_last for event in fitting):
        shape = list(fitting[0].output.shape)
        raise UserError(
            f"{subject} give {shape}, with their units last, and are read as "
            "[B, C, h, w]: name other layers by --layers"
        )


def _default_events(events: list[_Event]) -> list[_Event]:
    map_events = [event for event in events if event.output.dim() == 4]
    # Without the gates inside blocks (squeeze and excitation), whose kernels are of size 1.
    candidates = [event for event in map_events if event.is_block(large_kernels=True)] or [
        event for event in map_events if event.is_block(large_kernels=False)
    ]
    paths = {event.path for event in candidates}
    blocks = [
        event
        for event in candidates
        if not any(other.startswith(f"{event.path}.") for other in paths)
    ]
    inside = tuple({f"{event.path}." for event in blocks})
    outside = [
        event
        for event in events
        if isinstance(event.module, NON_LINEARITIES) and not event.path.startswith(inside)
    ]
    selected_ids = {id(event) for event in (*blocks, *outside)}
    if not selected_ids:
        return [event for event in events if isinstance(event.module, CONVOLUTIONS)]
    return [event for event in events if id(event) in selected_ids]


def _build_layers(selected: list[_Event], events: list[_Event]) -> tuple[Layer, ...]:
    names = {id(event): name for event, name in zip(events, _event_names(events), strict=True)}
    position_by_id = {id(event): number for number, event in enumerate(events)}
    layers: dict[int, Layer] = {}
    block_positions: set[int] = set()
    for event in selected:
        source = event.activation or event
        # Of several names for one tensor the innermost block's is the one that people know.
        position = position_by_id[id(source)]
        if position in block_positions or (position in layers and event is source):
            continue
        if event is not source:
            block_positions.add(position)
        module = source.module
        layers[position] = Layer(
            name=names[id(event)],
            path=source.path,
            call=source.call,
            activated=source is event.activation,
            shape=_shape(source.output),
            rectified=isinstance(module, RECTIFIERS),
            relu=type(module) is nn.ReLU,
            gated=_cuts_at_zero(module),
            bound=_bound(module),
        )
    return tuple(layers[position] for position in sorted(layers))


def _shape(output: Tensor) -> tuple[int, int, int]:
    sizes = (*output.shape[1:], 1, 1)
    return sizes[0], sizes[1], sizes[2]


def _event_names(events: list[_Event]) -> list[str]:
    calls = Counter(event.path for event in events)
    return [
        f"{event.path}#{event.call}" if calls[event.path] > 1 else event.path for event in events
    ]


def _cuts_at_zero(module: nn.Module) -> bool:
    # ReLU6 is a Hardtanh
    return isinstance(module, nn.ReLU) or (isinstance(module, nn.Hardtanh) and module.min_val == 0)


def _bound(module: nn.Module) -> float | None:
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return float(max(abs(module.min_val), abs(module.max_val)))
    return 1.0 if isinstance(module, nn.Sigmoid | nn.Hardsigmoid | nn.Tanh | nn.Softsign) else None
