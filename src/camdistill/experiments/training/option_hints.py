"""Where an option lies that was given without its group, or by the name that other programs use."""

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


def places(name: str, options: Sequence[str], classes: dict[str, tuple[str, ...]]) -> list[str]:
    """The options that end with the last word of a name, or with what it is called here.

    Args:
        name: What was given.
        options: Of the command, dotted.
        classes: What a group of the command may name, by class path.
    """
    group, _, last = name.rpartition(".")
    known = [*options]
    for part, paths in classes.items():
        if part in options and "images" not in options:  # beside it, data is a text
            known += [f"{part}.{inner}" for path in paths for inner in _arguments(path)]
    last = last.replace("-", "_")
    seen: set[str] = set()
    while last not in seen:
        seen.add(last)
        found = [
            option
            for option in dict.fromkeys(known)
            if option.rpartition(".")[2] == last and option.startswith(group) and option != name
        ]
        if found:
            return sorted(found, key=lambda option: option.count("."))[:3]
        last = ALIASES.get(last, last)
    return []


def _arguments(path: str) -> Iterator[str]:
    """The arguments of a class, and the fields of dataclasses among them, dotted."""
    module, _, name = path.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), name))
    for argument, parameter in signature.parameters.items():
        if argument == "seed":  # it follows seed_everything
            continue
        yield argument
        if dataclasses.is_dataclass(parameter.annotation):
            yield from (
                f"{argument}.{one.name}" for one in dataclasses.fields(parameter.annotation)
            )
