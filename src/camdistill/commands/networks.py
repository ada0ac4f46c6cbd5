"""Networks for a command: a checkpoint's student and teacher, or any network alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from camdistill.data.decode import check_side
from camdistill.data.modules import Carving
from camdistill.distill.checkpoints import TrainedExplainer, load
from camdistill.errors import UserError
from camdistill.networks.cifar_resnet import CifarResNet, WideResNet
from camdistill.networks.teachers import NetworkSpec, Preprocessed, Teacher
from camdistill.networks.training_facts import TrainingFacts


@dataclass(frozen=True)
class NetworkSelection:
    """The networks that are explained.

    Attributes:
        teacher: Its top class is explained, of both networks.
        student: Beside it, or None.
        pairs: Layers of (teacher, student); the student's is empty where there is none.
        classes: Names of the classes; empty when unknown.
        size: Height and width of the images that the networks were trained on, in pixels.
        sha256: SHA-256 of the files that were read.
        first: What the first network is: a student whose teacher is missing stands in its place.
        channels: Channels of the images that the networks take: 3, or 1 for their mean.
        carving: Carving of the images that they were trained on.
    """

    teacher: Preprocessed
    student: Preprocessed | None
    pairs: list[tuple[str, str]]
    classes: tuple[str, ...]
    size: tuple[int, int]
    sha256: dict[str, str | None]
    first: str = "teacher"
    channels: int = 3
    carving: Carving = Carving()  # noqa: RUF009  (a tuple)

    @property
    def by_name(self) -> dict[str, nn.Module]:
        """The networks that there are."""
        first: dict[str, nn.Module] = {self.first: self.teacher}
        return first if self.student is None else first | {"student": self.student}


def load_networks(
    checkpoint: Path | None, teacher: str | None, weights: str | None, trust: Sequence[str]
) -> NetworkSelection:
    """The networks that a command line names.

    Raises:
        UserError: Neither or both ways are named, or what is named can't be loaded.
    """
    if checkpoint is not None and teacher is None:
        return _of_checkpoint(load(checkpoint, trust=trust, teacher=weights))
    if teacher is None or checkpoint is not None:
        raise UserError(
            "give either --checkpoint FILE (a student with its teacher), or --teacher NAME, with "
            "--weights if it is trained (a network alone)"
        )
    network = Teacher(NetworkSpec(teacher, weights))
    facts, usual_size = network.facts, _usual_size(network)
    if weights is None:
        print(f"{teacher} has random weights; for trained ones give --weights FILE or DEFAULT\n")
    elif assumed := _assumptions(facts, usual_size):
        print(f"'{weights}' doesn't tell how its images were: {assumed}\n")
    channels, sha256 = _channels(network.network), {"teacher": network.sha256}
    if channels == 1:
        # The spec has three numbers, of red, green and blue.
        mean, std = (float(value.mean()) for value in (network.mean, network.std))
        network = Teacher.from_network(network.network, [mean], [std])
    return NetworkSelection(
        network,
        None,
        [],
        facts.class_names,
        facts.size or usual_size,
        sha256,
        channels=channels,
        carving=_carving(facts.carving),
    )


def _assumptions(facts: TrainingFacts, usual_size: tuple[int, int]) -> str:
    """What is taken for granted where the weights' file doesn't say it."""
    assumed = []
    if facts.size is None:
        assumed.append(f"{usual_size[0]}x{usual_size[1]} pixels (--size N takes others)")
    if facts.mean is None:
        assumed.append("ImageNet's mean and standard deviation")
    verb = "are" if facts.mean is None else "is"
    return f"{' and '.join(assumed)} {verb} assumed" if assumed else ""


def _carving(facts: Mapping[str, float]) -> Carving:
    return Carving(int(facts.get("split_seed", 0)), float(facts.get("test_fraction", 0.1)))


def image_side(size: int | None, usual_size: tuple[int, int]) -> int:
    """Side of the images in pixels: as the user wants it, or the usual one.

    Raises:
        UserError: The user's is none, or images usually aren't square and the user wants no side.
    """
    if size is not None:
        check_side("size", size)
        return size
    height, width = usual_size
    if height != width:
        raise UserError(
            f"the network was trained on {height}x{width} images, which this command doesn't show "
            "whole: give --size N, the side of a square in pixels"
        )
    return height


def training_size(explainer: TrainedExplainer) -> tuple[int, int]:
    """Height and width of a checkpoint's images; the usual ones where it doesn't tell."""
    size = explainer.settings.get("size")
    return (int(size[0]), int(size[1])) if size and all(size) else _usual_size(explainer.network)


def _channels(network: nn.Module) -> int:
    """Of the images that a network takes: what its first convolution reads."""
    channels = next((read for part in network.modules() if (read := _channels_read(part))), 3)
    if channels not in (1, 3):
        raise UserError(
            f"{type(network).__name__} takes images of {channels} channels; give a network for "
            "color (3) or gray (1) images"
        )
    return channels


def _channels_read(part: nn.Module) -> int | None:
    """Of a convolution; one of TorchScript has its class's name alone, one traced no numbers."""
    if isinstance(part, nn.Conv2d):
        return part.in_channels
    if getattr(part, "original_name", "") != "Conv2d":
        return None
    weight = part.weight
    assert isinstance(weight, Tensor), "a convolution has a kernel"
    return int(getattr(part, "in_channels", weight.shape[1]))


def _of_checkpoint(explainer: TrainedExplainer) -> NetworkSelection:
    carving_facts = explainer.settings.get("carving", {})
    carving = _carving({str(name): float(value) for name, value in carving_facts.items()})
    size = training_size(explainer)
    sha256: dict[str, str | None] = {"checkpoint": explainer.sha256}
    if explainer.teacher is None:
        if explainer.teacher_missing:
            print(f"No teacher, so the student alone: {explainer.teacher_missing}\n")
        first = "student" if "student" in explainer.settings else "network"
        return NetworkSelection(
            explainer.network, None, [], explainer.classes, size, sha256, first, carving=carving
        )
    pairs = [(teacher, student) for student, teacher, _ in explainer.pairs]
    sha256["teacher"] = explainer.teacher.sha256
    return NetworkSelection(
        explainer.teacher,
        explainer.network,
        pairs,
        explainer.classes,
        size,
        sha256,
        carving=carving,
    )


def _usual_size(network: Preprocessed) -> tuple[int, int]:
    return (32, 32) if isinstance(network.network, CifarResNet | WideResNet) else (224, 224)
