"""The identity of a run, from its config: model, data, seed and trainer."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

# Options that change no number of a run.
FREE_OPTIONS = {"model.cache_dir", "data.cache_dir", "data.download"}
# Where files lie: what is in them is compared with the checkpoint when it is loaded.
PATH_OPTIONS = {"model.teacher.weights", "data.root"}
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
TRAINER_OPTIONS = {f"trainer.{name}" for name in TRAINER_DEFAULTS}
_PRECISIONS = {"16": "16-mixed", "32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}

Config = Mapping[str, object]
OptionDifferences = dict[str, tuple[object, object]]


def config_differences(stored: Config, current: Config, free: set[str]) -> OptionDifferences:
    """Options that make two configs two runs, with their values there and here."""
    differing: OptionDifferences = {}
    for part in ("model", "data", "seed_everything"):
        differing |= _compare(part, stored.get(part), current.get(part))
    stored_trainer, current_trainer = _trainer_options(stored), _trainer_options(current)
    for name, value in stored_trainer.items():
        # as texts, because 1 is one batch and 1.0 is all of them
        if str(value) != str(current_trainer[name]):
            differing[f"trainer.{name}"] = (value, current_trainer[name])
    return {name: values for name, values in differing.items() if name not in free}


def _trainer_options(config: Config) -> dict[str, object]:
    """What changes a training's numbers, each in one spelling; what is not given is the default."""
    trainer_config = config.get("trainer")
    options = trainer_config if isinstance(trainer_config, Mapping) else {}
    effective: dict[str, object] = {}
    for name, default in TRAINER_DEFAULTS.items():
        value = options.get(name)
        # 0 and 0.0 are the same, whatever is counted
        effective[name] = default if value is None or value == default == 0 else value
    effective["precision"] = _PRECISIONS.get(str(effective["precision"]), effective["precision"])
    clip = effective["gradient_clip_val"]
    if isinstance(clip, int | float):
        effective["gradient_clip_val"] = float(clip)
    kind = effective["gradient_clip_algorithm"] if clip else "norm"  # without a value, none clips
    effective["gradient_clip_algorithm"] = str(kind).lower()
    return effective


def _compare(
    name: str, stored: object, current: object, annotation: object = None
) -> OptionDifferences:
    """Differing options by dotted name, without `init_args`.

    Args:
        name: Name of the option, or of the group.
        stored: Its value in one config.
        current: Its value in the other.
        annotation: Its type, where it is known.
    """
    differing: OptionDifferences = {}
    element = _element_type(annotation)
    if (
        _find_dataclass(element)
        and isinstance(stored, list)
        and isinstance(current, list)
        and len(stored) == len(current)
    ):
        for number, (stored_element, current_element) in enumerate(
            zip(stored, current, strict=True)
        ):
            differing |= _compare(f"{name}[{number}]", stored_element, current_element, element)
        return differing
    if not (isinstance(stored, Mapping) and isinstance(current, Mapping)):
        return {} if stored == current else {name: (stored, current)}
    if stored.get("class_path") != current.get("class_path"):
        return {f"{name}.class_path": (stored.get("class_path"), current.get("class_path"))}
    if "class_path" not in stored and (group := _find_dataclass(annotation)) is not None:
        return _compare_options(name, stored, current, group)
    for key in dict.fromkeys((*stored, *current)):
        if key == "init_args":
            options = (stored.get(key) or {}, current.get(key) or {})
            differing |= _compare_options(name, *options, _import_class(stored.get("class_path")))
        else:
            differing |= _compare(f"{name}.{key}", stored.get(key), current.get(key))
    return differing


def _compare_options(
    name: str, stored: Mapping[str, object], current: Mapping[str, object], group: type
) -> OptionDifferences:
    """Differing options of a class: one that only one config has is of another release.

    Its default is meant there, so it makes no other run.
    """
    annotations = _option_annotations(group)
    differing: OptionDifferences = {}
    for key in stored:
        if key in current:
            differing |= _compare(f"{name}.{key}", stored[key], current[key], annotations.get(key))
    return differing


def _import_class(path: object) -> type:
    """The class of a path; `object`, which has no options, where there is none."""
    module, _, name = str(path).rpartition(".")
    try:
        attribute = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return object
    return attribute if isinstance(attribute, type) else object


def _option_annotations(group: type) -> dict[str, object]:
    """Types of a class's options, also of those that it hands on to the classes above it."""
    annotations: dict[str, object] = {}
    for base in reversed(group.__mro__):
        if "__init__" not in vars(base) or base is object:
            continue
        try:
            annotations |= get_type_hints(vars(base)["__init__"])
        except (NameError, TypeError):  # a name that only a type checker knows
            continue
    return annotations


def _union_members(annotation: object) -> Sequence[object]:
    """The members of a union, or the type alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _find_dataclass(annotation: object) -> type | None:
    """The dataclass that an option's type is, or may be."""
    kinds = (
        member
        for member in _union_members(annotation)
        if isinstance(member, type) and is_dataclass(member)
    )
    return next(kinds, None)


def _element_type(annotation: object) -> object:
    """The type of a list's elements, if it is known."""
    for member in _union_members(annotation):
        if get_origin(member) in (list, tuple, Sequence):
            return get_args(member)[0]
    return None


def describe_differences(differing: Mapping[str, tuple[object, object]]) -> str:
    """`has model.beta 3.0 (here 1.0)`, of the first few options that differ."""
    descriptions = [
        f"{name} {_shorten(stored)} (here {_shorten(current)})"
        for name, (stored, current) in list(differing.items())[:3]
    ]
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    networks = ("model.student", "model.network")
    kind = (
        "is of another network:" if any(name.startswith(networks) for name in differing) else "has"
    )
    return f"{kind} {', '.join(descriptions)}{more}"


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
