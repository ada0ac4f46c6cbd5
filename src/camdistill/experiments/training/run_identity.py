"""What a run is: its model, its data, its seed and how it trains; how two configs differ in it."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

# Options that change no number of a run.
FREE = {"model.cache_dir", "data.cache_dir", "data.download"}
# Where files lie: what is in them is compared with the checkpoint when it is loaded.
PLACES = {"model.teacher.weights", "data.root"}
# The trainer's options that change what a training computes, with Lightning's defaults.
TRAINER_DEFAULTS: Mapping[str, object] = {
    "accumulate_grad_batches": 1,
    "gradient_clip_algorithm": "norm",
    "gradient_clip_val": 0,
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
    "precision": "32-true",
    "reload_dataloaders_every_n_epochs": 0,
    "sync_batchnorm": False,
}
TRAINER = {f"trainer.{name}" for name in TRAINER_DEFAULTS}
_PRECISIONS = {"16": "16-mixed", "32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}

Config = Mapping[str, object]
Differing = dict[str, tuple[object, object]]


def differences(stored: Config, own: Config, free: set[str]) -> Differing:
    """Options that make two configs two runs, with their values there and here."""
    found: Differing = {}
    for part in ("model", "data", "seed_everything"):
        found |= _compare(part, stored.get(part), own.get(part))
    there, here = _trainer_options(stored), _trainer_options(own)
    for name, value in there.items():
        # as texts, because 1 is one batch and 1.0 is all of them
        if str(value) != str(here[name]):
            found[f"trainer.{name}"] = (value, here[name])
    return {name: values for name, values in found.items() if name not in free}


def _trainer_options(config: Config) -> dict[str, object]:
    """What changes a training's numbers, each in one spelling; what is not given is the default."""
    given = config.get("trainer")
    options = given if isinstance(given, Mapping) else {}
    found: dict[str, object] = {}
    for name, default in TRAINER_DEFAULTS.items():
        value = options.get(name)
        # 0 and 0.0 are the same, whatever is counted
        found[name] = default if value is None or value == default == 0 else value
    found["precision"] = _PRECISIONS.get(str(found["precision"]), found["precision"])
    clip = found["gradient_clip_val"]
    if isinstance(clip, int | float):
        found["gradient_clip_val"] = float(clip)
    kind = found["gradient_clip_algorithm"] if clip else "norm"  # without a value, none clips
    found["gradient_clip_algorithm"] = str(kind).lower()
    return found


def _compare(name: str, there: object, here: object, annotation: object = None) -> Differing:
    """Differing options by dotted name, without `init_args`.

    Args:
        name: Of the option, or of the group.
        there: Its value in one config.
        here: Its value in the other.
        annotation: Its type, where it is known.
    """
    found: Differing = {}
    element = _element(annotation)
    if (
        _dataclass(element)
        and isinstance(there, list)
        and isinstance(here, list)
        and len(there) == len(here)
    ):
        for number, (one, other) in enumerate(zip(there, here, strict=True)):
            found |= _compare(f"{name}[{number}]", one, other, element)
        return found
    if not (isinstance(there, Mapping) and isinstance(here, Mapping)):
        return {} if there == here else {name: (there, here)}
    if there.get("class_path") != here.get("class_path"):
        return {f"{name}.class_path": (there.get("class_path"), here.get("class_path"))}
    if "class_path" not in there and (group := _dataclass(annotation)) is not None:
        return _compare_options(name, there, here, group)
    for key in dict.fromkeys((*there, *here)):
        if key == "init_args":
            options = (there.get(key) or {}, here.get(key) or {})
            found |= _compare_options(name, *options, _class(there.get("class_path")))
        else:
            found |= _compare(f"{name}.{key}", there.get(key), here.get(key))
    return found


def _compare_options(
    name: str, there: Mapping[str, object], here: Mapping[str, object], group: type
) -> Differing:
    """Differing options of a class: one that only one config has is of another release.

    Its default is meant there, so it makes no other run.
    """
    annotations = _annotations(group)
    found: Differing = {}
    for key in there:
        if key in here:
            found |= _compare(f"{name}.{key}", there[key], here[key], annotations.get(key))
    return found


def _class(path: object) -> type:
    """The class of a path; `object`, which has no options, where there is none."""
    module, _, name = str(path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return object
    return found if isinstance(found, type) else object


def _annotations(group: type) -> dict[str, object]:
    """Types of a class's options, also of those that it hands on to the classes above it."""
    found: dict[str, object] = {}
    for one in reversed(group.__mro__):
        if "__init__" not in vars(one) or one is object:
            continue
        try:
            found |= get_type_hints(vars(one)["__init__"])
        except (NameError, TypeError):  # a name that only a type checker knows
            continue
    return found


def _choices(annotation: object) -> Sequence[object]:
    """The members of a union, or the type alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _dataclass(annotation: object) -> type | None:
    """The dataclass that an option's type is, or may be."""
    kinds = (one for one in _choices(annotation) if isinstance(one, type) and is_dataclass(one))
    return next(kinds, None)


def _element(annotation: object) -> object:
    """The type of a list's elements, if it is known."""
    for one in _choices(annotation):
        if get_origin(one) in (list, tuple, Sequence):
            return get_args(one)[0]
    return None


def describe(differing: Mapping[str, tuple[object, object]]) -> str:
    """`has model.beta 3.0 (here 1.0)`, of the first few options that differ."""
    shown = [
        f"{name} {_short(there)} (here {_short(here)})"
        for name, (there, here) in list(differing.items())[:3]
    ]
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    networks = ("model.student", "model.network")
    kind = (
        "is of another network:" if any(name.startswith(networks) for name in differing) else "has"
    )
    return f"{kind} {', '.join(shown)}{more}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
