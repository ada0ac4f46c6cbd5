"""Hints for options that were given without their group, or by another program's name."""

import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Sequence

# Words of other programs, and of our own other commands.
ALIASES = {
    "batch": "batch_size",
    "checkpoint": "ckpt_path",
    "ckpt": "ckpt_path",
    "ckpt_path": "checkpoint",
    "data_dir": "root",
    "epochs": "max_epochs",
    "gpus": "devices",
    "learning_rate": "lr",
    "log_dir": "logdir",
    "logdir": "run",
    "out": "run",
    "output": "out",
    "resume": "ckpt_path",
    "root": "data",
    "run": "out",
    "seed": "seed_everything",
    "steps": "max_steps",
}


def suggest_options(
    name: str, options: Sequence[str], classes: dict[str, tuple[str, ...]]
) -> list[str]:
    """The options that end with the last word of a name, or with what it is called here.

    Args:
        name: What was given.
        options: Options of the command, dotted.
        classes: What a group of the command may name, by class path.
    """
    group, _, last_word = name.rpartition(".")
    candidates = [*options]
    for group_name, paths in classes.items():
        if group_name in options and "images" not in options:  # beside it, data is a text
            candidates += [
                f"{group_name}.{argument}" for path in paths for argument in _list_arguments(path)
            ]
    last_word = last_word.replace("-", "_")
    tried: set[str] = set()
    while last_word not in tried:
        tried.add(last_word)
        matches = [
            option
            for option in dict.fromkeys(candidates)
            if option.rpartition(".")[2] == last_word
            and option.startswith(group)
            and option != name
        ]
        if matches:
            return sorted(matches, key=lambda option: option.count("."))[:3]
        last_word = ALIASES.get(last_word, last_word)
    return []


def _list_arguments(path: str) -> Iterator[str]:
    """The arguments of a class, and the fields of dataclasses among them, dotted."""
    module, _, name = path.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), name))
    for argument, parameter in signature.parameters.items():
        if argument == "seed":  # it follows seed_everything
            continue
        yield argument
        if dataclasses.is_dataclass(parameter.annotation):
            yield from (
                f"{argument}.{field.name}" for field in dataclasses.fields(parameter.annotation)
            )
