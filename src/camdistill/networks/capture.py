"""Layers by dotted name, and what passes through them: the only forward hooks in the package.

A layer is named as inside the bare network: "layer3", "layer1.0.relu". A module that a forward
calls several times has one output a call: "layer1.0.relu#0" is the first call, "#1" the second;
without a number the name means the last call.
"""

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DataParallel, DistributedDataParallel

from camdistill.errors import UserError, is_out_of_memory, nearest
from camdistill.networks.network_checks import check_logits
from camdistill.networks.wrapper import Wrapper
from camdistill.types import Images

Visit = Callable[[str, object], Tensor | None]
PreVisit = Callable[[str, object], None]
SIZE_CURE = "give another --size, or another network"

MANY_MODULES = 16
# Threads take turns in examining networks.
_EXAMINING = threading.RLock()
# Whether compiled code runs is one switch for the whole process.
_STANCE = threading.RLock()


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside its wrappers: torch.compile, DDP, DataParallel, `Preprocessed`."""
    while (inner := _unwrap_once(network)) is not None:
        network = inner
    return network


def unwrap_outer(network: nn.Module) -> nn.Module:
    """The network without outer wrappers that only run it elsewhere or otherwise.

    Unlike `unwrap` this keeps what changes the result, such as a normalization.
    """
    while isinstance(network, DataParallel | DistributedDataParallel) or _is_compiled(network):
        inner = _unwrap_once(network)
        assert inner is not None, "such a wrapper holds a network"
        network = inner
    return network


def layer_names(network: nn.Module) -> tuple[str, ...]:
    """Every layer's name, in the order of definition; a shared module has one name each place."""
    return tuple(_modules_by_name(unwrap(network)))


@contextmanager
def examination_lock() -> Iterator[None]:
    """Lets one thread at a time examine networks; others wait, calls inside the block don't.

    Modes, hooks and replaced functions belong to modules, which networks may share, so that two
    threads would undo each other's. A thread that only runs a network may do so meanwhile: hooks of
    this package act in the thread that set them.
    """
    with _EXAMINING:
        yield


@contextmanager
def watch_modules(
    modules: Collection[nn.Module], note: Callable[[nn.Module, object], None]
) -> Iterator[None]:
    """Calls `note(module, output)` whenever one of the modules has run inside the block.

    Nothing is changed, and no module needs to run. Only the calling thread's forwards are noted,
    and none of compiled parts (see `disable_compile`).
    """
    owner, watched = threading.get_ident(), set(modules)

    def hook(module: nn.Module, _: object, output: object) -> None:
        if threading.get_ident() == owner and module in watched:
            note(module, output)

    with ExitStack() as stack:
        # A part that is TorchScript takes no hook of its own.
        takes_hooks = not any(isinstance(module, torch.jit.ScriptModule) for module in watched)
        if takes_hooks and len(watched) < MANY_MODULES:
            for module in watched:
                stack.callback(module.register_forward_hook(hook).remove)
        else:  # one hook for all modules there are, as each registration takes its time
            stack.callback(register_module_forward_hook(hook).remove)
        yield


@contextmanager
def capture(network: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect layers' outputs from the forward that runs inside the block.

    The outputs carry the graph of that forward if it records one, and in-place operations that
    follow a layer don't change them: the network goes on with a copy.

    Args:
        network: Bare or wrapped; call it itself inside the block.
        layers: Names, see the module's docstring.

    Yields:
        Outputs by layer, filled while the network runs; in the order of `layers` after the block.

    Raises:
        UserError: If there is no such layer, its output is not a tensor, or the forward didn't
            call it.
    """
    layers = tuple(dict.fromkeys(layers))
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: object) -> Tensor:
        outputs[name] = check_tensor(name, output)
        return outputs[name].clone()

    with visit_layers(network, layers, keep):
        yield outputs
    for name in layers:
        outputs[name] = outputs.pop(name)


@contextmanager
def visit_layers(
    network: nn.Module,
    layers: Iterable[str],
    visit: Visit,
    *,
    before: PreVisit | None = None,
    required: bool = True,
) -> Iterator[None]:
    """Call `visit(name, output)` whenever a layer has run inside the block.

    What `visit` returns goes on in place of the output; None leaves it. A layer asked for without
    a call number is visited at every call, as nobody knows which is the last. Parts under
    torch.compile run uncompiled inside the block: compiled code doesn't call hooks.

    Args:
        network: Bare or wrapped.
        layers: Names, see the module's docstring.
        visit: What to do.
        before: What to do with a layer's first argument before the layer runs, and overwrites it
            if it works in place.
        required: Whether it is an error that a layer didn't run.

    Raises:
        UserError: If there is no such layer, or (`required`) the forward didn't call it.
    """
    requests: dict[nn.Module, list[tuple[str, int | None]]] = defaultdict(list)
    for name, (module, call) in _locate_layers(unwrap(network), layers).items():
        requests[module].append((name, call))
    calls = dict.fromkeys(requests, 0)
    owner = threading.get_ident()

    def hook(module: nn.Module, _: object, output: object) -> object:
        if threading.get_ident() != owner:
            return output
        number, calls[module] = calls[module], calls[module] + 1
        for name, call in requests[module]:
            if call in (None, number):
                replacement = visit(name, output)
                output = output if replacement is None else replacement
        return output

    def pre_hook(module: nn.Module, arguments: tuple[object, ...]) -> None:
        if threading.get_ident() != owner:
            return
        for name, call in requests[module]:
            if before is not None and call in (None, calls[module]):
                before(name, arguments[0] if arguments else None)

    with ExitStack() as stack:
        if requests:
            stack.enter_context(disable_compile(network))
        for module in requests:
            stack.callback(module.register_forward_hook(hook).remove)
            if before is not None:
                stack.callback(module.register_forward_pre_hook(pre_hook).remove)
        yield
    if required:
        for module, names_and_calls in requests.items():
            for name, call in names_and_calls:
                _check_called(name, call, calls[module])


def check_tensor(name: str, output: object) -> Tensor:
    """A layer's output if it is a tensor.

    Raises:
        UserError: If it is a tuple or the like, or sparse.
    """
    if not isinstance(output, Tensor) or output.layout != torch.strided:
        kind = "sparse tensor" if isinstance(output, Tensor) else type(output).__name__
        raise UserError(
            f"layer '{name}' gives a {kind}, not a{' dense' * (kind == 'sparse tensor')} tensor: "
            "ask for a layer inside it or after it"
        )
    return output


@contextmanager
def inspection_mode(network: nn.Module) -> Iterator[None]:
    """Run the network for a look, in eval mode without graph, and leave nothing behind.

    Modes, buffers and random states are put back, also after an exception.
    """
    inner = unwrap(network)
    with examination_lock():
        modes = [(module, module.training) for module in inner.modules()]
        buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in inner.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        devices = {weight.device.index for weight in inner.parameters() if weight.is_cuda}
        random_state = torch.random.fork_rng(devices=[i for i in devices if i is not None])
        try:
            for module, _ in modes:
                module.training = False
            with random_state, torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, saved in buffers:
                    module._buffers[name] = buffer
                    if not torch.equal(buffer, saved):
                        buffer.copy_(saved)


def check_forward(
    networks: Mapping[str, nn.Module],
    image: Images,
    *,
    cure: str = SIZE_CURE,
    numbers: bool = True,
    settled: bool = False,
) -> None:
    """Checks that each network runs on an image and gives logits.

    Args:
        networks: By what they are, such as "teacher".
        image: One of the images that they will take.
        cure: What to do where the image can't be taken.
        numbers: Whether NaN among the logits is refused even where a layer gives it: an analysis
            shows that layer.
        settled: Whether a network is refused that answers by chance, in eval mode too.

    Raises:
        UserError: One can't run on the image, or gives no logits.
    """
    pair = torch.cat([image[:1], image[:1]])
    shape = "x".join(map(str, image.shape[1:]))
    for name, network in networks.items():
        weight = next(network.parameters(), image)
        broken: list[nn.Module] = []

        def note(module: nn.Module, values: object, broken: list[nn.Module] = broken) -> None:
            if isinstance(values, Tensor) and bool(values.isnan().any()):
                broken.append(module)

        inner_modules = () if numbers else list_modules(unwrap(network))[1:]
        try:
            with inspection_mode(network), watch_modules(inner_modules, note):
                outputs = [network(batch.to(weight.device)) for batch in (pair, pair[:1], pair)]
        except UserError:
            raise
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            # What Python says of a forward that wants more, or less, than images.
            arguments = isinstance(error, TypeError) and "argument" in str(error)
            advice = "give a network whose forward takes images alone" if arguments else cure
            raise UserError(
                f"the {name} can't run on an image of {shape} ({_first_line(error)}); {advice}"
            ) from error
        except (LookupError, AttributeError, ArithmeticError, OSError, StopIteration) as error:
            raise UserError(
                f"the {name}'s forward fails on an image of {shape} ({type(error).__name__}: "
                f"{_first_line(error)}); mend {type(unwrap(network)).__name__}"
            ) from error
        for output, count in zip(outputs, (2, 1, 2), strict=True):
            check_logits(f"the {name}", output, count, numbers=not broken)
        if settled and _differ(outputs[0], outputs[2]):
            raise UserError(
                f"the {name} answers by chance: the same image gets other logits the second time; "
                "give a network that draws nothing in eval mode, such as by "
                "F.dropout(..., training=self.training)"
            )


def _differ(logits: Tensor, again: Tensor) -> bool:
    """Whether logits are others beyond rounding; a GPU may sum in another order."""
    return bool((logits - again).abs().max() > 1e-4 * logits.abs().max())


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def list_modules(network: nn.Module) -> list[nn.Module]:
    """Every module once, the network itself first; `modules()` is three times as slow."""
    modules = {network: None}
    pending = [network]
    while pending:
        for part in pending.pop()._modules.values():
            if part is not None and part not in modules:
                modules[part] = None
                pending.append(part)
    return list(modules)


def structure_fingerprint(network: nn.Module) -> int:
    """A fingerprint of what a network is made of and of its modes.

    It changes when a module is replaced, gets a hook, or switches between train and eval. A network
    may take another way without any of these, so nothing but costs may rest on it.
    """
    return hash(
        tuple(
            (
                id(module),
                type(module),
                module.training,
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
            )
            for module in list_modules(network)
        )
    )


def _unwrap_once(network: nn.Module) -> nn.Module | None:
    """One wrapper less; None if there is none."""
    inner: object = None
    if _is_compiled(network):
        inner = network._orig_mod
    elif isinstance(network, DataParallel | DistributedDataParallel):
        inner = network.module
    elif isinstance(network, Wrapper) and network._modules.keys() <= {"network"}:
        inner = network.network
    return inner if isinstance(inner, nn.Module) else None


def _is_compiled(network: nn.Module) -> bool:
    # Its class is in a module that takes seconds to import, and is there if anything is compiled.
    if "_orig_mod" not in network._modules:
        return False
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(network, dynamo.OptimizedModule)


@contextmanager
def disable_compile(network: nn.Module) -> Iterator[None]:
    """Parts under torch.compile run as they were written: compiled code doesn't call hooks."""
    wrappers = [network]
    while (inner := _unwrap_once(wrappers[-1])) is not None:
        wrappers.append(inner)
    if any(
        _is_compiled(part) or part._compiled_call_impl is not None
        for part in [*wrappers, *list_modules(wrappers[-1])]
    ):
        with _STANCE, torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _modules_by_name(inner: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in inner.named_modules(remove_duplicate=False) if name}


def _locate_layers(
    inner: nn.Module, layers: Iterable[str]
) -> dict[str, tuple[nn.Module, int | None]]:
    """Module and call number by name."""
    locations: dict[str, tuple[nn.Module, int | None]] = {}
    for name in layers:
        base, mark, number = name.partition("#")
        try:
            module = inner.get_submodule(base)
        except AttributeError:
            module = inner
        if module is inner:
            raise UserError(
                f"no layer '{name}' in {type(inner).__name__}; "
                f"{nearest(base, _modules_by_name(inner))}"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                f"layer '{name}' is a program of TorchScript, which can't be looked into: ask for "
                "a layer outside it, or give the torch.nn.Module that it was made from"
            )
        if mark and not number.isdecimal():
            raise UserError(
                f"no layer '{name}': after # comes the number of the call, from 0, "
                f"such as '{base}#0'"
            )
        locations[name] = module, int(number) if mark else None
    return locations


def _check_called(name: str, call: int | None, calls: int) -> None:
    if calls == 0:
        raise UserError(
            f"layer '{name}' is part of the network but this forward didn't call it: "
            "ask for a layer that runs (in train and eval mode they may differ)"
        )
    if call is not None and call >= calls:
        base = name.partition("#")[0]
        raise UserError(
            f"no layer '{name}': this forward calls '{base}' {calls} "
            f"time{'s' if calls > 1 else ''}, so the last is '{base}#{calls - 1}'"
        )
