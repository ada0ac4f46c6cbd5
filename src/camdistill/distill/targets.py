"""What the teacher says of a batch: asked now, or read from its cache."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from pytorch_lightning import Trainer
from rich.progress import Progress
from torch import Tensor

from camdistill.data.datasets import ImageSet
from camdistill.data.views import View, view_maps
from camdistill.distill.teacher_cache import TeacherCache
from camdistill.distill.teacher_maps_plan import Precision, Quantity, likeliest_classes
from camdistill.distill.transfer import quantity_maps
from camdistill.errors import UserError
from camdistill.explain.gradcam import TopClasses, last_layer
from camdistill.networks.teachers import Teacher
from camdistill.types import Images, Labels, Logits


class Targets(NamedTuple):
    """What the teacher says of a batch: nothing in it carries a graph.

    Attributes:
        logits: The teacher's.
        classes: Classes of the Grad-CAM maps: its top class, [B], or its likeliest ones, [B, C].
        maps_by_layer: By the teacher's layer, the quantity that is transferred: [B, h, w], or
            [B, C, h, w] for several classes.
    """

    logits: Logits
    classes: Int[Tensor, "batch *classes"]
    maps_by_layer: dict[str, Tensor]


@torch.no_grad()
def live_targets(
    teacher: Teacher,
    images: Images,
    layers: list[str],
    *,
    quantity: Quantity,
    classes: int = 1,
    p: float,
) -> Targets:
    """What the teacher says of augmented images when it is asked."""
    requested_classes = TopClasses(classes) if classes > 1 else None
    logits, maps = quantity_maps(teacher, images, layers, requested_classes, quantity=quantity, p=p)
    return Targets(logits, likeliest_classes(logits, classes), maps)


def cached_targets(
    cache: TeacherCache, ids: Labels, view: View, layers: list[str], *, quantity: Quantity
) -> Targets:
    """What the teacher said of the whole images, mirrored where the view is; maps are cropped."""
    logits, maps = cache.lookup(ids, view.flip, quantity, layers)
    maps_by_layer = {layer: _view_class_maps(maps[layer], view) for layer in layers}
    return Targets(logits, likeliest_classes(logits, cache.plan.classes), maps_by_layer)


def _view_class_maps(maps: Tensor, view: View) -> Tensor:
    """Maps of one class or of several under the view of their image."""
    if maps.dim() == 3:
        return view_maps(maps, view, flipped=True)
    classes = maps.shape[1]
    repeated = View(view.flip.repeat_interleave(classes), view.box.repeat_interleave(classes, 0))
    return view_maps(maps.flatten(0, 1), repeated, flipped=True).view(maps.shape)


def open_shared_cache(
    trainer: Trainer,
    teacher: Teacher,
    images: ImageSet,
    layers: Sequence[str],
    *,
    what: str,
    root: Path,
    quantities: Sequence[Quantity],
    classes: int = 1,
    flips: bool,
    p: float,
) -> TeacherCache:
    """The teacher's answers about all images; one process asks, the others wait and read.

    Trainings in bfloat16 ask the teacher in bfloat16 where its last spatial layer alone is asked
    for. Maps of inner layers come from a backward through what follows them, which bfloat16 makes
    noisy (a ResNet-56 on 500 CIFAR-10 images: 7 to 9 % at layer1, 1 % at layer3, median relative L2
    error), and are kept for all epochs: float32 makes these.

    Args:
        trainer: Its precision is the teacher's too, at the last layer.
        teacher: On its device.
        images: All of a split.
        layers: The teacher's.
        what: What the images are, for the progress bar.
        root: Folder of caches.
        quantities: Besides Grad-CAMs.
        classes: How many of the teacher's likeliest classes Grad-CAMs are of.
        flips: Whether mirrored images are asked about too.
        p: Power of attention maps.

    Raises:
        UserError: The process that asks failed, which raises its own error.
    """
    precision = _precision(trainer, teacher, images, layers)

    def open_cache(progress: Callable[[int, int], None] | None = None) -> TeacherCache:
        return TeacherCache.open_or_build(
            teacher,
            images,
            layers,
            root=root,
            quantities=quantities,
            classes=classes,
            flips=flips,
            precision=precision,
            p=p,
            progress=progress,
        )

    if not trainer.is_global_zero:
        if not trainer.strategy.broadcast(False):
            raise UserError(
                f"the first process could not get the teacher's answers about {what}; what it "
                "printed says why"
            )
        return open_cache()
    succeeded = False
    try:
        with Progress(transient=True) as bar:
            task = bar.add_task(f"Asking the teacher about {what}", total=None)
            cache = open_cache(lambda done, count: bar.update(task, completed=done, total=count))
        succeeded = True
    finally:
        # After a failure too, or the others would wait until their group's time is over.
        trainer.strategy.broadcast(succeeded)
    return cache


def _precision(
    trainer: Trainer, teacher: Teacher, images: ImageSet, layers: Sequence[str]
) -> Precision:
    if "bf16" not in str(trainer.precision):
        return "float32"
    last = last_layer(teacher, torch.zeros(1, 3, *images.size, device=teacher.mean.device))
    return "bfloat16" if set(layers) <= {last} else "float32"
