"""Weights from files, read without running any code that a file may hold.

safetensors and torch files are told apart by their first bytes, not by their names. Torch files
are only read with `weights_only`, onto the CPU.
"""

import hashlib
import json
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch._weights_only_unpickler import UnpicklingError  # type: ignore[attr-defined]

from camdistill.errors import UserError, mistake_of_system, nearest
from camdistill.store.atomic_files import expand_home, write_atomically
from camdistill.store.digest import sha256_of

# Where training programs put the weights inside their checkpoints, the usual ones first.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "params",
    "weights",
    "student",
    "teacher",
    "state_dict_ema",
    "model_ema",
    "params_ema",
)
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".th", ".bin")
ARCHIVE_SLACK = 64 << 20  # bytes: the code in a TorchScript file is compressed
# What our own checkpoints call the network that they trained.
PARTS = ("student", "network")
# What a damaged file makes torch's reader raise, whichever byte is hit.
_DAMAGE = (
    *(RuntimeError, ValueError, EOFError, OSError, LookupError, TypeError),
    *(AttributeError, AssertionError, OverflowError, ImportError, struct.error),
    MemoryError,
)


@dataclass(frozen=True)
class WeightFile:
    """The weights in a file.

    Attributes:
        state: Weights by name, on the CPU, without the prefixes of wrappers.
        metadata: Text stored beside them: what safetensors hold, or the experiment of a checkpoint
            of ours.
        sha256: SHA-256 of the file, in hexadecimal.
        path: Where they were read.
        is_lightning: Whether it is a Lightning checkpoint, from which a training can go on.
    """

    state: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    sha256: str = ""
    path: Path = Path("weights")
    is_lightning: bool = False


def read_weights(path: str | Path, *, part: str | None = None) -> WeightFile:
    """Weights from a safetensors file, a torch file or a checkpoint of ours.

    Args:
        path: The file; its format is seen from its content.
        part: Which network of a checkpoint with several: the first word of its keys, `student` or
            `network` in ours. None takes the one there is, the student before others.

    Raises:
        UserError: If the file isn't there, is damaged, holds code or no weights.
    """
    path = expand_home(path)
    try:
        _check_path(path)
        with path.open("rb") as file:
            head = file.read(512)
        sha256 = sha256_of(path)
    except OSError as error:
        raise mistake_of_system(error) or UserError(
            f"can't read '{path}': {error.strerror}; check its permissions"
        ) from error
    _check_format(path, head)
    metadata: dict[str, str] = {}
    is_lightning = False
    if head[8:9] == b"{":
        state, metadata = _read_safetensors(path)
        state = _select_network(path, strip_wrapper_names(state), part, False)
    else:
        content = _read_torch(path)
        is_lightning = isinstance(content, Mapping) and "pytorch-lightning_version" in content
        state = _select_network(
            path, strip_wrapper_names(_find_tensors(path, content)), part, is_lightning
        )
        metadata = _read_experiment(content) if is_lightning else {}
    return WeightFile(strip_wrapper_names(state), metadata, sha256, path, is_lightning)


def _check_path(path: Path) -> None:
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
        names = [name for name in names if name.endswith(SUFFIXES)] or names
        inside = f"give a file; {nearest('', names)}" if names else "it has no file: give another"
        raise UserError(f"'{path}' is a folder, not a file of weights; {inside}")
    if path.exists() and not path.is_file():  # a device or a pipe may never end
        raise UserError(f"'{path}' is not a file; give a file of weights")
    if not path.exists():
        if not path.parent.is_dir():
            raise UserError(f"no file '{path}': there is no folder '{path.parent}'; check the path")
        names = sorted(entry.name for entry in path.parent.iterdir())
        names = [name for name in names if name.endswith(SUFFIXES)]
        hint = nearest(path.name, names) if names else "it holds no file of weights"
        raise UserError(f"no file '{path.name}' in '{path.parent}'; {hint}")


def _check_format(path: Path, head: bytes) -> None:
    text = head.lstrip().lower()
    if not head:
        raise UserError(f"'{path}' is empty (0 bytes); copy or download it again")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UserError(
            f"'{path}' is a web page, not weights; download the file itself (a 'raw' link)"
        )
    if text.startswith(b"version https://git-lfs"):
        raise UserError(f"'{path}' is a Git LFS pointer, not weights; run `git lfs pull` there")
    if not (head[8:9] == b"{" or head.startswith((b"PK", b"\x80"))):
        raise UserError(
            f"'{path}' is neither safetensors nor a torch file; give a file written by "
            "`torch.save(network.state_dict(), ...)` or safetensors"
        )


def _damage_error(path: Path, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    return UserError(
        f"'{path}' is truncated or damaged ({path.stat().st_size:,} bytes; {reason}); "
        "copy or download it again"
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # A copy: the file may be replaced while its memory map is in use.
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, *_DAMAGE) as error:
        raise _damage_error(path, error) from error
    if not state:
        raise UserError(f"no weights in '{path}': its table is empty; give a file with weights")
    return state, metadata


def _read_torch(path: Path) -> object:
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            # Of unusual pickle protocols; what can't be read is an error anyway.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise _unsafe_error(path, str(error)) from error
    except _DAMAGE as error:
        if "TorchScript" in str(error):
            raise UserError(
                f"'{path}' is a TorchScript program, which camdistill doesn't run; save its "
                "weights: torch.save(torch.jit.load(file).state_dict(), ...)"
            ) from error
        raise _damage_error(path, error) from error


def _check_archive(path: Path) -> None:
    """Refuses an archive that unfolds: torch stores weights as they are, each byte once.

    A few megabytes that stand for many gigabytes, by compression or by overlapping entries, would
    fill the memory before anything could be checked.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            unpacked_size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # an old kind of file, or a damaged one: torch says it
    if not any(name.endswith(("data.pkl", "constants.pkl")) for name in names):
        raise UserError(
            f"'{path}' is an archive of {', '.join(map(repr, names[:3])) or 'nothing'}, not "
            "weights; give a file written by `torch.save(network.state_dict(), ...)` or safetensors"
        )
    size = path.stat().st_size
    if unpacked_size > 2 * size + ARCHIVE_SLACK:
        raise UserError(
            f"'{path}' has {size:,} bytes and unfolds to {unpacked_size:,}, which torch's "
            "own files never do; it isn't opened: save it with torch.save, or download it again"
        )


def _unsafe_error(path: Path, reason: str) -> UserError:
    """Torch's reader met something that is neither a tensor nor a plain value."""
    global_name = re.search(r"GLOBAL ([\w.]+)", reason)
    if global_name is None and "Unsupported operand" not in reason:
        return _damage_error(path, EOFError("the table of weights breaks off"))
    what = f" ({global_name[1]})" if global_name else ""
    return UserError(
        f"'{path}' holds Python objects{what}, which could run code, or is damaged, so it isn't "
        "opened: download it again or, if you trust it, save its weights alone with "
        "torch.save(network.state_dict(), ...)"
    )


def _find_tensors(path: Path, content: object, depth: int = 0) -> dict[str, Tensor]:
    """The mapping of names to tensors, however deep the training program put it."""
    if not isinstance(content, Mapping):
        raise UserError(
            f"no weights in '{path}': it holds a {type(content).__name__}; give a file written by "
            "`torch.save(network.state_dict(), ...)`"
        )
    if depth < 3:
        for name in WRAPPERS:
            if isinstance(content.get(name), Mapping) and content[name]:
                return _find_tensors(path, content[name], depth + 1)
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        names = ", ".join(repr(name) for name in list(content)[:6]) or "nothing"
        raise UserError(
            f"no weights in '{path}': it holds {names}; give a file written by "
            "`torch.save(network.state_dict(), ...)`"
        )
    return state


def _select_network(
    path: Path, state: dict[str, Tensor], part: str | None, lightning: bool
) -> dict[str, Tensor]:
    """The weights of one of several networks; without a name, ours from a checkpoint of ours."""
    words = {name.split(".")[0] for name in state}
    if part is None:
        part = next((name for name in PARTS if lightning and name in words), None)
        if part is None:
            return state
    elif part not in words:
        raise UserError(f"no '{part}' in '{path}'; {nearest(part, sorted(words))}")
    prefix = f"{part}."
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _read_experiment(content: object) -> dict[str, str]:
    """What a Lightning checkpoint of ours says of its experiment, as our safetensors say it."""
    text = content.get("camdistill") if isinstance(content, Mapping) else None
    return {"camdistill": text} if isinstance(text, str) else {}


def strip_wrapper_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what torch.compile and the parallel wrappers put before the names."""
    state = {_strip_compile_name(name): value for name, value in state.items()}
    while state and all(name.startswith("module.") for name in state):
        state = {name[len("module.") :]: value for name, value in state.items()}
    return {_strip_compile_name(name): value for name, value in state.items()}


def _strip_compile_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def save_safetensors(
    path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write weights in one step: a reader sees the old file or the new one, whole.

    Args:
        path: The file; its folder is made if there is none.
        state: Weights by name.
        metadata: Text to keep beside them, such as the configuration.

    Returns:
        The sha256 of the file, in hexadecimal.

    Raises:
        UserError: If the file can't be written (no space, no permission); an old one is intact.
    """
    path = expand_home(path)
    content = _serialize(state, metadata or {})
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def sha256_when_saved(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The sha256 of the file that `save_safetensors` would write."""
    return hashlib.sha256(_serialize(state, metadata)).hexdigest()


def _serialize(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    # Clones, because safetensors refuses tensors that share memory.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    content = safetensors.torch.save(tensors, dict(metadata) or None)
    # The library orders the metadata differently in every process: equal weights, equal sha256.
    end = 8 + int.from_bytes(content[:8], "little")
    table = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    table += b" " * (-len(table) % 8)
    return len(table).to_bytes(8, "little") + table + content[end:]


def weights_digest(network: nn.Module) -> str:
    """A sha256 of a network's weights: what tells it from another of the same kind."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
