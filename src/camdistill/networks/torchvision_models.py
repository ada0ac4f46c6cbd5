"""torchvision's networks and weights by name; what it downloads is kept in torch's own cache."""

import http.client
import inspect
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

from camdistill.errors import UserError, nearest
from camdistill.networks.class_paths import Argument, construct, factory_parameters
from camdistill.networks.training_facts import TrainingFacts


@cache
def model_names() -> tuple[str, ...]:
    """The classification networks, ResNets first."""
    all_models = torchvision.models.list_models(module=torchvision.models)
    return tuple(sorted(all_models, key=lambda name: (not name.startswith("resnet"), name)))


def is_weight_name(name: str, weights: str) -> bool:
    """Whether these weights are named, not a file's.

    Raises:
        UserError: If they look like a name that the network hasn't got.
    """
    available = list(_weights_enum(name).__members__) if name in model_names() else []
    short = weights.rpartition(".")[2] if weights.split(".")[0].endswith("_Weights") else weights
    if short in available:
        return True
    looks_named = "_Weights" in weights or not ("." in weights or "/" in weights)
    if looks_named and not Path(weights).exists():
        if not available:
            raise UserError(
                f"no weights '{weights}' for {name}: only torchvision's networks have "
                "weights by name; give a file"
            )
        raise UserError(f"no weights '{weights}' for {name}; {nearest(weights, available)}")
    return False


def _weights_enum(name: str) -> type[WeightsEnum]:
    enum: type[WeightsEnum] = torchvision.models.get_model_weights(name)
    return enum


def _weight_entry(name: str, weights: str) -> WeightsEnum:
    return _weights_enum(name)[weights.rpartition(".")[2]]


def download_weights(name: str, weights: str) -> Path:
    """The file of named weights, downloaded if it isn't in torch's cache yet.

    Raises:
        UserError: If it can't be downloaded.
    """
    url: str = _weight_entry(name, weights).url
    file = PurePosixPath(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if path.exists():
        return path
    # The name ends in the start of the sha256: resnet18-f37072fd.pth
    digest = path.stem.rpartition("-")[2]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest, progress=True)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise UserError(
            f"can't download {name}'s weights ({reason}): fetch {url} elsewhere and put it at "
            f"'{path}', or give another file as weights"
        ) from error
    return path


def build_pretrained(name: str, weights: str, args: Mapping[str, Argument]) -> nn.Module:
    """A network with named weights that are in the cache already."""
    _check_arguments(name, args, ("weights", "num_classes"))
    fixed = {"weights": _weight_entry(name, weights), "progress": False}
    return construct(name, torchvision.models.get_model_builder(name), args, fixed)


def build_untrained(name: str, args: Mapping[str, Argument], classes: int | None) -> nn.Module:
    """A network with random weights."""
    _check_arguments(name, args, ("weights",))
    fixed: dict[str, object] = {"weights": None}
    if classes is not None and "num_classes" not in args:
        fixed["num_classes"] = classes
    # Silences the notice that these two will change how they start.
    if "init_weights" in _class_parameters(name) and "init_weights" not in args:
        fixed["init_weights"] = True
    return construct(name, torchvision.models.get_model_builder(name), args, fixed)


def weight_facts(name: str, weights: str) -> TrainingFacts:
    """What torchvision says of named weights: images, normalization and names of classes."""
    member = _weight_entry(name, weights)
    transforms = member.transforms()
    mean, std = (tuple(float(number) for number in t) for t in (transforms.mean, transforms.std))
    side = int(transforms.crop_size[0])
    class_names = tuple(str(name) for name in member.meta.get("categories", ()))
    return TrainingFacts(
        class_names=class_names,
        size=(side, side),
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )


@cache
def _class_parameters(name: str) -> tuple[str, ...]:
    """Arguments of the network's class: the builders take any and pass them on."""
    builder = torchvision.models.get_model_builder(name)
    network_class = inspect.signature(builder).return_annotation
    return tuple(factory_parameters(network_class)) if inspect.isclass(network_class) else ()


def _check_arguments(name: str, args: Mapping[str, Argument], reserved: tuple[str, ...]) -> None:
    options = [option for option in _class_parameters(name) if option not in reserved]
    for argument in args:
        if argument in reserved:
            cure = "give it as `weights`" if argument == "weights" else "the weights say it"
            raise UserError(f"{argument} is not an argument of {name} here: {cure}")
        if options and argument not in options:
            raise UserError(f"no argument '{argument}' in {name}; {nearest(argument, options)}")
