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

from camdistill.commands.networks import side_of, trained_size
from camdistill.distill.checkpoints import Explainer, load
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
BOUND = 1e-4


def export(
    checkpoint: Path,
    out: Path = Path("runs/export"),
    format: Format = "both",
    layer: str | None = None,
    size: int | None = None,
    trust: list[str] = [],  # noqa: B006  (never changed; jsonargparse shows it)
) -> dict[str, object]:
    """Writes a student as explainer.onnx and explainer.pt2: images in, logits and raw maps out.

    The graph takes float32 images [B, 3, size, size] in [0, 1], any B, and normalises them itself;
    it gives logits [B, C] and the maps of all classes [B, C, h, w]. Both files are run and compared
    with PyTorch before they are kept.

    Args:
        checkpoint: A student (or classifier) of ours: .safetensors or .ckpt.
        out: Folder for the files and results.json.
        format: onnx, torch (torch.export's .pt2), or both.
        layer: Whose maps. Default: the last layer before the head.
        size: Side of the images in pixels. Default: the training images'.
        trust: Packages besides camdistill, torch, torchvision and timm that a checkpoint's class
            paths may come from.
    """
    start = time.monotonic()
    if format != "torch":
        _demand_extra()
    found = load(checkpoint, trust=trust)
    side = side_of(size, trained_size(found))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(max(BATCHES), 3, side, side, generator=generator)
    explainer = ClosedExplainer(found.network.eval().requires_grad_(False), images[:2], layer)
    program = torch.export.export(
        explainer, (images[:2],), dynamic_shapes=({0: Dim("batch")},), strict=False
    )
    files: dict[str, object] = {}
    rows: dict[str, dict[str, Cell]] = {}
    for name in ("onnx", "torch") if format == "both" else (format,):
        content = _onnx(program, found, explainer.layer, side) if name == "onnx" else _pt2(program)
        run = _onnx_runner(content) if name == "onnx" else _pt2_runner(content)
        apart = _compared(run, explainer, images, name)
        path = out / ("explainer.onnx" if name == "onnx" else "explainer.pt2")
        write_atomically(path, content)
        files[name] = {"file": path.name, "bytes": len(content), "max_difference": apart}
        rows[path.name] = {"kB": len(content) // 1000, **_row(apart)}
    results: dict[str, object] = {
        "layer": explainer.layer,
        "head": explainer.head,
        "size": side,
        "classes": list(found.classes),
        **files,
    }
    sha256 = {"checkpoint": found.sha256}
    write_results(out / "results.json", results, seconds=time.monotonic() - start, sha256=sha256)
    print(text_table(rows, corner="largest difference to PyTorch"))
    print(f"\nMaps of layer {explainer.layer}; {out / 'results.json'} says more")
    return results


def _demand_extra() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            "`pip install -e '.[export]'` in the project's folder, or --format torch, which needs "
            "nothing more"
        )


def _onnx(program: ExportedProgram, found: Explainer, layer: str, size: int) -> bytes:
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
    told = {
        "layer": layer,
        "size": str(size),
        "classes": json.dumps(list(found.classes)),
        "checkpoint_sha256": found.sha256,
    }
    onnx.helper.set_model_props(model, told)
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


def _compared(run: Run, explainer: ClosedExplainer, images: Images, name: str) -> Differences:
    """The largest differences to PyTorch, by batch size; refuses a file that isn't the same."""
    apart: Differences = {}
    for count in BATCHES:
        with torch.no_grad():
            expected = explainer(images[:count])
            given = run(images[:count])
        one = {}
        for what, ours, theirs in zip(("logits", "maps"), expected, given, strict=True):
            one[what] = float((ours - theirs).abs().max())
            allowed = BOUND * max(1.0, float(ours.abs().max()))
            if not one[what] < allowed:
                raise UserError(
                    f"the {name} file gives {what} that are up to {one[what]:.1e} from PyTorch's "
                    f"at batch {count}, where {allowed:.1e} is allowed; nothing was written for "
                    "it: try another --format"
                )
        apart[f"batch_{count}"] = one
    return apart


def _row(apart: Differences) -> dict[str, Cell]:
    return {
        f"{what}, batch {count}": f"{apart[f'batch_{count}'][what]:.1e}"
        for count in BATCHES
        for what in ("logits", "maps")
    }
