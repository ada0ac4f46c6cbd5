"""Turns mistakes in options and config files into one line with the nearest names."""

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from pytorch_lightning.cli import LightningArgumentParser

from camdistill.errors import UserError, mistake_of_system, nearest
from camdistill.experiments.training.config_yaml import load_config
from camdistill.experiments.training.option_checks import check_no_empty_text, restore_nulls
from camdistill.experiments.training.option_hints import suggest_options
from camdistill.experiments.training.trainer_errors import LIBRARY_ERRORS, mistake_of_options

# What a config's `model` and `data` may name; any other class path works too.
CLASSES = {
    "model": (
        "camdistill.distill.distilled_explainer.DistilledExplainer",
        "camdistill.distill.classifier.Classifier",
    ),
    "data": (
        "camdistill.data.modules.ShapesData",
        "camdistill.data.modules.CIFARData",
        "camdistill.data.modules.FolderData",
    ),
}
# Modules in which Lightning has the classes that its trainer's options may name.
_LIGHTNINGS = {
    "trainer.callbacks": "pytorch_lightning.callbacks",
    "trainer.logger": "pytorch_lightning.loggers",
    "trainer.plugins": "pytorch_lightning.plugins",
    "trainer.profiler": "pytorch_lightning.profilers",
}
_TYPE_WORDS = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list, such as [a, b]",
    "tuple": "a list, such as [a, b]",
    "dict": "named values, such as {a: 1}",
    "path": "a path",
    "nonetype": "null",
}
# Lightning's types have it, but the one seed is a number.
_MEANINGLESS = {"seed_everything": _TYPE_WORDS["bool"]}
MAX_MESSAGE = 300  # characters of a message that we don't translate


class OptionError(UserError):
    """A mistake in an option; groups around it put their names before its own.

    Args:
        sentence: With {} for each option's name.
        options: Names, inside their innermost group.
    """

    def __init__(self, sentence: str, *options: str) -> None:
        super().__init__(sentence.format(*options))
        self.sentence, self.options = sentence, options

    def with_group(self, group: str) -> "OptionError":
        """The same mistake with its options' names as seen from outside a group."""
        return OptionError(self.sentence, *(f"{group}.{option}" for option in self.options))


class Parser(LightningArgumentParser):
    """Lightning's parser whose errors are one `UserError` line that names the nearest option."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Raises the `UserError` that jsonargparse's many-line message stands for."""
        raise explain_parser_error(message, self, ex) from ex

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *rest: Any, **options: Any
    ) -> Namespace:
        """Parses; inside a group null stays null."""
        words = None if args is None else [restore_nulls(word) for word in args]
        return super().parse_args(words, *rest, **options)


def explain_parser_error(
    message: str, parser: ArgumentParser, error: BaseException | None
) -> UserError:
    """What a parser's message says to a user.

    Args:
        message: Jsonargparse's.
        parser: That gave up.
        error: What made it; a `UserError` among its causes already says it.
    """
    cause = mistake_in(error)
    if cause is not None:
        group = re.match(r"Parser key ['\"]([\w.]+)['\"]", message)
        return cause.with_group(group[1]) if group and isinstance(cause, OptionError) else cause
    parser = getattr(error, "subcommand_parser", None) or parser
    names = [action.dest for action in parser._actions]
    options = [name for name in names if not name.endswith(("help", "config"))]
    text = " ".join(message.split())
    for pattern, translate in _TRANSLATIONS:
        if match := re.search(pattern, text):
            return translate(match, options)
    return UserError(f"{_shorten(text)}; --help shows the options")


def mistake_in(error: BaseException | None) -> UserError | None:
    """The first `UserError` among an exception and its causes, or what the system refused."""
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, OSError) and (mistake := mistake_of_system(error)):
            return mistake
        error = error.__cause__
    return error


@contextmanager
def raise_user_errors() -> Iterator[None]:
    """Lets the mistakes that jsonargparse and Lightning wrap or find themselves through as ours."""
    try:
        yield
    except UserError:
        raise
    except LIBRARY_ERRORS as error:
        user_error = mistake_in(error) or mistake_of_options(error)
        if user_error is None:
            raise
        raise user_error from error


def check_config_files(arguments: Sequence[str]) -> None:
    """Checks that the config files on a command line are there and are YAML.

    Raises:
        UserError: With the nearest file's name, or the place of the mistake.
    """
    for path in config_files(arguments):
        read_config(path)


def config_files(arguments: Sequence[str]) -> list[Path]:
    """The config files on a command line."""
    paths = []
    for position, argument in enumerate(arguments):
        if argument in ("-c", "--config") and position + 1 < len(arguments):
            paths.append(Path(arguments[position + 1]))
        elif argument.startswith("--config="):
            paths.append(Path(argument.partition("=")[2]))
    return paths


def read_config(path: Path) -> dict[str, object]:
    """What a YAML file says.

    Raises:
        UserError: There is no such file, or it doesn't hold options.
    """
    if not path.is_file():
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a pipe, a socket or a device; give a .yaml file")
        if path.is_dir():
            raise UserError(f"{path} is a folder, not a config; {_suggest_configs(path / 'x')}")
        raise UserError(f"no config file {path}; {_suggest_configs(path)}")
    try:
        config = load_config(path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text, so no config; give a .yaml file") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}; check its permissions") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or _shorten(str(error), 100) or "it can't be read"
        raise UserError(
            f"{path}{where} is not YAML: {what}; check brackets, colons and indentation there"
        ) from None
    if isinstance(config, dict):
        check_no_empty_text(config)
    else:
        kind = "is empty" if config is None else f"holds a {type(config).__name__}"
        raise UserError(f"{path} {kind}; a config has options by name, such as model: and data:")
    return config


def _suggest_configs(path: Path) -> str:
    folder = path.parent
    names = sorted(file.name for file in folder.glob("*.yaml")) if folder.is_dir() else []
    if names:
        return f"in {folder} {nearest(path.name, names)}"
    return f"there is none in {folder}" if folder.is_dir() else f"there is no folder {folder}"


def _unknown_option_error(match: re.Match[str], options: list[str]) -> UserError:
    """No such option: the nearest ones, first among those of the same group."""
    groups = match.groupdict()
    name = f"{groups['group']}.{groups['name']}" if groups.get("group") else groups["name"]
    if not name:
        word = groups["word"]
        if word.lower().endswith((".yaml", ".yml")):
            return UserError(f"'{word}' belongs to no option; a config stands after -c: -c {word}")
        if "run" in options and Path(word).is_dir():
            return UserError(
                f"'{word}' belongs to no option; a run stands after --run: --run {word}"
            )
        return UserError(f"'{word}' belongs to no option; options begin with --")
    if name[0].isdecimal():
        return UserError(
            f"'{groups['word']}' reads as an option; give a number below 0 as --NAME=-1"
        )
    if suggestions := suggest_options(name, options, CLASSES):
        marks = " or ".join(["--{}"] * len(suggestions))
        return OptionError(f"no option '{{}}' here; give {marks}", name, *suggestions)
    group, _, last_word = name.rpartition(".")
    group_options = {
        option.rpartition(".")[2]: option
        for option in options
        if option.rpartition(".")[0] == group
    }
    close_names = [
        group_options[word] for word in get_close_matches(last_word, group_options, cutoff=0.5)
    ]
    close_names = close_names or get_close_matches(name, options, cutoff=0.5)
    cure = (
        f"nearest: {', '.join(['{!r}'] * len(close_names))}" if close_names else "--help shows them"
    )
    return OptionError(f"no option '{{}}'; {cure}", name, *close_names)


def _missing_option_error(match: re.Match[str], options: list[str]) -> UserError:
    """Options without a default that were not given."""
    names = [name.removeprefix("fit.") for name in match["names"].split(", ")]
    loops = ("fit.", "validate.", "test.", "predict.")
    if match["names"].startswith(loops):
        return UserError(
            "no model or data: they come from a config; -c configs/shapes.yaml is an example"
        )
    marks = ", ".join("{}" for _ in names)
    verb = "is" if len(names) == 1 else "are"
    if len(names) > 2:
        cure = "give a config: -c FILE (configs/ has examples), or --{}, ..."
        return OptionError(f"{marks} {verb} missing; {cure}", *names, names[0])
    return OptionError(
        f"{marks} {verb} missing; give --{{}} or set it in the config", *names, names[0]
    )


def _wrong_type_error(match: re.Match[str], options: list[str]) -> UserError:
    """A value of another type, or not among the choices."""
    expected_types = list(
        dict.fromkeys(_type_in_words(kind) for kind in re.findall(_EXPECTED, match["rest"]))
    )
    expected_types = [
        kind for kind in expected_types if kind and kind != _MEANINGLESS.get(match["name"])
    ]
    value = re.search(rf"(?:Got value|Given value): (.*?)(?:{_AFTER_VALUE}|$)", match["rest"])
    value_text = value[1] if value else "that"
    if nested := re.match(r"NestedArg\(key='(.*?)', val='(.*?)'\)", value_text):
        sentence = f"{{}} has no option '{nested[1]}' of its own; give --{{}} {nested[2]}"
        return OptionError(sentence, match["name"], match["name"])
    if value_text == "None":
        expected = (
            _shorten(" or ".join(expected_types) or "a value", 200)
            .replace("{", "{{")
            .replace("}", "}}")
        )
        sentence = f"{{}} is null; leave it out for its default, or give {expected}"
        return OptionError(sentence, match["name"])
    is_switch = value_text in ("True", "False")
    value_text = value_text.lower() if is_switch else value_text
    close_names = get_close_matches(
        value_text, re.findall(r"'([^']*)'", " ".join(expected_types)), n=1, cutoff=0.5
    )
    expected = f"it takes {' or '.join(expected_types) or 'another type'}"
    sentence = f"is {_shorten(value_text, 60)!r}; {_shorten(expected, 200)}"
    sentence += f"; nearest: '{close_names[0]}'" if close_names and not is_switch else ""
    if _TYPE_WORDS["int"] in expected_types and re.fullmatch(r"-?\d+\.0", value_text):
        sentence += f"; write {value_text.removesuffix('.0')}"
    return OptionError("{} " + sentence.replace("{", "{{").replace("}", "}}"), match["name"])


def _type_in_words(kind: str) -> str:
    """A type's name in words."""
    if choices := re.match(r"typing\.Literal\[(.*)\]", kind):
        return choices[1]
    name = re.sub(r"<class '(.*)'>", r"\1", kind).rpartition(".")[2].rstrip("'>").lower()
    return _TYPE_WORDS.get(name, "" if "." in kind else kind)


def _unknown_class_error(match: re.Match[str], options: list[str]) -> UserError:
    """A class path that leads nowhere."""
    path, known = match["path"], _classes_of(match["name"])
    by_name = {option.rpartition(".")[2]: option for option in known}
    close_names = get_close_matches(path.rpartition(".")[2], by_name, cutoff=0.5)
    suggestions = [by_name[name] for name in close_names] or list(known)
    cure = f"{'nearest' if close_names else 'there are'}: {', '.join(map(repr, suggestions[:8]))}"
    return OptionError(
        f"{{}} names the class '{path}', which is not there; "
        + (cure if suggestions else "check its spelling"),
        match["name"],
    )


def _classes_of(option: str) -> tuple[str, ...]:
    """The classes that an option may name: ours by their paths, Lightning's by their names."""
    if option in _LIGHTNINGS:
        return tuple(importlib.import_module(_LIGHTNINGS[option]).__all__)
    return CLASSES.get(option, ())


def _group_expected_error(match: re.Match[str], options: list[str]) -> UserError:
    """One value where a group of them is meant: teacher: resnet20."""
    groups = match.groupdict()
    value_text = _shorten(groups.get("value") or "that", 60).strip("'\"")
    if value_text in ("null", "None"):
        return OptionError("{} is null; leave it out for its defaults", match["name"])
    return OptionError(
        f"{{}} is {value_text!r}; it takes named values, such as {{{{name: {value_text}}}}}",
        match["name"],
    )


def _class_or_group_error(match: re.Match[str], options: list[str]) -> UserError:
    """A word where a class path or a group is meant."""
    known = match["name"] in {**CLASSES, **_LIGHTNINGS}
    return (_unknown_class_error if known else _group_expected_error)(match, options)


def _wrong_class_error(match: re.Match[str], options: list[str]) -> UserError:
    """A class of another kind."""
    known = ", ".join(repr(option) for option in _classes_of(match["name"])[:8])
    cure = f"name one, such as {known}" if known else "name one"
    return OptionError(
        f"{{}} names '{match['value']}', which is no {match['kind']}; {cure}", match["name"]
    )


def _key_of_number(match: re.Match[str], options: list[str]) -> UserError:
    """A word among named values whose names are whole numbers."""
    return OptionError(
        f"{{}} has the name {_shorten(match['key'], 60)!r}, but its names are whole numbers; write "
        "them as in {{0: 1, 4: 2}}",
        match["name"],
    )


def _wrong_length_error(match: re.Match[str], options: list[str]) -> UserError:
    return OptionError(
        f"{{}} is {_shorten(match['value'], 60)}; it takes a list of {match['count']}",
        match["name"],
    )


def _not_a_group_error(match: re.Match[str], options: list[str]) -> UserError:
    return OptionError("no option '{}': {} is one value", match["inner"], match["name"])


def _unknown_entry_error(match: re.Match[str], options: list[str]) -> UserError:
    return UserError(
        f"an entry with '{match['name']}' has another name in it that is not known; check its names"
    )


def _missing_value_error(match: re.Match[str], options: list[str]) -> UserError:
    return UserError(f"{match['name']} stands without its value; give one after it")


def _shorten(text: str, longest: int = MAX_MESSAGE) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


# Where a value ends that is given to one of several types.
_AFTER_VALUE = r" - Expected | - Problem | - Not | Given value type: "
_EXPECTED = r"Expected an? (typing\.Literal\[[^\]]*\]|<class '[^']*'>|[\w.\[\]]+)"
_KEY = r"Parser key ['\"](?P<name>[\w.]+)['\"]: "
Translator = Callable[[re.Match[str], list[str]], UserError]
_TRANSLATIONS: tuple[tuple[str, Translator], ...] = (
    (
        r"[Uu]nrecognized arguments?: (?P<word>(?:--?(?P<name>[\w.]+(?:-[\w.]+)*))?\S*)",
        _unknown_option_error,
    ),
    (r"Subcommand '\w+' does not accept option '(?P<name>[\w.]+)'", _unknown_option_error),
    (r"Group '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'", _unknown_option_error),
    (r"Option '(?P<name>[\w.]+)' is not accepted", _unknown_option_error),
    (r"the following arguments are required: (?P<names>.*)", _missing_option_error),
    (_KEY + r".*Problem with given class_path '(?P<path>[^']*)'", _unknown_class_error),
    (
        _KEY + r".*Expected a dot import path string: (?P<path>(?P<value>\S+))",
        _class_or_group_error,
    ),
    (
        _KEY + r".*Expected a path but (?P<value>\S+) either .*"
        r"does not correspond to a subclass of (?P<kind>\w+)",
        _wrong_class_error,
    ),
    (_KEY + r"Not a valid subclass of \w+\. Got value: (?P<value>\S+)", _group_expected_error),
    (
        _KEY + r"Expected a tuple with (?P<count>\d+) elements\. Got value: (?P<value>.*)",
        _wrong_length_error,
    ),
    (_KEY + r"Not of type Path: .* not NestedArg.*key='(?P<inner>[\w.]+)'", _not_a_group_error),
    (_KEY + r"invalid literal for int\(\) with base 10: '(?P<key>.*?)'", _key_of_number),
    (_KEY + r"(?P<rest>.*Expected .*)", _wrong_type_error),
    (
        _KEY + r"Unable to load config '(?P<value>[^']*)' - Parser key .* load config",
        _group_expected_error,
    ),
    (r"^[\"']+(?P<name>\w+)[\"']+$", _unknown_entry_error),
    (r"argument (?:-\w/)?(?P<name>--\S+): expected", _missing_value_error),
)
