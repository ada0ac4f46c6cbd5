"""The teacher cache against the live teacher; damage, full disks, kills, other processes."""

import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from camdistill.data.datasets import ImageSet
from camdistill.distill import teacher_cache as cache_module
from camdistill.distill.teacher_cache import TeacherCache
from camdistill.distill.teacher_maps_plan import Quantity
from camdistill.errors import UserError
from camdistill.networks.teachers import NetworkSpec, Teacher
from camdistill.store.array_files import lock_cache, pack, unpack

LAYERS = ("body.0", "body.3")
EVERYTHING: tuple[Quantity, ...] = ("grad_cam", "attention", "class_maps")


class Tiny(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, 6, 3, padding=1),
                nn.BatchNorm2d(6),
                nn.ReLU(inplace=True),
                nn.Conv2d(6, 8, 3, stride=2, padding=1),
            )
            self.head = nn.Linear(8, 5)
            self.body[1].running_mean.normal_()
            self.body[1].running_var.uniform_(0.5, 2)
            with torch.no_grad():  # centered, so that every class is some image's top one
                noise = (torch.rand(200, 3, 8, 6) - 0.45) / 0.226
                self.head.bias -= self.eval()(noise).mean(0)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).relu().mean((2, 3)))


def teacher_of(seed: int = 0) -> Teacher:
    return Teacher.from_network(Tiny(seed))


def images_of(count: int = 90, seed: int = 0) -> ImageSet:
    generator = np.random.default_rng(seed)
    return ImageSet(
        pixels=generator.integers(0, 256, (count, 3, 8, 6), dtype=np.uint8),
        labels=np.full(count, -1, dtype=np.int64),
        ids=(generator.permutation(count) * 7 + 1000).astype(np.int64),
        names=[f"n{index}" for index in range(count)],
        classes=(),
        fingerprint="0" * 64,
    )


def made(
    root: Path,
    teacher: Teacher | None = None,
    images: ImageSet | None = None,
    layers: Sequence[str] = LAYERS,
    **options: object,
) -> TeacherCache:
    return TeacherCache.open_or_build(
        teacher_of() if teacher is None else teacher,
        images_of() if images is None else images,
        layers,
        root=root,
        **{"batch_size": 16, **options},  # type: ignore[arg-type]
    )


def live(teacher: Teacher, images: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logits, all classes' Grad-CAMs and outputs by layer, with autograd and nothing of ours."""
    network: Tiny = teacher.network  # type: ignore[assignment]
    values, outputs = (images.double() / 255 - teacher.mean) / teacher.std, {}
    network = Tiny().double()
    network.load_state_dict(teacher.network.state_dict())
    network.eval()
    for name, module in network.body.named_children():
        values = module(values.clone())
        if f"body.{name}" in LAYERS:
            outputs[f"body.{name}"] = values
    logits = network.head(values.relu().mean((2, 3)))
    maps = {}
    for layer, output in outputs.items():
        found = []
        for label in range(5):
            (gradient,) = torch.autograd.grad(logits[:, label].sum(), output, retain_graph=True)
            found.append((gradient.mean((2, 3), keepdim=True) * output).sum(1).detach())
        maps[layer] = torch.stack(found, 1)
    return logits.detach(), maps, {layer: output.detach() for layer, output in outputs.items()}


def close(stored: Tensor, exact: Tensor) -> None:
    """Within the stated 2^-12 of each map's largest value, and float32's own rounding."""
    largest = exact.abs().amax((-2, -1), keepdim=True)
    assert stored.dtype == torch.float32
    assert ((stored - exact).abs() <= (2**-12 + 1e-5) * largest).all()


# What is looked up


@pytest.mark.parametrize("flips", [True, False])
def test_lookup_is_the_live_teacher_on_the_image_in_that_orientation(
    tmp_path: Path, flips: bool
) -> None:
    teacher, images = teacher_of(), images_of()
    cache = made(tmp_path, teacher, images, quantities=EVERYTHING, flips=flips)
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(0, len(images), (50,), generator=generator)
    flip = (torch.rand(50, generator=generator) < 0.5) & flips
    pixels = torch.from_numpy(images.pixels[positions.numpy()])
    for row in range(50):
        if flip[row]:
            pixels[row] = pixels[row].flip(-1)
    logits, maps, outputs = live(teacher, pixels)
    ids = torch.from_numpy(images.ids)[positions]
    own, top_maps = cache.lookup(ids, flip)
    torch.testing.assert_close(own.double(), logits, rtol=1e-5, atol=1e-5)
    assert set(top_maps) == set(LAYERS)
    for layer in LAYERS:
        close(top_maps[layer], maps[layer][torch.arange(50), logits.argmax(1)])
        close(cache.lookup(ids, flip, "class_maps")[1][layer], maps[layer])
        close(cache.lookup(ids, flip, "attention")[1][layer], outputs[layer].square().sum(1))


def test_mirrored_image_is_explained_for_its_own_top_class(tmp_path: Path) -> None:
    # A flipped copy of an unflipped map would be wrong wherever the top class changes.
    teacher, images = teacher_of(), images_of(300)
    cache = made(tmp_path, teacher, images, layers=["body.3"])
    ids = torch.from_numpy(images.ids)
    plain, mirrored = (cache.lookup(ids, torch.full((300,), flip)) for flip in (False, True))
    changed = plain[0].argmax(1) != mirrored[0].argmax(1)
    assert changed.any()
    logits, maps, _ = live(teacher, torch.from_numpy(images.pixels[:]).flip(-1))
    expected = maps["body.3"][torch.arange(300), logits.argmax(1)]
    close(mirrored[1]["body.3"][changed], expected[changed])


def test_mean_map_is_of_rectified_maps_of_images_as_stored(tmp_path: Path) -> None:
    teacher, images = teacher_of(), images_of()
    cache = made(tmp_path, teacher, images)
    logits, maps, _ = live(teacher, torch.from_numpy(images.pixels[:]))
    for layer in LAYERS:
        top = maps[layer][torch.arange(len(images)), logits.argmax(1)]
        mean = top.clamp_min(0).mean(0)
        torch.testing.assert_close(
            cache.mean_map_by_layer[layer].double(), mean, rtol=1e-3, atol=2**-12 * float(top.max())
        )


def test_without_layers_there_are_logits(tmp_path: Path) -> None:
    images = images_of()
    logits, maps = made(tmp_path, layers=[]).lookup(
        torch.from_numpy(images.ids), torch.zeros(len(images), dtype=torch.bool)
    )
    assert logits.shape == (90, 5)
    assert maps == {}


def test_what_is_not_stored_is_refused(tmp_path: Path) -> None:
    cache = made(tmp_path, flips=False)
    known, no = torch.from_numpy(images_of().ids[:2]), torch.zeros(2, dtype=torch.bool)
    for ids in (torch.tensor([int(known[0]), 3]), torch.tensor([int(known[0]), 10**6])):
        with pytest.raises(ValueError, match=str(int(ids[1]))):
            cache.lookup(ids, no)
    with pytest.raises(ValueError, match="mirrored: True"):
        cache.lookup(known, ~no)
    with pytest.raises(ValueError, match="'attention' is not stored"):
        cache.lookup(known, no, "attention")
    with pytest.raises(ValueError, match=r"'body\.9'.* not stored"):
        cache.lookup(known, no, layers=["body.0", "body.9"])


def test_lookup_of_some_layers_reads_these_alone(tmp_path: Path) -> None:
    cache = made(tmp_path)
    ids, flip = torch.from_numpy(images_of().ids), torch.arange(90) % 2 == 0
    logits, every = cache.lookup(ids, flip)
    some_logits, some = cache.lookup(ids, flip, layers=["body.3"])
    assert list(some) == ["body.3"]
    assert torch.equal(some["body.3"], every["body.3"])
    assert torch.equal(some_logits, logits)
    assert cache.lookup(ids, flip, layers=[])[1] == {}


def test_images_with_one_id_are_refused(tmp_path: Path) -> None:
    images = images_of(10)
    with pytest.raises(ValueError, match="same id"):
        made(tmp_path, images=replace(images, ids=np.zeros(10, dtype=np.int64)))
    assert not list(tmp_path.iterdir())


def test_copy_on_a_device_answers_the_same(tmp_path: Path) -> None:
    cache = made(tmp_path)
    ids, flip = torch.from_numpy(images_of().ids), torch.arange(90) % 2 == 0
    there = cache.to("cpu")
    for own, other in zip(cache.lookup(ids, flip), there.lookup(ids, flip), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)
    torch.testing.assert_close(cache.mean_map_by_layer, there.mean_map_by_layer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cache_in_a_gpus_memory_answers_nan_to_an_unknown_id(tmp_path: Path) -> None:
    cache = made(tmp_path).to("cuda")
    ids = torch.tensor([int(images_of().ids[0]), 3], device="cuda")
    logits, maps = cache.lookup(ids, torch.zeros(2, dtype=torch.bool, device="cuda"))
    assert logits.isnan().all(1).tolist() == [False, True]
    assert maps["body.3"].device.type == "cuda"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), power=st.integers(-30, 30), blank=st.booleans())
def test_packing_keeps_a_map_to_2_to_the_minus_12_of_its_largest_value(
    seed: int, power: int, blank: bool
) -> None:
    maps = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    if blank:
        maps[1] = 0
    back = unpack(*pack(maps))
    assert (
        (back - maps).abs() <= 2**-12 * (1 + 1e-3) * maps.abs().amax((1, 2), keepdim=True)
    ).all()
    assert torch.equal(back.amax((1, 2)) > 0, maps.amax((1, 2)) > 0)


# When it is used and when it is made


def test_second_opening_makes_nothing(tmp_path: Path) -> None:
    first, calls = made(tmp_path), []
    times = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    second = made(tmp_path, progress=lambda done, count: calls.append(done))
    assert second.folder == first.folder
    assert calls == []
    assert times == {file: file.stat().st_mtime_ns for file in second.folder.iterdir()}


def test_progress_counts_images_up_to_all(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    made(tmp_path, progress=lambda done, count: seen.append((done, count)))
    assert seen == [(done, 90) for done in (16, 32, 48, 64, 80, 90)]


def test_whatever_decides_the_content_makes_another_cache(tmp_path: Path) -> None:
    images, other = images_of(), teacher_of()
    with torch.no_grad():
        other.network.head.bias[0] += 1e-3  # type: ignore[union-attr]
    folders = [
        made(tmp_path).folder,
        made(tmp_path, other).folder,
        made(tmp_path, Teacher.from_network(Tiny(), mean=(0.5, 0.5, 0.5))).folder,
        made(tmp_path, images=replace(images, fingerprint="1" * 64)).folder,
        made(tmp_path, images=images.subset(np.arange(80))).folder,
        made(tmp_path, images=images.subset(np.arange(90)[::-1])).folder,
        made(tmp_path, layers=LAYERS[:1]).folder,
        made(tmp_path, layers=LAYERS[::-1]).folder,
        made(tmp_path, flips=False).folder,
        made(tmp_path, precision="bfloat16").folder,
        made(tmp_path, quantities=("attention",)).folder,
        made(tmp_path, quantities=("attention",), p=1.0).folder,
    ]
    assert len(set(folders)) == len(folders)


def test_where_the_weights_came_from_does_not(tmp_path: Path) -> None:
    made(tmp_path)
    again = teacher_of()
    again.sha256 = "f" * 64
    calls: list[int] = []
    made(tmp_path, again, progress=lambda done, count: calls.append(done), batch_size=7, p=3.0)
    assert calls == []


def test_subset_is_looked_up_by_the_ids_of_the_whole(tmp_path: Path) -> None:
    images = images_of()
    part = images.subset(np.array([40, 3, 77, 8]))
    whole_cache, part_cache = made(tmp_path, images=images), made(tmp_path, images=part)
    ids, flip = torch.from_numpy(part.ids), torch.tensor([True, False, True, False])
    torch.testing.assert_close(
        whole_cache.lookup(ids, flip), part_cache.lookup(ids, flip), rtol=1e-3, atol=1e-5
    )


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    ids, flip = torch.from_numpy(images_of().ids), torch.zeros(90, dtype=torch.bool)
    half = made(tmp_path, precision="bfloat16").lookup(ids, flip)
    full = made(tmp_path).lookup(ids, flip)
    assert (half[0] - full[0]).norm() < 0.05 * full[0].norm()
    same = half[0].argmax(1) == full[0].argmax(1)
    assert same.sum() > 80
    for layer in LAYERS:
        near, exact = half[1][layer][same], full[1][layer][same]
        assert (near - exact).norm() < 0.1 * exact.norm()
    assert not torch.equal(half[0], full[0])


# Damage


def damage_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES = {"byte": damage_byte, "truncated": truncate, "missing": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_noticed_and_the_cache_made_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    ids, flip = torch.from_numpy(images_of().ids), torch.arange(90) % 2 == 0
    folder = made(tmp_path).folder
    expected = made(tmp_path).to("cpu").lookup(ids, flip)
    names = sorted(file.name for file in folder.iterdir())
    assert "meta.json" in names
    for name in names:
        caplog.clear()
        DAMAGES[damage](folder / name)
        torch.testing.assert_close(made(tmp_path).lookup(ids, flip), expected, rtol=0, atol=0)
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warnings) == 1, (name, warnings)
        assert "making it anew" in warnings[0]
        assert sorted(file.name for file in folder.iterdir()) == names


def test_cache_that_the_live_teacher_contradicts_is_stale_and_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path, images=images_of(seed=1))
    changed = replace(images_of(seed=2), ids=images_of(seed=1).ids)  # same fingerprint and ids
    cache = made(tmp_path, images=changed)
    assert "the live teacher differs on" in caplog.text
    logits, _ = cache.lookup(torch.from_numpy(changed.ids), torch.zeros(90, dtype=torch.bool))
    exact, _, _ = live(teacher_of(), torch.from_numpy(changed.pixels[:]))
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_teacher_that_does_not_repeat_itself_is_refused_and_nothing_left(tmp_path: Path) -> None:
    class Moody(Tiny):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images + torch.randn_like(images))

    with pytest.raises(UserError, match="does not repeat") as caught:
        made(tmp_path, Teacher.from_network(Moody()))
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


# Disks, kills, other processes


def test_full_disk_is_one_line_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = made(tmp_path).folder

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        made(tmp_path, teacher_of(1))
    assert "\n" not in str(caught.value)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [there]
    assert made(tmp_path).folder == there


def test_limit_on_the_size_of_files_is_a_users_mistake_and_no_crash(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            made(tmp_path, images=images_of(2000), layers=["body.0"], batch_size=500)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_root_that_is_a_file_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another folder"):
        made(tmp_path / "file" / "caches")


def test_no_images_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images"):
        made(tmp_path, images=images_of().subset(np.arange(0)))


class Killed(BaseException):
    pass


def test_broken_off_build_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "PAUSE", 0.0)
    whole = made(tmp_path / "whole")

    def break_off(done: int, count: int) -> None:
        if done == 48:
            raise Killed

    with pytest.raises(Killed):
        made(tmp_path / "broken", progress=break_off)
    seen: list[int] = []
    cache = made(tmp_path / "broken", progress=lambda done, count: seen.append(done))
    assert seen == [48, 64, 80, 90]  # 48 was made, but not noted yet
    for file in whole.folder.iterdir():
        assert (cache.folder / file.name).read_bytes() == file.read_bytes()
    assert len([path for path in (tmp_path / "broken").iterdir() if path.is_dir()]) == 1


def test_draft_of_something_else_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "PAUSE", 0.0)

    def break_off(done: int, count: int) -> None:
        if done == 48:
            raise Killed

    with pytest.raises(Killed):
        made(tmp_path, progress=break_off)
    (draft,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    note = draft / "progress.json"
    note.write_text(note.read_text().replace("body.0", "body.1"))
    seen: list[int] = []
    made(tmp_path, progress=lambda done, count: seen.append(done))
    assert seen[0] == 16


def test_second_process_waits_for_the_first(tmp_path: Path) -> None:
    folder, order = tmp_path / "teacher-0", []

    def second() -> None:
        with lock_cache(folder):
            order.append("second")

    with lock_cache(folder):
        other = threading.Thread(target=second)
        other.start()
        time.sleep(0.2)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from camdistill.distill import teacher_cache
from test_teacher_cache import made
teacher_cache.PAUSE = 0.0
def slowly(done, count):
    print(done, flush=True)
    time.sleep(0.05)
made(Path(sys.argv[1]), progress=slowly)
"""


@pytest.mark.slow
def test_killed_process_leaves_a_build_that_the_next_one_ends(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 64:
            process.kill()
            break
    process.wait()
    process.stdout.close()
    seen: list[int] = []
    cache = made(tmp_path / "killed", progress=lambda done, count: seen.append(done))
    assert seen
    assert seen[0] > 16
    whole = made(tmp_path / "whole")
    for file in whole.folder.iterdir():
        assert (cache.folder / file.name).read_bytes() == file.read_bytes()


# A real teacher


@pytest.mark.data
@pytest.mark.slow
def test_cache_of_a_pretrained_resnet_in_bfloat16_keeps_its_maps(tmp_path: Path) -> None:
    data = os.environ.get("CAMDISTILL_DATA")
    file = Path(data or "", "..", "teachers", "resnet20-12fca82f.th")
    if not data or not file.exists():
        pytest.skip("CAMDISTILL_DATA names no folder with teachers beside it")
    from camdistill.data.datasets import load_folder

    images = load_folder(Path(data) / "cifar10", "test").subset(np.arange(0, 10_000, 40))
    teacher = Teacher(NetworkSpec("resnet20", weights=str(file)))
    ids, flip = torch.from_numpy(images.ids), torch.arange(len(images)) % 2 == 0
    exact = made(tmp_path, teacher, images, layers=["layer2", "layer3"]).lookup(ids, flip)
    near = made(tmp_path, teacher, images, layers=["layer2", "layer3"], precision="bfloat16")
    logits, maps = near.lookup(ids, flip)
    same = logits.argmax(1) == exact[0].argmax(1)
    assert same.float().mean() >= 0.98
    for layer in maps:
        cosine = nn.functional.cosine_similarity(
            maps[layer][same].flatten(1), exact[1][layer][same].flatten(1)
        )
        assert cosine.mean() > 0.995
