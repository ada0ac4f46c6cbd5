"""Sources of the maps that students learn from: a method, a file, a function or a mask."""

import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from camdistill.data.datasets import ImageSet, PixelArray
from camdistill.data.modules import ImageData, ShapesData
from camdistill.errors import UserError, nearest
from camdistill.explain.gradcam import last_layer
from camdistill.explain.learnable import load_explainer
from camdistill.explain.methods import AT_PIXELS, METHODS, ExplanationMethod, find_method
from camdistill.networks.class_paths import FAILURES, SAFE_PACKAGES
from camdistill.networks.teachers import Teacher
from camdistill.store.atomic_files import expand_home, read_arrays
from camdistill.store.digest import sha256_of
from camdistill.types import Explain, Images, Labels

MASK = "mask:"
Maps = Float[Tensor, "batch rows columns"]


@dataclass(frozen=True)
class MapRequest:
    """Images whose maps are wanted, and of which class.

    Attributes:
        images: In [0, 1], mirrored already where they are.
        classes: The teacher's top class of each.
        ids: The images' numbers in the training set.
        mirrored: Whether these are the mirror images.
    """

    images: Images
    classes: Labels
    ids: Labels
    mirrored: bool


@dataclass(frozen=True)
class MapSource:
    """Where maps come from.

    Attributes:
        name: Name as the user wrote it.
        key: What decides the maps, apart from the teacher and the images.
        maps: Gives raw maps.
        of_teacher: Whether the teacher is asked: then a randomized one gives a control.
        layer: Layer of the teacher, if one is named.
    """

    name: str
    key: dict[str, str | None]
    maps: Callable[[Teacher, MapRequest], Maps]
    of_teacher: bool
    layer: str | None = None


def parse_source(name: str, data: ImageData, trust: Collection[str] = ()) -> MapSource:
    """What a name stands for.

    Args:
        name: `grad_cam@layer3` (a method of ours at a layer of the teacher; without a layer at the
            last one, or at the pixels where that is what the method explains), `maps.npz`, an
            adapted explainer's `explainer.safetensors`,
            `package.module.function` of (network, images, classes) that gives one map an image, for
            Shapes `mask:parts` and other masks, for image folders `mask:object` and `mask:box`.
        data: Where the images come from.
        trust: Packages besides camdistill from which functions may be called.

    Raises:
        UserError: If there is no such method, file, function or mask.
    """
    if name.startswith(MASK):
        return _of_mask(name, data)
    if name.endswith(".npz"):
        return _of_file(name)
    if name.endswith(".safetensors"):
        return _of_explainer(name)
    method, _, layer = name.partition("@")
    if method in AT_PIXELS and layer:
        raise UserError(f"'{method}' explains at the pixels; leave out '@{layer}'")
    if method in METHODS:
        return _of_method(name, find_method(method), layer or None)
    if "." not in method:
        raise UserError(
            f"no method '{method}'; {nearest(method, METHODS)}; or give maps.npz, or "
            "package.module.function"
        )
    if layer:
        raise UserError(
            f"'{method}' is asked for no layer, as it chooses its own: '{method}' alone"
        )
    return _of_function(name, _import_function(method, trust))


def _of_method(name: str, method: ExplanationMethod, layer: str | None) -> MapSource:
    def maps(teacher: Teacher, request: MapRequest) -> Maps:
        layers = [layer or last_layer(teacher, request.images)]
        (layer_maps,) = method(teacher, request.images, layers, request.classes).values()
        return _check_maps(name, layer_maps, len(request.images))

    return MapSource(name, _key(name, method, layer), maps, True, layer)


def call_function(
    path: str,
    function: Callable[..., object],
    network: nn.Module,
    images: Images,
    classes: Labels,
) -> object:
    """What a user's function gives.

    Raises:
        UserError: If it fails; the line says what it was called with.
    """
    try:
        return function(network, images, classes)
    except UserError:
        raise
    except FAILURES as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"function '{path}' fails ({type(error).__name__}: {reason}): it is called with "
            "(network, images, classes) and must return one map an image"
        ) from error


def _of_function(name: str, function: Explain) -> MapSource:
    def maps(teacher: Teacher, request: MapRequest) -> Maps:
        function_maps = call_function(name, function, teacher, request.images, request.classes)
        return _check_maps(name, function_maps, len(request.images))

    return MapSource(name, _key(name, function, None), maps, True)


def _of_explainer(name: str) -> MapSource:
    explainer = load_explainer(name)

    def maps(teacher: Teacher, request: MapRequest) -> Maps:
        with torch.no_grad():
            explainer_maps = explainer.to(request.images.device)(
                teacher, request.images, request.classes
            )
        return _check_maps(name, explainer_maps, len(request.images))

    key = _key("explainer", type(explainer), None)
    return MapSource(name, key | {"sha256": sha256_of(Path(name))}, maps, True)


def _key(name: str, code: Callable[..., object], layer: str | None) -> dict[str, str | None]:
    """What decides a method's maps: its name, its layer, and the file that it is written in."""
    return {"name": name.partition("@")[0], "layer": layer, "code": code_sha256(code)}


def code_sha256(code: Callable[..., object]) -> str | None:
    """Of the file that a function, a class or an object that can be called is written in."""
    code = inspect.unwrap(code)
    while isinstance(code, functools.partial):
        code = inspect.unwrap(code.func)
    written = code if inspect.isroutine(code) or inspect.isclass(code) else type(code)
    try:
        file = inspect.getsourcefile(written)
    except TypeError:  # built into Python
        file = None
    return sha256_of(Path(file)) if file else None


def _check_maps(name: str, maps: object, count: int) -> Maps:
    if not isinstance(maps, Tensor) or maps.dim() != 3 or len(maps) != count:
        description = list(maps.shape) if isinstance(maps, Tensor) else f"a {type(maps).__name__}"
        raise UserError(f"'{name}' gives {description} for {count} images; give maps [B, h, w]")
    if not bool(torch.isfinite(maps).all()):
        raise UserError(f"'{name}' gives maps that are not numbers; mend the method")
    return maps.detach().float()


def _import_function(path: str, trust: Collection[str]) -> Explain:
    package, module, name = path.partition(".")[0], *path.rpartition(".")[::2]
    if package not in (SAFE_PACKAGES[0], *trust):
        raise UserError(
            f"function '{path}' lies outside {SAFE_PACKAGES[0]}: importing it runs its code; "
            f"add `--trust {package}` if you trust it"
        )
    try:
        function: Explain = getattr(importlib.import_module(module), name)
    except (*FAILURES, SyntaxError, NameError) as error:
        raise UserError(
            f"can't import '{path}': {error}; check the name, or put its folder on PYTHONPATH"
        ) from error
    if not callable(function):
        raise UserError(f"'{path}' is a {type(function).__name__}; name a function")
    return function


def _of_mask(name: str, data: ImageData) -> MapSource:
    if not isinstance(data, ShapesData):
        return _of_annotations(name, data)
    shapes, mask_name = data.shapes("train"), name.removeprefix(MASK)
    masks_by_name = shapes.render(np.zeros(1, np.int64)).masks
    if mask_name not in masks_by_name:
        raise UserError(f"Shapes have no mask '{mask_name}'; {nearest(mask_name, masks_by_name)}")

    def maps(teacher: Teacher, request: MapRequest) -> Maps:
        rendered = shapes.render(request.ids.cpu().numpy()).masks[mask_name]
        masks = torch.from_numpy(rendered).float()
        return (masks.flip(-1) if request.mirrored else masks).to(request.images.device)

    return MapSource(name, {"name": name, "shapes": shapes.fingerprint}, maps, False)


def _of_annotations(name: str, data: ImageData) -> MapSource:
    """Masks or boxes of an image folder: where the object is, whatever the teacher looks at."""
    data.prepare_data()
    data.setup("fit")
    images = data.train_set
    assert images is not None, "setup made it"
    annotation_masks = _masks_of(name, images)
    place = {int(number): row for row, number in enumerate(images.ids)}

    def maps(teacher: Teacher, request: MapRequest) -> Maps:
        rows = np.array([place[number] for number in request.ids.tolist()])
        masks = torch.from_numpy(np.asarray(annotation_masks[rows], np.float32))
        return (masks.flip(-1) if request.mirrored else masks).to(request.images.device)

    content = hashlib.sha256(
        np.ascontiguousarray(annotation_masks[np.arange(len(images))]).tobytes()
    )
    return MapSource(name, {"name": name, "sha256": content.hexdigest()}, maps, False)


def _masks_of(name: str, images: ImageSet) -> PixelArray:
    if name == f"{MASK}object" and images.masks is not None:
        return images.masks
    if name == f"{MASK}box" and images.boxes is not None:
        return _fill_boxes(images.boxes, images.size)
    raise UserError(
        f"'{name}' is not there: mask:object needs masks and mask:box boxes.csv beside the images "
        "(and mask:parts ShapesData); name a method"
    )


def _fill_boxes(boxes: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.uint8]:
    """1 inside each box, whose pixels are inclusive; nothing where an image has none."""
    rows, columns = np.arange(size[0])[None, :, None], np.arange(size[1])[None, None, :]
    left, top, right, bottom = (boxes[:, side, None, None] for side in range(4))
    inside = (columns >= left) & (columns <= right) & (rows >= top) & (rows <= bottom)
    return inside.astype(np.uint8)


def _of_file(name: str) -> MapSource:
    stored, ids = _read_maps(expand_home(name))
    place = {int(number): row for row, number in enumerate(ids)}
    mirrored = "mirrored" if "mirrored" in stored else "maps"

    def maps(teacher: Teacher, request: MapRequest) -> Maps:
        unknown = [number for number in request.ids.tolist() if number not in place]
        if unknown:
            raise UserError(
                f"{name} has no map of training image {unknown[0]}; store one a training image "
                "in their order, or say which in 'ids'"
            )
        rows = [place[number] for number in request.ids.tolist()]
        stored_maps = torch.from_numpy(stored[mirrored if request.mirrored else "maps"][rows])
        flip = request.mirrored and mirrored == "maps"
        return (stored_maps.flip(-1) if flip else stored_maps).to(request.images.device)

    # of the content: a file that is written again has another date inside
    content = hashlib.sha256(ids.tobytes())
    for key, array in stored.items():
        content.update(f"{key} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return MapSource(name, {"sha256": content.hexdigest()}, maps, False)


def _read_maps(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of a file of maps, checked: `maps` [N, h, w], `mirrored`, `ids`."""
    if not path.is_file():
        beside = sorted(file.name for file in path.parent.glob("*.npz"))
        hint = nearest(path.name, beside) if beside else "check the path"
        raise UserError(f"no file {path}; {hint}")
    try:
        arrays = read_arrays(path)
    except UserError:
        raise
    except (ValueError, OSError, EOFError, KeyError, BadZipFile) as error:
        raise UserError(f"can't read {path}: {error}; write it with numpy.savez") from None
    if "maps" not in arrays:
        raise UserError(f"{path} holds {sorted(arrays)}, not 'maps'; savez(file, maps=array)")
    stored_arrays: dict[str, np.ndarray] = {
        key: np.asarray(arrays[key], np.float32) for key in ("maps", "mirrored") if key in arrays
    }
    for key, array in stored_arrays.items():
        if array.ndim != 3 or not np.isfinite(array).all():
            raise UserError(
                f"'{key}' of {path} has shape {array.shape}; give finite numbers [N, h, w]"
            )
    count = len(stored_arrays["maps"])
    ids = np.asarray(arrays.get("ids", np.arange(count)))
    if len(ids) != count or any(len(array) != count for array in stored_arrays.values()):
        raise UserError(f"the arrays of {path} have different lengths; give one map an image")
    return stored_arrays, ids
