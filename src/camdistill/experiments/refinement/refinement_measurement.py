"""Measures a refined network's maps, and its start's maps on it, image by image."""

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
from camdistill.experiments.refinement.refinement_config import JudgingOptions
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
BANK_PLAN = BankPlan(occluders=())
MapOwner = str
OWN_MAP, START_MAP = "own", "before"
"""The judged network's map, and its start's map of the same class, both asked of the former."""
LOCALIZATION = ("rank_accuracy", "energy_share", "pointing_game")
ValuesByColumn = Mapping[str, Float[np.ndarray, "images"]]


class Column(NamedTuple):
    """What is measured of an image."""

    explainer: str
    owner: MapOwner
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
        objective: Objective that the maps are refined towards.
        judging: How.
        seed: Seed of every random choice.
        device: Where.
    """

    images: ImageSet
    objective: Objective
    judging: JudgingOptions
    seed: int
    device: str = "cpu"

    def __call__(self, network: Preprocessed, start: Preprocessed) -> ValuesByColumn:
        """Everything that is measured of a network, by column; NaN where there is nothing to say.

        Args:
            network: In eval mode; may be the start itself, whose columns are then its own.
            start: What it was.
        """
        columns: dict[str, list[Tensor]] = {}
        size = self.judging.batch
        for first in range(0, len(self.images), size):
            rows = np.arange(first, min(first + size, len(self.images)))
            for name, value in self._measure_batch(network, start, rows).items():
                columns.setdefault(name, []).append(value.detach().float().cpu())
        return {name: torch.cat(parts).numpy() for name, parts in columns.items()}

    def _measure_batch(
        self, network: Preprocessed, start: Preprocessed, rows: np.ndarray
    ) -> dict[str, PerImage]:
        batch = self.images.batch(rows)
        images = as_images(batch.pixels).to(self.device)
        test_batch = _prepare_batch(self, network, images, self._load_masks(rows), str(rows[0]))
        start_labels = predict_labels(logits_of(start, images))
        columns = {"agreement": (test_batch.labels == start_labels).float()}
        if len(self.images.classes) == label_count(head_size(network.network)):
            columns["accuracy"] = (test_batch.labels == batch.labels.to(self.device)).float()
        explainers = {
            MAP: self.explain,
            **{name: _find_explainer(name) for name in self.judging.held_out},
        }
        for explainer, explain in explainers.items():
            network_by_owner = (
                {OWN_MAP: network} if network is start else {OWN_MAP: network, START_MAP: start}
            )
            for owner, map_network in network_by_owner.items():
                maps = explain(map_network, images, test_batch.classes).detach()
                for metric, value in self._measure_maps(test_batch, maps, explainer == MAP).items():
                    columns[Column(explainer, owner, metric).name] = value
                if (explainer, owner) == (MAP, OWN_MAP):
                    value = self._view_consistency(
                        network, images, batch.ids, test_batch.classes, maps
                    )
                    columns[Column(MAP, OWN_MAP, "view_cosine").name] = value
        return columns

    @property
    def explain(self) -> Explain:
        """The refined explainer, at the images' resolution."""
        return image_explainer(self.objective.cam, self.objective.layer)

    def _measure_maps(
        self, test_batch: "_TestBatch", maps: Maps, is_refined: bool
    ) -> dict[str, PerImage]:
        network, images, classes = test_batch.network, test_batch.images, test_batch.classes
        order = ranks(maps, test_batch.generator("ties"))
        noise = test_batch.generator("road")
        scores = {
            "faithfulness_correlation": faithfulness_correlation(maps, test_batch.bank),
            "road": road(
                network, images, classes, order, noise, fractions=self.judging.road
            ).combine(),
        }
        if is_refined:
            kind = self.objective.replacement
            insertion_curve = insertion(network, images, classes, order, test_batch.replacement)
            deletion_curve = deletion(network, images, classes, order, test_batch.replacement)
            scores |= {
                f"insertion_{kind}": insertion_curve.area(),
                f"deletion_{kind}": deletion_curve.area(),
            }
        if test_batch.masks is not None:
            tolerance = 2 * maps.shape[1] / 32
            scores |= {
                "rank_accuracy": relevance_rank_accuracy(order, test_batch.masks),
                "energy_share": energy_pointing_game(maps, test_batch.masks),
                "pointing_game": pointing_game(order, test_batch.masks, tolerance),
            }
        if is_refined and self.objective.kind == "fidelity":
            scores["fidelity"] = self._fidelity(images, classes, maps)
        if is_refined and test_batch.context is not None:
            assert self._metric is not None, "it made the context"
            scores["learned"] = self._metric(maps, test_batch.context)
        return scores

    def _view_consistency(
        self, network: nn.Module, images: Images, ids: Labels, classes: Labels, maps: Maps
    ) -> PerImage:
        """Cosine of a view's map and the image's map under that view."""
        size = (images.shape[2], images.shape[3])
        view: View = draw_view(
            self.objective.views, ids.to(self.device), size, seed=self.seed + SECOND_VIEW, epoch=0
        )
        view_image_maps = self.explain(network, view_images(images, view), classes).detach()
        return cosine(relu(view_image_maps), relu(view_maps(maps, view, flipped=False)))

    def _fidelity(self, images: Images, classes: Labels, maps: Maps) -> PerImage:
        objective = self.objective
        layers = None if objective.teacher_layer is None else [objective.teacher_layer]
        (teacher_maps,) = grad_cam(self._teacher, images, layers, classes).values()
        grid = (teacher_maps.shape[-2], teacher_maps.shape[-1])
        return pearson(resize(relu(maps), grid), relu(teacher_maps))

    @cached_property
    def _teacher(self) -> Teacher:
        assert self.objective.teacher is not None, "fidelity has a teacher"
        return Teacher(self.objective.teacher).to(self.device)

    @cached_property
    def _metric(self) -> LearnedMetric | None:
        file = self.objective.file
        return None if file is None else load_metric(file).to(self.device)

    def _load_masks(self, rows: np.ndarray) -> Masks | None:
        if self.images.masks is not None:
            return torch.from_numpy(np.asarray(self.images.masks[rows]) > 0).to(self.device)
        if self.images.boxes is not None:
            boxes = torch.from_numpy(self.images.boxes[rows])
            return inside_boxes(boxes, self.images.size).to(self.device)
        return None


@dataclass(frozen=True)
class _TestBatch:
    """Images, and what a network says of changes that no map chose."""

    network: nn.Module
    images: Images
    classes: Labels
    labels: Labels  # what is predicted: of a single logit it isn't its class
    masks: Masks | None
    replacement: Images
    bank: Bank
    context: Context | None
    seed: str

    def generator(self, purpose: str) -> torch.Generator:
        return _seed_generator(f"{self.seed} {purpose}")


def _prepare_batch(
    judge: Judge, network: nn.Module, images: Images, masks: Masks | None, batch_name: str
) -> _TestBatch:
    seed = f"{judge.seed} {batch_name}"
    logits = logits_of(network, images)
    classes = logits.argmax(1)
    perturbation_bank = build_bank(
        network,
        images,
        baseline(images, "gray"),
        _seed_generator(f"{seed} bank"),
        classes=classes,
        plan=BANK_PLAN,
    )
    replacement = baseline(images, judge.objective.replacement)
    learned_context = (
        None if judge.objective.file is None else image_context(network, images, classes)
    )
    labels = predict_labels(logits)
    return _TestBatch(
        network,
        images,
        classes,
        labels,
        masks,
        replacement,
        perturbation_bank,
        learned_context,
        seed,
    )


def _seed_generator(text: str) -> torch.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _find_explainer(name: str) -> Explain:
    method, _, layer = name.partition("@")
    return image_explainer(method, layer or None)


def objective_metrics(objective: Objective) -> tuple[str, ...]:
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
