"""Run folders: claimed when they are chosen, and found again by the identity of a run.

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
    FREE_OPTIONS,
    PATH_OPTIONS,
    TRAINER_OPTIONS,
    Config,
    config_differences,
    describe_differences,
)
from camdistill.store.atomic_files import make_folders, release_lock, remove_empty, take_lock

CONFIG = "config.yaml"
FOLDER_VARIABLE = "CAMDISTILL_RUN_FOLDER"
# What launchers tell a process about its place; some tell only its node's, or that on its node.
_RANKS = (
    "RANK",
    "LOCAL_RANK",
    "SLURM_PROCID",
    "JSM_NAMESPACE_RANK",
    "NODE_RANK",
    "GROUP_RANK",
)
_BUSY_CURE = "wait for it, or start a run of its own: without --ckpt_path, or with another --run"


class RunFolder:
    """A run's folder, which one process trains in at a time.

    Attributes:
        path: Where.
    """

    def __init__(self, path: Path, created: list[Path] | None = None) -> None:
        self.path = path
        self._created = created or []
        self._lock: int | None = None

    def lock(self) -> None:
        """Keeps other processes from training here.

        Raises:
            UserError: One does.
        """
        if self._lock is None and self.path.is_dir() and _is_first_process():
            self._lock = take_lock(self.path, _BUSY_CURE)

    def keep(self) -> None:
        """From now on the folder stays, however the run ends."""
        self._created = []

    def release(self) -> None:
        """Unlocks the folder; one that was claimed and never needed is removed."""
        if self._created:
            with contextlib.suppress(OSError):
                shutil.rmtree(self.path)
            remove_empty(self._created[1:])
            self._created = []
        release_lock(self._lock)
        self._lock = None


def list_versions(runs: Path) -> list[Path]:
    """A run's version folders, oldest first."""
    folders = [path for path in runs.glob("version_*") if path.name.split("_")[1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("_")[1]))


def claim_folder(runs: Path) -> RunFolder:
    """Makes the next free folder, so that no other run takes it.

    Processes that Lightning starts for the same run get the same one.
    """
    inherited = os.environ.get(FOLDER_VARIABLE)
    if inherited and "LOCAL_RANK" in os.environ and Path(inherited).parent == runs:
        return RunFolder(Path(inherited))
    folders = list_versions(runs)
    number = int(folders[-1].name.split("_")[1]) + 1 if folders else 0
    if not _is_first_process():  # the first one claims, and tells the folder when they have met
        return RunFolder(runs / f"version_{max(number - 1, 0)}")
    parents = make_folders(runs)
    while True:
        path = runs / f"version_{number}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            continue
        except OSError as error:
            remove_empty(parents)
            raise writing_mistake(error, "make the folder", path, "give another --run") from None
        os.environ[FOLDER_VARIABLE] = str(path)
        return RunFolder(path, [path, *parents])


class ResumableRun(NamedTuple):
    """A run to go on with.

    Attributes:
        folder: Its folder.
        checkpoint: Its last checkpoint; None where it was stopped before its first.
    """

    folder: Path
    checkpoint: Path | None


class FolderChoice(NamedTuple):
    """Where a command works.

    Attributes:
        folder: The run's.
        checkpoint: What `last` stands for; None where nothing, or a file, was asked for.
        restarts: Whether the run was stopped before its first checkpoint and starts again.
    """

    folder: RunFolder
    checkpoint: Path | None = None
    restarts: bool = False


def choose_folder(
    runs: Path, config: Config, requested: str | None, subcommand: str | None
) -> FolderChoice:
    """The folder for a command, claimed if it is a new one.

    Args:
        runs: Folder of the versions.
        config: The whole one.
        requested: The checkpoint that was asked for: `last`, a file, or none.
        subcommand: Subcommand of Lightning's command line; None trains.

    Raises:
        UserError: There is no such run, it is another one, or no checkpoint was given to test.
    """
    fit = subcommand in (None, "fit")
    if requested == "last":
        folder, checkpoint = find_run(runs, config, fit=fit)
        is_same = fit or is_same_run(folder, config)
        return FolderChoice(
            RunFolder(folder) if is_same else claim_folder(runs), checkpoint, checkpoint is None
        )
    if not (requested or fit):
        raise UserError(
            f"no checkpoint to {subcommand}: give --ckpt_path FILE, or --ckpt_path last for the "
            f"newest run of {runs}"
        )
    checkpoint_folder = find_run_folder(Path(requested)) if requested else None
    if checkpoint_folder is None:
        return FolderChoice(claim_folder(runs))
    if fit:
        check_same_run(checkpoint_folder, config)
    elif not is_same_run(checkpoint_folder, config):
        return FolderChoice(claim_folder(runs))
    return FolderChoice(RunFolder(checkpoint_folder))


def find_run(runs: Path, config: Config, *, fit: bool) -> ResumableRun:
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
    moved_run: ResumableRun | None = None
    for folder in reversed(list_versions(runs)):
        checkpoint = folder / LAST if (folder / LAST).is_file() else None
        stored = _read_stored_config(folder)
        if stored is None:
            if checkpoint:
                raise UserError(_missing_config_message(folder))
            continue
        unfinished = fit and not any(folder.glob("*.safetensors"))
        differing = config_differences(
            stored, config, FREE_OPTIONS if fit else FREE_OPTIONS | TRAINER_OPTIONS
        )
        if not differing and (checkpoint or unfinished):
            return ResumableRun(folder, checkpoint)
        if checkpoint:
            others.append(f"{folder.name} {describe_differences(differing)}")
            if all(
                name in PATH_OPTIONS or not (fit or name.startswith("data.")) for name in differing
            ):
                moved_run = moved_run or ResumableRun(folder, checkpoint)
    if moved_run is not None:
        return moved_run
    if not others:
        raise UserError(
            f"no checkpoint to go on from under {runs}; start without --ckpt_path, or name the run "
            "with --run"
        )
    notes = "; ".join(others[:3]) + (f"; and {len(others) - 3} more" if len(others) > 3 else "")
    raise UserError(
        f"no run under {runs} is this one: {notes}. Start without --ckpt_path, or go on in one of "
        f"them with its own config: -c {runs}/{others[0].split()[0]}/{CONFIG}"
    )


def find_same_config(runs: Path, config: Config) -> Path | None:
    """The newest of a run's folders whose whole config is this one.

    Raises:
        UserError: A newer one has a checkpoint, but no config that says whose.
    """
    for folder in reversed(list_versions(runs)):
        stored = _read_stored_config(folder)
        if stored == config:
            return folder
        if stored is None and (folder / LAST).is_file():
            raise UserError(_missing_config_message(folder))
    return None


def find_run_folder(checkpoint: Path) -> Path | None:
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
    stored = _read_stored_config(folder)
    differing = (
        {} if stored is None else config_differences(stored, config, FREE_OPTIONS | PATH_OPTIONS)
    )
    if differing:
        raise UserError(
            f"{folder} {describe_differences(differing)}, so it is another run; go on with its "
            "own config, -c "
            f"{folder / CONFIG}, or start without --ckpt_path"
        )


def is_same_run(folder: Path, config: Config) -> bool:
    """Whether what a config's test measures belongs into a folder."""
    stored = _read_stored_config(folder)
    # they change no result of a test, or are chosen for it
    free = FREE_OPTIONS | TRAINER_OPTIONS | {"data.batch_size", "model.teacher.weights"}
    return stored is None or not config_differences(stored, config, free)


def _read_stored_config(folder: Path) -> Config | None:
    """A folder's config; None where there is none, or one that can't be read."""
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) else None


def _missing_config_message(folder: Path) -> str:
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
