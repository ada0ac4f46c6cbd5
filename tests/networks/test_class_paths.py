"""Networks by dotted path: whose code runs, and what is said when it can't."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from camdistill.errors import UserError
from camdistill.networks.class_paths import SAFE_PACKAGES
from camdistill.networks.teachers import NetworkSpec, build

OWN = """
from torch import nn

class Tiny(nn.Module):
    def __init__(self, width: int, depth: int = 1, num_classes: int = 5):
        super().__init__()
        if width < 0:
            raise ValueError("width is negative")
        self.conv = nn.Conv2d(3, width, 3)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))

def tiny(width=3):
    return Tiny(width)

def nothing():
    return 3

class Plain:
    pass

number = 3
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's modules on the path, forgotten afterwards."""
    (tmp_path / "own_networks.py").write_text(OWN)
    (tmp_path / "marked.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w').close()\n{OWN}")
    (tmp_path / "broken_syntax.py").write_text("def")
    (tmp_path / "needs_other.py").write_text("import surely_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("own_networks", "marked", "broken_syntax", "needs_other")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def refused(
    name: str, args: dict[str, object] | None = None, allowed: tuple[str, ...] | None = None
) -> str:
    with pytest.raises(UserError) as caught:
        build(NetworkSpec(name, args=args or {}), allowed=allowed)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_class_and_function_by_path_make_networks() -> None:
    network = build(NetworkSpec("own_networks.Tiny", args={"width": 4}), classes=7)
    assert network.conv.out_channels == 4
    assert network.fc.out_features == 7
    assert build(NetworkSpec("own_networks.tiny"), classes=9).fc.out_features == 9


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("own_network.Tiny", {}, "there is no module 'own_network'; check the name"),
        ("own_networks.inner.Tiny", {}, "there is no module 'own_networks.inner'"),
        ("own_networks.Tinny", {}, "no 'Tinny' in module 'own_networks'; nearest: 'Tiny'"),
        ("own_networks.Plain", {}, "a class but not a torch.nn.Module"),
        ("own_networks.number", {}, "is of type int and can.t be called"),
        ("own_networks.nothing", {}, "made a int, not a torch.nn.Module"),
        ("own_networks.Tiny", {}, "needs the argument 'width'"),
        ("own_networks.Tiny", {"width": 2, "dept": 3}, "no argument 'dept'.*nearest: 'depth'"),
        ("own_networks.Tiny", {"width": -2}, "can't build .* width=-2: width is negative"),
        ("own_networks.Tiny", {"width": "a"}, "can't build own_networks.Tiny with width='a'"),
        ("broken_syntax.Tiny", {}, "can't import 'broken_syntax.Tiny': invalid syntax"),
        ("needs_other.Tiny", {}, "it needs 'surely_not_installed', not installed"),
        (".Tiny", {}, "'.Tiny' is no class path; give package"),
        ("own_networks.", {}, "'own_networks.' is no class path"),
    ],
)
def test_wrong_path_is_one_line_with_a_cure(name: str, args: dict[str, object], said: str) -> None:
    assert re.search(said, refused(name, args))


def test_strangers_path_is_refused_before_its_import(own: Path) -> None:
    message = refused("marked.Tiny", {"width": 3}, SAFE_PACKAGES)
    assert "add `--trust marked`" in message
    assert not (own / "trace").exists()
    assert "marked" not in sys.modules


def test_trusted_package_may_be_used(own: Path) -> None:
    allowed = (*SAFE_PACKAGES, "marked")
    assert build(NetworkSpec("marked.tiny"), allowed=allowed).conv.out_channels == 3
    assert (own / "trace").exists()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("torch.hub.load", {"repo_or_dir": "a/b", "model": "c"}),
        ("torch.load", {"f": "file", "weights_only": False}),
        ("torch.serialization.os.system", {"command": "touch trace"}),
        ("torch.utils.cpp_extension.load", {"name": "a", "sources": ["b"]}),
        ("torch.serialization.load", {"f": "file"}),
        ("torch.utils.collect_env.subprocess", {}),
        ("torch._utils._import_dotted_name", {"name": "marked"}),
        ("torch.utils.bottleneck.__main__.main", {}),
        ("torchvision.models.get_model", {"name": "resnet18", "weights": "DEFAULT"}),
        ("torchvision.models.resnet18", {"weights": "DEFAULT"}),
        ("torchvision.datasets.utils.download_url", {"url": "x", "root": "y"}),
        ("camdistill.networks.teachers.build", {"spec": "a"}),
        ("camdistill.networks.weights.save_safetensors", {"path": "trace", "state": None}),
        ("timm.create_model", {"model_name": "hf-hub:a/b"}),
        ("timm.create_model", {"model_name": "resnet18", "pretrained": True}),
        ("timm.create_model", {"model_name": "resnet18", "checkpoint_path": "file"}),
        ("timm.models.load_checkpoint", {"model": "a", "checkpoint_path": "b"}),
    ],
)
def test_safe_packages_do_not_lend_strangers_their_functions(
    name: str, args: dict[str, object], own: Path
) -> None:
    refused(name, args, SAFE_PACKAGES)
    assert not (own / "trace").exists()
    assert "marked" not in sys.modules


def test_strangers_path_may_name_networks_of_safe_packages() -> None:
    by_class = NetworkSpec(
        "camdistill.networks.students.ShallowCNN", args={"channels": [4], "strides": [1]}
    )
    assert isinstance(build(by_class, classes=3, allowed=SAFE_PACKAGES), nn.Module)
    listed = NetworkSpec("torchvision.models.resnet18", args={"num_classes": 4})
    assert build(listed, allowed=SAFE_PACKAGES).fc.out_features == 4


def test_timm_model_by_path_equals_timms_own() -> None:
    timm = pytest.importorskip("timm")
    for spec in (
        NetworkSpec("timm.create_model", args={"model_name": "resnet10t", "num_classes": 4}),
        NetworkSpec("timm.models.resnet10t", args={"num_classes": 4}),
    ):
        torch.manual_seed(0)
        network = build(spec, allowed=SAFE_PACKAGES).eval()
        torch.manual_seed(0)
        peer = timm.create_model("resnet10t", num_classes=4).eval()
        images = torch.rand(1, 3, 64, 64)
        assert torch.equal(network(images), peer(images))


def test_missing_timm_is_installed_by_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'camdistill[models]'" in refused("timm.create_model")
