"""Networks that can't be explained, and outputs that aren't logits: told before anything runs."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import Quantize
from torch.ao.nn.quantized.modules.utils import WeightedQuantizedModule
from torch.export._unlift import _StatefulGraphModule
from torch.nn.modules.lazy import LazyModuleMixin

from camdistill.errors import UserError

# A part of one of these classes may keep a network from being explained.
PROGRAMS = (torch.jit.ScriptModule, _StatefulGraphModule)
QUANTIZED = (WeightedQuantizedModule, Quantize)
SUSPECT: tuple[type, ...] = (*PROGRAMS, *QUANTIZED, LazyModuleMixin)


def check_explainable(network: nn.Module, name: str, suspects: Iterable[nn.Module]) -> None:
    """Refuses what has no layers to look into, no gradients, or layers without weights.

    A quantized layer's backward gives zeros without a word.

    Args:
        network: The bare network.
        name: What the user called it.
        suspects: Its parts of the classes in `SUSPECT`, itself among them.

    Raises:
        UserError: For a program of TorchScript or torch.export, and quantized or lazy layers.
    """
    for part in suspects:
        if part is network and isinstance(part, PROGRAMS):
            kind = "TorchScript" if isinstance(part, torch.jit.ScriptModule) else "torch.export"
            raise UserError(
                f"{name} is a program of {kind}, whose layers can't be looked into: give the "
                "torch.nn.Module that it was made from"
            )
        if isinstance(part, QUANTIZED):
            raise UserError(
                f"{name} has quantized layers ('{_module_name(network, part)}'), which have no "
                "gradients: give the network of floats that it was made from"
            )
        if isinstance(part, LazyModuleMixin) and part.has_uninitialized_params():
            raise UserError(
                f"{name} has layers without weights yet ('{_module_name(network, part)}' is "
                "lazy): run "
                "the network on an image once before (as a class path: name a function that does "
                "so and returns the network)"
            )


def check_built(network: nn.Module, name: str) -> None:
    """Refuses a network by name or class path that can't be explained or run on float32 images.

    Raises:
        UserError: See `check_explainable`; or its weights are not float32, or on no device.
    """
    suspects = [part for part in network.modules() if isinstance(part, SUSPECT)]
    check_explainable(network, name, suspects)
    for weight_name, weight in network.named_parameters():
        if weight.is_meta:
            raise UserError(
                f"{name}'s '{weight_name}' is on the meta device, which holds no numbers: build "
                "the "
                "network on the CPU"
            )
        if weight.is_floating_point() and weight.dtype != torch.float32:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise UserError(
                f"{name}'s '{weight_name}' is {dtype}, and images are float32: build the network "
                "in "
                "float32, such as by network.float()"
            )


def check_logits(who: str, output: object, count: int, *, numbers: bool = True) -> None:
    """Refuses an output that isn't one row of logits an image.

    Args:
        who: The network, as a subject: "the teacher".
        output: What it gave.
        count: Number of images that it was given.
        numbers: Whether NaN is refused.

    Raises:
        UserError: With what it gave, and where in it logits may be.
    """
    if not _is_logits(output, count):
        expression = _find_logits(output, count)
        cure = "name a network that returns them alone"
        if expression is not None:
            cure = (
                "name a class of your own around this network, whose forward returns "
                f"self.network(images){expression}"
            )
        raise UserError(
            f"{who} gives {_describe_output(output)} for {count} images, not logits [images, "
            "classes]: "
            f"{cure}"
        )
    if numbers and isinstance(output, Tensor) and bool(output.isnan().any()):
        raise UserError(f"{who} gives logits that are not numbers (nan); give other weights")


def _is_logits(output: object, count: int) -> bool:
    return (
        isinstance(output, Tensor)
        and output.is_floating_point()
        and output.layout == torch.strided
        and output.dim() == 2
        and len(output) == count
        and output.shape[1] > 0
    )


def _find_logits(output: object, count: int) -> str | None:
    """How logits may be taken out of an output, as Python code that follows its name."""
    if isinstance(output, Tensor):
        if not output.is_floating_point() or output.dim() == 0 or len(output) != count:
            return None
        rows = {1: "[:, None]", 2: "", 3: ".mean(1)", 4: ".mean((2, 3))"}
        inside = rows.get(output.dim())
        dense = "" if output.layout == torch.strided else ".to_dense()"
        return None if inside is None else f"{dense}{inside}"
    entries: list[tuple[object, object]] = []
    if isinstance(output, Mapping):
        entries = sorted(output.items(), key=lambda entry: str(entry[0]) not in ("logits", "out"))
    elif isinstance(output, Sequence) and not isinstance(output, str):
        entries = list(enumerate(output))
    for key, value in entries:
        inner = _find_logits(value, count)
        if inner is not None:
            return f"[{key!r}]{inner}"
    return None


def _describe_output(output: object) -> str:
    """What an output is, with the shapes in it."""
    if isinstance(output, Tensor):
        dtype = "" if output.is_floating_point() else str(output.dtype).removeprefix("torch.")
        kind = "a tensor" if output.layout == torch.strided else "a sparse tensor"
        return f"{kind} {list(output.shape)}{f' of {dtype}' if dtype else ''}"
    name = type(output).__name__
    if isinstance(output, Mapping):
        shapes = [f"{key!r} {_describe_shape(value)}" for key, value in list(output.items())[:3]]
    elif isinstance(output, Sequence) and not isinstance(output, str):
        shapes = [_describe_shape(value) for value in output[:3]]
    else:
        return "None" if output is None else f"one {name}"
    return f"one {name} of {', '.join(shapes)}" if shapes else f"an empty {name}"


def _describe_shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _module_name(network: nn.Module, part: nn.Module) -> str:
    return next((name for name, module in network.named_modules() if module is part), "")
