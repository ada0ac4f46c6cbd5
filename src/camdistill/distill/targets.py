"""What the teacher says of a batch: asked now, or read from its cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pytorch_lightning import Trainer
from rich.progress import Progress
from torch import Tensor

from camdistill.data.datasets import ImageSet
from camdistill.data.views import View, view_maps
from camdistill.distill.cache import Quantity, TeacherCache
from camdistill.distill.transfer import quantity_maps
from camdistill.networks.teachers import Teacher
from camdistill.types import Images, Labels, Logits


class Targets(NamedTuple):
    """What the teacher says of a batch: nothing in it carries a graph.

    Attributes:
        logits: The teacher's.
        classes: Its top class.
        maps_by_layer: By the teacher's layer, the quantity that is transferred: [B, h, w], or
            [B, C, h, w] for class maps.
    """

    logits: Logits
    classes: Labels
    maps_by_layer: dict[str, Tensor]


@torch.no_grad()
def live_targets(
    teacher: Teacher, images: Images, layers: list[str], *, quantity: Quantity, p: float
) -> Targets:
    """What the teacher says of augmented images when it is asked."""
    logits, maps = quantity_maps(teacher, images, layers, None, quantity=quantity, p=p)
    return Targets(logits, logits.argmax(1), maps)


def cached_targets(
    cache: TeacherCache, ids: Labels, view: View, layers: list[str], *, quantity: Quantity
) -> Targets:
    """What the teacher said of the whole images, mirrored where the view is; maps are cropped."""
    logits, maps = cache.lookup(ids, view.flip, quantity)
    moved = {layer: _moved(maps[layer], view) for layer in layers}
    return Targets(logits, logits.argmax(1), moved)


def _moved(maps: Tensor, view: View) -> Tensor:
    """Maps of one class or of several under the view of their image."""
    if maps.dim() == 3:
        return view_maps(maps, view, flipped=True)
    classes = maps.shape[1]
    repeated = View(view.flip.repeat_interleave(classes), view.box.repeat_interleave(classes, 0))
    return view_maps(maps.flatten(0, 1), repeated, flipped=True).view(maps.shape)


def shared_cache(
    trainer: Trainer,
    teacher: Teacher,
    images: ImageSet,
    layers: Sequence[str],
    *,
    what: str,
    root: Path,
    quantities: Sequence[Quantity],
    flips: bool,
    p: float,
) -> TeacherCache:
    """The teacher's answers about all images; one process asks, the others wait and read.

    Args:
        trainer: Its precision is the teacher's too.
        teacher: On its device.
        images: All of a split.
        layers: The teacher's.
        what: Of what the images are, for the progress bar.
        root: Folder of caches.
        quantities: Besides Grad-CAMs.
        flips: Whether mirrored images are asked about too.
        p: Power of attention maps.
    """
    if not trainer.is_global_zero:
        trainer.strategy.barrier()
    with Progress(disable=not trainer.is_global_zero, transient=True) as bar:
        task = bar.add_task(f"Asking the teacher about {what}", total=None)
        cache = TeacherCache.open_or_build(
            teacher,
            images,
            layers,
            root=root,
            quantities=quantities,
            flips=flips,
            precision="bfloat16" if "bf16" in str(trainer.precision) else "float32",
            p=p,
            progress=lambda done, count: bar.update(task, completed=done, total=count),
        )
    if trainer.is_global_zero:
        trainer.strategy.barrier()
    return cache
