"""Networks by dotted path, and what may be called when the path comes from a checkpoint."""

import http.client
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

from camdistill.errors import UserError, nearest, shorten
from camdistill.store.atomic_files import check_memory

Argument = bool | int | float | str | list[int] | list[float] | list[str] | None
Factory = Callable[..., object]

# From these, a checkpoint may name only networks; from what the user trusts, any factory.
SAFE_PACKAGES = ("camdistill", "torch", "torchvision", "timm")

# What a user's code may raise; files and downloads that fail among them.
FAILURES = (
    *(TypeError, ValueError, RuntimeError, LookupError, AssertionError),
    *(AttributeError, ImportError, ArithmeticError, OSError),
)


def resolve(
    path: str,
    allowed: Sequence[str] | None = None,
    *,
    what: str = "a torch.nn.Module class or a function that returns one",
) -> Factory:
    """What a dotted path names: a network's class or a function that makes one.

    Args:
        path: Such as `timm.create_model` or `package.module.Network`.
        allowed: Top-level packages that the path may begin with; None for any. With a list the
            path counts as a stranger's: it is checked before anything is imported, and inside
            `SAFE_PACKAGES` it may only name a network's class or a registered model.
        what: The path should name, for errors.

    Raises:
        UserError: If the path isn't allowed, can't be imported or names no network.
    """
    package, module_name, name = path.partition(".")[0], *path.rpartition(".")[::2]
    if allowed is not None and package not in allowed:
        raise UserError(
            f"class path '{path}' lies outside {', '.join(allowed)}: importing it would run its "
            f"code; add `--trust {package}` if you trust it"
        )
    if not module_name or not name:
        raise UserError(f"'{path}' is no class path; give package.module.Network")
    private = any(part.startswith("_") or not part for part in path.split("."))
    if private and allowed is not None and package in SAFE_PACKAGES:
        raise UserError(f"class path '{path}' is private to {package}: name a public network")
    factory = _import_attribute(path, module_name, name)
    if inspect.isclass(factory) and not issubclass(factory, nn.Module):
        raise UserError(f"'{path}' is a class but not a torch.nn.Module: name a network's class")
    if not callable(factory):
        raise UserError(
            f"'{path}' is of type {type(factory).__name__} and can't be called: name {what}"
        )
    if allowed is not None:
        _check_network(path, factory, allowed)
    return factory


def _import_attribute(path: str, module_name: str, name: str) -> object:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        is_own_module = module_name == missing or module_name.startswith(f"{missing}.")
        cause = (
            f"there is no module '{missing}'"
            if is_own_module
            else f"it needs '{missing}', not installed"
        )
        cure = (
            "pip install 'camdistill[models]'"
            if missing == "timm"
            else ("check the name, install it, or put its folder on PYTHONPATH")
        )
        raise UserError(f"can't import '{path}': {cause}; {cure}") from error
    except (*FAILURES, SyntaxError, NameError) as error:
        raise UserError(f"can't import '{path}': {_first_line(error)}; mend that module") from error
    if not hasattr(module, name):
        public = [option for option in dir(module) if not option.startswith("_")]
        raise UserError(f"no '{name}' in module '{module_name}'; {nearest(name, public)}")
    attribute: object = getattr(module, name)
    return attribute


def _check_network(path: str, factory: Factory, allowed: Sequence[str]) -> None:
    """A stranger's path may re-export what isn't a network: `torch.hub.load` runs code."""
    package = getattr(factory, "__module__", "").partition(".")[0]
    if package not in allowed:
        raise UserError(
            f"class path '{path}' leads to '{package}', outside {', '.join(allowed)}; "
            f"add `--trust {package}` if you trust it"
        )
    if package in SAFE_PACKAGES and not inspect.isclass(factory) and not _is_registered(factory):
        raise UserError(
            f"'{path}' is no network of {package}, so it isn't called from a checkpoint; "
            "name a network's class or a model that the package lists"
        )


def _is_registered(factory: Factory) -> bool:
    """Whether torchvision or timm list this function among their models."""
    name, module_name = getattr(factory, "__name__", ""), getattr(factory, "__module__", "")
    if module_name.startswith("torchvision.models"):
        is_listed = name in torchvision.models.list_models()
        return is_listed and torchvision.models.get_model_builder(name) is factory
    if module_name.startswith("timm.models"):
        timm = importlib.import_module("timm")
        is_listed = timm.is_model(name) and timm.model_entrypoint(name) is factory
        return is_listed or factory is timm.create_model
    return False


def check_safe_arguments(path: str, args: Mapping[str, Argument]) -> None:
    """Refuse a checkpoint's arguments that would make a model fetch or read something.

    What the user trusts beyond `SAFE_PACKAGES` may take any argument.

    Raises:
        UserError: If an argument asks for weights, or a text looks like an address.
    """
    if path.partition(".")[0] not in SAFE_PACKAGES:
        return
    for name, value in args.items():
        fetches = name.startswith(("pretrained", "weights", "checkpoint")) and bool(value)
        texts = value if isinstance(value, list) else [value]
        if fetches or any(isinstance(text, str) and ":" in text for text in texts):
            raise UserError(
                f"the checkpoint asks for {path} with {name}={value!r}, which fetches or reads "
                "files; give the network and its weights yourself"
            )


def construct(
    name: str, factory: Factory, args: Mapping[str, Argument], fixed: Mapping[str, object]
) -> nn.Module:
    """The network that a factory makes.

    Args:
        name: What the user called it, for errors.
        factory: A class or a function.
        args: The user's arguments.
        fixed: Arguments that belong to the name; the user can't give them again.

    Raises:
        UserError: If an argument is unknown, missing or wrong, or no network is made.
    """
    parameters = factory_parameters(factory)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    options = [
        option
        for option, parameter in parameters.items()
        if option not in fixed
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    for passed in args:
        if passed in fixed or (passed not in options and not open_ended):
            hint = nearest(passed, options) if options else "it takes none"
            raise UserError(f"no argument '{passed}' in {name}; {hint}")
    missing = [
        option
        for option in options
        if parameters[option].default is inspect.Parameter.empty and option not in args
    ]
    if missing:
        raise UserError(
            f"{name} needs the argument '{missing[0]}'; give it in a config's args, or name a "
            "function of yours that gives it"
        )
    _check_memory_need(name, factory, {**fixed, **args})
    try:
        network = factory(**fixed, **args)
    except UserError:
        raise
    except (URLError, http.client.HTTPException) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"{name} downloads something, which fails ({_first_line(error)}): put its file into "
            f"'{folder}', or name a network that starts without weights"
        ) from error
    except FAILURES as error:
        passed = ", ".join(f"{key}={value!r}" for key, value in args.items()) or "no arguments"
        raise UserError(f"can't build {name} with {passed}: {_first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"{name} made a {type(network).__name__}, not a torch.nn.Module: name a network's "
            "class or a function that returns one"
        )
    return network


def offline_arguments(factory: Factory, args: Mapping[str, Argument]) -> dict[str, object]:
    """Arguments that keep a factory from fetching weights that nobody asked for.

    torchvision's detection and segmentation networks fetch a backbone's weights by default.
    """
    overrides: dict[str, object] = {}
    for name, parameter in factory_parameters(factory).items():
        default = parameter.default
        fetches = isinstance(default, WeightsEnum) or (
            (name.startswith("pretrained") and default is True)
            or (name.startswith("weights") and isinstance(default, str))
        )
        if fetches and name not in args:
            overrides[name] = False if default is True else None
    return overrides


def _check_memory_need(name: str, factory: Factory, args: Mapping[str, object]) -> None:
    """Refuses a network that wouldn't fit into memory, by its shapes alone.

    Asked of networks that are known to be made of shapes; what others do when they are called twice
    isn't known.
    """
    module_name = getattr(factory, "__module__", "")
    loads = any(args.get(option) for option in ("weights", "weights_backbone", "pretrained"))
    if loads or not module_name.startswith(("camdistill.networks.", "torchvision.models.")):
        return
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            network = factory(**args)
    except (TypeError, ValueError, RuntimeError, LookupError, AssertionError):
        return  # what is wrong is told when it is built
    if isinstance(network, nn.Module):
        size = sum(tensor.numel() * tensor.element_size() for tensor in network.parameters())
        check_memory(size, f"the weights of {name} with {shorten(str(dict(args)))}")


def factory_parameters(factory: Factory) -> dict[str, inspect.Parameter]:
    """A factory's parameters by name, empty where Python can't tell."""
    try:
        return dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return {"args": inspect.Parameter("args", inspect.Parameter.VAR_KEYWORD)}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
