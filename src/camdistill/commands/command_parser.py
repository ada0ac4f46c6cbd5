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
    check_config_files,
    config_files,
    explain_parser_error,
    raise_user_errors,
    read_config,
)
from camdistill.experiments.training.option_checks import (
    check_lists_once,
    check_words,
    restore_nulls,
)
from camdistill.store.atomic_files import expand_home, lock_folder

_INTEGER = re.compile(r"-?\d+")
_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?")
# Lists in which a value may stand twice, to no harm or with a line of its own
REPEATABLE = ("overrides", "trust", "runs")
# First words of the options of fit, validate, test and predict
LOOP_OPTIONS = ("model", "data", "trainer", "run", "seed_everything", "ckpt_path", "verbose")
READ_ONLY_SWITCHES = ("list_layers",)  # switches with which a command writes nothing


class CommandParser(ArgumentParser):
    """A parser with -c whose errors are one `UserError` line."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Raises the `UserError` that jsonargparse's many-line message stands for."""
        raise explain_parser_error(message, self, ex) from ex

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *rest: Any, **options: Any
    ) -> Namespace:
        """Parses; inside a group null stays null."""
        words = None if args is None else [restore_nulls(word) for word in args]
        return super().parse_args(words, *rest, **options)


def call(command: Callable[..., object], arguments: Sequence[str]) -> object:
    """Runs a function with the options on a command line, the first word being its name."""
    name, *command_words = arguments
    if help_flags := {"-h", "--help"} & set(command_words):
        following = command_words[command_words.index(help_flags.pop()) + 1 :][:1]
        group = [word for word in following if not word.startswith("-")]
        print(command_help(name, command, *group))
        return None
    check_words(command_words, ("config", *inspect.signature(command).parameters))
    check_config_files(command_words)
    check_config_of(name, inspect.signature(command).parameters, command_words)
    parser = CommandParser(prog=f"camdistill {name}", allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="Options from a YAML file.")
    parser.add_function_arguments(command, as_group=False)
    check_lists_once(command_words, _lists(command))
    words = join_list_words(expand_flags(command_words, _flags(command)), _lists(command))
    parsed = parser.parse_args(words)
    parsed.pop("config", None)
    with raise_user_errors():
        instances = parser.instantiate_classes(parsed)
    options = {option: _expand_homes(value) for option, value in vars(instances).items()}
    for option, value in options.items():
        check_value(option, value)
    if isinstance(out := options.get("out"), Path) and not any(
        map(options.get, READ_ONLY_SWITCHES)
    ):
        check_writable(out)
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
    if isinstance(value, list) and option not in REPEATABLE:
        check_each_once(f"--{option}", [str(entry) for entry in value])


def check_config_of(name: str, option_names: Collection[str], arguments: Sequence[str]) -> None:
    """Checks that config files are this command's, as far as the names of their options tell.

    Args:
        name: The command's.
        option_names: The first words of its options.
        arguments: The command line.

    Raises:
        UserError: One has options that only other commands have; it names these.
    """
    for path in config_files(arguments):
        keys = {str(key).partition(".")[0] for key in read_config(path)}
        unknown_keys = sorted(keys - {"config", *option_names})
        matching = [
            command for command, options in _options().items() if unknown_keys and keys <= options
        ]
        if matching:
            raise UserError(
                f"{path} is a config of `camdistill {' or '.join(matching)}`; {name} has no option "
                f"'{unknown_keys[0]}': start that command, or give another -c"
            )


def _options() -> dict[str, set[str]]:
    """The first words of every command's options, by command."""
    options_by_command = {"fit": set(LOOP_OPTIONS)}
    for module in pkgutil.iter_modules(commands.__path__):
        command_module = importlib.import_module(f"{commands.__name__}.{module.name}")
        if callable(function := getattr(command_module, module.name, None)):
            options_by_command[module.name] = set(inspect.signature(function).parameters)
    return options_by_command


def check_writable(out: Path) -> None:
    """Checks that results can be written before anything is computed for them.

    Raises:
        UserError: The folder is a file, or lies where one may not write.
    """
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"--out is '{out}', but '{existing}' is a file; name a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(
            f"can't write to '{existing}'; change its permissions, or name another --out"
        )


def join_list_words(arguments: Sequence[str], lists: Mapping[str, type]) -> list[str]:
    """A command line whose lists may be words: `--images a.png b.png` becomes one JSON list.

    Args:
        arguments: The words.
        lists: What is in the list, by option.
    """
    words, rewritten = list(arguments), []
    while words:
        option, equals, first = (word := words.pop(0)).partition("=")
        name = option.removeprefix("--")
        if name == option or name not in lists:
            rewritten.append(word)
            continue
        values = [first] if equals else []
        while words and (not words[0].startswith("-") or _NUMBER.fullmatch(words[0])):
            values.append(words.pop(0))
        if not values:
            raise UserError(f"{option} stands without its value; give one or more, or leave it out")
        is_list = len(values) == 1 and values[0].startswith("[") and values[0].endswith("]")
        numbers = all(_INTEGER.fullmatch(value) for value in values) and lists[name] is int
        text = f"[{', '.join(values)}]" if numbers else json.dumps(values)
        rewritten.append(f"{option}={values[0] if is_list else text}")
    return rewritten


def expand_flags(arguments: Sequence[str], flags: Collection[str]) -> list[str]:
    """A command line whose switches need no value: `--list-layers` becomes `--list_layers=true`.

    Args:
        arguments: The words; hyphens in the names of switches are fine.
        flags: Names of the switches, with underscores.
    """
    rewritten = []
    for index, word in enumerate(arguments):
        name = word.removeprefix("--").replace("-", "_")
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        is_switch = word.startswith("--") and name in flags
        if is_switch and following.lower() not in ("true", "false"):
            rewritten.append(f"--{name}=true")
        else:
            rewritten.append(f"--{name}" if is_switch else word)
    return rewritten


def _expand_homes(value: object) -> object:
    """Paths, also in lists, with the home folder for a `~` that no shell has replaced."""
    if isinstance(value, list):
        return [_expand_homes(entry) for entry in value]
    return expand_home(value) if isinstance(value, Path) else value


def _flags(command: Callable[..., object]) -> list[str]:
    parameters = inspect.signature(command).parameters.items()
    return [name for name, parameter in parameters if parameter.annotation is bool]


def _lists(command: Callable[..., object]) -> dict[str, type]:
    """A function's parameters that take a list, with the type of what is in it."""
    kinds = {
        name: parameter.annotation
        for name, parameter in inspect.signature(command).parameters.items()
    }
    return {name: get_args(kind)[0] for name, kind in kinds.items() if get_origin(kind) is list}
