"""`explain`: pictures, raw maps and numbers of images, for a checkpoint or for any network."""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from camdistill.commands.image_sources import ImageSelection, load_images
from camdistill.commands.methods import maps_by_method, method_scores, write_methods
from camdistill.commands.networks import NetworkSelection, image_side, load_networks
from camdistill.distill.training import match_channels
from camdistill.errors import UserError, nearest
from camdistill.explain.gradcam import Explanation, last_layer
from camdistill.explain.gradcam import explain_images as explain_network
from camdistill.measure.scores import map_scores
from camdistill.networks.capture import check_forward
from camdistill.networks.heads import head_size
from camdistill.perturb.probability import probabilities
from camdistill.report.figures.maps import PanelRow, map_panel
from camdistill.report.figures.pictures import save_png
from camdistill.report.results import Cell, text_table, write_results
from camdistill.store.atomic_files import write_atomically
from camdistill.types import Images

Grid = Float[np.ndarray, "height width"]
OtherGrid = Float[np.ndarray, "other_height other_width"]
CHUNK = 32  # images in one forward


@dataclass(frozen=True)
class LayerPairMaps:
    """One class of one image at one pair of layers."""

    layers: tuple[str, str]
    class_name: str
    teacher: Grid
    student: OtherGrid | None
    scores: dict[str, float]

    @property
    def label(self) -> str:
        """The layers as `--layers` takes them: stage3:layer2, or layer2 of a network alone."""
        return ":".join(layer for layer in reversed(self.layers) if layer)


def explain(
    checkpoint: Path | None = None,
    teacher: str | None = None,
    weights: str | None = None,
    images: list[Path] = [],  # noqa: B006  (never changed; jsonargparse shows it)
    data: str | None = None,
    layers: list[str] = [],  # noqa: B006
    classes: list[str] = [],  # noqa: B006
    method: list[str] = [],  # noqa: B006
    count: int = 16,
    size: int | None = None,
    out: Path = Path("runs/explain"),
    trust: list[str] = [],  # noqa: B006
) -> dict[str, object]:
    """Explains images: an overview, a panel and the raw maps (.npz) of each, and results.json.

    With a checkpoint the student stands beside its teacher; maps are of the teacher's top class.
    Probabilities are the softmax of the logits, of a single logit its sigmoid.
    With --method a panel shows every method's map, or Grad-CAM's at many layers, and no overview.

    Args:
        checkpoint: A student (or classifier) of ours: .safetensors or .ckpt.
        teacher: A network alone, by name or class path: resnet50, resnet56, package.module.Network.
        weights: Weights of that network: a file, or DEFAULT for torchvision's. With a checkpoint:
            where the teacher's file is now.
        images: Image files or folders.
        data: In place of images: shapes, cifar10, cifar100, or an image folder; its test images.
        layers: Layers to show, the student's and the teacher's joined by a colon: stage3:layer2; of
            a network alone its layers. Default: the pairs of the checkpoint, or the last layer.
        classes: Classes to show, by name or number. Default: the teacher's top class.
        method: Methods to show side by side, such as grad_cam layer_cam rise, or all. Default:
            grad_cam, with the student's difference from the teacher.
        count: At most so many images, spread evenly.
        size: Side in pixels that images are scaled and cut to. Default: the training images'.
        out: Folder for the results.
        trust: Packages besides camdistill, torch, torchvision and timm that a checkpoint's class
            paths may come from.
    """
    selection = load_networks(checkpoint, teacher, weights, trust)
    source = load_images(
        images, data, count=count, size=image_side(size, selection.size), carving=selection.carving
    )
    inputs = match_channels(source.images, selection.channels)
    check_forward(selection.by_name, inputs[:1], settled=True)
    selection = replace(selection, pairs=_layer_pairs(selection, layers, inputs[:1]))
    classes_match = len(source.classes) == head_size(selection.teacher.network)
    names = selection.classes or (source.classes if classes_match else ())
    class_numbers = [_class_number(name, names) for name in classes]
    teacher_explanation, student_explanation = _explain_networks(selection, inputs, class_numbers)
    if method:
        return _by_method(
            selection, source, teacher_explanation, student_explanation, names, method, out
        )
    rows: dict[str, dict[str, object]] = {}
    overview: list[PanelRow] = []
    for index, name in enumerate(source.names):
        pairs = list(
            _pairs_of_image(index, selection, teacher_explanation, student_explanation, names)
        )
        predictions = _describe_predictions(
            index, teacher_explanation, student_explanation, names, selection.first
        )
        path = _path_stem(out, index, name)
        panel = _write_image(
            path, name, source.images[index].numpy(), pairs, predictions, selection.first
        )
        overview.append(panel[0]._replace(caption=[Path(name).name[-20:], *panel[0].caption[1:]]))
        maps = {f"{pair.label}/{pair.class_name}": pair.scores for pair in pairs if pair.scores}
        rows[name] = {**predictions, **({"maps": maps} if maps else {})}
    abreast = 2 if len(overview) > 1 else 1
    save_png(out / "overview.png", map_panel(overview, abreast=abreast, first=selection.first))
    results: dict[str, object] = {"n": len(rows), "images": rows}
    write_results(out / "results.json", results, sha256=selection.sha256)
    print(text_table({name: _table_line(row) for name, row in rows.items()}, corner="image"))
    print(f"\n{out / 'overview.png'} shows all; panels, raw maps (.npz), results.json beside it")
    return results


def _by_method(
    selection: NetworkSelection,
    images: ImageSelection,
    teacher_explanation: Explanation,
    student_explanation: Explanation | None,
    names: Sequence[str],
    methods: Sequence[str],
    out: Path,
) -> dict[str, object]:
    """Panels, raw maps and results of several methods."""
    inputs = match_channels(images.images, selection.channels)
    maps = maps_by_method(selection, inputs, teacher_explanation.classes, methods)
    rows: dict[str, dict[str, object]] = {}
    similarities: dict[str, list[float]] = {}
    for index, name in enumerate(images.names):
        predictions = _describe_predictions(
            index, teacher_explanation, student_explanation, names, selection.first
        )
        path, title = _path_stem(out, index, name), f"{name}   {_heading(predictions)}"
        image = images.images[index].numpy()
        panel = write_methods(path, title, image, maps, index, names, selection.first)
        save_png(path.with_name(f"{path.name}.png"), panel)
        scores = method_scores(maps, index, names)
        for key, entry in scores.items():
            similarities.setdefault(key.rpartition("/")[0], []).append(entry["pearson"])
        rows[name] = {**predictions, **({"maps": scores} if scores else {})}
    results: dict[str, object] = {
        "n": len(rows),
        "methods": list(dict.fromkeys(method for method, _, _ in maps.pairs)),
        "refused": maps.refused,
        "images": rows,
    }
    write_results(out / "results.json", results, sha256=selection.sha256)
    if similarities:
        means = {key: {"Pearson": float(np.nanmean(entry))} for key, entry in similarities.items()}
        print(text_table({key: {**row, "n": len(similarities[key])} for key, row in means.items()}))
    for name, reason in maps.refused.items():
        print(f"{name} is left out: {reason}")
    print(f"\n{out} has a panel of each image, raw maps (.npz), results.json")
    return results


def _path_stem(out: Path, index: int, name: str) -> Path:
    """Where an image's files go, without their endings."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).with_suffix("").as_posix())
    return out / f"{index:03d}_{stem[-60:]}"


def _heading(predictions: dict[str, object]) -> str:
    return "   ".join(
        f"{network}: {_table_line({network: prediction})[network]}"
        for network, prediction in predictions.items()
    )


def _layer_pairs(
    selection: NetworkSelection, layers: Sequence[str], image: Images
) -> list[tuple[str, str]]:
    """The layers to show, as (teacher's, student's)."""
    if selection.student is None:
        return [(name, "") for name in layers or [last_layer(selection.teacher, image)]]
    if not layers:
        return selection.pairs or [
            (last_layer(selection.teacher, image), last_layer(selection.student, image))
        ]
    split = [layer.split(":") for layer in layers]
    malformed = next(
        (layer for layer, parts in zip(layers, split, strict=True) if len(parts) != 2), ""
    )
    if malformed:
        pairs = ", ".join(f"{student}:{teacher}" for teacher, student in selection.pairs)
        raise UserError(
            f"layer '{malformed}': name the student's and the teacher's, such as stage3:layer2; "
            f"the checkpoint's own are {pairs}"
        )
    return [(teacher, student) for student, teacher in split]


def _class_number(name: str, names: Sequence[str]) -> int:
    if name in names:
        return list(names).index(name)
    if name.isdigit():
        return int(name)
    if name[:1] == "-" and name[1:].isdigit():
        raise UserError(f"class {name} is below 0; classes are counted from 0: give 0 or more")
    hint = nearest(name, names) if names else "give its number: names of classes aren't known here"
    raise UserError(f"no class '{name}'; {hint}")


def _class_name(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else str(number)


def _explain_networks(
    selection: NetworkSelection, images: Images, class_numbers: Sequence[int]
) -> tuple[Explanation, Explanation | None]:
    """Both networks on all images, maps being [B, C, h, w] for the classes shown."""
    teacher_parts, student_parts = [], []
    for part in torch.split(images, CHUNK):
        with torch.no_grad():
            top = selection.teacher(part).argmax(1)[:, None]
        classes = torch.tensor([class_numbers]).expand(len(part), -1) if class_numbers else top
        teacher_parts.append(
            explain_network(selection.teacher, part, [pair[0] for pair in selection.pairs], classes)
        )
        if selection.student is not None:
            layers = [pair[1] for pair in selection.pairs]
            student_parts.append(explain_network(selection.student, part, layers, classes))
    return _join_explanations(teacher_parts), _join_explanations(
        student_parts
    ) if student_parts else None


def _join_explanations(parts: Sequence[Explanation]) -> Explanation:
    return Explanation(
        torch.cat([part.logits for part in parts]),
        torch.cat([part.classes for part in parts]),
        {name: torch.cat([part.maps[name] for part in parts]) for name in parts[0].maps},
        {},
    )


def _pairs_of_image(
    index: int,
    selection: NetworkSelection,
    teacher_explanation: Explanation,
    student_explanation: Explanation | None,
    names: Sequence[str],
) -> Iterator[LayerPairMaps]:
    for layers in selection.pairs:
        for position, number in enumerate(teacher_explanation.classes[index].tolist()):
            teacher = teacher_explanation.maps[layers[0]][index, position]
            student = (
                None
                if student_explanation is None
                else student_explanation.maps[layers[1]][index, position]
            )
            scores = {}
            if student is not None:
                similarity = map_scores(student[None], teacher[None])
                scores = {name: float(value) for name, value in similarity._asdict().items()}
            grid = None if student is None else student.numpy()
            yield LayerPairMaps(layers, _class_name(number, names), teacher.numpy(), grid, scores)


def _describe_predictions(
    index: int,
    teacher_explanation: Explanation,
    student_explanation: Explanation | None,
    names: Sequence[str],
    first: str,
) -> dict[str, object]:
    """What each network takes the image for."""
    predictions: dict[str, object] = {}
    for network, explanation in ((first, teacher_explanation), ("student", student_explanation)):
        if explanation is not None:
            probability, top = probabilities(explanation.logits[index : index + 1])[0].max(0)
            predictions[network] = {
                "class": _class_name(int(top), names),
                "probability": float(probability),
            }
    return predictions


def _write_image(
    path: Path,
    name: str,
    image: Float[np.ndarray, "channels height width"],
    pairs: Sequence[LayerPairMaps],
    predictions: dict[str, object],
    first: str,
) -> list[PanelRow]:
    """Writes an image's panel and its raw maps; returns the panel's rows."""
    rows, arrays = [], {}
    for pair in pairs:
        caption = [pair.label, pair.class_name]
        caption += [f"Pearson {pair.scores['pearson']:.2f}"] if pair.scores else []
        rows.append(PanelRow(image, pair.teacher, pair.student, caption))
        arrays[f"{first}/{pair.layers[0]}/{pair.class_name}"] = pair.teacher
        if pair.student is not None:
            arrays[f"student/{pair.layers[1]}/{pair.class_name}"] = pair.student
    panel = map_panel(rows, title=f"{name}   {_heading(predictions)}", first=first)
    save_png(path.with_name(f"{path.name}.png"), panel)
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_atomically(path.with_name(f"{path.name}.npz"), content.getvalue())
    return rows


def _table_line(row: dict[str, object]) -> dict[str, Cell]:
    """An image's numbers as a line of the table."""
    line: dict[str, Cell] = {}
    for network, entry in row.items():
        if not isinstance(entry, dict):
            continue
        if network == "maps":
            line |= {
                f"Pearson {key.split('/')[0]}": scores["pearson"] for key, scores in entry.items()
            }
        else:
            line[network] = f"{entry['class']} {entry['probability']:.2f}"
    return line
