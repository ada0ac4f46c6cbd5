"""`export`: a distilled explainer, logits and maps in one graph, for use without camdistill."""

import importlib.util
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from camdistill.commands.networks import image_side, training_size
from camdistill.distill.checkpoints import TrainedExplainer, load
from camdistill.errors import UserError
from camdistill.explain.exporting import ClosedExplainer
from camdistill.report.results import Cell, text_table, write_results
from camdistill.store.atomic_files import write_atomically
from camdistill.types import Images

Format = Literal["onnx", "torch", "both"]
Run = Callable[[Images], tuple[Tensor, Tensor]]
Differences = dict[str, dict[str, float]]

EXTRA = ("onnx", "onnxscript", "onnxruntime")
BATCHES = (1, 7)
# Of the largest difference to PyTorch; relative where logits or maps are larger than 1.
MAX_DIFFERENCE = 1e-4


def export(
    checkpoint: Path,
    out: Path = Path("runs/export"),
    format: Format = "both",
    layer: str | None = None,
    size: int | None = None,
    trust: list[str] = [],  # noqa: B006  (never changed; jsonargparse shows it)
) -> dict[str, object]:
    """Writes a student as explainer.onnx and explainer.pt2: images in, logits and raw maps out.

    The graph takes float32 images [B, 3, size, size] in [0, 1], any B, and normalizes them itself;
    it gives logits [B, C] and the maps of all classes [B, C, h, w]. Both files are run and compared
    with PyTorch before they are kept.

    Args:
        checkpoint: A student (or classifier) of ours: .safetensors or .ckpt.
        out: Folder for the files and results.json.
        format: onnx, torch (torch.export's .pt2), or both.
        layer: Layer of the maps. Default: the last layer before the head.
        size: Side of the images in pixels. Default: the training images'.
        trust: Packages besides camdistill, torch, torchvision and timm that a checkpoint's class
            paths may come from.
    """
    start_time = time.monotonic()
    if format != "torch":
        _check_extra()
    student = load(checkpoint, trust=trust)
    side = image_side(size, training_size(student))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(max(BATCHES), 3, side, side, generator=generator)
    explainer = ClosedExplainer(student.network.eval().requires_grad_(False), images[:2], layer)
    program = torch.export.export(
        explainer, (images[:2],), dynamic_shapes=({0: Dim("batch")},), strict=False
    )
    files: dict[str, object] = {}
    rows: dict[str, dict[str, Cell]] = {}
    for name in ("onnx", "torch") if format == "both" else (format,):
        content = (
            _onnx(program, student, explainer.layer, side) if name == "onnx" else _pt2(program)
        )
        run = _onnx_runner(content) if name == "onnx" else _pt2_runner(content)
        differences = _check_against_pytorch(run, explainer, images, name)
        path = out / ("explainer.onnx" if name == "onnx" else "explainer.pt2")
        write_atomically(path, content)
        files[name] = {"file": path.name, "bytes": len(content), "max_difference": differences}
        rows[path.name] = {"kB": len(content) // 1000, **_row(differences)}
    results: dict[str, object] = {
        "layer": explainer.layer,
        "head": explainer.head,
        "size": side,
        "classes": list(student.classes),
        **files,
    }
    sha256 = {"checkpoint": student.sha256}
    write_results(
        out / "results.json", results, seconds=time.monotonic() - start_time, sha256=sha256
    )
    print(text_table(rows, corner="largest difference to PyTorch"))
    print(f"\nMaps of layer {explainer.layer}; {out / 'results.json'} says more")
    return results


def _check_extra() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            "`pip install -e '.[export]'` in the project's folder, or --format torch, which needs "
            "nothing more"
        )


def _onnx(program: ExportedProgram, student: TrainedExplainer, layer: str, size: int) -> bytes:
    """The graph as an ONNX file, with what a user must know in its metadata."""
    import onnx

    converted = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits", "maps"],
    )
    assert converted is not None, "dynamo gives a program"
    model = converted.model_proto
    model.doc_string = (
        f"images: float32 RGB in [0, 1], [batch, 3, {size}, {size}]; logits: [batch, classes]; "
        f"maps: raw, signed Grad-CAM of {layer}, [batch, classes, h, w]"
    )
    properties = {
        "layer": layer,
        "size": str(size),
        "classes": json.dumps(list(student.classes)),
        "checkpoint_sha256": student.sha256,
    }
    onnx.helper.set_model_props(model, properties)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _onnx_runner(content: bytes) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Images) -> tuple[Tensor, Tensor]:
        logits, maps = session.run(["logits", "maps"], {"images": images.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(maps)

    return run


def _pt2(program: ExportedProgram) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _pt2_runner(content: bytes) -> Run:
    run: Run = torch.export.load(io.BytesIO(content)).module()
    return run


def _check_against_pytorch(
    run: Run, explainer: ClosedExplainer, images: Images, name: str
) -> Differences:
    """The largest differences to PyTorch, by batch size; refuses a file that isn't the same."""
    differences: Differences = {}
    for count in BATCHES:
        with torch.no_grad():
            expected = explainer(images[:count])
            exported = run(images[:count])
        largest = {}
        for output_name, expected_tensor, exported_tensor in zip(
            ("logits", "maps"), expected, exported, strict=True
        ):
            largest[output_name] = float((expected_tensor - exported_tensor).abs().max())
            allowed = MAX_DIFFERENCE * max(1.0, float(expected_tensor.abs().max()))
            if not largest[output_name] < allowed:
                raise UserError(
                    f"the {name} file gives {output_name} that are up to "
                    f"{largest[output_name]:.1e} from PyTorch's "
                    f"at batch {count}, where {allowed:.1e} is allowed; nothing was written for "
                    "it: try another --format"
                )
        differences[f"batch_{count}"] = largest
    return differences


def _row(differences: Differences) -> dict[str, Cell]:
    return {
        f"{output_name}, batch {count}": f"{differences[f'batch_{count}'][output_name]:.1e}"
        for count in BATCHES
        for output_name in ("logits", "maps")
    }
