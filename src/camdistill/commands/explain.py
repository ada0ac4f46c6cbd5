"""`explain`: pictures, raw maps and numbers of images, for a checkpoint or for any network."""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from camdistill.commands.methods import maps_by_method, method_scores, write_methods
from camdistill.commands.networks import Shown, networks_from, side_of
from camdistill.commands.sources import ShownImages, images_from
from camdistill.distill.training import as_taken
from camdistill.errors import UserError, nearest
from camdistill.explain.gradcam import Explanation, last_layer
from camdistill.explain.gradcam import explain as explain_network
from camdistill.files import write_atomically
from camdistill.measure.scores import map_scores
from camdistill.networks.capture import demand_runs
from camdistill.networks.heads import head_size
from camdistill.perturb.probability import probabilities
from camdistill.report.figures.maps import Row, map_panel
from camdistill.report.figures.pictures import save_png
from camdistill.report.results import Cell, text_table, write_results
from camdistill.types import Images

Grid = Float[np.ndarray, "height width"]
OtherGrid = Float[np.ndarray, "other_height other_width"]
CHUNK = 32  # images in one forward


@dataclass(frozen=True)
class Pair:
    """One class of one image at one pair of layers."""

    layers: tuple[str, str]
    class_name: str
    teacher: Grid
    student: OtherGrid | None
    scores: dict[str, float]

    @property
    def place(self) -> str:
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
        weights: Of that network: a file, or DEFAULT for torchvision's. With a checkpoint: where
            the teacher's file is now.
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
    shown = networks_from(checkpoint, teacher, weights, trust)
    found = images_from(
        images, data, count=count, size=side_of(size, shown.size), carving=shown.carving
    )
    taken = as_taken(found.images, shown.channels)
    demand_runs(shown.by_name, taken[:1], settled=True)
    shown = replace(shown, pairs=_pairs(shown, layers, taken[:1]))
    fitting = len(found.classes) == head_size(shown.teacher.network)
    names = shown.classes or (found.classes if fitting else ())
    chosen = [_class_number(name, names) for name in classes]
    told, own = _explanations(shown, taken, chosen)
    if method:
        return _by_method(shown, found, told, own, names, method, out)
    rows: dict[str, dict[str, object]] = {}
    overview: list[Row] = []
    for index, name in enumerate(found.names):
        pairs = list(_pairs_of_image(index, shown, told, own, names))
        said = _said(index, told, own, names, shown.first)
        path = _path(out, index, name)
        panel = _write_image(path, name, found.images[index].numpy(), pairs, said, shown.first)
        overview.append(panel[0]._replace(caption=[Path(name).name[-20:], *panel[0].caption[1:]]))
        maps = {f"{pair.place}/{pair.class_name}": pair.scores for pair in pairs if pair.scores}
        rows[name] = {**said, **({"maps": maps} if maps else {})}
    abreast = 2 if len(overview) > 1 else 1
    save_png(out / "overview.png", map_panel(overview, abreast=abreast, first=shown.first))
    results: dict[str, object] = {"n": len(rows), "images": rows}
    write_results(out / "results.json", results, sha256=shown.sha256)
    print(text_table({name: _flat(row) for name, row in rows.items()}, corner="image"))
    print(f"\n{out / 'overview.png'} shows all; panels, raw maps (.npz), results.json beside it")
    return results


def _by_method(
    shown: Shown,
    images: ShownImages,
    told: Explanation,
    own: Explanation | None,
    names: Sequence[str],
    methods: Sequence[str],
    out: Path,
) -> dict[str, object]:
    """Panels, raw maps and results of several methods."""
    taken = as_taken(images.images, shown.channels)
    maps = maps_by_method(shown, taken, told.classes, methods)
    rows: dict[str, dict[str, object]] = {}
    alike: dict[str, list[float]] = {}
    for index, name in enumerate(images.names):
        said = _said(index, told, own, names, shown.first)
        path, title = _path(out, index, name), f"{name}   {_heading(said)}"
        image = images.images[index].numpy()
        panel = write_methods(path, title, image, maps, index, names, shown.first)
        save_png(path.with_name(f"{path.name}.png"), panel)
        scores = method_scores(maps, index, names)
        for key, one in scores.items():
            alike.setdefault(key.rpartition("/")[0], []).append(one["pearson"])
        rows[name] = {**said, **({"maps": scores} if scores else {})}
    results: dict[str, object] = {
        "n": len(rows),
        "methods": list(dict.fromkeys(method for method, _, _ in maps.pairs)),
        "refused": maps.refused,
        "images": rows,
    }
    write_results(out / "results.json", results, sha256=shown.sha256)
    if alike:
        means = {key: {"Pearson": float(np.nanmean(one))} for key, one in alike.items()}
        print(text_table({key: {**row, "n": len(alike[key])} for key, row in means.items()}))
    for name, reason in maps.refused.items():
        print(f"{name} is left out: {reason}")
    print(f"\n{out} has a panel of each image, raw maps (.npz), results.json")
    return results


def _path(out: Path, index: int, name: str) -> Path:
    """Where an image's files go, without their endings."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).with_suffix("").as_posix())
    return out / f"{index:03d}_{stem[-60:]}"


def _heading(said: dict[str, object]) -> str:
    return "   ".join(f"{who}: {_flat({who: what})[who]}" for who, what in said.items())


def _pairs(shown: Shown, layers: Sequence[str], image: Images) -> list[tuple[str, str]]:
    """The layers to show, as (teacher's, student's)."""
    if shown.student is None:
        return [(name, "") for name in layers or [last_layer(shown.teacher, image)]]
    if not layers:
        return shown.pairs or [(last_layer(shown.teacher, image), last_layer(shown.student, image))]
    split = [layer.split(":") for layer in layers]
    wrong = next((layer for layer, parts in zip(layers, split, strict=True) if len(parts) != 2), "")
    if wrong:
        raise UserError(
            f"layer '{wrong}': name the student's and the teacher's, such as stage3:layer2; the "
            f"checkpoint's own are {', '.join(f'{own}:{other}' for other, own in shown.pairs)}"
        )
    return [(teacher, student) for student, teacher in split]


def _class_number(name: str, names: Sequence[str]) -> int:
    if name in names:
        return list(names).index(name)
    if name.isdigit():
        return int(name)
    hint = nearest(name, names) if names else "give its number: names of classes aren't known here"
    raise UserError(f"no class '{name}'; {hint}")


def _class_name(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else str(number)


def _explanations(
    shown: Shown, images: Images, chosen: Sequence[int]
) -> tuple[Explanation, Explanation | None]:
    """Both networks on all images, maps being [B, C, h, w] for the classes shown."""
    told, own = [], []
    for part in torch.split(images, CHUNK):
        with torch.no_grad():
            top = shown.teacher(part).argmax(1)[:, None]
        classes = torch.tensor([chosen]).expand(len(part), -1) if chosen else top
        told.append(
            explain_network(shown.teacher, part, [pair[0] for pair in shown.pairs], classes)
        )
        if shown.student is not None:
            layers = [pair[1] for pair in shown.pairs]
            own.append(explain_network(shown.student, part, layers, classes))
    return _joined(told), _joined(own) if own else None


def _joined(parts: Sequence[Explanation]) -> Explanation:
    return Explanation(
        torch.cat([part.logits for part in parts]),
        torch.cat([part.classes for part in parts]),
        {name: torch.cat([part.maps[name] for part in parts]) for name in parts[0].maps},
        {},
    )


def _pairs_of_image(
    index: int, shown: Shown, told: Explanation, own: Explanation | None, names: Sequence[str]
) -> Iterator[Pair]:
    for layers in shown.pairs:
        for place, number in enumerate(told.classes[index].tolist()):
            teacher = told.maps[layers[0]][index, place]
            student = None if own is None else own.maps[layers[1]][index, place]
            scores = {}
            if student is not None:
                found = map_scores(student[None], teacher[None])
                scores = {name: float(value) for name, value in found._asdict().items()}
            grid = None if student is None else student.numpy()
            yield Pair(layers, _class_name(number, names), teacher.numpy(), grid, scores)


def _said(
    index: int,
    told: Explanation,
    own: Explanation | None,
    names: Sequence[str],
    first: str,
) -> dict[str, object]:
    """What each network takes the image for."""
    said: dict[str, object] = {}
    for who, found in ((first, told), ("student", own)):
        if found is not None:
            probability, top = probabilities(found.logits[index : index + 1])[0].max(0)
            said[who] = {"class": _class_name(int(top), names), "probability": float(probability)}
    return said


def _write_image(
    path: Path,
    name: str,
    image: Float[np.ndarray, "channels height width"],
    pairs: Sequence[Pair],
    said: dict[str, object],
    first: str,
) -> list[Row]:
    """Writes an image's panel and its raw maps; returns the panel's rows."""
    rows, arrays = [], {}
    for pair in pairs:
        caption = [pair.place, pair.class_name]
        caption += [f"Pearson {pair.scores['pearson']:.2f}"] if pair.scores else []
        rows.append(Row(image, pair.teacher, pair.student, caption))
        arrays[f"{first}/{pair.layers[0]}/{pair.class_name}"] = pair.teacher
        if pair.student is not None:
            arrays[f"student/{pair.layers[1]}/{pair.class_name}"] = pair.student
    panel = map_panel(rows, title=f"{name}   {_heading(said)}", first=first)
    save_png(path.with_name(f"{path.name}.png"), panel)
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_atomically(path.with_name(f"{path.name}.npz"), content.getvalue())
    return rows


def _flat(row: dict[str, object]) -> dict[str, Cell]:
    """An image's numbers as a line of the table."""
    line: dict[str, Cell] = {}
    for who, said in row.items():
        if not isinstance(said, dict):
            continue
        if who == "maps":
            line |= {
                f"Pearson {key.split('/')[0]}": scores["pearson"] for key, scores in said.items()
            }
        else:
            line[who] = f"{said['class']} {said['probability']:.2f}"
    return line
