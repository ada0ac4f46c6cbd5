"""What of the teacher's explanation the student has to match, and how far off it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from camdistill.distill.losses import (
    AttentionForm,
    BetaSchedule,
    MapDistance,
    attention_distance,
    attention_map,
    class_map_distance,
    map_distance,
    several_maps_distance,
)
from camdistill.distill.teacher_maps_plan import Quantity
from camdistill.errors import UserError, check_number
from camdistill.explain.engine.request import Classes, Grad
from camdistill.explain.gradcam import explain_images, last_layer
from camdistill.networks.heads import head_size
from camdistill.networks.teachers import Preprocessed
from camdistill.types import Images, Logits, PerImage


@dataclass(frozen=True)
class LayerPair:
    """A student's layer and the teacher's layer whose map it has to match.

    Args:
        student: Name of the student's layer; None is its last spatial one.
        teacher: Name of the teacher's layer; None is its last spatial one.
        weight: Weight of this pair's distance in the sum over pairs.
    """

    student: str | None = None
    teacher: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("a pair's weight", self.weight, "[0, inf)", "give 0 or more")


@dataclass(frozen=True)
class Transfer:
    """The explanation that is transferred.

    Args:
        quantity: "grad_cam" transfers the teacher's Grad-CAM for its likeliest classes; "attention"
            the activation attention maps of Zagoruyko and Komodakis (2017); "class_maps" the maps
            of all classes (CAT-KD, Guo et al. 2023).
        classes: Number of the teacher's likeliest classes whose Grad-CAM is taught. With 1, its top
            class, the student's maps of other classes are left to chance, and come out much like
            the first's; asking for more costs little at a last layer that GAP and a linear head
            follow, and a backward a class at any other.
        distance: Between Grad-CAMs.
        pairs: Layers that are matched, and at which fidelity is measured; the last pair is the main
            one.
        schedule: How beta changes over the training.
        form: Form of attention transfer: the paper's or the released code's.
        p: Power of attention maps.
        pool: Side of the grid on which class maps are compared.
        grad: Through which part of the student's Grad-CAM the gradient flows: "full", or
            "activations" only (the channel weights are held constant: cheaper at inner layers).
    """

    quantity: Quantity = "grad_cam"
    classes: int = 1
    distance: MapDistance = "pearson"
    pairs: list[LayerPair] = field(default_factory=lambda: [LayerPair()])
    schedule: BetaSchedule = "constant"
    form: AttentionForm = "code"
    p: float = 2.0
    pool: int = 2
    grad: Literal["activations", "full"] = "full"

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise UserError(f"transfer.classes is {self.classes}; give 1 (the top class) or more")
        if self.classes > 1 and self.quantity != "grad_cam":
            raise UserError(
                f"transfer.classes is {self.classes}, but {self.quantity} has none to choose; "
                "leave it out, or transfer grad_cam"
            )
        check_number("p", self.p, "[1, 16]", "a power of attention maps is at least 1, usually 2")
        if not self.pairs:
            raise UserError("transfer.pairs is empty; leave it out for the last layer of both")
        if not any(pair.weight for pair in self.pairs):
            raise UserError("transfer.pairs all have weight 0; give one a weight above 0")
        check_number("pool", self.pool, "[1, 1024]", "it is the side of a grid, at least 1")


def name_pairs(
    pairs: Sequence[LayerPair], student: Preprocessed, teacher: Preprocessed, images: Images
) -> list[tuple[str, str, float]]:
    """The matched layers by name, with their weights; None stands for the last spatial layer.

    Args:
        pairs: Pairs as in the config.
        student: Its layers are named inside `student.network`.
        teacher: Layers of the teacher, named inside `teacher.network`.
        images: One or more images, to find out which layers are spatial.

    Raises:
        UserError: If the student's layer comes twice: fidelity is told by it.
    """
    last_layers: dict[str, str] = {}
    for side, network in (("student", student), ("teacher", teacher)):
        if any(getattr(pair, side) is None for pair in pairs):
            last_layers[side] = last_layer(network, images)
    layer_pairs = [
        (
            pair.student or last_layers["student"],
            pair.teacher or last_layers["teacher"],
            pair.weight,
        )
        for pair in pairs
    ]
    student_layers = [pair[0] for pair in layer_pairs]
    if repeated := sorted({layer for layer in student_layers if student_layers.count(layer) > 1}):
        raise UserError(
            f"two of transfer.pairs name the student's layer '{repeated[0]}'; match each layer once"
        )
    return layer_pairs


def quantity_maps(
    network: Preprocessed,
    images: Images,
    layers: list[str],
    classes: Classes,
    *,
    quantity: Quantity,
    p: float,
    grad: Grad = "none",
) -> tuple[Logits, dict[str, Tensor]]:
    """A network's logits and the transferred quantity at its layers, from one forward.

    Args:
        network: Teacher or student.
        images: In [0, 1].
        layers: Names.
        classes: Classes of the Grad-CAMs, as `explain_images` takes them.
        quantity: What is transferred.
        p: Power of attention maps.
        grad: "none" for targets; a student's maps carry a graph.
    """
    if quantity == "class_maps":
        count = head_size(network.network)
        classes = torch.arange(count, device=images.device).expand(len(images), count)
    explanation = explain_images(
        network, images, layers, classes, grad=grad, maps=quantity != "attention"
    )
    if quantity == "attention":
        return explanation.logits, {
            layer: attention_map(explanation.activations[layer], p) for layer in layers
        }
    return explanation.logits, dict(explanation.maps)


def transfer_distance(
    transfer: Transfer,
    pairs: list[tuple[str, str, float]],
    student_by_layer: dict[str, Tensor],
    teacher_by_layer: dict[str, Tensor],
) -> PerImage:
    """The weighted sum over layer pairs of the distance between student and teacher."""
    total: PerImage | None = None
    for student_layer, teacher_layer, weight in pairs:
        student, teacher = student_by_layer[student_layer], teacher_by_layer[teacher_layer]
        if transfer.quantity == "grad_cam":
            several = student.dim() == 4
            distance = (several_maps_distance if several else map_distance)(
                student, teacher, transfer.distance
            )
        elif transfer.quantity == "attention":
            distance = attention_distance(student, teacher, form=transfer.form)
        else:
            distance = class_map_distance(student, teacher, pool=transfer.pool)
        total = weight * distance if total is None else total + weight * distance
    assert total is not None, "there is always a pair"
    return total
