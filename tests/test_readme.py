"""The README's Python runs as it stands."""

import re
import shutil
from pathlib import Path

import pytest

from camdistill.distill.checkpoints import write_checkpoint
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.networks.teachers import NetworkSpec

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.M)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the checkpoints that ship, and a stand-in for a student that doesn't."""
    shutil.copytree(ROOT / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    student = tmp_path / "checkpoints" / "shapes-student.safetensors"
    if not student.exists():
        teacher = NetworkSpec("resnet20", "checkpoints/shapes-resnet20.safetensors", {"classes": 8})
        write_checkpoint(DistilledExplainer(teacher), student)
    return tmp_path


def test_readme_has_one_block_of_python() -> None:
    assert len(BLOCKS) == 1
    assert "from camdistill import grad_cam, load" in BLOCKS[0]
    assert len(BLOCKS[0].splitlines()) <= 12


def test_python_of_the_readme_runs(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("torch.Size([4, 8]) {")
    assert printed[1].startswith("torch.Size([4, ")
