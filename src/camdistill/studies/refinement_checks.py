"""What a refinement must have before anything is spent on it."""

import numpy as np
import torch

from camdistill.distill.refiner import masks_of
from camdistill.distill.training import as_images
from camdistill.errors import UserError
from camdistill.explain.methods import at_image
from camdistill.measure.learned import load_metric
from camdistill.networks.heads import head_size
from camdistill.networks.teachers import Preprocessed, Teacher, preprocessed
from camdistill.studies.refinement_plan import Plan
from camdistill.studies.refinement_work import Workshop
from camdistill.types import Images


def demand_possible(workshop: Workshop) -> None:
    """Refuse what can't be done.

    Raises:
        UserError: No masks for energy, another number of classes, no such layer.
    """
    plan, sets = workshop.plan, workshop.sets()
    train, classes = sets.whole.train_set, len(sets.whole.classes)
    assert train is not None, "setup made it"
    if any(objective.kind == "energy" for objective, _ in plan.refined.values()):
        masks_of(train)
    for objective, _ in plan.refined.values():
        if objective.file is not None:
            load_metric(objective.file)
    teachers = [one.teacher for one, _ in plan.refined.values() if one.kind == "fidelity"]
    of_teachers = [Teacher(teacher).classes for teacher in teachers if teacher is not None]
    images = as_images(sets.test.batch(np.arange(1)).pixels).to(workshop.device)
    for network in workshop.starting():
        own = head_size(network.network)
        if classes and own != classes and plan.recipe.keep != "start":
            raise UserError(
                f"the images have {classes} classes, a start network {own}; give the data that it "
                "was trained with, or --recipe.keep start, which needs no label"
            )
        if other := [count for count in of_teachers if count != own]:
            raise UserError(
                f"objective.teacher has {other[0]} classes, a start network {own}: maps are of the "
                "same class, so give a teacher with the same classes"
            )
        _demand_layers(plan, network, images)
        if plan.students is not None:  # they are judged at the same layers
            student = preprocessed(plan.students.network, classes=own)
            _demand_layers(plan, student.to(workshop.device).eval(), images)


def _demand_layers(plan: Plan, network: Preprocessed, images: Images) -> None:
    """Explains one image in every way that will be asked."""
    with torch.no_grad():
        top = network(images).argmax(1)
    for objective, _ in plan.refined.values():
        at_image(objective.cam, objective.layer)(network, images, top)
    for name in plan.judging.held_out:
        method, _, layer = name.partition("@")
        at_image(method, layer or None)(network, images, top)
