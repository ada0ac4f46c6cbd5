"""Adapts an explainer, then tests whether new students learn more from it.

Its parameters are learned beside students of one family (`bilevel`), a new one each round. After
each round other students are taught with the explainer as it is, and judged on images that its
parameters were not learned on: the best round stays, or Grad-CAM, which is where it starts. The
same is done for a teacher of random weights. What was found is then ranked with new seeds and other
families, beside Grad-CAM, on the test images (`ranking.ranking_run`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from camdistill.distill.training import as_images
from camdistill.errors import UserError
from camdistill.experiments.adaptation.adaptation_rounds import (
    Adaptation,
    AdaptedExplainer,
    run_rounds,
)
from camdistill.experiments.evaluation.evaluation_values import save_arrays
from camdistill.experiments.ranking.ranking_arms import ArmTrainer
from camdistill.experiments.ranking.ranking_config import RankingStudy
from camdistill.experiments.ranking.ranking_run import (
    CALIBRATION,
    Progress,
    RankingRuns,
    prepare_arm_trainer,
    run_ranking,
)
from camdistill.experiments.ranking.student_controls import randomize_weights
from camdistill.experiments.ranking.teacher_outputs import pool_of
from camdistill.explain.gradcam import last_layer
from camdistill.explain.learnable import LearnableCAM
from camdistill.networks.teachers import Teacher
from camdistill.store.array_files import lock_cache

ADAPTED, RANDOMIZED = "adapted.safetensors", "adapted_randomized.npz"


@dataclass(frozen=True, eq=False)
class AdaptationOutcome:
    """What a whole study found.

    Attributes:
        adapted: The explainer of the teacher.
        control: That of the teacher of random weights.
        ranking: The ranking.
        names: The ranking's arms: "grad_cam", "adapted", "randomized".
    """

    adapted: AdaptedExplainer
    control: AdaptedExplainer
    ranking: RankingRuns
    names: Mapping[str, str]

    def short_name(self, arm: str) -> str:
        """An arm's name that doesn't tell where the study lies."""
        return shorten_arm(arm, self.names)


def shorten_arm(arm: str, names: Mapping[str, str]) -> str:
    """The short name of an arm, and of what controls made of it: "grad_cam random"."""
    for name, full_name in names.items():
        if arm == full_name or arm.startswith(f"{full_name} "):
            return name + arm.removeprefix(full_name)
    return arm


def adapt_study(
    study: RankingStudy,
    adaptation: Adaptation,
    *,
    other_methods: Sequence[str] = (),
    workers: int = 0,
    stack: int = 1,
    device: str = "cpu",
    on_progress: Progress | None = None,
    on_unused: Callable[[int], None] | None = None,
) -> AdaptationOutcome:
    """Learns both explainers and ranks them; what is done already isn't done again.

    Args:
        study: The ranking, but for its methods. The first family of students is the one that the
            parameters are learned with.
        adaptation: How they are.
        other_methods: Further methods to rank.
        workers: Number of worker processes of the ranking.
        stack: Number of students that are trained as one on a GPU.
        device: Where.
        on_progress: Told what is being done, and how much of it is done.
        on_unused: Told how many finished runs in the folder are of other settings, if any.
    """
    adaptation.check_fresh_seeds(study)
    base_method = f"grad_cam@{adaptation.layers[-1]}" if adaptation.layers else "grad_cam"
    folder = study.folder
    folder.mkdir(parents=True, exist_ok=True)
    with lock_cache(folder / "adapt", wait=False):
        teacher = Teacher(study.teacher).to(device)
        # what is wrong with the other methods is told before hours of learning
        base_study = replace(
            study,
            methods=list(dict.fromkeys([base_method, *other_methods])),
            controls=(),
            controls_of=(),
        )
        arm_trainer = prepare_arm_trainer(base_study, device, on_progress)
        adaptation = _fill_defaults(adaptation, study, teacher, arm_trainer)
        sized_classroom = arm_trainer.room(adaptation.n or max(study.n))
        adapted = run_rounds("teacher", teacher, sized_classroom, adaptation, folder, on_progress)
        adapted.explainer.save(folder / ADAPTED, {"best_round": adapted.best})
        calibration = as_images(pool_of(sized_classroom.cached_answers, CALIBRATION).pixels).to(
            device
        )
        random_teacher = randomize_weights(teacher, calibration, study.seed).to(device)
        control = run_rounds(
            "randomized", random_teacher, sized_classroom, adaptation, folder, on_progress
        )
        _save_control_maps(folder / RANDOMIZED, control.explainer, random_teacher, arm_trainer)
    names = {
        "grad_cam": base_method,
        "adapted": str(folder / ADAPTED),
        "randomized": str(folder / RANDOMIZED),
    }
    methods = list(dict.fromkeys([*names.values(), *other_methods]))
    ranking_study = replace(study, methods=methods)
    ranking = run_ranking(
        ranking_study,
        workers=workers,
        stack=stack,
        device=device,
        on_progress=on_progress,
        on_unused=on_unused,
    )
    return AdaptationOutcome(adapted, control, ranking, names)


def _fill_defaults(
    adaptation: Adaptation, study: RankingStudy, teacher: Teacher, arm_trainer: ArmTrainer
) -> Adaptation:
    """With what the study and the teacher say where nothing was chosen."""
    pool = pool_of(arm_trainer.cached_answers)
    count = adaptation.n or max(study.n)
    if not 8 <= count <= len(pool.pixels):
        raise UserError(
            f"adaptation.n is {count}; its students need 8 images or more, and the study has "
            f"{len(pool.pixels)}"
        )
    first_image = as_images(pool.pixels[:1]).to(teacher.mean.device)
    return replace(
        adaptation, n=count, layers=adaptation.layers or [last_layer(teacher, first_image)]
    )


def _save_control_maps(
    path: Path, explainer: LearnableCAM, teacher: Teacher, arm_trainer: ArmTrainer
) -> None:
    """The maps of a teacher that only this study knows, as `rank` reads them."""
    pool = pool_of(arm_trainer.cached_answers)
    views = []
    for view in range(2):
        pixels = pool.pixels.flip(-1) if view else pool.pixels
        classes = pool.logits[:, view].argmax(1)
        chunks = [
            explainer(
                teacher,
                as_images(pixel_chunk.to(arm_trainer.device)),
                class_chunk.to(arm_trainer.device),
            ).cpu()
            for pixel_chunk, class_chunk in zip(
                torch.split(pixels, 64), torch.split(classes, 64), strict=True
            )
        ]
        views.append(torch.cat(chunks).detach().numpy())
    save_arrays(path, {"maps": views[0], "mirrored": views[1], "ids": pool.ids.numpy()})
