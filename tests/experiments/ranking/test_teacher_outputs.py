"""The teacher is asked once, and what is read back is what it said."""

from pathlib import Path

import numpy as np
import pytest
import torch

from camdistill.data.datasets import shapes_set
from camdistill.data.modules import ShapesData
from camdistill.data.shapes import Shapes
from camdistill.experiments.ranking import teacher_outputs
from camdistill.experiments.ranking.map_sources import MapRequest, MapSource, parse_source
from camdistill.experiments.ranking.teacher_outputs import CachedPart, Sets
from camdistill.explain.gradcam import grad_cam
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Teacher

DATA = ShapesData(train=40, val=9, test=11, classes=6)


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher.from_network(ShallowCNN(6, (4, 6), (2, 2)))


@pytest.fixture
def sets() -> Sets:
    pool, val, test = (
        shapes_set(Shapes(split, count, classes=6))
        for split, count in (("train", 40), ("val", 9), ("test", 11))  # type: ignore[arg-type]
    )
    return Sets(pool.subset(np.arange(40)[::-1]), val, test)


def test_answers_are_the_live_teachers(teacher: Teacher, sets: Sets, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    known = teacher_outputs.cache_answers(
        tmp_path, teacher, sets, on_progress=lambda *w: told.append(w)
    )
    pool = teacher_outputs.pool_of(known)
    assert pool.ids.tolist() == list(range(39, -1, -1))
    assert np.array_equal(pool.pixels, np.asarray(sets.pool.pixels))
    images = pool.pixels.float() / 255
    torch.testing.assert_close(pool.logits[:, 0], teacher(images))
    torch.testing.assert_close(pool.logits[:, 1], teacher(images.flip(-1)))
    pixels, logits = teacher_outputs.load_held_out(known, "test")
    assert np.array_equal(pixels, sets.test.pixels)
    torch.testing.assert_close(logits, teacher(pixels.float() / 255))
    assert told[-1] == ("teacher's answers", 60, 60)
    assert len(teacher_outputs.pool_of(known, 7).pixels) == 7


def test_maps_are_of_the_teachers_class_in_both_orientations(
    teacher: Teacher, sets: Sets, tmp_path: Path
) -> None:
    known = teacher_outputs.cache_answers(tmp_path, teacher, sets)
    stored = teacher_outputs.cache_maps(
        tmp_path, teacher, known, parse_source("grad_cam@stage1", DATA)
    )
    targets = teacher_outputs.targets(stored, 12, (8, 8))
    pixels = teacher_outputs.pool_of(known, 12).pixels.float() / 255
    for view in range(2):
        images = pixels.flip(-1) if view else pixels
        maps = grad_cam(teacher, images, ["stage1"])["stage1"].relu()
        wanted = maps.view(12, 8, 2, 8, 2).mean((2, 4))
        torch.testing.assert_close(targets[:, view], wanted, rtol=2e-3, atol=1e-4)


def test_nothing_is_asked_twice_and_what_changed_is_asked_anew(
    teacher: Teacher, sets: Sets, tmp_path: Path
) -> None:
    known = teacher_outputs.cache_answers(tmp_path, teacher, sets)
    asked = []
    inner = parse_source("grad_cam@stage2", DATA)

    def counted(key: str) -> MapSource:
        def maps(teacher: Teacher, what: object) -> torch.Tensor:
            asked.append(key)
            return inner.maps(teacher, what)  # type: ignore[arg-type]

        return MapSource("counted", {"key": key}, maps, True)

    def made(key: str = "a", of: Teacher = teacher) -> CachedPart:
        return teacher_outputs.cache_maps(tmp_path, of, known, counted(key))

    first = made()
    assert asked == ["a", "a"]
    assert made() == first
    assert asked == ["a", "a"]
    other = Teacher.from_network(ShallowCNN(6, (4, 6), (2, 2)))
    assert len({made("b").folder, made(of=other).folder, first.folder}) == 3
    assert len(asked) == 6
    # damage: made anew, with the same content
    file = first.folder / "maps.npy"
    file.write_bytes(file.read_bytes()[:-4] + b"xxxx")
    teacher_outputs.open_part.cache_clear()
    assert made() == first
    assert len(asked) == 8


def test_a_build_that_was_killed_goes_on(
    teacher: Teacher, sets: Sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_outputs, "CHUNK", 8)
    monkeypatch.setattr(teacher_outputs, "PAUSE", 0.0)
    whole = teacher_outputs.cache_answers(tmp_path / "whole", teacher, sets)
    inner, asked = parse_source("grad_cam@stage2", DATA), []

    def until(count: int) -> MapSource:
        def maps(teacher: Teacher, what: MapRequest) -> torch.Tensor:
            if len(asked) == count:
                raise KeyboardInterrupt
            asked.append(what.ids.tolist())
            return inner.maps(teacher, what)

        return MapSource("x", {}, maps, True)

    wanted = teacher_outputs.cache_maps(tmp_path / "whole", teacher, whole, until(-1))
    asked.clear()
    logits, calls = teacher_outputs._logits, [0]

    def killed(*what: object) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 12:  # five chunks of the pool are two calls each: in the middle of val
            raise KeyboardInterrupt
        return logits(*what)  # type: ignore[arg-type]

    monkeypatch.setattr(teacher_outputs, "_logits", killed)
    with pytest.raises(KeyboardInterrupt):
        teacher_outputs.cache_answers(tmp_path, teacher, sets)
    known = teacher_outputs.cache_answers(tmp_path, teacher, sets)
    assert calls[0] == 10 + 2 + 2 + 1, "only the call that was killed is made again"
    assert known.sha256 == whole.sha256
    with pytest.raises(KeyboardInterrupt):
        teacher_outputs.cache_maps(tmp_path, teacher, known, until(5))
    found = teacher_outputs.cache_maps(tmp_path, teacher, known, until(-1))
    assert found.sha256 == wanted.sha256
    assert len(asked) == 5 + 6, "two chunks were whole"


def test_pools_that_were_asked_about_are_found(
    teacher: Teacher, sets: Sets, tmp_path: Path
) -> None:
    for count in (24, 40):
        teacher_outputs.cache_answers(tmp_path, teacher, sets.first(count))
    assert teacher_outputs.list_answered_sizes(tmp_path, teacher, sets) == [24, 40]
    assert teacher_outputs.list_answered_sizes(tmp_path, teacher, sets.first(30)) == [24]
    other = Sets(sets.pool.subset(np.arange(40)[::-1]), sets.val, sets.test)
    assert teacher_outputs.list_answered_sizes(tmp_path, teacher, other) == []
    assert (
        teacher_outputs.list_answered_sizes(
            tmp_path, Teacher.from_network(ShallowCNN(6, (4, 6), (2, 2))), sets
        )
        == []
    )
    (damaged,) = (path for path in tmp_path.glob("*/pool-ids.npy") if len(np.load(path)) == 24)
    damaged.write_bytes(damaged.read_bytes()[:20])
    assert teacher_outputs.list_answered_sizes(tmp_path, teacher, sets) == [40]


def test_large_maps_are_brought_to_the_grid_in_parts(
    teacher: Teacher, sets: Sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = teacher_outputs.cache_answers(tmp_path, teacher, sets)
    stored = teacher_outputs.cache_maps(
        tmp_path, teacher, known, parse_source("grad_cam@stage1", DATA)
    )
    whole = teacher_outputs.targets(stored, 12, (4, 4))
    monkeypatch.setattr(teacher_outputs, "AT_ONCE", 5 * 2 * 16 * 16)
    torch.testing.assert_close(teacher_outputs.targets(stored, 12, (4, 4)), whole)


def test_a_build_that_fails_leaves_nothing(teacher: Teacher, sets: Sets, tmp_path: Path) -> None:
    known = teacher_outputs.cache_answers(tmp_path, teacher, sets)
    before = sorted(path.name for path in tmp_path.iterdir())

    def broken(teacher: Teacher, asked: object) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teacher_outputs.cache_maps(tmp_path, teacher, known, MapSource("x", {}, broken, True))
    after = {path.name for path in tmp_path.iterdir() if not path.suffix}
    assert after == {name for name in before if "." not in name}
