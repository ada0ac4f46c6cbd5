"""What a refined network's maps are worth, its start's maps on it beside them, image by image."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.data.datasets import ImageSet
from camdistill.data.views import View, draw_view, view_images, view_maps
from camdistill.distill.refinement_targets import SECOND_VIEW, Objective
from camdistill.distill.training import as_images
from camdistill.experiments.refinement.refinement_config import Judging
from camdistill.explain.compare import cosine, pearson
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.maps import relu, resize
from camdistill.explain.methods import image_explainer
from camdistill.measure.boxes import inside_boxes
from camdistill.measure.faithfulness import faithfulness_correlation
from camdistill.measure.learned import Context, LearnedMetric, image_context, load_metric
from camdistill.measure.localization import (
    energy_pointing_game,
    pointing_game,
    relevance_rank_accuracy,
)
from camdistill.measure.removal import deletion, insertion, road
from camdistill.networks.heads import head_size
from camdistill.networks.teachers import Preprocessed, Teacher
from camdistill.perturb.bank import Bank, BankPlan, build_bank
from camdistill.perturb.batched_forward import logits_of
from camdistill.perturb.imputers import baseline
from camdistill.perturb.probability import label_count, predict_labels
from camdistill.perturb.ranks import ranks
from camdistill.types import Explain, Images, Labels, Maps, Masks, PerImage

VERSION = 2  # goes up when the same judging would give other numbers
MAP = "map"
"""What tables call the refined explainer."""
BANK = BankPlan(occluders=())
Whose = str
OWN, BEFORE = "own", "before"
"""The judged network's map, and its start's map of the same class, both asked of the former."""
LOCALISATION = ("rank_accuracy", "energy_share", "pointing_game")
Values = Mapping[str, Float[np.ndarray, "images"]]


class Column(NamedTuple):
    """What is measured of an image."""

    explainer: str
    whose: Whose
    metric: str

    @property
    def name(self) -> str:
        """In the results file."""
        return "|".join(self)


@dataclass(frozen=True)
class Judge:
    """Measures networks on the same images, with the same random choices.

    Attributes:
        images: Test images.
        objective: Whose maps are refined.
        judging: How.
        seed: Of every random choice.
        device: Where.
    """

    images: ImageSet
    objective: Objective
    judging: Judging
    seed: int
    device: str = "cpu"

    def __call__(self, network: Preprocessed, start: Preprocessed) -> Values:
        """Everything that is measured of a network, by column; NaN where there is nothing to say.

        Args:
            network: In eval mode; may be the start itself, whose columns are then its own.
            start: What it was.
        """
        found: dict[str, list[Tensor]] = {}
        size = self.judging.batch
        for first in range(0, len(self.images), size):
            rows = np.arange(first, min(first + size, len(self.images)))
            for name, value in self._batch(network, start, rows).items():
                found.setdefault(name, []).append(value.detach().float().cpu())
        return {name: torch.cat(parts).numpy() for name, parts in found.items()}

    def _batch(
        self, network: Preprocessed, start: Preprocessed, rows: np.ndarray
    ) -> dict[str, PerImage]:
        batch = self.images.batch(rows)
        images = as_images(batch.pixels).to(self.device)
        scene = _scene(self, network, images, self._masks(rows), str(rows[0]))
        before = predict_labels(logits_of(start, images))
        found = {"agreement": (scene.labels == before).float()}
        if len(self.images.classes) == label_count(head_size(network.network)):
            found["accuracy"] = (scene.labels == batch.labels.to(self.device)).float()
        explainers = {MAP: self.explain, **{name: _named(name) for name in self.judging.held_out}}
        for explainer, explain in explainers.items():
            whose = {OWN: network} if network is start else {OWN: network, BEFORE: start}
            for who, explained in whose.items():
                maps = explain(explained, images, scene.classes).detach()
                for metric, value in self._measured(scene, maps, explainer == MAP).items():
                    found[Column(explainer, who, metric).name] = value
                if (explainer, who) == (MAP, OWN):
                    value = self._consistency(network, images, batch.ids, scene.classes, maps)
                    found[Column(MAP, OWN, "view_cosine").name] = value
        return found

    @property
    def explain(self) -> Explain:
        """The refined explainer, at the images' resolution."""
        return image_explainer(self.objective.cam, self.objective.layer)

    def _measured(self, scene: "_Scene", maps: Maps, refined: bool) -> dict[str, PerImage]:
        network, images, classes = scene.network, scene.images, scene.classes
        order = ranks(maps, scene.generator("ties"))
        noise = scene.generator("road")
        found = {
            "faithfulness_correlation": faithfulness_correlation(maps, scene.bank),
            "road": road(
                network, images, classes, order, noise, fractions=self.judging.road
            ).combine(),
        }
        if refined:
            kind = self.objective.replacement
            inserted = insertion(network, images, classes, order, scene.shown)
            removed = deletion(network, images, classes, order, scene.shown)
            found |= {f"insertion_{kind}": inserted.area(), f"deletion_{kind}": removed.area()}
        if scene.masks is not None:
            near = 2 * maps.shape[1] / 32
            found |= {
                "rank_accuracy": relevance_rank_accuracy(order, scene.masks),
                "energy_share": energy_pointing_game(maps, scene.masks),
                "pointing_game": pointing_game(order, scene.masks, near),
            }
        if refined and self.objective.kind == "fidelity":
            found["fidelity"] = self._fidelity(images, classes, maps)
        if refined and scene.context is not None:
            assert self._metric is not None, "it made the context"
            found["learned"] = self._metric(maps, scene.context)
        return found

    def _consistency(
        self, network: nn.Module, images: Images, ids: Labels, classes: Labels, maps: Maps
    ) -> PerImage:
        """Cosine of a view's map and the image's map under that view."""
        size = (images.shape[2], images.shape[3])
        view: View = draw_view(
            self.objective.views, ids.to(self.device), size, seed=self.seed + SECOND_VIEW, epoch=0
        )
        other = self.explain(network, view_images(images, view), classes).detach()
        return cosine(relu(other), relu(view_maps(maps, view, flipped=False)))

    def _fidelity(self, images: Images, classes: Labels, maps: Maps) -> PerImage:
        wanted = self.objective
        layers = None if wanted.teacher_layer is None else [wanted.teacher_layer]
        (target,) = grad_cam(self._teacher, images, layers, classes).values()
        grid = (target.shape[-2], target.shape[-1])
        return pearson(resize(relu(maps), grid), relu(target))

    @cached_property
    def _teacher(self) -> Teacher:
        assert self.objective.teacher is not None, "fidelity has a teacher"
        return Teacher(self.objective.teacher).to(self.device)

    @cached_property
    def _metric(self) -> LearnedMetric | None:
        file = self.objective.file
        return None if file is None else load_metric(file).to(self.device)

    def _masks(self, rows: np.ndarray) -> Masks | None:
        if self.images.masks is not None:
            return torch.from_numpy(np.asarray(self.images.masks[rows]) > 0).to(self.device)
        if self.images.boxes is not None:
            boxes = torch.from_numpy(self.images.boxes[rows])
            return inside_boxes(boxes, self.images.size).to(self.device)
        return None


@dataclass(frozen=True)
class _Scene:
    """Images, and what a network says of changes that no map chose."""

    network: nn.Module
    images: Images
    classes: Labels
    labels: Labels  # what is predicted: of a single logit it isn't its class
    masks: Masks | None
    shown: Images
    bank: Bank
    context: Context | None
    seed: str

    def generator(self, purpose: str) -> torch.Generator:
        return _generator(f"{self.seed} {purpose}")


def _scene(
    judge: Judge, network: nn.Module, images: Images, masks: Masks | None, where: str
) -> _Scene:
    seed = f"{judge.seed} {where}"
    logits = logits_of(network, images)
    classes = logits.argmax(1)
    asked = build_bank(
        network,
        images,
        baseline(images, "grey"),
        _generator(f"{seed} bank"),
        classes=classes,
        plan=BANK,
    )
    shown = baseline(images, judge.objective.replacement)
    known = None if judge.objective.file is None else image_context(network, images, classes)
    labels = predict_labels(logits)
    return _Scene(network, images, classes, labels, masks, shown, asked, known, seed)


def _generator(text: str) -> torch.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _named(name: str) -> Explain:
    method, _, layer = name.partition("@")
    return image_explainer(method, layer or None)


def trained_metrics(objective: Objective) -> tuple[str, ...]:
    """What an objective is trained on; everything else is held out."""
    return {
        "insertion_deletion": (
            (f"insertion_{objective.replacement}", f"deletion_{objective.replacement}")
            if objective.deletion
            else (f"insertion_{objective.replacement}",)
        ),
        "faithfulness": ("faithfulness_correlation",),
        "consistency": ("view_cosine",),
        "energy": ("energy_share",),
        "fidelity": ("fidelity",),
        "learned": ("learned",),
    }[objective.kind]
