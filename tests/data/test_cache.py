"""The cache of decoded images: right, whole or rebuilt, and nothing left of a failed write."""

import errno
import logging
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from camdistill.data import cache
from camdistill.data.cache import load_or_decode
from camdistill.data.folders import ImageFiles, scan
from camdistill.errors import CURES, UserError

COUNT = 150


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, pixels in enumerate(truth()):
        path = tmp_path / "images" / f"c{index % 3}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def truth() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 20, 20, 3), dtype=np.uint8)


def in_order(files: ImageFiles) -> NDArray[np.uint8]:
    order = [int(Path(name).stem) for name in files.names]
    return truth()[order].transpose(0, 3, 1, 2)


def test_cache_holds_the_decoded_images_in_the_order_of_the_files(
    folder: Path, tmp_path: Path
) -> None:
    files = scan(folder)
    found = load_or_decode(files, cache_dir=tmp_path / "cache")
    assert np.array_equal(found.pixels, in_order(files))
    assert found.sizes.tolist() == [[20, 20]] * COUNT
    assert found.positions.tolist() == list(range(COUNT))
    assert not found.pixels.flags.writeable


def test_second_opening_decodes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_or_decode(scan(folder), cache_dir=tmp_path)
    monkeypatch.setattr(cache.decode, "decode", None)
    second = load_or_decode(scan(folder), cache_dir=tmp_path, check="full")
    assert second.path == first.path
    assert second.digest == first.digest
    assert np.array_equal(first.pixels, second.pixels)


@pytest.mark.parametrize("change", ["pixels", "touched", "added", "removed", "renamed"])
def test_a_stale_cache_is_rebuilt(folder: Path, tmp_path: Path, change: str) -> None:
    before = load_or_decode(scan(folder), cache_dir=tmp_path)
    victim = folder / "c1" / "001.png"
    if change == "pixels":
        Image.fromarray(truth()[0]).save(victim)
        os.utime(victim, ns=(1, 1))
    elif change == "touched":
        os.utime(victim, ns=(5, 5))
    elif change == "added":
        Image.fromarray(truth()[0]).save(folder / "c1" / "new.png")
    elif change == "removed":
        victim.unlink()
    else:
        victim.rename(folder / "c1" / "zzz.png")
    after = load_or_decode(scan(folder), cache_dir=tmp_path)
    assert after.path == before.path
    # the digest is of the content: touching a file rebuilds the cache but is no other content
    assert (after.digest == before.digest) == (change == "touched")
    assert len(after.pixels) == COUNT + {"added": 1, "removed": -1}.get(change, 0)
    assert len(list(tmp_path.glob("*.pixels"))) == 1


def test_other_sizes_have_caches_of_their_own(folder: Path, tmp_path: Path) -> None:
    whole, half = (load_or_decode(scan(folder), size, tmp_path) for size in (None, 10))
    assert whole.path != half.path
    assert half.pixels.shape == (COUNT, 3, 10, 10)


@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 0.97, 0.99, 0.9999])
@pytest.mark.parametrize("how", ["cut", "changed", "lengthened", "emptied"])
def test_a_damaged_cache_is_rebuilt(
    folder: Path, tmp_path: Path, how: str, where: float, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_or_decode(scan(folder), cache_dir=tmp_path)
    content = bytearray(first.path.read_bytes())
    place = int(where * len(content))
    if how == "cut":
        content = content[:place]
    elif how == "changed":
        content[place] ^= 1
    elif how == "lengthened":
        content[place:place] = b"\0" * 100
    else:
        content = bytearray()
    del first
    path = next(tmp_path.glob("*.pixels"))
    path.unlink()
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        files = scan(folder)
        again = load_or_decode(files, cache_dir=tmp_path)
    assert np.array_equal(again.pixels, in_order(files))
    assert "damaged" in caplog.text


def test_a_byte_between_the_samples_is_found_by_the_full_check(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SAMPLE_BYTES", 64)
    first = load_or_decode(scan(folder), cache_dir=tmp_path)
    content = bytearray(first.path.read_bytes())
    content[200] ^= 1
    first.path.write_bytes(content)
    assert np.array_equal(
        load_or_decode(scan(folder), cache_dir=tmp_path).pixels.reshape(-1)[200:201],
        content[200:201],
    )
    again = load_or_decode(scan(folder), cache_dir=tmp_path, check="full")
    assert np.array_equal(again.pixels, in_order(scan(folder)))


def test_a_broken_file_is_named_and_leaves_the_old_cache(folder: Path, tmp_path: Path) -> None:
    old = load_or_decode(scan(folder), cache_dir=tmp_path / "cache")
    content = old.path.read_bytes()
    (folder / "c2" / "005.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"c2/005\.png.*on_broken: skip"):
        load_or_decode(scan(folder), cache_dir=tmp_path / "cache")
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [content]


def test_skip_goes_on_and_says_how_many(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("c2/005.png", "c0/000.png"):
        (folder / name).write_bytes(b"broken")
    files = scan(folder)
    for _ in range(2):  # built, then opened
        caplog.clear()
        found = load_or_decode(files, cache_dir=tmp_path, on_broken="skip")
        assert "2 of 150 files" in caplog.text
        assert [files.names[i] for i in set(range(COUNT)) - set(found.positions.tolist())] == [
            "c0/000.png",
            "c2/005.png",
        ]
        assert np.array_equal(found.pixels, in_order(files)[found.positions])


def test_only_broken_files_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="all 1 files"):
        load_or_decode(scan(tmp_path), cache_dir=tmp_path / "cache", on_broken="skip")
    assert not list((tmp_path / "cache").iterdir())


def test_files_of_other_sizes_need_a_size(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (30, 25)).save(folder / "c2" / "zz.png")
    with pytest.raises(UserError, match=r"zz\.png' has 30x25 .* 20x20; set size"):
        load_or_decode(scan(folder), cache_dir=tmp_path / "cache")
    assert load_or_decode(scan(folder), 20, tmp_path / "cache").pixels.shape == (
        COUNT + 1,
        3,
        20,
        20,
    )


def test_a_full_disk_is_told_and_leaves_no_half_file(folder: Path, tmp_path: Path) -> None:
    """A real failed write: the process may write files of at most 50 kB, the cache needs 180."""
    script = f"""
        import resource, sys
        from pathlib import Path
        from camdistill.data.cache import load_or_decode
        from camdistill.data.folders import scan
        from camdistill.errors import UserError
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            load_or_decode(scan(Path({str(folder)!r})), cache_dir=Path({str(tmp_path / "cache")!r}))
        except UserError as error:
            sys.exit(str(error))
    """
    assert resource.RLIM_INFINITY  # the limit exists on this platform
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert CURES[errno.EFBIG] in done.stderr
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_written_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="CAMDISTILL_CACHE"):
        load_or_decode(scan(folder), cache_dir=tmp_path / "file" / "below")


def test_leftovers_of_killed_runs_are_removed_when_old(folder: Path, tmp_path: Path) -> None:
    path = load_or_decode(scan(folder), cache_dir=tmp_path / "cache").path
    old, young = (path.with_name(f"{path.name}.{name}.part") for name in ("old", "young"))
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    young.write_bytes(b"half")
    path.unlink()
    load_or_decode(scan(folder), cache_dir=tmp_path / "cache")
    assert not old.exists()
    assert young.exists()


def test_cache_lies_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAMDISTILL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "camdistill"
    monkeypatch.setenv("CAMDISTILL_CACHE", str(tmp_path / "named"))
    assert cache.cache_folder() == tmp_path / "named"
    assert cache.cache_folder(tmp_path / "given") == tmp_path / "given"


def test_large_images_are_decoded_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the bytes of a chunk allow, also where the first file is broken."""
    for number in range(6):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "0.png").write_bytes(b"no image")
    taken: list[int] = []
    submit = cache.concurrent.futures.ThreadPoolExecutor.submit

    def counted(pool: object, work: object, start: int) -> object:
        taken.append(start)
        return submit(pool, work, start)  # type: ignore[arg-type]

    monkeypatch.setattr(cache.concurrent.futures.ThreadPoolExecutor, "submit", counted)
    monkeypatch.setattr(cache, "CHUNK_BYTES", 2 * 3 * 20 * 20)
    whole = load_or_decode(scan(tmp_path / "images"), 20, tmp_path / "cache", "skip")
    assert taken == [0, 2, 4]
    assert whole.pixels[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    whole = load_or_decode(scan(tmp_path / "images"), None, tmp_path / "cache", "skip")
    assert whole.pixels[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
