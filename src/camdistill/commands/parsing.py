"""Typed functions as commands."""

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args, get_origin

from jsonargparse import ArgumentParser

from camdistill.commands.help import command_help
from camdistill.studies.parsing import demand_configs, told


class CommandParser(ArgumentParser):
    """A parser with -c whose errors are one `UserError` line."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Raises the `UserError` that jsonargparse's many-line message stands for."""
        raise told(message, self, ex) from ex


def call(command: Callable[..., object], arguments: Sequence[str]) -> object:
    """Runs a function with the options on a command line, the first word being its name."""
    name, *given = arguments
    if {"-h", "--help"} & set(given):
        print(command_help(name, command))
        return None
    demand_configs(given)
    parser = CommandParser(prog=f"camdistill {name}", allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="Options from a YAML file.")
    parser.add_function_arguments(command, as_group=False)
    words = with_lists(given, _lists(command))
    chosen = parser.instantiate_classes(parser.parse_args(words)).as_dict()
    chosen.pop("config", None)
    return command(**chosen)


def with_lists(arguments: Sequence[str], lists: Sequence[str]) -> list[str]:
    """A command line whose lists may be words: `--images a.png b.png` becomes one JSON list.

    Args:
        arguments: The words.
        lists: Names of the options that take a list of texts.
    """
    words, done = list(arguments), []
    while words:
        option, equals, first = (word := words.pop(0)).partition("=")
        if option.removeprefix("--") not in lists or not option.startswith("--"):
            done.append(word)
            continue
        values = [first] if equals else []
        while words and not words[0].startswith("-"):
            values.append(words.pop(0))
        whole = len(values) == 1 and values[0].startswith("[")
        done.append(f"{option}={values[0] if whole else json.dumps(values)}")
    return done


def _lists(command: Callable[..., object]) -> list[str]:
    """Names of a function's parameters that take a list of texts or paths."""
    kinds = {name: one.annotation for name, one in inspect.signature(command).parameters.items()}
    return [
        name
        for name, kind in kinds.items()
        if get_origin(kind) is list and get_args(kind)[0] in (str, Path)
    ]
