import contextlib
import fcntl
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from camdistill.errors import UserError
from camdistill.store.atomic_files import (
    expand_home,
    folder_name,
    lock_folder,
    printable,
    read_arrays,
    take_lock,
    write_atomically,
)


def test_folder_that_is_a_file_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file stands where a folder is meant"):
        write_atomically(tmp_path / "file" / "results.json", b"")


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_atomically(tmp_path / "ours", b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_interrupted_writing_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept"
    write_atomically(path, b"old")

    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def arrays(path: Path, **shapes: tuple[int, ...]) -> Path:
    np.savez_compressed(path, **{name: np.zeros(shape) for name, shape in shapes.items()})
    return path


def test_arrays_come_back(tmp_path: Path) -> None:
    found = read_arrays(arrays(tmp_path / "x.npz", maps=(2, 3), ids=(2,)))
    assert {name: one.shape for name, one in found.items()} == {"maps": (2, 3), "ids": (2,)}


def test_arrays_that_have_no_room_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = arrays(tmp_path / "x.npz", maps=(1000, 1000))
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if "SIZE" in name else 1000)
    monkeypatch.setattr(np, "load", lambda *args, **options: pytest.fail("read"))
    with pytest.raises(UserError, match=r"take 0\.0 GB, and this machine has"):
        read_arrays(path)


def test_arrays_are_read_where_the_system_tells_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = arrays(tmp_path / "x.npz", maps=(2, 3))
    monkeypatch.delattr(os, "sysconf")
    assert read_arrays(path)["maps"].shape == (2, 3)


@pytest.mark.parametrize("part", range(0, 100, 7))
def test_damaged_arrays_are_no_surprise(tmp_path: Path, part: int) -> None:
    path = arrays(tmp_path / "x.npz", maps=(64, 64))
    content = bytearray(path.read_bytes())
    place = len(content) * part // 100
    content[place] ^= 0xFF
    path.write_bytes(content)
    with contextlib.suppress(OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        read_arrays(path)


@pytest.mark.parametrize("name", ["a", "straße", "日本"])
def test_names_of_letters_stay(name: str) -> None:
    assert printable(name) == name
    assert folder_name(name) == name


def test_bytes_that_are_no_letters_are_written_out() -> None:
    assert printable(os.fsdecode(b"caf\xe9/\xff")) == r"caf\xe9/\xff"


def test_long_names_are_cut_and_stay_apart() -> None:
    one, other = (folder_name("x" * 300 + end) for end in "ab")
    assert one != other
    assert max(len(one.encode()), len(folder_name("日" * 300).encode())) <= 255


def test_a_file_that_begins_with_a_tilde_is_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somewhere")
    Path("~backup.png").touch()
    assert expand_home("~backup.png") == Path("~backup.png")
    assert expand_home("~/x") == Path("/somewhere/x")
    with pytest.raises(UserError, match="no user 'nouser'"):
        expand_home("~nouser/x")


def test_a_name_as_long_as_can_be_is_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("x" * 255), b"content")
    assert (tmp_path / ("x" * 255)).read_bytes() == b"content"


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_lock_of_a_folder_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_anew: bool
) -> None:
    folder, flock = tmp_path / "out", fcntl.flock
    folder.mkdir()

    def removed_before(lock: int, operation: int) -> None:
        """The process that had the lock removes its folder and ends."""
        folder.rmdir()
        if made_anew:
            (tmp_path / "takes the old number").mkdir()
            folder.mkdir()
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with pytest.raises(UserError, match="another process works in"):
        take_lock(folder, "wait")


def test_a_folder_is_never_removed_after_its_lock_was_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"

    def taken(lock: int | None) -> None:
        """As soon as the lock is free, another process makes the folder and works in it."""
        folder.mkdir()

    monkeypatch.setattr("camdistill.store.atomic_files.release_lock", taken)
    with lock_folder(folder):
        pass
    assert folder.is_dir()
