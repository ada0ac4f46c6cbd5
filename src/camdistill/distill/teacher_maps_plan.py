"""What is asked of a teacher and kept: which maps, of which classes, and whose they are."""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from camdistill.data.datasets import ImageSet
from camdistill.distill.losses import attention_map
from camdistill.explain.engine.request import Classes, class_columns
from camdistill.explain.gradcam import TopClasses, explain_images
from camdistill.networks.teachers import Teacher
from camdistill.store.array_files import CacheKey
from camdistill.types import Logits, Pixels

Quantity = Literal["grad_cam", "attention", "class_maps"]
Precision = Literal["float32", "bfloat16"]

VERSION = 1


@dataclass(frozen=True)
class CachePlan:
    """What is stored of each image.

    Attributes:
        layers: The teacher's layers.
        quantities: "grad_cam" (always stored), the signed maps of the teacher's top class for that
            orientation, or of its likeliest `classes`; "attention", attention maps of power `p`;
            "class_maps", the signed maps of every class.
        flips: Whether the mirrored images are stored too.
        precision: The teacher's; "bfloat16" is autocast.
        p: Power of attention maps.
        classes: How many of the likeliest classes; above 1, Grad-CAMs are [B, classes, h, w].
    """

    layers: tuple[str, ...]
    quantities: tuple[Quantity, ...] = ("grad_cam",)
    flips: bool = True
    precision: Precision = "float32"
    p: float = 2.0
    classes: int = 1

    @property
    def orientations(self) -> int:
        """2 with mirrored images, else 1."""
        return 2 if self.flips else 1

    def key(self, teacher: Teacher, image_set: ImageSet) -> CacheKey:
        """Everything that decides the content of a cache."""
        ids = np.ascontiguousarray(image_set.ids, dtype=np.int64)
        return {
            "version": VERSION,
            "teacher": teacher_sha256(teacher),
            "images": image_set.fingerprint,
            "ids": hashlib.sha256(ids.tobytes()).hexdigest(),
            "size": list(image_set.pixels.shape[2:]),
            "layers": list(self.layers),
            "quantities": list(self.quantities),
            "flips": self.flips,
            "precision": self.precision,
            "p": self.p if "attention" in self.quantities else None,
            **({"classes": self.classes} if self.classes > 1 else {}),
        }


def likeliest_classes(logits: Logits, count: int) -> Int[Tensor, "batch *count"]:
    """The top class, [B], or with a count above 1 the likeliest ones, [B, count]."""
    if count == 1:
        return logits.argmax(1)
    return logits.topk(min(count, logits.shape[1]), 1).indices


def teacher_sha256(teacher: Teacher) -> str:
    """sha256 of a teacher's modules, weights and normalization, whatever file they came from."""
    digest = hashlib.sha256()
    for name, module in teacher.network.named_modules():
        digest.update(f"{name} {type(module).__qualname__}\n".encode())
    if teacher.spec is not None:
        digest.update(json.dumps([teacher.spec.name, teacher.spec.args], sort_keys=True).encode())
    state = {**teacher.network.state_dict(), "/mean": teacher.mean, "/std": teacher.std}
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def query_teacher(
    plan: CachePlan,
    teacher: Teacher,
    pixels: Pixels,
    classes: Int[Tensor, "batch *classes"] | None = None,
) -> dict[str, Tensor]:
    """Logits and, as `quantity/number of the layer`, maps of a batch, on the CPU."""
    device = teacher.mean.device
    images = (pixels.to(device).float() / 255).contiguous(memory_format=torch.channels_last)
    all_classes = "class_maps" in plan.quantities
    requested_classes: Classes = classes if classes is None else classes.to(device)
    if requested_classes is None and plan.classes > 1:
        requested_classes = TopClasses(plan.classes)
    if all_classes:
        requested_classes = torch.arange(teacher.classes, device=device).expand(len(images), -1)
    bfloat16 = plan.precision == "bfloat16"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        explanation = explain_images(teacher, images, list(plan.layers), requested_classes)
    values = {"logits": explanation.logits.float().cpu()}
    top = likeliest_classes(values["logits"], plan.classes) if classes is None else classes
    for number, layer in enumerate(plan.layers):
        maps = explanation.maps[layer].float().cpu()
        if all_classes:
            values[f"class_maps/{number}"] = maps
            maps = maps.gather(
                1, class_columns(top)[:, :, None, None].expand(-1, -1, *maps.shape[2:])
            )
            maps = maps if top.dim() == 2 else maps[:, 0]
        values[f"grad_cam/{number}"] = maps
        if "attention" in plan.quantities:
            values[f"attention/{number}"] = attention_map(
                explanation.activations[layer], plan.p
            ).cpu()
    return values
