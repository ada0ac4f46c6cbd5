"""Folders of runs: claimed when they are chosen, and found again by what a run is.

A run is its model, its data, its seed and how its trainer computes (precision, clipping, batches).
`--ckpt_path last` stands for the newest run of that name with these; epochs, steps, devices,
loggers, callbacks and where files lie may change.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import yaml

from camdistill.errors import UserError, writing_mistake
from camdistill.experiments.training.checkpoint_io import LAST
from camdistill.experiments.training.run_identity import (
    FREE,
    PLACES,
    TRAINER,
    Config,
    describe,
    differences,
)
from camdistill.store.atomic_files import make_folders, release_lock, remove_empty, take_lock

CONFIG = "config.yaml"
INHERITED = "CAMDISTILL_RUN_FOLDER"
# What launchers tell a process about its place; some tell only its node's, or that on its node.
_RANKS = (
    "RANK",
    "LOCAL_RANK",
    "SLURM_PROCID",
    "JSM_NAMESPACE_RANK",
    "NODE_RANK",
    "GROUP_RANK",
)
_BUSY = "wait for it, or start a run of its own: without --ckpt_path, or with another --run"


class RunFolder:
    """A run's folder, which one process trains in at a time.

    Attributes:
        path: Where.
    """

    def __init__(self, path: Path, made: list[Path] | None = None) -> None:
        self.path = path
        self._made = made or []
        self._lock: int | None = None

    def lock(self) -> None:
        """Keeps other processes from training here.

        Raises:
            UserError: One does.
        """
        if self._lock is None and self.path.is_dir() and _is_first_process():
            self._lock = take_lock(self.path, _BUSY)

    def keep(self) -> None:
        """From now on the folder stays, however the run ends."""
        self._made = []

    def release(self) -> None:
        """Unlocks the folder; one that was claimed and never needed is removed."""
        if self._made:
            with contextlib.suppress(OSError):
                shutil.rmtree(self.path)
            remove_empty(self._made[1:])
            self._made = []
        release_lock(self._lock)
        self._lock = None


def versions(runs: Path) -> list[Path]:
    """A run's version folders, oldest first."""
    found = [path for path in runs.glob("version_*") if path.name.split("_")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("_")[1]))


def claim(runs: Path) -> RunFolder:
    """Makes the next free folder, so that no other run takes it.

    Processes that Lightning starts for the same run get the same one.
    """
    inherited = os.environ.get(INHERITED)
    if inherited and "LOCAL_RANK" in os.environ and Path(inherited).parent == runs:
        return RunFolder(Path(inherited))
    found = versions(runs)
    number = int(found[-1].name.split("_")[1]) + 1 if found else 0
    if not _is_first_process():  # the first one claims, and tells the folder when they have met
        return RunFolder(runs / f"version_{max(number - 1, 0)}")
    above = make_folders(runs)
    while True:
        path = runs / f"version_{number}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            continue
        except OSError as error:
            remove_empty(above)
            raise writing_mistake(error, "make the folder", path, "give another --run") from None
        os.environ[INHERITED] = str(path)
        return RunFolder(path, [path, *above])


class Found(NamedTuple):
    """A run to go on with.

    Attributes:
        folder: Its folder.
        checkpoint: Its last checkpoint; None where it was stopped before its first.
    """

    folder: Path
    checkpoint: Path | None


class Choice(NamedTuple):
    """Where a command works.

    Attributes:
        folder: The run's.
        checkpoint: What `last` stands for; None where nothing, or a file, was asked for.
        again: Whether the run was stopped before its first checkpoint and starts again.
    """

    folder: RunFolder
    checkpoint: Path | None = None
    again: bool = False


def choose(runs: Path, config: Config, wanted: str | None, subcommand: str | None) -> Choice:
    """The folder for a command, claimed if it is a new one.

    Args:
        runs: Folder of the versions.
        config: The whole one.
        wanted: The checkpoint that was asked for: `last`, a file, or none.
        subcommand: Of Lightning's command line; None trains.

    Raises:
        UserError: There is no such run, it is another one, or no checkpoint was given to test.
    """
    fit = subcommand in (None, "fit")
    if wanted == "last":
        folder, last = find_run(runs, config, fit=fit)
        mine = fit or is_same_run(folder, config)
        return Choice(RunFolder(folder) if mine else claim(runs), last, last is None)
    if not (wanted or fit):
        raise UserError(
            f"no checkpoint to {subcommand}: give --ckpt_path FILE, or --ckpt_path last for the "
            f"newest run of {runs}"
        )
    own = folder_of(Path(wanted)) if wanted else None
    if own is None:
        return Choice(claim(runs))
    if fit:
        check_same_run(own, config)
    elif not is_same_run(own, config):
        return Choice(claim(runs))
    return Choice(RunFolder(own))


def find_run(runs: Path, config: Config, *, fit: bool) -> Found:
    """The newest run of a name that is the one of a config.

    Args:
        runs: Folder of the versions.
        config: The whole one.
        fit: Whether training goes on: a run that was stopped before its first checkpoint starts
            again in its folder. Otherwise the images may be others than those of the training.

    Raises:
        UserError: There is none; the message says which there are.
    """
    others: list[str] = []
    moved: Found | None = None
    for folder in reversed(versions(runs)):
        checkpoint = folder / LAST if (folder / LAST).is_file() else None
        stored = _stored(folder)
        if stored is None:
            if checkpoint:
                raise UserError(_without_config(folder))
            continue
        unfinished = fit and not any(folder.glob("*.safetensors"))
        differing = differences(stored, config, FREE if fit else FREE | TRAINER)
        if not differing and (checkpoint or unfinished):
            return Found(folder, checkpoint)
        if checkpoint:
            others.append(f"{folder.name} {describe(differing)}")
            if all(name in PLACES or not (fit or name.startswith("data.")) for name in differing):
                moved = moved or Found(folder, checkpoint)
    if moved is not None:
        return moved
    if not others:
        raise UserError(
            f"no checkpoint to go on from under {runs}; start without --ckpt_path, or name the run "
            "with --run"
        )
    listed = "; ".join(others[:3]) + (f"; and {len(others) - 3} more" if len(others) > 3 else "")
    raise UserError(
        f"no run under {runs} is this one: {listed}. Start without --ckpt_path, or go on in one of "
        f"them with its own config: -c {runs}/{others[0].split()[0]}/{CONFIG}"
    )


def same_config(runs: Path, config: Config) -> Path | None:
    """The newest of a run's folders whose whole config is this one.

    Raises:
        UserError: A newer one has a checkpoint, but no config that says whose.
    """
    for folder in reversed(versions(runs)):
        stored = _stored(folder)
        if stored == config:
            return folder
        if stored is None and (folder / LAST).is_file():
            raise UserError(_without_config(folder))
    return None


def folder_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint lies in, if it lies in one."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / CONFIG).is_file() or folder / LAST == checkpoint:
            return folder
    return None


def check_same_run(folder: Path, config: Config) -> None:
    """Checks that training with a config may go on in a folder.

    Raises:
        UserError: The folder's run is another one.
    """
    stored = _stored(folder)
    differing = {} if stored is None else differences(stored, config, FREE | PLACES)
    if differing:
        raise UserError(
            f"{folder} {describe(differing)}, so it is another run; go on with its own config, -c "
            f"{folder / CONFIG}, or start without --ckpt_path"
        )


def is_same_run(folder: Path, config: Config) -> bool:
    """Whether what a config's test measures belongs into a folder."""
    stored = _stored(folder)
    # they change no result of a test, or are chosen for it
    free = FREE | TRAINER | {"data.batch_size", "model.teacher.weights"}
    return stored is None or not differences(stored, config, free)


def _stored(folder: Path) -> Config | None:
    """A folder's config; None where there is none, or one that can't be read."""
    try:
        found = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def _without_config(folder: Path) -> str:
    return (
        f"{folder} has a checkpoint, but its {CONFIG} is missing, empty or damaged, so whose it is "
        f"can't be known; put the config back, move the folder away, or give --ckpt_path "
        f"{folder / LAST} to go on in it"
    )


def _is_first_process() -> bool:
    """Whether this is the process of rank 0, as far as its launcher says."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ranks its nodes as they come
        return os.environ.get("RANK", "0") == "0"
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)
