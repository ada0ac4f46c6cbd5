"""The help that `--help` prints, written from signatures and docstrings."""

import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_origin

from docstring_parser import parse as parse_docstring

from camdistill.commands.options import (
    Parameter,
    default_text,
    group_parameters,
    option_parameters,
    type_word,
)
from camdistill.errors import UserError, nearest
from camdistill.experiments.training.config_errors import CLASSES, read_config

WIDTH = 100
COLUMN = 34  # where the explanations begin
_COMMON = {
    "-c, --config FILE": "Options from a YAML file; those on the command line win.",
    "--print_config": "Show all options with their values, as YAML, and do nothing.",
}
_LOOP = {
    "--run NAME": "Its folder under runs/, or a path with a slash. Default: the config's name.",
    "--ckpt_path FILE|last": "{checkpoint}",
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


def command_help(name: str, command: Callable[..., object], group: str | None = None) -> str:
    """The help of a command that is a function.

    Options of a group have a line each; the help of the group tells all of them.

    Args:
        name: The command's.
        command: The function.
        group: Tell all of this group's options; None tells the command's.

    Raises:
        UserError: There is no such group.
    """
    usage = f"usage: camdistill {name} [-c CONFIG] [--OPTION VALUE ...]"
    groups = {
        parameter.name: parameter
        for parameter in option_parameters(command)
        if parameter.group is not None
    }
    if group is not None:
        if group not in groups:
            cure = nearest(group, groups) if groups else "it has none"
            raise UserError(f"{name} has no group of options '{group}'; {cure}")
        return "\n".join([usage, "", *_rows(list(_expand_option(groups[group])))])
    parsed = parse_docstring(command.__doc__ or "")
    paragraphs = [parsed.short_description or "", *(parsed.long_description or "").split("\n\n")]
    options = [
        _option(parameter) for parameter in option_parameters(command) if parameter.group is None
    ]
    lines = [
        usage,
        "",
        *(textwrap.fill(part, WIDTH) for part in paragraphs if part),
        "",
        *_rows([*(Option(*row) for row in _COMMON.items()), *options]),
    ]
    for parameter in groups.values():
        more = f"camdistill {name} --help {parameter.name}"
        title = f"{parameter.name}: {parameter.text} All of it: {more}"
        lines += ["", *textwrap.wrap(title, WIDTH)]
        lines += [line for inner in group_parameters(parameter) for line in _short_rows(inner)]
    return "\n".join(lines)


def loop_help(arguments: Sequence[str]) -> str:
    """The help of `fit`, `validate`, `test` or `predict`, for the classes of a given config."""
    name = arguments[0]
    model, data = _model_and_data(arguments)
    checkpoint = _CHECKPOINT.get(name, _CHECKPOINT["test"])
    options = [
        Option(usage, text.format(checkpoint=checkpoint))
        for usage, text in (_COMMON | _LOOP).items()
    ]
    sections = [_usage(name), "options", *_rows(options)]
    if name == "fit":
        sections += ["", f"model: {model.__name__} ({_alternatives('model', model)})"]
        sections += _rows(list(options_of(model, "model.", ("seed",))))
    sections += ["", f"data: {data.__name__} ({_alternatives('data', data)})"]
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


def _model_and_data(arguments: Sequence[str]) -> tuple[type, type]:
    """Model and data of the config on the command line; the usual ones without."""
    paths = {"model": CLASSES["model"][0], "data": CLASSES["data"][-1]}
    for index, word in enumerate(arguments[:-1]):
        if word in ("-c", "--config"):
            config = read_config(Path(arguments[index + 1]))
            for part in paths:
                section = config.get(part)
                if isinstance(section, dict):
                    paths[part] = str(section.get("class_path", paths[part]))
    return _class_at(paths["model"], CLASSES["model"]), _class_at(paths["data"], CLASSES["data"])


def _class_at(path: str, usual: Sequence[str]) -> type:
    """A class by its path or by its bare name; the first usual one if it can't be found."""
    full_path = next((known for known in usual if known.rpartition(".")[2] == path), path)
    module, _, name = full_path.rpartition(".")
    try:
        class_type: type = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return _class_at(usual[0], ())
    return class_type


def _alternatives(part: str, chosen: type) -> str:
    names = [path.rpartition(".")[2] for path in CLASSES[part]]
    others = [name for name in names if name != chosen.__name__]
    return f"a config may name {' or '.join(others)} too: see --help with -c"


def options_of(
    factory: Callable[..., object], prefix: str = "", hidden: Sequence[str] = ()
) -> Iterator[Option]:
    """What a function or class takes; the fields of a dataclass among it, dotted."""
    listed_groups = dict[type, str]()
    for parameter in option_parameters(factory, prefix):
        if parameter.name.removeprefix(prefix) in hidden:
            continue
        if parameter.group in listed_groups:
            text = f"{parameter.text} Its options are those of {listed_groups[parameter.group]}."
            yield Option(f"--{parameter.name}.*", text)
            continue
        yield from _expand_option(parameter)
        if parameter.group is not None:
            listed_groups[parameter.group] = parameter.name


def _expand_option(parameter: Parameter) -> Iterator[Option]:
    """An option, or a group and all that is in it."""
    if parameter.group is None:
        yield _option(parameter)
        return
    yield Option(f"--{parameter.name}.*", parameter.text)
    for inner in group_parameters(parameter):
        yield from _expand_option(inner)


def _option(parameter: Parameter) -> Option:
    text, default = parameter.text, default_text(parameter)
    if parameter.default is inspect.Parameter.empty:
        text += " Required."
    elif default and "Default:" not in text:
        text += f" Default: {default}."
    return Option(f"--{parameter.name} {type_word(parameter.kind)}", text)


def _short_rows(parameter: Parameter) -> list[str]:
    """An option in a line, with its default; two where its choices need them."""
    summary = re.split(r"(?<=\.) |; ", parameter.text)[0].rstrip(".")
    width = WIDTH - COLUMN
    if parameter.group is not None:
        names = ", ".join(inspect.signature(parameter.group).parameters)
        summary_with_names = f"{summary} ({names})"
        return _rows(
            [
                Option(
                    f"--{parameter.name}.*",
                    summary_with_names if len(summary_with_names) <= width else names,
                )
            ]
        )
    usage, default = (
        f"--{parameter.name} {type_word(parameter.kind)}",
        default_text(parameter, width // 2),
    )
    ending = f". Default: {default}." if default else ""
    if parameter.default is inspect.Parameter.empty:
        ending = ". Required."
    elif "Default:" in parameter.text:
        ending = f". {parameter.text[parameter.text.index('Default:') :]}"
    if len(usage) + 4 > COLUMN:
        usage = f"--{parameter.name}"
        if get_origin(parameter.kind) is Literal:
            choices = type_word(parameter.kind)
            fits = len(choices + ending) <= width
            return _rows(
                [Option(usage, (choices if fits else choices.replace("|", " | ")) + ending)]
            )
    return _rows([Option(usage, _cut_text(summary, ending, width))])


def _cut_text(text: str, ending: str, width: int) -> str:
    """A text with its end in so many letters, as far as words can be left out."""
    if len(text + ending) <= width or " " not in text:
        return text + ending
    beginning = text[: max(width - len(ending) - 2, 12)].rpartition(" ")[0].rstrip(",:(")
    return f"{beginning}...{ending.removeprefix('.')}"


def _rows(options: Sequence[Option]) -> list[str]:
    lines = []
    for usage, text in options:
        wrapped = textwrap.wrap(text, WIDTH - COLUMN) or [""]
        if len(usage) + 4 > COLUMN:
            lines.append(f"  {usage}")
        else:
            lines.append(f"  {usage:<{COLUMN - 2}}{wrapped.pop(0)}".rstrip())
        lines += [f"{'':<{COLUMN}}{line}" for line in wrapped if line]
    return lines
