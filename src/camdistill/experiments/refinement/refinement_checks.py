"""Checks the inputs of a refinement before anything is computed."""

from pathlib import Path

import numpy as np
import torch

from camdistill.data.views import identity_view
from camdistill.distill.checks import check_data_matches
from camdistill.distill.differentiable_maps import explain_with_graph
from camdistill.distill.refinement_targets import Refinement, ViewBatch
from camdistill.distill.refiner import object_masks
from camdistill.distill.training import as_images
from camdistill.errors import UserError
from camdistill.experiments.refinement.refinement_config import CE, RefinementPlan
from camdistill.experiments.refinement.refinement_worker import RefinementWorker
from camdistill.explain.methods import image_explainer
from camdistill.measure.learned import load_metric
from camdistill.networks.capture import check_forward
from camdistill.networks.heads import head_size
from camdistill.networks.teachers import Preprocessed, Teacher, build_preprocessed
from camdistill.perturb.probability import label_count
from camdistill.store.digest import sha256_of
from camdistill.types import Images, Labels, Maps


def check_refinement(worker: RefinementWorker) -> None:
    """Refuse what can't be done.

    Raises:
        UserError: No masks for energy, another number of classes, no such layer.
    """
    plan, sets = worker.plan, worker.image_sets()
    train, classes = sets.full_data.train_set, len(sets.full_data.classes)
    assert train is not None, "setup made it"
    if any(objective.kind == "energy" for objective, _ in plan.objectives_by_arm.values()):
        object_masks(train)
    for objective, _ in plan.objectives_by_arm.values():
        if objective.file is not None:
            load_metric(objective.file)
    teachers = [
        entry.teacher for entry, _ in plan.objectives_by_arm.values() if entry.kind == "fidelity"
    ]
    teacher_classes = [Teacher(teacher).classes for teacher in teachers if teacher is not None]
    batch = sets.test.batch(np.arange(min(2, len(sets.test))))
    images, ids = as_images(batch.pixels).to(worker.device), batch.ids.to(worker.device)
    networks = worker.start_networks()
    _check_distinct_checkpoints(plan)
    for network in networks:
        check_forward({"start network": network}, images, cure="give another --data.size")
        check_data_matches(network.facts, sets.test.size, sets.full_data.classes, "start network")
        class_count = head_size(network.network)
        if classes and label_count(class_count) != classes and plan.recipe.keep != "start":
            raise UserError(
                f"the images have {classes} classes, a start network {class_count}; give the "
                "data that it "
                "was trained with, or --recipe.keep start, which needs no label"
            )
        if other_counts := [
            teacher_count for teacher_count in teacher_classes if teacher_count != class_count
        ]:
            raise UserError(
                f"objective.teacher has {other_counts[0]} classes, a start network "
                f"{class_count}: maps are of the "
                "same class, so give a teacher with the same classes"
            )
        _check_layers(plan, network, images)
        _check_objectives(plan, network, images, ids)
        if plan.students is not None:  # they are judged at the same layers
            student = build_preprocessed(plan.students.network, classes=class_count)
            _check_layers(plan, student.to(worker.device).eval(), images)


def _check_distinct_checkpoints(plan: RefinementPlan) -> None:
    """A network that is given twice would count as two independent starts."""
    path_by_digest: dict[str, Path] = {}
    for path in plan.checkpoints:
        digest = sha256_of(path)
        if digest in path_by_digest:
            raise UserError(
                f"checkpoints {path_by_digest[digest]} and {path} are the same file; give "
                "networks that were "
                "trained independently"
            )
        path_by_digest[digest] = path


def _check_layers(plan: RefinementPlan, network: Preprocessed, images: Images) -> None:
    """Explains one image in every way that will be asked."""
    with torch.no_grad():
        classes = network(images).argmax(1)
    objective = plan.objective
    refined_maps = image_explainer(objective.cam, objective.layer)(network, images, classes)
    for name in plan.judging.held_out:
        method, _, layer = name.partition("@")
        maps = image_explainer(method, layer or None)(network, images, classes)
        if maps.amax() > maps.amin() and _is_same_map(maps, refined_maps):
            raise UserError(
                f"judging.held_out has {name}, which gives this network's {objective.cam}: the "
                "very map that is refined; name another method, or another layer"
            )


def _is_same_map(maps: Maps, others: Maps) -> bool:
    """Whether maps differ by a positive factor alone."""
    first, second = (maps / maps.abs().amax() for maps in (maps, others))
    return torch.allclose(first, second, atol=1e-5)


def _check_objectives(
    plan: RefinementPlan, network: Preprocessed, images: Images, ids: Labels
) -> None:
    """Asks every objective about two images, before anything is trained."""
    view = identity_view(len(ids))
    masks = torch.ones_like(images[:, 0], dtype=torch.bool)
    for name, (objective, arm) in plan.objectives_by_arm.items():
        if arm == CE:
            continue
        refinement = Refinement(objective, arm, plan.seed)
        try:
            _, classes, maps = explain_with_graph(network, images, objective.cam, objective.layer)
            refinement.loss(network, ViewBatch(images, ids, view, classes, maps, masks), 0)
        except ValueError as error:
            raise UserError(f"{name} can't be asked about these images: {error}") from error
