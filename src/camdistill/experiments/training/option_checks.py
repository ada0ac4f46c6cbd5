"""What words on a command line and values in a config can't mean, found before they are parsed."""

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
_NO_NUMBER = re.compile(r"(?<![\w.'\"])(-?)(inf|nan)(?![\w.'\"])")  # as Python writes them
_OTHERS = ("args", "trainer", "callbacks", "dict_kwargs")


def check_words(arguments: Sequence[str], options: Collection[str] | None = None) -> None:
    """Checks that options are text, and not empty: as a path that would be the working folder.

    Args:
        arguments: The words of a command line.
        options: Names of its options; None for any.

    Raises:
        UserError: One is not.
    """
    for place, word in enumerate(arguments):
        if printable(word) != word:
            raise UserError(
                f"'{shorten(printable(word))}' is not UTF-8, as all options and results are; "
                "rename it, or name a folder above it"
            )
        option, sign, value = word.partition("=")
        option = "--config" if option == "-c" else option
        name = option.removeprefix("--")
        if name == option or not name or _of_others(name.split(".")):
            continue
        if options is not None and name.split(".")[0].replace("-", "_") not in options:
            continue
        following = arguments[place + 1 : place + 2] if not sign else [value]
        if following and not following[0].strip():
            raise _empty(option)


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
        if _of_others([str(name)]):
            continue
        whole = f"{group}.{name}" if group else str(name)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                check_no_empty_text(one, whole)
            elif isinstance(one, str) and not one.strip():
                raise _empty(f"--{whole}")


def _of_others(words: Sequence[str]) -> bool:
    return any(word in _OTHERS for word in words)


def _empty(option: str) -> UserError:
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
    value = _NO_NUMBER.sub(r"\1.\2", value)
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
    chosen = config.get(part)
    module, _, factory = str(getattr(chosen, "class_path", "")).rpartition(".")
    if not module:
        return
    found = getattr(importlib.import_module(module), factory, None)
    if inspect.isclass(found):
        _check_nulls(found, chosen.get("init_args") or {}, part)


def _check_nulls(factory: type, given: Mapping[str, object] | Namespace, group: str) -> None:
    """Refuses null where a class's or dataclass's annotation doesn't have it."""
    for name, kind in _kinds(factory).items():
        if name not in given:
            continue
        value, whole = given[name], f"{group}.{name}"
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            if value is None:
                raise UserError(
                    f"{whole} is null; leave it out for its defaults, or give its options one by "
                    f"one: --{whole}.OPTION"
                )
            if isinstance(value, Mapping | Namespace):
                _check_nulls(kind, value, whole)
        elif isinstance(value, list | tuple):
            entries = [one for one in typing.get_args(_without_null(kind)) if inspect.isclass(one)]
            for one in value if entries and dataclasses.is_dataclass(entries[0]) else ():
                if isinstance(one, Mapping | Namespace):
                    _check_nulls(entries[0], one, whole)
        elif value is None and not _takes_null(kind):
            raise UserError(f"{whole} is null; leave it out for its default, or give a value")


def _kinds(factory: type) -> dict[str, Any]:
    """The annotations of a class's parameters, and of those that it hands on to its parents."""
    found: dict[str, Any] = {}
    for one in factory.__mro__:
        parameters = inspect.signature(one).parameters if one is not object else {}
        for name, parameter in parameters.items():
            found.setdefault(name, parameter.annotation)
        if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
            break
    return found


def _without_null(kind: Any) -> Any:
    """The first of an annotation's types, where it has several: the others are None."""
    several = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind)[0] if several else kind


def _takes_null(kind: Any) -> bool:
    """Whether an annotation has None; one that is none, or a text, may."""
    if kind in (None, type(None), Any, object, inspect.Parameter.empty) or isinstance(kind, str):
        return True
    if typing.get_origin(kind) is typing.Annotated:
        return _takes_null(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_takes_null(one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return None in typing.get_args(kind)
    return isinstance(kind, typing.TypeVar)
