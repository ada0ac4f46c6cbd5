"""The command line: Lightning's loops, our commands, and every mistake in one line."""

import errno
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from camdistill.errors import UserError, mistake_of_system, nearest

LOOPS = {
    "fit": "train a student (or a teacher) from a config",
    "validate": "measure a checkpoint on the validation images",
    "test": "measure a checkpoint on the test images",
    "predict": "logits and maps of the test images",
}
COMMANDS = {
    "evaluate": "how good explanations are, without labels, controls beside them",
    "pool": "several evaluations in one table: intervals over images and seeds",
    "claims": "the Grad-CAM paper's claims, each measured here: pass or fail",
    "explain": "pictures and raw maps of images, of a checkpoint or of any network",
    "analyze": "every layer opened: statistics, filters, units, maps, in TensorBoard",
    "report": "TensorBoard on a run, and the link to its front page",
    "export": "a student as one graph of logits and maps: ONNX, torch.export",
    "rank": "rank explanation methods by how much they teach a student",
    "adapt": "adapt an explainer's parameters to what its maps teach a student",
    "learn": "learn a metric of maps from what rankings found they teach",
    "refine": "adapt a network to a metric of its own maps, controls beside it",
    "study": "train several arms with several seeds and compare them",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 2 for a user's mistake, 130 if interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that a terminal has no letters for
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _run(given)
    except UserError as error:
        return _told(str(error))
    except SystemExit as end:  # jsonargparse's, after --print_config
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:  # `camdistill ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if mistake := mistake_of_system(error):
            return _told(str(mistake))
        where = error.filename or "the disk"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _told(f"no space left writing to {where}; free some and start the command again")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return _told(f"{where}: {error.strerror}; change its permissions, or name another")
        raise
    except KeyboardInterrupt:
        resumes = "`--ckpt_path last` goes on from the last checkpoint"
        _told(f"interrupted; {resumes if given[0] in LOOPS else 'start the same command again'}")
        return 130
    return 0


def _run(given: list[str]) -> None:
    if not given or given[0] in ("-h", "--help"):
        print(_help())
    elif given[0] == "--version":
        print(importlib.import_module("camdistill").__version__)
    elif given[0] in LOOPS:
        loops = importlib.import_module("camdistill.commands.loops")
        _quieten()
        loops.run(given)
    elif given[0] in COMMANDS:
        command = getattr(importlib.import_module(f"camdistill.commands.{given[0]}"), given[0])
        _quieten()
        importlib.import_module("camdistill.commands.parsing").call(command, given)
    else:
        raise UserError(
            f"no command '{given[0]}'; {nearest(given[0], [*LOOPS, *COMMANDS])}. "
            "`camdistill --help` lists them"
        )


def _quieten() -> None:
    """Leaves out what Lightning says of itself; its warnings stay, but for those that we answer.

    Called after Lightning is imported, which sets its loggers' levels.
    """
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",  # Lightning's pytree helper against new releases of torch
        ".*does not have many workers.*",  # images come from memory
        ".*module.s. in eval mode at the start.*",  # the teacher, which stays there
        ".*smaller than the logging interval.*",
        ".*exists and is not empty.*",  # a run that goes on in its folder
        ".*dirpath has changed.*",  # a checkpoint that was moved
        ".*None of the inputs have requires_grad.*",  # a reentrant checkpoint, which we tell of
    ):
        warnings.filterwarnings("ignore", message)


def _help() -> str:
    rows = [f"  {name:<10}{what}" for name, what in (LOOPS | COMMANDS).items()]
    return "\n".join(
        [
            "camdistill: distilled explainers and layer analysis",
            "",
            *rows,
            "",
            "`camdistill <command> --help` tells a command's options; -c reads them from a file.",
        ]
    )


def _told(message: str) -> int:
    print(f"camdistill: {' '.join(message.split())}", file=sys.stderr)
    return 2
