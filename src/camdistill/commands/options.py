"""What a function's options are, read from its signature and its docstring."""

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Union, get_args, get_origin

from docstring_parser import parse as parse_docstring

_KINDS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH", bool: "true|false", dict: "{...}"}


class Parameter(NamedTuple):
    """An option by its dotted name; `group` is the dataclass of one that is a group of them."""

    name: str
    kind: object
    text: str
    default: object
    group: type | None


def option_parameters(
    factory: Callable[..., object], prefix: str = "", instance: object = None
) -> Iterator[Parameter]:
    """What a function or class takes, with what stands for each where nothing is given.

    Args:
        factory: The function or class.
        prefix: Before the names.
        instance: What the class would be if nothing were given; None for its own defaults.
    """
    texts = _texts(factory)
    fields = dataclasses.fields(factory) if dataclasses.is_dataclass(factory) else ()
    fresh = {
        field.name: field.default_factory()
        for field in fields
        if field.default_factory is not dataclasses.MISSING
    }
    for name, parameter in inspect.signature(factory).parameters.items():
        kind = _without_none(parameter.annotation)
        default = fresh.get(name, parameter.default)
        default = default if instance is None else getattr(instance, name)
        group = kind if dataclasses.is_dataclass(kind) and isinstance(kind, type) else None
        yield Parameter(prefix + name, kind, texts.get(name, ""), default, group)


def group_parameters(group: Parameter) -> Iterator[Parameter]:
    """The options of a group."""
    assert group.group is not None, "it is one"
    instance = group.default if isinstance(group.default, group.group) else None
    return option_parameters(group.group, f"{group.name}.", instance)


def default_text(parameter: Parameter, longest: int | None = None) -> str:
    """What stands for an option that isn't given, as it is written; empty for nothing.

    Args:
        parameter: The option.
        longest: Leave out the middle of a list that would have more letters.
    """
    value = parameter.default
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | str | Path):
        return str(value)
    if not isinstance(value, list | tuple) or not value or dataclasses.is_dataclass(value[0]):
        return ""
    between, ends = (" ", ("", "")) if isinstance(value, list) else (", ", ("[", "]"))
    words = [str(entry) for entry in value]
    text = between.join(words)
    if longest is not None and len(text) > longest:
        text = between.join([*words[:2], "...", words[-1]])
    return f"{ends[0]}{text}{ends[1]}"


def _texts(factory: Callable[..., object]) -> dict[str, str]:
    parsed = parse_docstring(factory.__doc__ or "")
    return {param.arg_name: " ".join((param.description or "").split()) for param in parsed.params}


def _without_none(kind: object) -> object:
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def type_word(kind: object) -> str:
    """A type as one word."""
    if get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is list:
        inner = get_args(kind)[0]
        if get_origin(inner) is Literal:
            return "NAME ..."
        return f"{type_word(inner)} ..." if inner in _KINDS else "[{...}, ...]"
    if get_origin(kind) is tuple:
        if get_args(kind)[-1] is ...:
            return "[A, B, ...]"
        return f"[{', '.join('ABC'[: len(get_args(kind))])}]"
    origin = get_origin(kind) or kind
    return _KINDS.get(origin, "VALUE") if isinstance(origin, type) else "VALUE"
