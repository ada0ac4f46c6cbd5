"""Trained networks as files, and back: `load` gives a network that classifies and explains."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from camdistill.distill.classifier import Classifier
from camdistill.distill.module import DistilledExplainer
from camdistill.errors import UserError
from camdistill.explain.gradcam import Classes, Explanation, Grad, Score, explain
from camdistill.networks.class_paths import SAFE_PACKAGES
from camdistill.networks.teachers import (
    NetworkSpec,
    Preprocessed,
    Teacher,
    build,
    normalisation,
)
from camdistill.networks.weights import WeightFile, load_state, read_weights, save_safetensors
from camdistill.types import Images, Logits

SETTINGS = "camdistill"


class Explainer(nn.Module):
    """A trained network with what is known of it; it takes images in [0, 1].

    Attributes:
        network: The student, or the network that was trained alone.
        teacher: Its teacher, where there is one and its weights were found.
        teacher_missing: Why there is no teacher; empty when there is one or never was.
        pairs: Layers that were matched: (student, teacher, weight).
        classes: Names of the classes; empty when unknown.
        mean_map_by_layer: The teacher's mean map over the training split.
        settings: The experiment's.
        sha256: Of the file.
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
        """Logits and maps of the network itself; see `camdistill.explain.gradcam.explain`."""
        return explain(self.network, images, layers, classes, score=score, grad=grad)


def save(module: DistilledExplainer | Classifier, path: Path, classes: Sequence[str] = ()) -> str:
    """Writes what was trained as a small safetensors file, the experiment in its metadata.

    Args:
        module: Trained; of a `DistilledExplainer` the student is kept, never the teacher.
        path: The file.
        classes: Names of the classes.

    Returns:
        The file's sha256.
    """
    settings = {**module.experiment(), "class_names": list(classes)}
    metadata = {**module.fitted.metadata(), SETTINGS: json.dumps(settings)}
    return save_safetensors(path, module.fitted.network.state_dict(), metadata)


def load(
    path: str | Path, *, trust: Sequence[str] = (), teacher: str | Path | None = None
) -> Explainer:
    """A trained network from a checkpoint of ours: safetensors, or Lightning's `.ckpt`.

    No code of the file is run: class paths in it resolve inside camdistill, torch, torchvision and
    timm alone.

    Args:
        path: The file.
        trust: Further packages that class paths in the file may come from.
        teacher: The teacher's weights, where they are not (or no longer) where the file says.

    Raises:
        UserError: If the file is damaged, not one of ours, or names code that isn't trusted.
    """
    weights = read_weights(path)
    settings = _settings(weights)
    allowed = (*SAFE_PACKAGES, *trust)
    distilled = "student" in settings
    spec = _spec(settings["student" if distilled else "network"])
    network = build(replace(spec, weights=None), classes=settings.get("classes"), allowed=allowed)
    load_state(network, weights)
    own = Preprocessed(network, *normalisation(spec, weights)).eval()
    if not distilled:
        return Explainer(
            own,
            classes=settings.get("class_names", ()),
            settings=settings,
            sha256=weights.sha256,
        )
    wanted = _spec(settings["teacher"])
    if teacher is not None:
        wanted = replace(wanted, weights=str(teacher))
    found, missing = _teacher(wanted, allowed)
    if found is not None and teacher is None and _differs(found, settings):
        found, missing = None, f"'{wanted.weights}' is no longer the file it was distilled from"
    return Explainer(
        own,
        teacher=found,
        teacher_missing=missing,
        pairs=[(str(a), str(b), float(w)) for a, b, w in settings.get("pairs", [])],
        classes=settings.get("class_names", ()),
        mean_map_by_layer={
            layer: torch.tensor(mean)
            for layer, mean in settings.get("mean_map_by_layer", {}).items()
        },
        settings=settings,
        sha256=weights.sha256,
    )


def _settings(weights: WeightFile) -> dict[str, Any]:
    text = weights.metadata.get(SETTINGS)
    if text is None:
        raise UserError(
            f"'{weights.path}' has weights but no experiment of camdistill in it; to use it as a "
            "teacher name its network too: --teacher resnet56 --weights FILE"
        )
    try:
        settings = json.loads(text)
        if not isinstance(settings, dict) or not {"student", "network"} & set(settings):
            raise ValueError("no network in it")
    except ValueError as error:
        raise UserError(
            f"the experiment in '{weights.path}' can't be read ({error}); copy the file again"
        ) from error
    return settings


def _spec(settings: Mapping[str, Any]) -> NetworkSpec:
    try:
        return NetworkSpec(
            name=str(settings["name"]),
            weights=settings.get("weights"),
            args=dict(settings.get("args") or {}),
            mean=tuple(settings.get("mean", NetworkSpec.mean)),
            std=tuple(settings.get("std", NetworkSpec.std)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"a checkpoint's network can't be read ({error}); copy the file again"
        ) from error


def _teacher(spec: NetworkSpec, allowed: Sequence[str]) -> tuple[Teacher | None, str]:
    """The teacher, or why there is none: the student's own output needs no teacher."""
    try:
        return Teacher(spec, allowed=allowed), ""
    except UserError as error:
        return None, str(error)


def _differs(teacher: Teacher, settings: Mapping[str, Any]) -> bool:
    expected = settings.get("teacher_sha256")
    return expected is not None and teacher.sha256 != expected
