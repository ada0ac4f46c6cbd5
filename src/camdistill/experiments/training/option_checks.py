"""Checks options and config values before they are parsed."""

import ast
import dataclasses
import importlib
import inspect
import json
import re
import types
import typing
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jsonargparse import Namespace

from camdistill.errors import UserError, shorten
from camdistill.store.atomic_files import printable

# Arguments of classes that aren't ours: an empty text may have a meaning there.
_NON_FINITE = re.compile(r"(?<![\w.'\"])(-?)(inf|nan)(?![\w.'\"])")  # as Python writes them
_FOREIGN_GROUPS = ("args", "trainer", "callbacks", "dict_kwargs")


def check_words(arguments: Sequence[str], options: Collection[str] | None = None) -> None:
    """Checks that options are text, and not empty: as a path that would be the working folder.

    Args:
        arguments: The words of a command line.
        options: Names of its options; None for any.

    Raises:
        UserError: One is not.
    """
    for position, word in enumerate(arguments):
        if printable(word) != word:
            raise UserError(
                f"'{shorten(printable(word))}' is not UTF-8, as all options and results are; "
                "rename it, or name a folder above it"
            )
        option, sign, value = word.partition("=")
        option = "--config" if option == "-c" else option
        name = option.removeprefix("--")
        if name == option or not name or _is_foreign(name.split(".")):
            continue
        if options is not None and name.split(".")[0].replace("-", "_") not in options:
            continue
        following = arguments[position + 1 : position + 2] if not sign else [value]
        if following and not following[0].strip():
            raise _empty_error(option)


def check_seeds(arguments: Sequence[str]) -> None:
    """Checks that the one seed isn't given to a part of the experiment, where it is replaced.

    Raises:
        UserError: It is.
    """
    for word in arguments:
        option = word.partition("=")[0].replace(".init_args", "")
        if option in ("--model.seed", "--data.seed"):
            raise UserError(
                f"{option} is taken from --seed_everything, and would be replaced; give "
                "--seed_everything"
            )


def check_no_empty_text(config: Mapping[str, object], group: str = "") -> None:
    """Checks the same of a config file.

    Raises:
        UserError: An option has an empty text.
    """
    for name, value in config.items():
        if _is_foreign([str(name)]):
            continue
        option = f"{group}.{name}" if group else str(name)
        for element in value if isinstance(value, list) else [value]:
            if isinstance(element, Mapping):
                check_no_empty_text(element, option)
            elif isinstance(element, str) and not element.strip():
                raise _empty_error(f"--{option}")


def _is_foreign(words: Sequence[str]) -> bool:
    return any(word in _FOREIGN_GROUPS for word in words)


def _empty_error(option: str) -> UserError:
    return UserError(f"{option} is empty; give a value, or leave it out")


def check_lists_once(arguments: Sequence[str], lists: Collection[str]) -> None:
    """Checks that an option that takes several values stands once: the last would replace others.

    Raises:
        UserError: It stands twice.
    """
    names = (word.partition("=")[0].removeprefix("--") for word in arguments if word[:2] == "--")
    counts = Counter(name for name in names if name in lists)
    for name, count in counts.items():
        if count > 1:
            raise UserError(
                f"--{name} is given {count} times, and the last would replace the others; give all "
                f"values after one: --{name} A B"
            )


def restore_nulls(argument: str) -> str:
    """An option as jsonargparse hands it to a group inside a class, with Python's None as null.

    It writes the value with `str`, so that null becomes the text "None", and infinity "inf".
    """
    option, sign, value = argument.partition("=")
    if not sign or value[:1] not in ("[", "{", "N"):
        return argument
    value = _NON_FINITE.sub(r"\1.\2", value)
    if "None" not in value:
        return f"{option}={value}"
    try:
        literal = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return f"{option}={value}"
    if literal is not None and not isinstance(literal, list | dict):
        return argument
    return f"{option}={json.dumps(literal)}"


def check_groups(config: Namespace, part: str) -> None:
    """Checks that options of a model or data, and those in its groups, are null only where they
    can be.

    Raises:
        UserError: One is.
    """
    component = config.get(part)
    module, _, factory = str(getattr(component, "class_path", "")).rpartition(".")
    if not module:
        return
    imported_class = getattr(importlib.import_module(module), factory, None)
    if inspect.isclass(imported_class):
        _check_nulls(imported_class, component.get("init_args") or {}, part)


def _check_nulls(factory: type, arguments: Mapping[str, object] | Namespace, group: str) -> None:
    """Refuses null where a class's or dataclass's annotation doesn't have it."""
    for name, annotation in _annotations_by_name(factory).items():
        if name not in arguments:
            continue
        value, option = arguments[name], f"{group}.{name}"
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            if value is None:
                raise UserError(
                    f"{option} is null; leave it out for its defaults, or give its options one by "
                    f"one: --{option}.OPTION"
                )
            if isinstance(value, Mapping | Namespace):
                _check_nulls(annotation, value, option)
        elif isinstance(value, list | tuple):
            entries = [
                one for one in typing.get_args(_without_null(annotation)) if inspect.isclass(one)
            ]
            for one in value if entries and dataclasses.is_dataclass(entries[0]) else ():
                if isinstance(one, Mapping | Namespace):
                    _check_nulls(entries[0], one, option)
        elif value is None and not _takes_null(annotation):
            raise UserError(f"{option} is null; leave it out for its default, or give a value")


def _annotations_by_name(factory: type) -> dict[str, Any]:
    """The annotations of a class's parameters, and of those that it hands on to its parents."""
    annotations: dict[str, Any] = {}
    for base in factory.__mro__:
        parameters = inspect.signature(base).parameters if base is not object else {}
        for name, parameter in parameters.items():
            annotations.setdefault(name, parameter.annotation)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return annotations


def _without_null(kind: Any) -> Any:
    """The first of an annotation's types, where it has several: the others are None."""
    several = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind)[0] if several else kind


def _takes_null(annotation: Any) -> bool:
    """Whether an annotation has None; one that is none, or a text, may."""
    if annotation in (None, type(None), Any, object, inspect.Parameter.empty) or isinstance(
        annotation, str
    ):
        return True
    if typing.get_origin(annotation) is typing.Annotated:
        return _takes_null(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_takes_null(member) for member in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Literal:
        return None in typing.get_args(annotation)
    return isinstance(annotation, typing.TypeVar)
