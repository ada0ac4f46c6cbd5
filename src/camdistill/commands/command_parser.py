"""Typed functions as commands."""

import importlib
import inspect
import json
import os
import pkgutil
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace

from camdistill import commands
from camdistill.commands.help import command_help
from camdistill.errors import UserError, check_each_once
from camdistill.experiments.training.config_errors import (
    config_files,
    demand_configs,
    read_config,
    told,
    translated,
)
from camdistill.experiments.training.option_checks import (
    check_lists_once,
    check_words,
    restore_nulls,
)
from camdistill.store.atomic_files import expand_home, lock_folder

_WHOLE = re.compile(r"-?\d+")
_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?")
# Lists in which a value may stand twice, to no harm or with a line of its own
REPEATED = ("overrides", "trust", "runs")
# First words of the options of fit, validate, test and predict
OF_LOOPS = ("model", "data", "trainer", "run", "seed_everything", "ckpt_path", "verbose")
LOOKS = ("list_layers",)  # switches with which a command writes nothing


class CommandParser(ArgumentParser):
    """A parser with -c whose errors are one `UserError` line."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Raises the `UserError` that jsonargparse's many-line message stands for."""
        raise told(message, self, ex) from ex

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *rest: Any, **options: Any
    ) -> Namespace:
        """Parses; inside a group null stays null."""
        words = None if args is None else [restore_nulls(word) for word in args]
        return super().parse_args(words, *rest, **options)


def call(command: Callable[..., object], arguments: Sequence[str]) -> object:
    """Runs a function with the options on a command line, the first word being its name."""
    name, *given = arguments
    if asked := {"-h", "--help"} & set(given):
        following = given[given.index(asked.pop()) + 1 :][:1]
        group = [word for word in following if not word.startswith("-")]
        print(command_help(name, command, *group))
        return None
    check_words(given, ("config", *inspect.signature(command).parameters))
    demand_configs(given)
    demand_config_of(name, inspect.signature(command).parameters, given)
    parser = CommandParser(prog=f"camdistill {name}", allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="Options from a YAML file.")
    parser.add_function_arguments(command, as_group=False)
    check_lists_once(given, _lists(command))
    words = with_lists(with_flags(given, _flags(command)), _lists(command))
    chosen = parser.parse_args(words)
    chosen.pop("config", None)
    with translated():
        made = parser.instantiate_classes(chosen)
    options = {option: _at_home(value) for option, value in vars(made).items()}
    for option, value in options.items():
        check_value(option, value)
    if isinstance(out := options.get("out"), Path) and not any(map(options.get, LOOKS)):
        demand_room(out)
        with lock_folder(out):
            return command(**options)
    return command(**options)


def check_value(option: str, value: object) -> None:
    """Checks what would be taken for something else, or twice, without a word.

    Raises:
        UserError: A path is null, a name is no text, or something stands twice in a list.
    """
    if value == Path("null"):
        raise UserError(f"--{option} is null; give a path, or leave it out")
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):  # YAML reads 5, true and null as no text
                raise UserError(
                    f"{option.removesuffix('s')} {name} is no text in YAML; give it in quotes, and "
                    f"as a name: '{option.removesuffix('s')}_1'"
                )
    if isinstance(value, list) and option not in REPEATED:
        check_each_once(f"--{option}", [str(one) for one in value])


def demand_config_of(name: str, own: Collection[str], arguments: Sequence[str]) -> None:
    """Checks that config files are this command's, as far as the names of their options tell.

    Args:
        name: The command's.
        own: The first words of its options.
        arguments: The command line.

    Raises:
        UserError: One has options that only other commands have; it names these.
    """
    for path in config_files(arguments):
        keys = {str(key).partition(".")[0] for key in read_config(path)}
        odd = sorted(keys - {"config", *own})
        others = [other for other, options in _options().items() if odd and keys <= options]
        if others:
            raise UserError(
                f"{path} is a config of `camdistill {' or '.join(others)}`; {name} has no option "
                f"'{odd[0]}': start that command, or give another -c"
            )


def _options() -> dict[str, set[str]]:
    """The first words of every command's options, by command."""
    found = {"fit": set(OF_LOOPS)}
    for module in pkgutil.iter_modules(commands.__path__):
        own = importlib.import_module(f"{commands.__name__}.{module.name}")
        if callable(function := getattr(own, module.name, None)):
            found[module.name] = set(inspect.signature(function).parameters)
    return found


def demand_room(out: Path) -> None:
    """Checks that results can be written before anything is computed for them.

    Raises:
        UserError: The folder is a file, or lies where one may not write.
    """
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"--out is '{out}', but '{there}' is a file; name a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"can't write to '{there}'; change its permissions, or name another --out")


def with_lists(arguments: Sequence[str], lists: Mapping[str, type]) -> list[str]:
    """A command line whose lists may be words: `--images a.png b.png` becomes one JSON list.

    Args:
        arguments: The words.
        lists: What is in the list, by option.
    """
    words, done = list(arguments), []
    while words:
        option, equals, first = (word := words.pop(0)).partition("=")
        name = option.removeprefix("--")
        if name == option or name not in lists:
            done.append(word)
            continue
        values = [first] if equals else []
        while words and (not words[0].startswith("-") or _NUMBER.fullmatch(words[0])):
            values.append(words.pop(0))
        if not values:
            raise UserError(f"{option} stands without its value; give one or more, or leave it out")
        whole = len(values) == 1 and values[0].startswith("[") and values[0].endswith("]")
        numbers = all(_WHOLE.fullmatch(value) for value in values) and lists[name] is int
        text = f"[{', '.join(values)}]" if numbers else json.dumps(values)
        done.append(f"{option}={values[0] if whole else text}")
    return done


def with_flags(arguments: Sequence[str], flags: Collection[str]) -> list[str]:
    """A command line whose switches need no value: `--list-layers` becomes `--list_layers=true`.

    Args:
        arguments: The words; hyphens in the names of switches are fine.
        flags: Names of the switches, with underscores.
    """
    done = []
    for place, word in enumerate(arguments):
        name = word.removeprefix("--").replace("-", "_")
        following = arguments[place + 1] if place + 1 < len(arguments) else ""
        bare = word.startswith("--") and name in flags
        if bare and following.lower() not in ("true", "false"):
            done.append(f"--{name}=true")
        else:
            done.append(f"--{name}" if bare else word)
    return done


def _at_home(value: object) -> object:
    """Paths, also in lists, with the home folder for a `~` that no shell has replaced."""
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    return expand_home(value) if isinstance(value, Path) else value


def _flags(command: Callable[..., object]) -> list[str]:
    kinds = inspect.signature(command).parameters.items()
    return [name for name, one in kinds if one.annotation is bool]


def _lists(command: Callable[..., object]) -> dict[str, type]:
    """A function's parameters that take a list, with the type of what is in it."""
    kinds = {name: one.annotation for name, one in inspect.signature(command).parameters.items()}
    return {name: get_args(kind)[0] for name, kind in kinds.items() if get_origin(kind) is list}
