"""The command line: Lightning's loops, our commands, and every mistake in one line."""

import importlib
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from camdistill.errors import (
    UserError,
    disk_mistake,
    is_out_of_memory,
    mistake_of_system,
    nearest,
)

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

INTERRUPTED, TERMINATED = 130, 143  # 128 and the signal's number, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code.

    It is 2 for a user's mistake, 130 after Ctrl-C and 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that a terminal has no letters for
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _handle_signals():
            _run(words)
    except UserError as error:
        return _print_error(str(error))
    except SystemExit as end:
        # Lightning makes Ctrl-C exit 1, and its own exception of SIGTERM has no code.
        if end.code == TERMINATED or type(end).__name__ == "SIGTERMException":
            return _report_stop("terminated", TERMINATED, words)
        if isinstance(end.__context__, KeyboardInterrupt):
            return _report_stop("interrupted", INTERRUPTED, words)
        # jsonargparse's, after --print_config
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:  # `camdistill ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        mistake = mistake_of_system(error) or disk_mistake(error)
        if mistake is None:
            raise
        return _print_error(str(mistake))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _print_error(
            "out of memory; give fewer or smaller images, or a smaller batch, or a larger machine"
        )
    except KeyboardInterrupt:
        return _report_stop("interrupted", INTERRUPTED, words)
    return 0


@contextmanager
def _handle_signals() -> Iterator[None]:
    """SIGTERM ends what runs as Ctrl-C does, cleaning up; both handlers are put back.

    Lightning calls this handler after its own, and leaves Ctrl-C switched off when it was used.
    """
    if threading.current_thread() is not threading.main_thread():  # it has no signals
        yield
        return
    handlers = {which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)}
    main_process = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() != main_process:  # one that was forked from it
            os._exit(TERMINATED)
        raise SystemExit(TERMINATED)

    if handlers[signal.SIGTERM] is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        for which, handler in handlers.items():
            if handler is not None:
                signal.signal(which, handler)


def _report_stop(reason: str, code: int, words: Sequence[str]) -> int:
    """Says how to go on after a signal."""
    if words[:1] == ["fit"]:
        cure = "the same command with `--ckpt_path last` goes on from the last whole epoch"
    else:
        cure = "start the same command again"
    _print_error(f"{reason}; {cure}")
    return code


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
    elif words[0] == "--version":
        print(importlib.import_module("camdistill").__version__)
    elif words[0] in LOOPS:
        loops = importlib.import_module("camdistill.commands.loops")
        _silence_libraries()
        with _quiet_event_writers():
            loops.run(words)
    elif words[0] in COMMANDS:
        command = getattr(importlib.import_module(f"camdistill.commands.{words[0]}"), words[0])
        _silence_libraries()
        with _quiet_event_writers():
            importlib.import_module("camdistill.commands.command_parser").call(command, words)
    else:
        raise UserError(
            f"no command '{words[0]}'; {nearest(words[0], [*LOOPS, *COMMANDS])}. "
            "`camdistill --help` lists them"
        )


@contextmanager
def _quiet_event_writers() -> Iterator[None]:
    """Leaves out the traceback of TensorBoard's writing thread where its file can't be written.

    The next event that is added, or the next flush, raises the same error in the main thread.
    """
    previous_hook = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        writer = type(failure.thread).__name__ == "_AsyncWriterThread"
        if not (writer and isinstance(failure.exc_value, OSError)):
            previous_hook(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = previous_hook


def _silence_libraries() -> None:
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


def _print_error(message: str) -> int:
    print(f"camdistill: {' '.join(message.split())}", file=sys.stderr)
    return 2
