"""An explainer adapted to what it teaches, and whether fresh students learn more from it.

Its parameters are learnt beside students of one family (`bilevel`), a new one each round. After
each round other students are taught with the explainer as it is, and judged on images that its
parameters were not learnt on: the best round stays, or Grad-CAM, which is where it starts. The same
is done for a teacher of random weights. What was found is then ranked with new seeds and other
families, beside Grad-CAM, on the test images (`simulatability`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from camdistill.distill.training import as_images
from camdistill.errors import UserError
from camdistill.experiments.adaptation.adaptation_rounds import Adaptation, Learnt, learnt
from camdistill.experiments.evaluation.evaluation_values import save
from camdistill.experiments.ranking.ranking_arms import Classroom
from camdistill.experiments.ranking.ranking_config import Study
from camdistill.experiments.ranking.ranking_run import (
    CALIBRATION,
    Found,
    Progress,
    prepared,
    ranked,
)
from camdistill.experiments.ranking.student_controls import randomised
from camdistill.experiments.ranking.teacher_outputs import pool_of
from camdistill.explain.gradcam import last_layer
from camdistill.explain.learnable import LearnableCAM
from camdistill.networks.teachers import Teacher
from camdistill.store.array_files import lock_cache

ADAPTED, RANDOMISED = "adapted.safetensors", "adapted_randomised.npz"


@dataclass(frozen=True, eq=False)
class Adapted:
    """What a whole study found.

    Attributes:
        of_teacher: The explainer of the teacher.
        of_random: That of the teacher of random weights.
        found: The ranking.
        names: The ranking's arms: "grad_cam", "adapted", "randomised".
    """

    of_teacher: Learnt
    of_random: Learnt
    found: Found
    names: Mapping[str, str]

    def name_of(self, arm: str) -> str:
        """An arm's name that doesn't tell where the study lies."""
        return stable(arm, self.names)


def stable(arm: str, names: Mapping[str, str]) -> str:
    """The short name of an arm, and of what controls made of it: "grad_cam random"."""
    for name, long in names.items():
        if arm == long or arm.startswith(f"{long} "):
            return name + arm.removeprefix(long)
    return arm


def adapt_study(
    study: Study,
    how: Adaptation,
    *,
    also: Sequence[str] = (),
    workers: int = 0,
    stack: int = 1,
    device: str = "cpu",
    on_progress: Progress | None = None,
    on_unused: Callable[[int], None] | None = None,
) -> Adapted:
    """Learns both explainers and ranks them; what is done already isn't done again.

    Args:
        study: The ranking, but for its methods. The first family of students is the one that the
            parameters are learnt with.
        how: How they are.
        also: Further methods to rank.
        workers: Of the ranking.
        stack: Of the ranking.
        device: Where.
        on_progress: Told what is being done, and how much of it is done.
        on_unused: Told how many finished runs in the folder are of other settings, if any.
    """
    how.demand_fresh(study)
    base = f"grad_cam@{how.layers[-1]}" if how.layers else "grad_cam"
    folder = study.folder
    folder.mkdir(parents=True, exist_ok=True)
    with lock_cache(folder / "adapt", wait=False):
        teacher = Teacher(study.teacher).to(device)
        # what is wrong with the other methods is told before hours of learning
        alone = replace(
            study, methods=list(dict.fromkeys([base, *also])), controls=(), controls_of=()
        )
        classroom = prepared(alone, device, on_progress)
        how = _complete(how, study, teacher, classroom)
        room = classroom.room(how.n or max(study.n))
        own = learnt("teacher", teacher, room, how, folder, on_progress)
        own.explainer.save(folder / ADAPTED, {"best_round": own.best})
        calibration = as_images(pool_of(room.known, CALIBRATION).pixels).to(device)
        other = randomised(teacher, calibration, study.seed).to(device)
        control = learnt("randomised", other, room, how, folder, on_progress)
        _store(folder / RANDOMISED, control.explainer, other, classroom)
    names = {
        "grad_cam": base,
        "adapted": str(folder / ADAPTED),
        "randomised": str(folder / RANDOMISED),
    }
    methods = list(dict.fromkeys([*names.values(), *also]))
    whole = replace(study, methods=methods)
    found = ranked(
        whole,
        workers=workers,
        stack=stack,
        device=device,
        on_progress=on_progress,
        on_unused=on_unused,
    )
    return Adapted(own, control, found, names)


def _complete(how: Adaptation, study: Study, teacher: Teacher, classroom: Classroom) -> Adaptation:
    """With what the study and the teacher say where nothing was chosen."""
    pool = pool_of(classroom.known)
    count = how.n or max(study.n)
    if not 8 <= count <= len(pool.pixels):
        raise UserError(
            f"adaptation.n is {count}; its students need 8 images or more, and the study has "
            f"{len(pool.pixels)}"
        )
    first = as_images(pool.pixels[:1]).to(teacher.mean.device)
    return replace(how, n=count, layers=how.layers or [last_layer(teacher, first)])


def _store(path: Path, explainer: LearnableCAM, teacher: Teacher, classroom: Classroom) -> None:
    """The maps of a teacher that only this study knows, as `rank` reads them."""
    pool = pool_of(classroom.known)
    views = []
    for view in range(2):
        pixels = pool.pixels.flip(-1) if view else pool.pixels
        classes = pool.logits[:, view].argmax(1)
        parts = [
            explainer(teacher, as_images(some.to(classroom.device)), of.to(classroom.device)).cpu()
            for some, of in zip(torch.split(pixels, 64), torch.split(classes, 64), strict=True)
        ]
        views.append(torch.cat(parts).detach().numpy())
    save(path, {"maps": views[0], "mirrored": views[1], "ids": pool.ids.numpy()})
