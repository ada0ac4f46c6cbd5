"""Networks that rows need beside the shipped ones: one trunk with the two heads of the paper.

Both start from the student's trunk and get a new head, as the paper's start from VGG-16's: fully
connected layers learn little of Shapes from nothing, whose objects may stand anywhere (0.13 to 0.55
right after 8 epochs, pooling 0.97).
"""

from collections.abc import Sequence

import torch
from torch import nn

from camdistill.claims.claim import ClaimSetup
from camdistill.claims.networks.claim_training import train_or_load
from camdistill.data.modules import ShapesData
from camdistill.data.views import Augment
from camdistill.distill.classifier import Classifier
from camdistill.distill.optimization import Optimization
from camdistill.distill.training import build_with_seed
from camdistill.errors import UserError
from camdistill.networks.capture import unwrap
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import NetworkSpec, Preprocessed, build_preprocessed
from camdistill.types import Images, Logits

HIDDEN = 128
EPOCHS, IMAGES = 3, 12000
RUNS = 5  # trainings of each, where a row speaks of training


class FlattenedCNN(ShallowCNN):
    """A `ShallowCNN` with VGG's head: max pooling, then every cell fully connected, twice.

    CAM does not exist for it.

    Args:
        classes: Number of logits.
        channels: Channels of the stages.
        strides: Likewise.
        size: Size of the images, in pixels: the head's weights are for this size alone.
    """

    def __init__(
        self,
        classes: int = 8,
        channels: Sequence[int] = (32, 64, 64, 96),
        strides: Sequence[int] = (1, 2, 2, 1),
        size: int = 32,
    ) -> None:
        super().__init__(classes, channels, strides)
        del self.linear  # heads are found by the order of definition: the last one is the head
        for stride in strides:
            size = (size - 1) // stride + 1
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(channels[-1] * (size // 2) ** 2, HIDDEN)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(HIDDEN, classes)

    def forward(self, images: Images) -> Logits:
        """Logits of normalized images."""
        cells = images
        for index in range(1, self.stages + 1):
            cells = self.get_submodule(f"stage{index}")(cells)
        hidden = self.relu(self.hidden(torch.flatten(self.pool(cells), 1)))
        return self.linear(hidden)  # type: ignore[no-any-return]


def fully_connected_network(setup: ClaimSetup, run: int = 0) -> Preprocessed:
    """The student's trunk with fully connected layers behind it, as VGG-16 and AlexNet have."""
    path = f"{FlattenedCNN.__module__}.{FlattenedCNN.__qualname__}"
    return _train_network(setup, f"flattened{run}", run, path, {"size": setup.shapes.size})


def pooling_network(setup: ClaimSetup, run: int = 0) -> Preprocessed:
    """The same trunk with pooling and a linear layer: what CAM asks for."""
    return _train_network(setup, f"pooled{run}", run, "shallow_cnn", {})


def _train_network(
    setup: ClaimSetup, name: str, run: int, path: str, extra_args: dict[str, int]
) -> Preprocessed:
    trunk = unwrap(setup.student)
    if not isinstance(trunk, ShallowCNN):
        raise UserError(
            f"the student is a {type(trunk).__name__}, and this row gives a shallow_cnn other "
            "heads: name one with --student, such as checkpoints/shapes-student.safetensors"
        )
    seed = RUNS * setup.seed + run
    numbers = range(1, trunk.stages + 1)
    weights = [trunk.get_parameter(f"stage{number}.conv.weight") for number in numbers]
    strides = [layer.stride[0] for layer in trunk.modules() if isinstance(layer, nn.Conv2d)]
    args: dict[str, int | float | str | list[int] | list[float] | list[str] | None] = {
        "classes": setup.shapes.classes,
        "channels": [len(weight) for weight in weights],
        "strides": strides,
        **extra_args,
    }
    spec = NetworkSpec(path, args=args)
    module = Classifier(
        spec,
        augment=Augment(crop="pad", padding=3, flip=True),
        optimization=Optimization("adamw", lr=2e-3, weight_decay=1e-2),
        seed=seed,
    )
    module.network = build_with_seed(seed, lambda: build_preprocessed(spec))
    trunk_weights = {
        key: value for key, value in trunk.state_dict().items() if key.startswith("stage")
    }
    module.network.network.load_state_dict(trunk_weights, strict=False)
    data = ShapesData(setup.shapes.classes, train=IMAGES, val=1, test=1, seed=seed)
    return train_or_load(setup, name, module, data, epochs=EPOCHS)
