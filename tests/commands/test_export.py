"""`camdistill export`: files that give PyTorch's numbers without it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from camdistill import load
from camdistill.cli import main
from camdistill.commands import export as command
from camdistill.commands.export import export
from camdistill.data.decode import decode
from camdistill.explain.maps import relu
from camdistill.networks.students import ShallowCNN

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path.name for path in (ROOT / "checkpoints").glob("*.safetensors"))
EXAMPLE = ROOT / "docs" / "examples" / "onnx_explainer.py"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped Shapes student, exported."""
    folder = tmp_path_factory.mktemp("export")
    export(ROOT / "checkpoints" / "shapes-student.safetensors", folder)
    return folder


def test_onnx_runtime_gives_the_logits_and_grad_cam_of_every_class(shapes: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    explainer = load(ROOT / "checkpoints" / "shapes-student.safetensors")
    session = onnxruntime.InferenceSession(shapes / "explainer.onnx")
    generator = torch.Generator().manual_seed(3)
    for count in (1, 3, 8):
        images = torch.rand(count, 3, 32, 32, generator=generator)
        logits, maps = session.run(["logits", "maps"], {"images": images.numpy()})
        true = explainer.explain(images, None, torch.arange(8).expand(count, 8))
        assert np.abs(logits - true.logits.numpy()).max() < 1e-4
        assert np.abs(maps - true.maps["stage4"].numpy()).max() < 1e-5
    told = session.get_modelmeta()
    assert json.loads(told.custom_metadata_map["classes"]) == list(explainer.classes)
    assert told.custom_metadata_map["checkpoint_sha256"] == explainer.sha256
    assert told.custom_metadata_map["size"] == "32"


def test_torch_export_gives_the_same(shapes: Path) -> None:
    explainer = load(ROOT / "checkpoints" / "shapes-student.safetensors")
    program = torch.export.load(shapes / "explainer.pt2").module()
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    logits, maps = program(images)
    true = explainer.explain(images, None, torch.arange(8).expand(5, 8))
    torch.testing.assert_close(logits, true.logits)
    torch.testing.assert_close(maps, true.maps["stage4"])


def test_results_tell_the_differences(shapes: Path) -> None:
    results = json.loads((shapes / "results.json").read_text())
    assert (results["layer"], results["head"], results["size"]) == ("stage4", "linear", 32)
    for name in ("onnx", "torch"):
        assert (shapes / results[name]["file"]).stat().st_size == results[name]["bytes"]
        for batch in ("batch_1", "batch_7"):
            for apart in results[name]["max_difference"][batch].values():
                assert 0 <= apart < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_checkpoint_is_exported(name: str, tmp_path: Path) -> None:
    assert (
        main(["export", "--checkpoint", str(ROOT / "checkpoints" / name), f"--out={tmp_path}"]) == 0
    )
    results = json.loads((tmp_path / "results.json").read_text())
    for batch in results["onnx"]["max_difference"].values():
        assert max(batch.values()) < 1e-4


def test_a_graph_that_differs_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def other(content: bytes) -> command.Run:
        return lambda images: (torch.zeros(len(images), 8), torch.zeros(len(images), 8, 8, 8))

    monkeypatch.setattr(command, "_pt2_runner", other)
    with pytest.raises(command.UserError, match=r"the torch file gives logits that are up to"):
        export(ROOT / "checkpoints" / "shapes-student.safetensors", tmp_path, "torch")
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_onnx_is_refused_and_torch_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name)
    )
    given = ["export", "--checkpoint", str(ROOT / "checkpoints" / "shapes-student.safetensors")]
    given += [f"--out={tmp_path}"]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert "onnx, onnxscript, onnxruntime are not installed: `pip install -e '.[export]'" in said
    assert main([*given, "--format=torch"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["explainer.pt2", "results.json"]


class Hidden(torch.nn.Module):
    """A student whose head has a hidden layer."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.trunk = ShallowCNN(5, (4, 6), (1, 2))
        self.hidden, self.linear = torch.nn.ReLU(), torch.nn.Linear(5, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.hidden(self.trunk(images)))


def test_a_head_without_a_closed_form_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load(trained / "runs/tiny/version_0/student.safetensors")
    found.network.network = Hidden().eval()
    monkeypatch.setattr(command, "load", lambda *_, **__: found)
    with pytest.raises(command.UserError, match=r"'trunk.stage2' of Hidden has no closed form"):
        export(Path("any"), tmp_path)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((60, 44)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_example_needs_no_torch_and_says_what_torch_says(shapes: Path, photo: Path) -> None:
    pytest.importorskip("onnxruntime")
    out = photo.parent / "explained"
    given = [str(shapes / "explainer.onnx"), str(photo), str(photo), "--out", str(out)]
    script = f"""
import runpy, sys
for name in ("torch", "camdistill", "scipy", "cv2"):
    sys.modules[name] = None
sys.argv[1:] = {given}
runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    explainer = load(ROOT / "checkpoints" / "shapes-student.safetensors")
    pixels = decode(photo, 32)[0]
    found = explainer.explain(torch.from_numpy(pixels.copy())[None] / 255)
    probability, top = found.logits[0].softmax(0).max(0)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert f"{photo}: {explainer.classes[top]} {float(probability):.3f}, " in lines[0]
    picture = np.asarray(Image.open(out / "000_photo.png")).astype(float)
    evidence = relu(found.maps["stage4"])[0]
    grown = torch.nn.functional.interpolate(
        (evidence / evidence.max())[None, None], (32, 32), mode="bilinear"
    )[0, 0].numpy()
    # Half of the picture is the color; its blue rises to 142 at 0.4 and falls to 37 at 1.
    colors = 2 * picture - pixels.transpose(1, 2, 0)
    blue = np.interp(grown, [0, 0.2, 0.4, 0.6, 0.8, 1], [84, 135, 142, 132, 81, 37])
    assert np.abs(colors[..., 2] - blue).max() <= 4
    assert np.abs(colors[grown == 0] - (68, 1, 84)).max(initial=0) <= 2
