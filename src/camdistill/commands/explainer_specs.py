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

from camdistill.commands.networks import Shown
from camdistill.distill.checkpoints import load
from camdistill.errors import UserError, check_each_once, nearest, shortened
from camdistill.experiments.evaluation.evaluation_run import Explainer, Subject
from camdistill.experiments.evaluation.evaluation_values import CONTROLS, LADDER, UNREADABLE
from camdistill.experiments.evaluation.pooling import demand_pairs
from camdistill.experiments.ranking.map_sources import call_function, code_sha256
from camdistill.explain.learnable import holds_explainer, load_explainer
from camdistill.explain.maps import upsample
from camdistill.explain.methods import METHODS, at_image
from camdistill.networks.class_paths import resolve
from camdistill.networks.heads import head_size
from camdistill.networks.teachers import Preprocessed
from camdistill.networks.weights import read_weights, weights_digest
from camdistill.store.atomic_files import expand_home, printable, read_arrays
from camdistill.types import Explain, Images, Labels

_BESIDE = {"teacher": "student", "student": "teacher"}
RawMaps = Float[Tensor, "batch rows columns"]


@dataclass(frozen=True)
class Networks:
    """The network whose decisions are explained, and the one beside it.

    Attributes:
        explained: In eval mode.
        layer: Of the explained network; None is its last spatial layer.
        other: Its student or its teacher; None where it is alone.
        other_layer: Likewise.
        of: "teacher" or "student": what the explained network is.
        size: Height and width of the images that it was trained on, in pixels.
        sha256: Of the files that were read.
        channels: Of the images that the networks take: 3, or 1 for their mean.
    """

    explained: Preprocessed
    layer: str | None
    other: Preprocessed | None
    other_layer: str | None
    of: str
    size: tuple[int, int]
    sha256: dict[str, str | None]
    channels: int = 3


def networks_of(found: Shown, of: Literal["teacher", "student"], layer: str | None) -> Networks:
    """Which of a command's networks is explained, at which layer."""
    if of == "student" and found.student is None and found.first != "student":
        raise UserError("there is no student: leave out --of, or give a student's --checkpoint")
    if of == "teacher" and found.first == "student":
        raise UserError("the teacher is missing: give --of student, or the teacher's --weights")
    told, student = found.pairs[-1] if found.pairs else (None, None)
    if found.student is None:
        size, sha256 = found.size, found.sha256
        return Networks(found.teacher, layer, None, None, of, size, sha256, found.channels)
    both = [(found.teacher, told), (found.student, student)]
    (explained, own), (other, beside) = both if of == "teacher" else both[::-1]
    return Networks(explained, layer or own, other, beside, of, found.size, found.sha256)


def explainers_of(
    words: Sequence[str], networks: Networks, subject: Subject, trust: Sequence[str]
) -> list[Explainer]:
    """The explainers that words name; several of one name are numbered."""
    check_each_once("--explainers", words)
    beside = _BESIDE[networks.of]
    default = ["grad_cam"] if networks.other is None else ["grad_cam", beside]
    found = [
        (name, _explainer(what, beside, networks, subject, trust))
        for name, what in map(_named, words or default)
    ]
    counts = Counter(name or one.name for name, one in found)
    seen: Counter[str] = Counter()
    compared = []
    for name, one in found:
        called = name or one.name
        if len(called) > 100:
            raise UserError(f"'{shortened(called)}' is too long a name; give another: NAME=...")
        if "#" in called:
            raise UserError(f"'{called}' can't name an explainer, because of #: give NAME={called}")
        if called in CONTROLS or called.startswith(LADDER):
            raise UserError(f"'{called}' is the name of a control; give another: NAME={called}...")
        if counts[called] > 1 and not name:
            raise UserError(
                f"{counts[called]} explainers are called '{called}': name each, NAME=..., the same "
                "name for seeds of the same"
            )
        seen[called] += 1
        several = f"#{seen[called]}" if counts[called] > 1 else ""
        compared.append(replace(one, name=f"{called}{several}"))
    demand_pairs([one.name for one in compared])
    return compared


def _named(word: str) -> tuple[str, str]:
    """NAME=WHAT; a file's name may hold the sign too."""
    name, sign, what = word.partition("=")
    if not sign or _is_file(word):
        return "", word
    if re.fullmatch(r"[\w.@ -]{1,60}", name) is None or not name.strip(". "):
        raise UserError(
            f"{shortened(name)!r} can't name an explainer: NAME=... takes letters, digits, _ - . @ "
            "(60 at most)"
        )
    return name, what


def _is_file(word: str) -> bool:
    try:
        return expand_home(word).is_file()
    except OSError:  # a name that no file can have
        return False


def _explainer(
    word: str, beside: str, networks: Networks, subject: Subject, trust: Sequence[str]
) -> Explainer:
    if word == beside and networks.other is not None:
        return _of_other(word, networks)
    if word.partition("@")[0] in METHODS:
        method, _, layer = word.partition("@")
        layer = layer or networks.layer or ""
        return Explainer(word, at_image(method, layer or None), kind=f"{method}@{layer}")
    if word.endswith(".npz"):
        return _stored(expand_home(word), subject)
    if word.endswith((".safetensors", ".ckpt")):
        return _of_checkpoint(expand_home(word), networks, trust)
    if _is_file(word):
        raise UserError(f"'{word}' is a file, but neither .safetensors, .ckpt nor .npz")
    if "." in word:
        return _callable(word)
    known = [*METHODS, *([beside] if networks.other is not None else [])]
    raise UserError(
        f"no explainer '{word}'; {nearest(word, known)}, or give package.module.function, "
        "FILE.safetensors or FILE.npz"
    )


def _of_other(name: str, networks: Networks) -> Explainer:
    """The map that the other network has for the class: whatever the explained one is."""
    assert networks.other is not None, "asked before"
    return Explainer(
        name,
        _grad_cam_of(networks.other, networks.other_layer),
        kind=f"{name}@{networks.other_layer or ''}",
        digest=weights_digest(networks.other),
        apart=True,
    )


def _of_checkpoint(path: Path, networks: Networks, trust: Sequence[str]) -> Explainer:
    """What a file explains with: an adapted explainer, or another student's map for the class."""
    if path.suffix == ".safetensors" and holds_explainer(weights := read_weights(path)):
        return Explainer(path.stem, _adapted(path), kind="adapted", digest=weights.sha256)
    found = load(path, trust=trust)
    own, explained = (head_size(one.network) for one in (found.network, networks.explained))
    if own != explained:
        raise UserError(
            f"'{path}' tells {own} classes apart, the network that is explained {explained}: give "
            "a student of the same classes"
        )
    layer = found.pairs[-1][0] if found.pairs else None
    made_by = weights_digest(found.network)
    kind = f"{_BESIDE[networks.of]}@{layer or ''}"
    explain = _grad_cam_of(found.network, layer)
    return Explainer(path.stem, explain, kind=kind, digest=made_by, apart=True)


def _grad_cam_of(other: nn.Module, layer: str | None) -> Explain:
    """Its own Grad-CAM, whatever network is asked about."""
    show = at_image("grad_cam", layer)

    def explain(network: nn.Module, images: Images, classes: Labels) -> RawMaps:
        return show(other.to(images.device), images, classes)

    return explain


def _adapted(path: Path) -> Explain:
    explainer = load_explainer(path)

    def explain(network: nn.Module, images: Images, classes: Labels) -> RawMaps:
        with torch.no_grad():
            maps = explainer.to(images.device)(network, images, classes)
        return upsample(maps, (images.shape[-2], images.shape[-1]))

    return explain


def _callable(path: str) -> Explainer:
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

    return Explainer(path, explain, kind=path, digest=digest)


def _stored(path: Path, subject: Subject) -> Explainer:
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
        beside = [str(file) for file in path.parent.glob("*.npz")]
        raise UserError(f"no file '{path}'; {nearest(str(path), beside)}") from None
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
    return Explainer(
        printable(path.stem), stored=maps.astype(np.float32), kind="stored", digest=digest
    )
