"""Turns Lightning's errors about its own options into one line with a cure."""

import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator

from lightning_fabric.utilities.exceptions import MisconfigurationException

from camdistill.errors import UserError, nearest

# What Lightning, torch and jsonargparse raise about flags, callbacks, loggers and strategies.
LIBRARY_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MisconfigurationException,
    RuntimeError,
    TypeError,
    ValueError,
)
MAX_MESSAGE = 300  # characters of a message that we don't translate
_LIGHTNING = {"pytorch_lightning", "lightning_fabric", "lightning_utilities", "jsonargparse"}
_PARTS = tuple(
    f"pytorch_lightning.{package}." for package in ("callbacks", "loggers", "strategies")
)
# What they raise comes from elsewhere: a user's data set in a worker process, another machine.
_CARRIERS = (
    "torch.autograd",
    "torch._tensor",
    "torch._utils",
    "torch.utils.data",
    "torch.distributed",
)
_LOWER_LIBRARIES = {"torch", "torchmetrics", "numpy", "tensorboard", *sys.stdlib_module_names}


def mistake_of_options(error: Exception) -> UserError | None:
    """What a user can do about an error of Lightning's; None where someone's code is wrong.

    Args:
        error: One of `LIBRARY_ERRORS`.
    """
    cause = _first_cause(error)
    message = _one_line(str(cause))
    if message.startswith("Error(s) in loading state_dict"):
        return UserError(
            "the checkpoint's weights don't fit the network of the config "
            f"({message.partition(': ')[2][:150]}...); give the config that it was trained with: -c"
        )
    if not isinstance(cause, MisconfigurationException) and not is_from_lightning(cause):
        return None
    for text in (message, _one_line(str(error))):
        for pattern, translate in _MESSAGES:
            if match := re.search(pattern, text):
                return UserError(translate(match))
    reason = message.partition(" Got value: Namespace")[0].rstrip(". ") or type(cause).__name__
    if len(reason) > MAX_MESSAGE:
        reason = f"{reason[: MAX_MESSAGE - 3]}..."
    return UserError(
        f"{_lightning_part(cause)}{reason}; change that option of the trainer, or leave it out"
    )


def is_from_lightning(error: BaseException) -> bool:
    """Whether Lightning itself, or what it calls, raised an error.

    The innermost frame decides that is not of a library below Lightning. A step of the training, a
    user's callback, what autograd runs and what a DataLoader's workers raise are no business of
    Lightning's; nor is a wrong call of `self.log`, which lies in `pytorch_lightning.core`.
    """
    inner = ""  # Lightning's outermost frame below the one that is looked at
    for module in reversed(list(_traceback_modules(error))):
        top = module.partition(".")[0]
        if module.startswith(_CARRIERS):
            return False
        if top in _LIGHTNING:
            inner = module
        elif top == "camdistill":
            return bool(inner) and not inner.startswith("pytorch_lightning.core")
        elif top not in _LOWER_LIBRARIES:
            return False
    return bool(inner)


def _traceback_modules(error: BaseException) -> Iterator[str]:
    """The module of each frame of an error's traceback, outermost first."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        yield str(frame.f_globals.get("__name__", ""))


def _lightning_part(error: BaseException) -> str:
    """The callback, logger or strategy of Lightning's in which an error was raised."""
    name = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(_PARTS) and "self" in frame.f_locals:
            name = type(frame.f_locals["self"]).__name__
    return f"{name}: " if name else ""


def _first_cause(error: BaseException) -> BaseException:
    """The error that others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _monitor_message(match: re.Match[str]) -> str:
    """A callback that watches a number which nobody logs."""
    names = re.findall(r"[`']([^`']+)[`']", match["names"])
    return (
        f"a callback monitors '{match['name']}', which is not logged; "
        f"{nearest(match['name'], names, count=len(names))}"
    )


def _missing_package_message(match: re.Match[str]) -> str:
    package = re.split(r"[<>=!~.\[ ]", match["name"])[0]
    return (
        f"the package '{package}', which that option needs, is not installed; "
        f"pip install {package}, or leave the option out"
    )


def _interval_message(match: re.Match[str]) -> str:
    return (
        f"--trainer.val_check_interval is {match[1]}, but an epoch has {match[2]} batches; give "
        f"{match[2]} or less, or --trainer.check_val_every_n_epoch null to count over epochs"
    )


def _no_batch(match: re.Match[str]) -> str:
    """A share of the batches that is less than one of them."""
    whole = int(match["count"])
    return (
        f"--trainer.{match['name']} is {match['share']}, less than one of {whole} batches; give 1 "
        f"(a batch), or a share of {math.ceil(1000 / whole) / 1000:g} or more"
    )


_MESSAGES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (
        r"conditioned on metric `(?P<name>[^`]*)` which is not available\..*: (?P<names>.*)",
        _monitor_message,
    ),
    (
        r"\(monitor='(?P<name>[^']*)'\)`? could not find the monitored key(?P<names>.*)",
        _monitor_message,
    ),
    (
        r"Timer\(duration='(.*)'\)` is not a valid duration",
        lambda match: (
            f"the longest time (max_time) is '{match[1]}'; give DD:HH:MM:SS, such as "
            "00:02:00:00 for two hours"
        ),
    ),
    (
        r"to check (?P<share>\S+) of the .* \* (?P<count>\d+) < 1\..* the `(?P<name>\w+)`",
        _no_batch,
    ),
    (
        r"restored a checkpoint with current_epoch=(\d+), .*Trainer\(max_epochs=(\d+)\)",
        lambda match: (
            f"--trainer.max_epochs is {match[2]}, but the checkpoint has been trained for "
            f"{int(match[1]) + 1} epochs; give {int(match[1]) + 1} or more, or start without "
            "--ckpt_path"
        ),
    ),
    (r"by running `pip install -U (?P<name>[\w-]+)`", _missing_package_message),
    (r"Requirement '(?P<name>[^']+)' not met", _missing_package_message),
    (r"No module named '(?P<name>[^']+)'", _missing_package_message),
    (
        r"`val_check_interval` \((\d+)\) must be less .* training batches \((\d+)\)",
        _interval_message,
    ),
    (
        r"You selected an invalid (\w+) .*?='?([^'`]*)'?`\. .*?: (.*?)\.$",
        lambda match: f"--trainer.{match[1]} is '{match[2]}'; give one of {match[3]}",
    ),
)
