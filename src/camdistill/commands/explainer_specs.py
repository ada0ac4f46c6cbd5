"""What `evaluate` compares: networks and explainers by the words on its command line."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.commands.networks import NetworkSelection
from camdistill.distill.checkpoints import load
from camdistill.errors import UserError, check_each_once, nearest, shorten
from camdistill.experiments.evaluation.evaluation_run import EvaluatedExplainer, EvaluationSubject
from camdistill.experiments.evaluation.evaluation_values import CONTROLS, LADDER, UNREADABLE
from camdistill.experiments.evaluation.pooling import check_pairs
from camdistill.experiments.ranking.map_sources import call_function, code_sha256
from camdistill.explain.learnable import holds_explainer, load_explainer
from camdistill.explain.maps import upsample
from camdistill.explain.methods import METHODS, image_explainer
from camdistill.networks.class_paths import resolve
from camdistill.networks.heads import head_size
from camdistill.networks.teachers import Preprocessed
from camdistill.networks.weights import read_weights, weights_digest
from camdistill.store.atomic_files import expand_home, printable, read_arrays
from camdistill.types import Explain, Images, Labels

_OTHER_ROLE = {"teacher": "student", "student": "teacher"}
RawMaps = Float[Tensor, "batch rows columns"]


@dataclass(frozen=True)
class EvaluationNetworks:
    """The network whose decisions are explained, and the one beside it.

    Attributes:
        explained: In eval mode.
        layer: Layer of the explained network; None is its last spatial layer.
        other: Its student or its teacher; None where it is alone.
        other_layer: Likewise.
        role: "teacher" or "student": what the explained network is.
        size: Height and width of the images that it was trained on, in pixels.
        sha256: SHA-256 of the files that were read.
        channels: Channels of the images that the networks take: 3, or 1 for their mean.
    """

    explained: Preprocessed
    layer: str | None
    other: Preprocessed | None
    other_layer: str | None
    role: str
    size: tuple[int, int]
    sha256: dict[str, str | None]
    channels: int = 3


def select_networks(
    selection: NetworkSelection, role: Literal["teacher", "student"], layer: str | None
) -> EvaluationNetworks:
    """Which of a command's networks is explained, at which layer."""
    if role == "student" and selection.student is None and selection.first != "student":
        raise UserError("there is no student: leave out --of, or give a student's --checkpoint")
    if role == "teacher" and selection.first == "student":
        raise UserError("the teacher is missing: give --of student, or the teacher's --weights")
    teacher_layer, student_layer = selection.pairs[-1] if selection.pairs else (None, None)
    if selection.student is None:
        size, sha256 = selection.size, selection.sha256
        return EvaluationNetworks(
            selection.teacher, layer, None, None, role, size, sha256, selection.channels
        )
    sides = [(selection.teacher, teacher_layer), (selection.student, student_layer)]
    (explained, explained_layer), (other, other_layer) = sides if role == "teacher" else sides[::-1]
    return EvaluationNetworks(
        explained,
        layer or explained_layer,
        other,
        other_layer,
        role,
        selection.size,
        selection.sha256,
    )


def parse_explainers(
    specs: Sequence[str],
    networks: EvaluationNetworks,
    subject: EvaluationSubject,
    trust: Sequence[str],
) -> list[EvaluatedExplainer]:
    """The explainers that words name; several of one name are numbered."""
    check_each_once("--explainers", specs)
    other_name = _OTHER_ROLE[networks.role]
    default = ["grad_cam"] if networks.other is None else ["grad_cam", other_name]
    parsed = [
        (name, _parse_explainer(spec, other_name, networks, subject, trust))
        for name, spec in map(_split_name, specs or default)
    ]
    counts = Counter(name or explainer.name for name, explainer in parsed)
    used: Counter[str] = Counter()
    explainers = []
    for name, explainer in parsed:
        label = name or explainer.name
        if len(label) > 100:
            raise UserError(f"'{shorten(label)}' is too long a name; give another: NAME=...")
        if "#" in label:
            raise UserError(f"'{label}' can't name an explainer, because of #: give NAME={label}")
        if label in CONTROLS or label.startswith(LADDER):
            raise UserError(f"'{label}' is the name of a control; give another: NAME={label}...")
        if counts[label] > 1 and not name:
            raise UserError(
                f"{counts[label]} explainers are called '{label}': name each, NAME=..., the same "
                "name for seeds of the same"
            )
        used[label] += 1
        suffix = f"#{used[label]}" if counts[label] > 1 else ""
        explainers.append(replace(explainer, name=f"{label}{suffix}"))
    check_pairs([explainer.name for explainer in explainers])
    return explainers


def _split_name(argument: str) -> tuple[str, str]:
    """NAME=WHAT; a file's name may hold the sign too."""
    name, equals, spec = argument.partition("=")
    if not equals or _is_file(argument):
        return "", argument
    if re.fullmatch(r"[\w.@ -]{1,60}", name) is None or not name.strip(". "):
        raise UserError(
            f"{shorten(name)!r} can't name an explainer: NAME=... takes letters, digits, _ - . @ "
            "(60 at most)"
        )
    return name, spec


def _is_file(word: str) -> bool:
    try:
        return expand_home(word).is_file()
    except OSError:  # a name that no file can have
        return False


def _parse_explainer(
    spec: str,
    other_name: str,
    networks: EvaluationNetworks,
    subject: EvaluationSubject,
    trust: Sequence[str],
) -> EvaluatedExplainer:
    if spec == other_name and networks.other is not None:
        return _other_network_explainer(spec, networks)
    if spec.partition("@")[0] in METHODS:
        method, _, layer = spec.partition("@")
        layer = layer or networks.layer or ""
        return EvaluatedExplainer(
            spec, image_explainer(method, layer or None), kind=f"{method}@{layer}"
        )
    if spec.endswith(".npz"):
        return _load_stored_maps(expand_home(spec), subject)
    if spec.endswith((".safetensors", ".ckpt")):
        return _checkpoint_explainer(expand_home(spec), networks, trust)
    if _is_file(spec):
        raise UserError(f"'{spec}' is a file, but neither .safetensors, .ckpt nor .npz")
    if "." in spec:
        return _function_explainer(spec)
    known = [*METHODS, *([other_name] if networks.other is not None else [])]
    raise UserError(
        f"no explainer '{spec}'; {nearest(spec, known)}, or give package.module.function, "
        "FILE.safetensors or FILE.npz"
    )


def _other_network_explainer(name: str, networks: EvaluationNetworks) -> EvaluatedExplainer:
    """The map that the other network has for the class: whatever the explained one is."""
    assert networks.other is not None, "asked before"
    return EvaluatedExplainer(
        name,
        _grad_cam_of(networks.other, networks.other_layer),
        kind=f"{name}@{networks.other_layer or ''}",
        digest=weights_digest(networks.other),
        apart=True,
    )


def _checkpoint_explainer(
    path: Path, networks: EvaluationNetworks, trust: Sequence[str]
) -> EvaluatedExplainer:
    """What a file explains with: an adapted explainer, or another student's map for the class."""
    if path.suffix == ".safetensors" and holds_explainer(weights := read_weights(path)):
        return EvaluatedExplainer(
            path.stem, _load_adapted(path), kind="adapted", digest=weights.sha256
        )
    student = load(path, trust=trust)
    class_count, explained_count = (
        head_size(network.network) for network in (student.network, networks.explained)
    )
    if class_count != explained_count:
        raise UserError(
            f"'{path}' tells {class_count} classes apart, the network that is explained "
            f"{explained_count}: give "
            "a student of the same classes"
        )
    layer = student.pairs[-1][0] if student.pairs else None
    digest = weights_digest(student.network)
    kind = f"{_OTHER_ROLE[networks.role]}@{layer or ''}"
    explain = _grad_cam_of(student.network, layer)
    return EvaluatedExplainer(path.stem, explain, kind=kind, digest=digest, apart=True)


def _grad_cam_of(other: nn.Module, layer: str | None) -> Explain:
    """Its own Grad-CAM, whatever network is asked about."""
    grad_cam = image_explainer("grad_cam", layer)

    def explain(network: nn.Module, images: Images, classes: Labels) -> RawMaps:
        return grad_cam(other.to(images.device), images, classes)

    return explain


def _load_adapted(path: Path) -> Explain:
    explainer = load_explainer(path)

    def explain(network: nn.Module, images: Images, classes: Labels) -> RawMaps:
        with torch.no_grad():
            maps = explainer.to(images.device)(network, images, classes)
        return upsample(maps, (images.shape[-2], images.shape[-1]))

    return explain


def _function_explainer(path: str) -> EvaluatedExplainer:
    function = resolve(path, what="a function of (network, images, classes)")
    digest = code_sha256(function) or ""

    def explain(network: nn.Module, images: Images, classes: Labels) -> RawMaps:
        maps = call_function(path, function, network, images, classes)
        if not isinstance(maps, Tensor):
            raise UserError(
                f"explainer '{path}' gave a {type(maps).__name__}: it must return a tensor, one "
                "map an image"
            )
        return maps

    return EvaluatedExplainer(path, explain, kind=path, digest=digest)


def _load_stored_maps(path: Path, subject: EvaluationSubject) -> EvaluatedExplainer:
    count, size = len(subject.images), subject.images.size

    def check(name: str, shape: tuple[int, ...]) -> None:
        if name != "maps":
            return
        if len(shape) != 3 or shape[0] != count:
            raise UserError(
                f"'maps' in '{path}' has the shape {list(shape)} for {count} images: give one map "
                f"an image, [{count}, height, width], in the order of the images"
            )
        if max(shape[1:]) > 4 * max(size):
            raise UserError(
                f"'maps' in '{path}' has maps of {shape[1]}x{shape[2]} cells for images of "
                f"{size[0]}x{size[1]} pixels: give maps of the images' size or smaller"
            )

    try:
        arrays = read_arrays(path, check)
    except UserError:
        raise
    except FileNotFoundError:
        neighbors = [str(file) for file in path.parent.glob("*.npz")]
        raise UserError(f"no file '{path}'; {nearest(str(path), neighbors)}") from None
    except UNREADABLE as error:
        raise UserError(f"'{path}' is no .npz of arrays ({error}); save it again") from None
    maps = arrays.get("maps")
    if maps is None:
        raise UserError(f"'{path}' has no array 'maps'; {nearest('maps', arrays)}")
    if maps.dtype.kind not in "fiub" or not maps.size:
        raise UserError(
            f"'maps' in '{path}' has the shape {list(maps.shape)} and the type {maps.dtype}: give "
            "real numbers"
        )
    digest = hashlib.sha256(np.ascontiguousarray(maps).tobytes()).hexdigest()
    return EvaluatedExplainer(
        printable(path.stem), stored=maps.astype(np.float32), kind="stored", digest=digest
    )
