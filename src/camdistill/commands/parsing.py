"""Typed functions as commands."""

from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser

from camdistill.errors import UserError
from camdistill.studies.experiment import one_line


class CommandParser(ArgumentParser):
    """A parser with -c whose errors are one `UserError` line."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Raises the `UserError` that jsonargparse's many-line message stands for."""
        raise UserError(one_line(message, self)) from ex


def call(command: Callable[..., object], arguments: Sequence[str]) -> object:
    """Runs a function with the options on a command line, the first word being its name."""
    name = arguments[0]
    summary = (command.__doc__ or "").splitlines()[0]
    parser = CommandParser(prog=f"camdistill {name}", description=summary)
    parser.add_argument("-c", "--config", action="config", help="Options from a YAML file.")
    parser.add_function_arguments(command, as_group=False)
    chosen = parser.instantiate_classes(parser.parse_args(list(arguments[1:]))).as_dict()
    chosen.pop("config", None)
    return command(**chosen)
