"""Trained networks as files, and back: `load` gives a network that classifies and explains."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from camdistill.data.decode import LARGEST_SIDE
from camdistill.distill.classifier import Classifier
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.distill.refiner import Refiner
from camdistill.errors import UserError, check_number
from camdistill.explain.engine.request import Classes, Grad, Score
from camdistill.explain.gradcam import Explanation, explain_images
from camdistill.networks.class_paths import SAFE_PACKAGES
from camdistill.networks.fitting import load_weights
from camdistill.networks.heads import head_size
from camdistill.networks.teachers import (
    NetworkSpec,
    Preprocessed,
    Teacher,
    build,
    check_moments,
    normalization,
)
from camdistill.networks.training_facts import (
    EXPERIMENT,
    Triple,
    dump_experiment,
    parse_experiment,
    training_facts,
)
from camdistill.networks.weights import (
    WeightFile,
    read_weights,
    save_safetensors,
    sha256_when_saved,
)
from camdistill.store.digest import sha256_of
from camdistill.types import Images, Logits


class TrainedExplainer(nn.Module):
    """A trained network with what is known of it; it takes images in [0, 1].

    Attributes:
        network: The student, or the network that was trained alone.
        teacher: Its teacher, where there is one and its weights were found.
        teacher_missing: Why there is no teacher; empty when there is one or never was.
        pairs: Layers that were matched: (student, teacher, weight).
        classes: Names of the classes; empty when unknown.
        mean_map_by_layer: The teacher's mean map over the training split.
        settings: The experiment's.
        sha256: SHA-256 of the file.
    """

    def __init__(
        self,
        network: Preprocessed,
        *,
        teacher: Teacher | None = None,
        teacher_missing: str = "",
        pairs: Sequence[tuple[str, str, float]] = (),
        classes: Sequence[str] = (),
        mean_map_by_layer: Mapping[str, Tensor] | None = None,
        settings: Mapping[str, Any] | None = None,
        sha256: str = "",
    ) -> None:
        super().__init__()
        self.network = network
        self.teacher = teacher
        self.teacher_missing = teacher_missing
        self.pairs = list(pairs)
        self.classes = tuple(classes)
        self.mean_map_by_layer = dict(mean_map_by_layer or {})
        self.settings = dict(settings or {})
        self.sha256 = sha256

    def forward(self, images: Images) -> Logits:
        """Logits of images in [0, 1]."""
        logits: Logits = self.network(images)
        return logits

    def explain(
        self,
        images: Images,
        layers: Sequence[str] | None = None,
        classes: Classes = None,
        *,
        score: Score = "logit",
        grad: Grad = "none",
    ) -> Explanation:
        """Logits and maps of the network itself; see `explain.gradcam.explain_images`."""
        return explain_images(self.network, images, layers, classes, score=score, grad=grad)


def write_checkpoint(module: DistilledExplainer | Classifier | Refiner, path: Path) -> str:
    """Writes what was trained as a small safetensors file, the experiment in its metadata.

    Args:
        module: Trained; of a `DistilledExplainer` the student is kept, never the teacher.
        path: The file.

    Returns:
        The file's sha256.
    """
    return save_safetensors(path, module.fitted.network.state_dict(), _metadata(module))


def is_saved(module: DistilledExplainer | Classifier | Refiner, path: Path) -> bool:
    """Whether a file is, byte for byte, what `write_checkpoint` would write."""
    if not path.is_file():
        return False
    state = module.fitted.network.state_dict()
    return sha256_of(path) == sha256_when_saved(state, _metadata(module))


def _metadata(module: DistilledExplainer | Classifier | Refiner) -> dict[str, str]:
    return {**module.fitted.metadata(), EXPERIMENT: dump_experiment(module.experiment())}


def load(
    path: str | Path, *, trust: Sequence[str] = (), teacher: str | Path | None = None
) -> TrainedExplainer:
    """A trained network from a checkpoint of ours: safetensors, or Lightning's `.ckpt`.

    No code of the file is run: class paths in it resolve inside camdistill, torch, torchvision and
    timm alone. Where its teacher's file has a relative path, it is looked for from the working
    directory, then from the checkpoint's folder and the folders above it; only a file with the
    sha256 that the checkpoint tells is taken. Without its teacher the student works alone.

    Args:
        path: The file.
        trust: Further packages that class paths in the file may come from.
        teacher: The teacher's weights, where they are not (or no longer) where the file says.

    Raises:
        UserError: If the file is damaged, not one of ours, or names code that isn't trusted; or if
            the file given as `teacher` doesn't fit.
    """
    weights = read_weights(path)
    settings = _read_settings(weights)
    allowed = (*SAFE_PACKAGES, *trust)
    with _report_unreadable(weights.path):
        spec = _parse_spec(settings["student" if "student" in settings else "network"])
        teacher_spec = _parse_spec(settings["teacher"]) if "student" in settings else None
        pairs = [(str(a), str(b), float(w)) for a, b, w in settings.get("pairs", [])]
        means = _parse_mean_maps(settings)
        class_names = _parse_class_names(settings.get("class_names", []))
        _check_image_settings(settings, weights.path)
    network = _build_network(spec, weights, settings, allowed).eval()
    if class_names and len(class_names) != (count := head_size(network.network)):
        raise UserError(
            f"'{weights.path}' names {len(class_names)} classes, its network has {count}: give a "
            "checkpoint as it was written"
        )
    loaded_teacher, missing = None, ""
    if teacher_spec is not None:
        expected = settings.get("teacher_sha256")
        loaded_teacher, missing = _find_teacher(
            teacher_spec, expected, weights.path, teacher, allowed
        )
    return TrainedExplainer(
        network,
        teacher=loaded_teacher,
        teacher_missing=missing,
        pairs=pairs,
        classes=class_names,
        mean_map_by_layer=means,
        settings=settings,
        sha256=weights.sha256,
    )


def restore(module: DistilledExplainer | Classifier | Refiner, path: str | Path) -> None:
    """Puts the weights of a small checkpoint into a module, to test it or to predict with it.

    Args:
        module: Built from the config of the experiment.
        path: A file that `write_checkpoint` wrote.

    Raises:
        UserError: If the file is damaged, not one of ours, or of another network.
    """
    weights = read_weights(path)
    settings = _read_settings(weights)
    if isinstance(module, Classifier | Refiner):
        module.network = _build_network(module.spec, weights, settings, None)
        return
    load_weights(module.student.network, weights)
    with _report_unreadable(weights.path):
        module.mean_map_by_layer = _parse_mean_maps(settings)


def _check_image_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Refuses an experiment whose images can't have been: everything is shown at their size."""
    cure = f"; '{path}' says so of its images: give a checkpoint as it was written"
    for side in settings.get("size") or []:
        check_number("size", int(side), f"[1, {LARGEST_SIDE}]", f"it is in pixels{cure}")
    carving = settings.get("carving") or {}
    share, seed = float(carving.get("test_fraction", 0.1)), int(carving.get("split_seed", 0))
    check_number("test_fraction", share, "[0, inf)", f"it is a share{cure}")
    check_number("split_seed", seed, "[0, inf)", f"it is 0 or more{cure}")


def _build_network(
    spec: NetworkSpec,
    weights: WeightFile,
    settings: Mapping[str, Any],
    allowed: Sequence[str] | None,
) -> Preprocessed:
    """What was trained, with its weights and its normalization."""
    with _report_unreadable(weights.path):
        classes = None if settings.get("classes") is None else int(settings["classes"])
        has_moments = {"mean", "std"} <= set(settings)
        moments = (
            (_parse_triple(settings["mean"]), _parse_triple(settings["std"]))
            if has_moments
            else None
        )
    if moments is not None:
        check_moments(*moments, f"; '{weights.path}' says so: give a checkpoint as it was written")
    network = build(replace(spec, weights=None), classes=classes, allowed=allowed)
    load_weights(network, weights)
    return Preprocessed(
        network, *(moments or normalization(spec, weights)), facts=training_facts(weights)
    )


@contextmanager
def _report_unreadable(path: Path) -> Iterator[None]:
    """What a damaged or foreign experiment makes its readers raise, as one line."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"the experiment in '{path}' can't be read ({type(error).__name__}: {error}); copy the "
            "file again"
        ) from error


def _parse_triple(values: Sequence[float]) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _parse_class_names(names: object) -> list[str]:
    if not isinstance(names, list):
        raise ValueError("class_names is no list")
    return [str(name) for name in names]


def _parse_mean_maps(settings: Mapping[str, Any]) -> dict[str, Tensor]:
    means_by_layer = settings.get("mean_map_by_layer", {})
    return {layer: torch.tensor(mean) for layer, mean in means_by_layer.items()}


def _read_settings(weights: WeightFile) -> dict[str, Any]:
    text = weights.metadata.get(EXPERIMENT)
    if text is None:
        raise UserError(
            f"'{weights.path}' has weights but no experiment of camdistill in it; give a run's "
            "student.safetensors or last.ckpt, or name the network that the weights are of, where "
            "a command has it: --teacher resnet56 --weights FILE"
        )
    with _report_unreadable(weights.path):
        settings = parse_experiment(text, f"'{weights.path}'")
        if not {"student", "network"} & set(settings):
            raise ValueError("no network in it")
    return settings


def _parse_spec(settings: Mapping[str, Any]) -> NetworkSpec:
    weights = settings.get("weights")
    return NetworkSpec(
        name=str(settings["name"]),
        weights=None if weights is None else str(weights),
        args=dict(settings.get("args") or {}),
        mean=_parse_triple(settings.get("mean", NetworkSpec.mean)),
        std=_parse_triple(settings.get("std", NetworkSpec.std)),
    )


def _find_teacher(
    spec: NetworkSpec,
    expected: str | None,
    path: Path,
    teacher_path: str | Path | None,
    allowed: Sequence[str],
) -> tuple[Teacher | None, str]:
    """The teacher, or why there is none: the student's own output needs no teacher."""
    if teacher_path is not None:
        return Teacher(replace(spec, weights=str(teacher_path)), allowed=allowed), ""
    missing = ""
    for weights_path in _candidate_paths(spec.weights, path):
        try:
            teacher = Teacher(replace(spec, weights=weights_path), allowed=allowed)
        except UserError as error:
            missing = missing or str(error)
            continue
        if expected is None or teacher.sha256 == expected:
            return teacher, ""
        missing = f"'{weights_path}' is not (or no longer) the file that it was distilled from"
    return None, missing


def _candidate_paths(weights: str | None, checkpoint: Path) -> list[str | None]:
    """Where a teacher's file may be: as it is written, then beside the checkpoint and above it."""
    if weights is None or Path(weights).is_absolute() or ".." in Path(weights).parts:
        return [weights]
    above = [folder / weights for folder in checkpoint.resolve().parents]
    return [weights, *(str(file) for file in above if file.is_file())]
