"""The help that `--help` prints, written from signatures and docstrings."""

import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_origin

from docstring_parser import parse as parse_docstring

from camdistill.commands.options import Parameter, default_of, inside, parameters_of, word_of
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
    groups = {one.name: one for one in parameters_of(command) if one.group is not None}
    if group is not None:
        if group not in groups:
            cure = nearest(group, groups) if groups else "it has none"
            raise UserError(f"{name} has no group of options '{group}'; {cure}")
        return "\n".join([usage, "", *_rows(list(_whole(groups[group])))])
    parsed = parse_docstring(command.__doc__ or "")
    said = [parsed.short_description or "", *(parsed.long_description or "").split("\n\n")]
    alone = [_option(one) for one in parameters_of(command) if one.group is None]
    lines = [
        usage,
        "",
        *(textwrap.fill(part, WIDTH) for part in said if part),
        "",
        *_rows([*(Option(*row) for row in _COMMON.items()), *alone]),
    ]
    for one in groups.values():
        title = f"{one.name}: {one.text} All of it: camdistill {name} --help {one.name}"
        lines += ["", *textwrap.wrap(title, WIDTH)]
        lines += [line for inner in inside(one) for line in _short(inner)]
    return "\n".join(lines)


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
    shown = dict[type, str]()
    for one in parameters_of(factory, prefix):
        if one.name.removeprefix(prefix) in hidden:
            continue
        if one.group in shown:
            again = f"{one.text} Its options are those of {shown[one.group]}."
            yield Option(f"--{one.name}.*", again)
            continue
        yield from _whole(one)
        if one.group is not None:
            shown[one.group] = one.name


def _whole(one: Parameter) -> Iterator[Option]:
    """An option, or a group and all that is in it."""
    if one.group is None:
        yield _option(one)
        return
    yield Option(f"--{one.name}.*", one.text)
    for inner in inside(one):
        yield from _whole(inner)


def _option(one: Parameter) -> Option:
    text, default = one.text, default_of(one)
    if one.default is inspect.Parameter.empty:
        text += " Required."
    elif default and "Default:" not in text:
        text += f" Default: {default}."
    return Option(f"--{one.name} {word_of(one.kind)}", text)


def _short(one: Parameter) -> list[str]:
    """An option in a line, with its default; two where its choices need them."""
    said = re.split(r"(?<=\.) |; ", one.text)[0].rstrip(".")
    room = WIDTH - COLUMN
    if one.group is not None:
        names = ", ".join(inspect.signature(one.group).parameters)
        both = f"{said} ({names})"
        return _rows([Option(f"--{one.name}.*", both if len(both) <= room else names)])
    usage, default = f"--{one.name} {word_of(one.kind)}", default_of(one, room // 2)
    end = f". Default: {default}." if default else ""
    if one.default is inspect.Parameter.empty:
        end = ". Required."
    elif "Default:" in one.text:
        end = f". {one.text[one.text.index('Default:') :]}"
    if len(usage) + 4 > COLUMN:
        usage = f"--{one.name}"
        if get_origin(one.kind) is Literal:
            choices = word_of(one.kind)
            fits = len(choices + end) <= room
            return _rows([Option(usage, (choices if fits else choices.replace("|", " | ")) + end)])
    return _rows([Option(usage, _cut(said, end, room))])


def _cut(text: str, end: str, room: int) -> str:
    """A text with its end in so many letters, as far as words can be left out."""
    if len(text + end) <= room or " " not in text:
        return text + end
    kept = text[: max(room - len(end) - 2, 12)].rpartition(" ")[0].rstrip(",:(")
    return f"{kept}...{end.removeprefix('.')}"


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
