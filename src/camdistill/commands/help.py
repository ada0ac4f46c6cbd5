"""The help that `--help` prints, written from signatures and docstrings."""

import dataclasses
import importlib
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Union, get_args, get_origin

from docstring_parser import parse as parse_docstring

from camdistill.studies.parsing import CLASSES, read_config

WIDTH = 100
COLUMN = 34  # where the explanations begin
_KINDS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH", bool: "true|false", dict: "{...}"}
_COMMON = {
    "-c, --config FILE": "Options from a YAML file; those on the command line win.",
    "--print_config": "Show all options with their values, as YAML, and do nothing.",
}
_LOOP = {
    "--run NAME": "Its folder under runs/, or a path with a slash. Default: the config's name.",
    "--ckpt_path FILE|last": "",
    "--seed_everything N": "The seed of everything: start, order, views. Default: 0.",
}
_CHECKPOINT = {
    "fit": "Go on from here; `last` is the newest run of this config.",
    "test": "What to measure: a .ckpt or .safetensors of ours; `last` is the newest run's.",
}
_TRAINER = {
    "--trainer.max_epochs N": "Passes over the training images.",
    "--trainer.accelerator cpu|gpu|auto": "Where to compute. Default: auto.",
    "--trainer.devices N": "GPUs or processes. Default: auto.",
    "--trainer.precision 32|bf16-mixed|16-mixed": "Of the training. Default: bf16-mixed.",
    "--trainer.gradient_clip_val NUMBER": "Longest gradient; cures losses that are not numbers.",
    "--trainer.limit_train_batches N": "At most so many steps an epoch: for a try.",
}


class Option(NamedTuple):
    """What one option's two columns say."""

    usage: str
    text: str


def command_help(name: str, command: Callable[..., object]) -> str:
    """The help of a command that is a function."""
    parsed = parse_docstring(command.__doc__ or "")
    said = [parsed.short_description or "", *(parsed.long_description or "").split("\n\n")]
    options = [*(Option(*row) for row in _COMMON.items()), *options_of(command)]
    return "\n".join(
        [
            f"usage: camdistill {name} [-c CONFIG] [--OPTION VALUE ...]",
            "",
            *(textwrap.fill(part, WIDTH) for part in said if part),
            "",
            *_rows(options),
        ]
    )


def loop_help(arguments: Sequence[str]) -> str:
    """The help of `fit`, `validate`, `test` or `predict`, for the classes of a given config."""
    name = arguments[0]
    model, data = _classes(arguments)
    checkpoint = _CHECKPOINT.get(name, _CHECKPOINT["test"])
    options = [
        Option(usage, text.format(checkpoint=checkpoint))
        for usage, text in (_COMMON | _LOOP).items()
    ]
    sections = [_usage(name), "options", *_rows(options)]
    if name == "fit":
        sections += ["", f"model: {model.__name__} ({_others('model', model)})"]
        sections += _rows(list(options_of(model, "model.", ("seed",))))
    sections += ["", f"data: {data.__name__} ({_others('data', data)})"]
    sections += _rows(list(options_of(data, "data.", ("seed",))))
    sections += ["", "trainer: these and every other option of pytorch_lightning.Trainer"]
    sections += _rows([Option(*row) for row in _TRAINER.items()])
    return "\n".join(sections)


def _usage(name: str) -> str:
    checkpoint = "" if name == "fit" else " --ckpt_path last"
    start = f"camdistill {name} -c configs/shapes.yaml{checkpoint}"
    lines = {start: "as the config says"}
    if name == "fit":
        lines[f"{start} --model.beta 5"] = "with another option of the model"
        lines[f"{start} --ckpt_path last"] = "on from where it was stopped"
    width = max(map(len, lines))
    rows = [f"  {line:<{width}}   {what}" for line, what in lines.items()]
    usage = f"usage: camdistill {name} -c CONFIG [--OPTION VALUE ...]"
    return "\n".join([usage, "", *rows, ""])


def _classes(arguments: Sequence[str]) -> tuple[type, type]:
    """Model and data of the config on the command line; the usual ones without."""
    paths = {"model": CLASSES["model"][0], "data": CLASSES["data"][-1]}
    for place, word in enumerate(arguments[:-1]):
        if word in ("-c", "--config"):
            config = read_config(Path(arguments[place + 1]))
            for part in paths:
                chosen = config.get(part)
                if isinstance(chosen, dict):
                    paths[part] = str(chosen.get("class_path", paths[part]))
    return _class_at(paths["model"], CLASSES["model"]), _class_at(paths["data"], CLASSES["data"])


def _class_at(path: str, usual: Sequence[str]) -> type:
    """A class by its path or by its bare name; the first usual one if it can't be found."""
    whole = next((known for known in usual if known.rpartition(".")[2] == path), path)
    module, _, name = whole.rpartition(".")
    try:
        found: type = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return _class_at(usual[0], ())
    return found


def _others(part: str, chosen: type) -> str:
    names = [path.rpartition(".")[2] for path in CLASSES[part]]
    others = [name for name in names if name != chosen.__name__]
    return f"a config may name {' or '.join(others)} too: see --help with -c"


def options_of(
    factory: Callable[..., object], prefix: str = "", hidden: Sequence[str] = ()
) -> Iterator[Option]:
    """What a function or class takes; the fields of a dataclass among it, dotted."""
    texts, shown = _texts(factory), dict[type, str]()
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.name in hidden:
            continue
        kind = _without_none(parameter.annotation)
        text = texts.get(parameter.name, "")
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            again = f" Its options are those of {shown[kind]}." if kind in shown else ""
            yield Option(f"--{prefix}{parameter.name}.*", text + again)
            if not again:
                yield from options_of(kind, f"{prefix}{parameter.name}.")
            shown.setdefault(kind, f"{prefix}{parameter.name}")
            continue
        default = parameter.default
        if default is inspect.Parameter.empty:
            text += " Required."
        elif isinstance(default, bool | int | float | str | Path) and "Default:" not in text:
            text += f" Default: {str(default).lower() if isinstance(default, bool) else default}."
        yield Option(f"--{prefix}{parameter.name} {_word(kind)}", text)


def _texts(factory: Callable[..., object]) -> dict[str, str]:
    parsed = parse_docstring(factory.__doc__ or "")
    return {one.arg_name: " ".join((one.description or "").split()) for one in parsed.params}


def _without_none(kind: object) -> object:
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def _word(kind: object) -> str:
    """A type as one word."""
    if get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is list:
        inner = get_args(kind)[0]
        return f"{_word(inner)} ..." if inner in _KINDS else "[{...}, ...]"
    if get_origin(kind) is tuple:
        return f"[{', '.join('ABC'[: len(get_args(kind))])}]"
    origin = get_origin(kind) or kind
    return _KINDS.get(origin, "VALUE") if isinstance(origin, type) else "VALUE"


def _rows(options: Sequence[Option]) -> list[str]:
    lines = []
    for usage, text in options:
        told = textwrap.wrap(text, WIDTH - COLUMN) or [""]
        if len(usage) + 4 > COLUMN:
            lines.append(f"  {usage}")
        else:
            lines.append(f"  {usage:<{COLUMN - 2}}{told.pop(0)}".rstrip())
        lines += [f"{'':<{COLUMN}}{line}" for line in told if line]
    return lines
