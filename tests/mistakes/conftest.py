"""The folder in which the mistakes of every command are made."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_study import HERE, TINY, save_teacher, study

from camdistill.commands.refine import refine  # noqa: F401  (imported once, not in every test)

FUNCTIONS = """
class Other: pass
number = 3
def gives_nothing(network, images, classes): return None
def fails(network, images, classes): raise ValueError("no such thing")
def takes_nothing(): return 3
def gives_nan(network, images, classes): return images.mean(1) * float("nan")
"""
REFINE = {
    "data": {
        "class_path": "camdistill.data.modules.ShapesData",
        "init_args": {"train": 32, "val": 16, "test": 12, "batch_size": 16, "classes": 6},
    },
    "objective": {"shares": [0.5]},
    "start": {"epochs": 1},
    "recipe": {"epochs": 1},
    "judging": {"images": 6, "held_out": ["gradient"], "road": [0.5]},
    **HERE,
}
ARMS = {"methods": ["grad_cam@stage2"], "controls": ["random"], "shares": []}
ADAPT = {"layers": ["stage1", "stage2"], "rounds": 1, "judges": [50], "lr": 0.05}
TEXTS = {
    "own_functions.py": FUNCTIONS,
    "broken_code.py": "def f(:\n",
    "stops.py": "import nothing_of_this_name\n",
    "undefined.py": "x = y\n",
    "text.npz": "no arrays",
    "lfs.pth": "version https://git-lfs.github.com/spec/v1\noid x\n",
    "empty.yaml": "",
    "tabs.yaml": "a:\n\t- 1\n",
    "number.yaml": "3\n",
    "alias.yaml": "count: *x\n",
    "object.yaml": "count: !!python/object/apply:os.system [echo]\n",
    "cut.json": '{"count": 3',
    "dictionary.yaml": "arms: {a: {}}\nbase: tiny.yaml\n",
}


@pytest.fixture
def folder(offline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trained networks, configs of every command, and files that are not what they seem."""
    here = offline_folder
    monkeypatch.syspath_prepend(here)
    save_teacher(here / "t.safetensors")
    rank = study("t.safetensors", **ARMS, **HERE)
    configs = {
        "rank": rank,
        "refine": {**REFINE, "network": TINY, "seeds": [0]},
        "given": REFINE,
        "adapt": study("t.safetensors", adaptation=ADAPT, **HERE),
        "learn": {"studies": {"one": study("t.safetensors", **ARMS)}, "images": 4, **HERE},
    }
    for name, config in configs.items():
        (here / f"{name}.yaml").write_text(yaml.safe_dump(config))
    for name, text in TEXTS.items():
        (here / name).write_text(text)
    np.savez(here / "maps.npz", maps=np.zeros((3, 4, 4)))
    np.savez(here / "other.npz", other=np.zeros(3))
    np.savez(here / "words.npz", maps=np.zeros((2, 4, 4), dtype="<U3"))
    (here / "nothing").mkdir()
    (here / "nothing.safetensors").write_bytes(b"")
    (here / "noise.pt").write_bytes(bytes(range(256)))
    (here / "bytes.yaml").write_bytes(b"\xff\xfe\x00bad")
    (here / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    torch.save([1, 2], here / "list.pt")
    torch.save({"epoch": 1, "optimizer": {}}, here / "optimizer.pt")
    return here
