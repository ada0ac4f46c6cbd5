"""`explain --method`: images as several methods see them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camdistill.commands.networks import NetworkSelection
from camdistill.errors import UserError
from camdistill.explain.methods import AT_PIXELS, INPUT, METHODS, find_method
from camdistill.measure.scores import map_scores
from camdistill.networks.teachers import Preprocessed
from camdistill.report.figures.depth_maps import LayerMap, depth_panel
from camdistill.report.figures.methods import MethodMap, method_panel
from camdistill.report.figures.pictures import Picture
from camdistill.store.atomic_files import write_atomically
from camdistill.types import Images

Grid = Float[np.ndarray, "height width"]
MapsByMethod = dict[tuple[str, str], Float[Tensor, "batch classes rows columns"]]
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

    teacher: MapsByMethod
    student: MapsByMethod | None
    pairs: tuple[tuple[str, str, str], ...]
    classes: Tensor
    refused: dict[str, str]


def maps_by_method(
    selection: NetworkSelection, images: Images, classes: Tensor, methods: Sequence[str]
) -> MethodMaps:
    """Asks every method about both networks; "all" stands for all that these networks allow.

    Raises:
        UserError: There is no such method, or one that was named can't explain a network.
    """
    names = list(dict.fromkeys(METHODS if "all" in methods else methods))
    for name in names:
        find_method(name)  # an unknown one is told before the others have run
    networks = (
        [selection.teacher] if selection.student is None else [selection.teacher, selection.student]
    )
    maps_by_network: list[MapsByMethod] = [{} for _ in networks]
    pairs: list[tuple[str, str, str]] = []
    refused = {}
    for name in names:
        try:
            parts = [
                _explain_layers(
                    name, network, [pair[index] for pair in selection.pairs], images, classes
                )
                for index, network in enumerate(networks)
            ]
        except UserError as error:
            if "all" not in methods:
                raise
            refused[name] = str(error)
            continue
        for collected, part in zip(maps_by_network, parts, strict=True):
            collected.update(part)
        layers = [(INPUT, INPUT)] if name in AT_PIXELS else selection.pairs
        pairs += [(name, *pair) for pair in layers]
    if not pairs:
        raise UserError(f"no method can explain this network: {next(iter(refused.values()))}")
    return MethodMaps(
        maps_by_network[0],
        maps_by_network[1] if len(maps_by_network) > 1 else None,
        tuple(pairs),
        classes,
        refused,
    )


def method_scores(
    maps: MethodMaps, index: int, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """How like the teacher's the student's maps of an image are, by method, layers and class."""
    scores = {}
    for method, teacher_layer, student_layer in maps.pairs if maps.student is not None else ():
        for position, number in enumerate(maps.classes[index].tolist()):
            pair = _map_pair(maps, method, teacher_layer, student_layer, index, position)
            assert pair[1] is not None, "there is a student"
            similarity = map_scores(pair[1][None], pair[0][None])
            layers = (
                teacher_layer
                if teacher_layer == student_layer
                else f"{student_layer}:{teacher_layer}"
            )
            key = f"{method}/{layers}/{_class_label(number, names)}"
            scores[key] = {name: float(value) for name, value in similarity._asdict().items()}
    return scores


def write_methods(
    path: Path, title: str, image: Float[np.ndarray, "channels height width"], maps: MethodMaps,
    index: int, names: Sequence[str], first: str,
) -> Picture:  # fmt: skip
    """Writes an image's raw maps, and returns its panel."""
    arrays: dict[str, Grid] = {}
    blocks: dict[str, list[MethodMap]] = {}
    for position, number in enumerate(maps.classes[index].tolist()):
        class_name = _class_label(number, names)
        for method, teacher_layer, student_layer in maps.pairs:
            teacher, student = _map_pair(
                maps, method, teacher_layer, student_layer, index, position
            )
            arrays[f"{first}/{teacher_layer}/{class_name}/{method}"] = teacher.numpy()
            block = blocks.setdefault(f"{first}: {class_name}", [])
            block.append(_method_map(method, teacher_layer, teacher.numpy(), ""))
            if student is not None:
                arrays[f"student/{student_layer}/{class_name}/{method}"] = student.numpy()
                correlation = float(map_scores(student[None], teacher[None]).pearson)
                block = blocks.setdefault(f"student: {class_name}", [])
                block.append(
                    _method_map(method, student_layer, student.numpy(), f"r {correlation:.2f}")
                )
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_atomically(path.with_name(f"{path.name}.npz"), content.getvalue())
    if {method for method, _, _ in maps.pairs} == {"grad_cam"} and len(maps.pairs) > 1:
        layer_maps = {
            name: [LayerMap(method_map.layer, method_map.values) for method_map in block]
            for name, block in blocks.items()
        }
        return depth_panel(image, {"Grad-CAM": layer_maps}, title=title)
    return method_panel(image, blocks, title=title)


def _explain_layers(
    method: str, network: Preprocessed, layers: Sequence[str], images: Images, classes: Tensor
) -> MapsByMethod:
    explain = find_method(method)
    parts = [
        explain(network, part, layers, part_classes)
        for part, part_classes in zip(
            torch.split(images, CHUNK), torch.split(classes, CHUNK), strict=True
        )
    ]
    return {(method, layer): torch.cat([part[layer] for part in parts]) for layer in parts[0]}


def _method_map(method: str, layer: str, values: Grid, note: str) -> MethodMap:
    """RISE's sums have no zero of their own: what is drawn is what exceeds their minimum."""
    if method == "rise":
        return MethodMap(method, f"{layer}, above {values.min():.2g}", values - values.min(), note)
    return MethodMap(method, layer, values, note)


def _map_pair(
    maps: MethodMaps, method: str, teacher_layer: str, student_layer: str, index: int, position: int
) -> tuple[Tensor, Tensor | None]:
    student = None if maps.student is None else maps.student[method, student_layer][index, position]
    return maps.teacher[method, teacher_layer][index, position], student


def _class_label(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else str(number)
