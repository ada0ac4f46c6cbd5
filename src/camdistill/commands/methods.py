"""`explain --method`: images as several methods see them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camdistill.commands.networks import Shown
from camdistill.errors import UserError
from camdistill.explain.methods import AT_PIXELS, INPUT, METHODS, explainer
from camdistill.measure.scores import map_scores
from camdistill.networks.teachers import Preprocessed
from camdistill.report.figures.depth_maps import LayerMap, depth_panel
from camdistill.report.figures.methods import MethodMap, method_panel
from camdistill.report.figures.pictures import Picture
from camdistill.store.atomic_files import write_atomically
from camdistill.types import Images

Grid = Float[np.ndarray, "height width"]
Found = dict[tuple[str, str], Float[Tensor, "batch classes rows columns"]]
"""Maps by method and layer."""
CHUNK = 32  # images in one forward; methods that ask more have a memory of their own


@dataclass(frozen=True)
class MethodMaps:
    """What every method says of all images.

    Attributes:
        teacher: Maps of the first network.
        student: The other's, or None.
        pairs: (method, the first network's layer, the student's), in the order of showing.
        classes: [B, C].
        refused: Why a method of "all" was left out, by its name.
    """

    teacher: Found
    student: Found | None
    pairs: tuple[tuple[str, str, str], ...]
    classes: Tensor
    refused: dict[str, str]


def maps_by_method(
    shown: Shown, images: Images, classes: Tensor, methods: Sequence[str]
) -> MethodMaps:
    """Asks every method about both networks; "all" stands for all that these networks allow.

    Raises:
        UserError: There is no such method, or one that was named can't explain a network.
    """
    names = list(dict.fromkeys(METHODS if "all" in methods else methods))
    for name in names:
        explainer(name)  # an unknown one is told before the others have run
    networks = [shown.teacher] if shown.student is None else [shown.teacher, shown.student]
    found: list[Found] = [{} for _ in networks]
    pairs: list[tuple[str, str, str]] = []
    refused = {}
    for name in names:
        try:
            parts = [
                _maps(name, network, [pair[place] for pair in shown.pairs], images, classes)
                for place, network in enumerate(networks)
            ]
        except UserError as error:
            if "all" not in methods:
                raise
            refused[name] = str(error)
            continue
        for whole, part in zip(found, parts, strict=True):
            whole.update(part)
        layers = [(INPUT, INPUT)] if name in AT_PIXELS else shown.pairs
        pairs += [(name, *pair) for pair in layers]
    if not pairs:
        raise UserError(f"no method can explain this network: {next(iter(refused.values()))}")
    return MethodMaps(
        found[0], found[1] if len(found) > 1 else None, tuple(pairs), classes, refused
    )


def method_scores(
    maps: MethodMaps, index: int, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """How like the teacher's the student's maps of an image are, by method, layers and class."""
    scores = {}
    for method, layer, other in maps.pairs if maps.student is not None else ():
        for place, number in enumerate(maps.classes[index].tolist()):
            pair = _pair(maps, method, layer, other, index, place)
            assert pair[1] is not None, "there is a student"
            told = map_scores(pair[1][None], pair[0][None])
            layers = layer if layer == other else f"{other}:{layer}"
            key = f"{method}/{layers}/{_named(number, names)}"
            scores[key] = {name: float(value) for name, value in told._asdict().items()}
    return scores


def write_methods(
    path: Path, title: str, image: Float[np.ndarray, "channels height width"], maps: MethodMaps,
    index: int, names: Sequence[str], first: str,
) -> Picture:  # fmt: skip
    """Writes an image's raw maps, and returns its panel."""
    arrays: dict[str, Grid] = {}
    blocks: dict[str, list[MethodMap]] = {}
    for place, number in enumerate(maps.classes[index].tolist()):
        word = _named(number, names)
        for method, layer, other in maps.pairs:
            teacher, student = _pair(maps, method, layer, other, index, place)
            arrays[f"{first}/{layer}/{word}/{method}"] = teacher.numpy()
            block = blocks.setdefault(f"{first}: {word}", [])
            block.append(_drawn(method, layer, teacher.numpy(), ""))
            if student is not None:
                arrays[f"student/{other}/{word}/{method}"] = student.numpy()
                told = float(map_scores(student[None], teacher[None]).pearson)
                block = blocks.setdefault(f"student: {word}", [])
                block.append(_drawn(method, other, student.numpy(), f"r {told:.2f}"))
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_atomically(path.with_name(f"{path.name}.npz"), content.getvalue())
    if {method for method, _, _ in maps.pairs} == {"grad_cam"} and len(maps.pairs) > 1:
        deep = {
            name: [LayerMap(one.layer, one.values) for one in block]
            for name, block in blocks.items()
        }
        return depth_panel(image, {"Grad-CAM": deep}, title=title)
    return method_panel(image, blocks, title=title)


def _maps(
    method: str, network: Preprocessed, layers: Sequence[str], images: Images, classes: Tensor
) -> Found:
    explain = explainer(method)
    parts = [
        explain(network, part, layers, asked)
        for part, asked in zip(torch.split(images, CHUNK), torch.split(classes, CHUNK), strict=True)
    ]
    return {(method, layer): torch.cat([part[layer] for part in parts]) for layer in parts[0]}


def _drawn(method: str, layer: str, values: Grid, note: str) -> MethodMap:
    """RISE's sums have no zero of their own: what is drawn is what exceeds their minimum."""
    if method == "rise":
        return MethodMap(method, f"{layer}, above {values.min():.2g}", values - values.min(), note)
    return MethodMap(method, layer, values, note)


def _pair(
    maps: MethodMaps, method: str, layer: str, other: str, index: int, place: int
) -> tuple[Tensor, Tensor | None]:
    student = None if maps.student is None else maps.student[method, other][index, place]
    return maps.teacher[method, layer][index, place], student


def _named(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else str(number)
