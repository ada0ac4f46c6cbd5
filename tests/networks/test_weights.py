"""Reading weights: every usual kind of file, and every usual kind of damage."""

import collections
import contextlib
import hashlib
import json
import os
import pickle
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.networks.fitting import load_weights
from camdistill.networks.students import ShallowCNN
from camdistill.networks.weights import read_weights, save_safetensors

State = dict[str, Tensor]


def student(classes: int = 3, seed: int = 0) -> ShallowCNN:
    torch.manual_seed(seed)
    return ShallowCNN(classes, (4, 6), (1, 2))


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def same(first: State, second: State) -> bool:
    return set(first) == set(second) and all(torch.equal(first[n], second[n]) for n in first)


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


CONTENTS: dict[str, Callable[[State], object]] = {
    "bare": lambda state: state,
    "ordered": collections.OrderedDict,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "best": 0.9},
    "model beside tensors": lambda state: {"step": torch.tensor(3), "model": state},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer": {"state": {}}},
    "net": lambda state: {"net": state, "acc": 91.2},
    "params in state_dict": lambda state: {"state_dict": {"params": state}},
    "parallel": lambda state: prefixed("module.", state),
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "compiled in parallel": lambda state: prefixed("module._orig_mod.", state),
    "parallel in compiled": lambda state: {"net": prefixed("_orig_mod.module.", state)},
    "foreign Lightning": lambda state: {
        "pytorch-lightning_version": "2.6",
        "state_dict": prefixed("model.backbone.", state),
    },
    "our student": lambda state: {
        "pytorch-lightning_version": "2.6",
        "state_dict": prefixed("student.network.", state) | {"other.weight": torch.zeros(1)},
    },
    "our classifier": lambda state: {
        "pytorch-lightning_version": "2.6",
        "state_dict": prefixed("network.network._orig_mod.", state),
    },
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_every_usual_torch_file_gives_the_same_network(kind: str, tmp_path: Path) -> None:
    network, path = student(), tmp_path / "weights.pth"
    torch.save(CONTENTS[kind](network.state_dict()), path)
    other = student(seed=1)
    load_weights(other, read_weights(path))
    assert same(network.state_dict(), other.state_dict())


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch_are_read(zipped: bool, tmp_path: Path) -> None:
    path, state = tmp_path / "w", student().state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert same(read_weights(path).state, dict(state))


def test_layers_compiled_one_by_one_are_named_as_before(tmp_path: Path) -> None:
    state = student().state_dict()
    inner = {n.replace("stage1.", "stage1._orig_mod."): v for n, v in state.items()}
    torch.save(inner, tmp_path / "w.pt")
    assert same(read_weights(tmp_path / "w.pt").state, dict(state))


def test_network_with_a_layer_named_like_a_wrapper_keeps_its_names(tmp_path: Path) -> None:
    network = nn.Sequential(collections.OrderedDict(model=nn.Linear(2, 3)))
    torch.save(network.state_dict(), tmp_path / "w.pt")
    other = nn.Sequential(collections.OrderedDict(model=nn.Linear(2, 3)))
    load_weights(other, read_weights(tmp_path / "w.pt"))
    assert same(dict(network.state_dict()), dict(other.state_dict()))


def test_part_picks_one_network_of_a_checkpoint(tmp_path: Path) -> None:
    one, two = student(seed=1).state_dict(), student(seed=2).state_dict()
    content = {"state_dict": prefixed("student.", one) | prefixed("average.", two)}
    torch.save(content, tmp_path / "last.ckpt")
    assert same(read_weights(tmp_path / "last.ckpt", part="average").state, dict(two))
    assert same(read_weights(tmp_path / "last.ckpt", part="student").state, dict(one))
    with pytest.raises(UserError, match=r"no 'averaged'.*nearest: 'average'"):
        read_weights(tmp_path / "last.ckpt", part="averaged")


def test_saved_weights_come_back_with_metadata_and_sha256(tmp_path: Path) -> None:
    state, path = dict(student().state_dict()), tmp_path / "new" / "folder" / "w.safetensors"
    state["last"] = state["stage1.conv.weight"].to(memory_format=torch.channels_last)
    state["shared"] = state["linear.weight"]
    sha256 = save_safetensors(path, state, {"config": json.dumps({"a": 1})})
    file = read_weights(path)
    assert same(file.state, state)
    assert file.metadata == {"config": '{"a": 1}'}
    assert file.sha256 == sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, framework="np") as peer:
        assert set(peer.keys()) == set(state)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    metadata = {f"key{number}": "x" for number in range(20)}
    sums = {
        save_safetensors(tmp_path / f"{n}.safetensors", student().state_dict(), metadata)
        for n in range(3)
    }
    assert len(sums) == 1


def test_weights_read_survive_the_files_replacement(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_safetensors(path, {"a": torch.ones(1000)})
    file = read_weights(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(file.state["a"], torch.ones(1000))


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_full_disk_leaves_the_old_file_and_no_litter(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    save_safetensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    if failing == "write":
        monkeypatch.setattr("os.fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="No space left") as caught:
        save_safetensors(path, {"a": torch.zeros(2)})
    assert "free some space" in one_line(caught)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saved_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(2)})
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("w.safetensors", "plain")}
    assert len(modes) == 1


class Bomb:
    """Unpickles into a call that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.trace,)  # type: ignore[return-value]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("by_torch", [True, False])
def test_code_in_a_file_does_not_run(protocol: int, by_torch: bool, tmp_path: Path) -> None:
    path, trace = tmp_path / "w.pth", tmp_path / "trace"
    content = {"state_dict": student().state_dict(), "extra": Bomb(trace)}
    if by_torch:
        torch.save(content, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps({"extra": Bomb(trace)}, protocol=protocol))
    with pytest.raises(UserError) as caught:
        read_weights(path)
    message = one_line(caught)
    assert "holds Python objects" in message
    assert "save its weights alone" in message
    assert not trace.exists()


def test_whole_module_in_a_file_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"Python objects \(torch.nn.modules.linear.Linear\)"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2).eval(), torch.ones(1, 2)).save(str(tmp_path / "w.pt"))
    with pytest.raises(UserError, match="TorchScript program") as caught:
        read_weights(tmp_path / "w.pt")
    one_line(caught)


FORMATS = ["zip", "legacy", "safetensors"]


def written(kind: str, path: Path) -> bytes:
    if kind == "safetensors":
        save_safetensors(path, student().state_dict(), {"config": "{}"})
    else:
        torch.save(student().state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    return path.read_bytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_truncation_anywhere_is_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "w"
    whole = written(kind, path)
    for length in [*range(1, 64, 3), *range(64, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            read_weights(path)
        assert "again" in one_line(caught) or "neither" in one_line(caught)


@pytest.mark.parametrize("kind", FORMATS)
def test_damage_anywhere_is_one_line_or_harmless(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "w"
    whole = written(kind, path)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        damaged = bytearray(whole)
        # The names and sizes stand at the beginning; the rest is mostly numbers.
        limit = len(whole) if torch.rand((), generator=generator) < 0.5 else 600
        place = int(torch.randint(limit, (), generator=generator))
        damaged[place] = int(torch.randint(256, (), generator=generator))
        path.write_bytes(damaged)
        # Any other error fails the test.
        with contextlib.suppress(UserError):
            load_weights(student(), read_weights(path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
        (b"\n  <html lang=en>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"hello, I am text", "neither safetensors nor a torch file"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f8'}", "neither safetensors nor a torch file"),
    ],
)
def test_what_is_no_weights_file_is_said(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_weights(tmp_path / "w.pth")
    one_line(caught)


def test_zip_that_is_not_torchs_is_said(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as file:
        file.writestr("a.txt", "hello")
    with pytest.raises(UserError) as caught:
        read_weights(tmp_path / "w.zip")
    one_line(caught)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2, 3], "it holds a list"),
        ({"epoch": 3, "lr": 0.1}, "it holds 'epoch', 'lr'"),
        ({}, "it holds nothing"),
        (torch.ones(3), "it holds a Tensor"),
        ({"state_dict": {"a": 1}}, "it holds 'a'"),
    ],
)
def test_torch_file_without_weights_is_said(content: object, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=said) as caught:
        read_weights(tmp_path / "w.pt")
    one_line(caught)


def test_missing_file_offers_its_neighbor(tmp_path: Path) -> None:
    (tmp_path / "resnet20.pth").touch()
    with pytest.raises(UserError, match=r"no file 'resnet2.pth'.*nearest: 'resnet20.pth'"):
        read_weights(tmp_path / "resnet2.pth")
    with pytest.raises(UserError, match="there is no folder"):
        read_weights(tmp_path / "nowhere" / "w.pth")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_that_may_never_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a file"):
        read_weights(tmp_path / "pipe")


def test_folder_offers_its_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has no file"):
        read_weights(tmp_path)
    (tmp_path / "w.safetensors").touch()
    (tmp_path / "README.md").touch()
    with pytest.raises(UserError, match=r"is a folder.*there are: 'w.safetensors'$"):
        read_weights(tmp_path)


def test_unreadable_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.pt").write_bytes(b"PK")

    def denied(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match="Permission denied") as caught:
        read_weights(tmp_path / "w.pt")
    one_line(caught)
