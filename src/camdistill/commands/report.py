"""`report`: TensorBoard on a run, and the link to its front page."""

import socket
import threading
from pathlib import Path

from tensorboard import program

from camdistill import tags
from camdistill.errors import UserError, check_number
from camdistill.report.layer_report import REPORT, report_url
from camdistill.report.tensorboard import front_page_url, read_tags


def report(
    run: Path,
    port: int | None = None,
    host: str = "localhost",
) -> None:
    """Starts TensorBoard on a folder and prints the link to its front page; Ctrl-C stops it.

    Args:
        run: A run's folder, or a folder of runs: what fit, study or analyze wrote.
        port: Where it listens. Default: 6006, or the next that is free.
        host: Which machines may look: localhost, or 0.0.0.0 for all.
    """
    if port is not None:
        check_number("port", port, "[0, 65535]", "give a port from 0 (any that is free) to 65535")
    if not run.is_dir() or not any(run.rglob("events.out.tfevents.*")):
        raise UserError(
            f"no TensorBoard events in '{run}'; give a folder that fit, study or analyze wrote"
        )
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"host is '{host}', which isn't known ({reason}); give localhost, or 0.0.0.0 for all"
        ) from None
    options = ["--logdir", str(run), "--host", host, "--samples_per_plugin", "images=100,text=100"]
    server = program.TensorBoard()
    server.configure(argv=["", *options, *(["--port", str(port)] if port is not None else [])])
    try:
        url = server.launch()
    except program.TensorBoardServerException as error:
        raise UserError(f"TensorBoard doesn't start: {error}; give another --port") from None
    link = report_url(run, url) if (run / REPORT).is_dir() else _training_page(run, url)
    print(f"TensorBoard shows {run}. The cards that matter, on top:\n\n  {link}\n")
    try:
        print("Ctrl-C stops it.", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nStopped.")


def _training_page(run: Path, base: str) -> str:
    """Of a training run, or of several: the scalars that matter, and the maps of the first."""
    folders = sorted({file.parent for file in run.rglob("events.out.tfevents.*")})
    kinds_by_folder = {folder.relative_to(run).as_posix(): read_tags(folder) for folder in folders}
    written_tags = {tag for kind_by_tag in kinds_by_folder.values() for tag in kind_by_tag}
    cards = [tag for tag in (*tags.STUDENT_CARDS, *tags.CLASSIFIER_CARDS) if tag in written_tags]
    maps = [
        (tag, name)
        for name, kind_by_tag in kinds_by_folder.items()
        for tag, kind in kind_by_tag.items()
        if kind == "images"
    ]
    return front_page_url(scalars=cards, pictures=maps[:2], base=base)
