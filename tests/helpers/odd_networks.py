"""Networks that give something else than logits, or that can't be explained, by class path."""

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Plain(nn.Module):
    """What the others are made from."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(6, classes)

    def features(self, images: Tensor) -> Tensor:
        return self.block(self.conv(images).relu())

    def logits(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images).mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images)


class GivesDict(Plain):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": self.features(images), "logits": self.logits(images)}


class GivesTuple(Plain):
    def forward(self, images: Tensor) -> tuple[None, Tensor]:
        return None, self.logits(images)


class GivesNumbers(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images)[:, 0]


class GivesScoreMaps(Plain):
    """As torchvision's segmentation networks."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.fc = nn.Conv2d(6, classes, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": self.fc(self.features(images))}


class GivesTokens(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images).flatten(2).transpose(1, 2))


class GivesClasses(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images).argmax(1)


class GivesOneRow(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images).mean(0, keepdim=True)


class GivesNoNumbers(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images) * torch.nan


class GivesNothing(Plain):
    def forward(self, images: Tensor) -> None:
        return None


class TakesTwo(Plain):
    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        return self.logits(images + others)


class Fails(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return {}["nothing"]


class GivesSparse(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images).to_sparse()


class StopsIterating(Plain):
    """As a forward that asks for the next of an iterator that is at its end."""

    def forward(self, images: Tensor) -> Tensor:
        return next(iter(()))


class AnswersByChance(Plain):
    def features(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(super().features(images), 0.5, training=True)


class RunsOutOfMemory(Plain):
    def forward(self, images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class RunsOutOfMemoryOnCpu(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + torch.empty(2**50, 6)[:1]


class CannotBeBuilt(Plain):
    def __init__(self, classes: int = 6) -> None:
        super().__init__(classes)
        raise FileNotFoundError("no file of means")


class Doubles(Plain):
    def __init__(self, classes: int = 6) -> None:
        super().__init__(classes)
        self.double()


class OnMeta(Plain):
    def __init__(self, classes: int = 6) -> None:
        super().__init__(classes)
        self.to("meta")


class Lazy(Plain):
    def __init__(self, classes: int = 6) -> None:
        super().__init__(classes)
        self.block = nn.Sequential(nn.LazyConv2d(6, 3, padding=1), nn.ReLU())


def lazy_run_once(classes: int = 6) -> nn.Module:
    network = Lazy(classes)
    network(torch.zeros(1, 3, 16, 16))
    return network


class Reentrant(Plain):
    """Its block runs inside a reentrant checkpoint."""

    reentrant = True

    def features(self, images: Tensor) -> Tensor:
        hidden = self.conv(images).relu()
        return checkpoint(self.block, hidden, use_reentrant=self.reentrant)


class NotReentrant(Reentrant):
    reentrant = False


def scripted(classes: int = 6) -> nn.Module:
    return torch.jit.script(Plain(classes))


def traced(classes: int = 6) -> nn.Module:
    return torch.jit.trace(Plain(classes).eval(), torch.zeros(1, 3, 16, 16))


def exported(classes: int = 6) -> nn.Module:
    return torch.export.export(Plain(classes).eval(), (torch.zeros(2, 3, 16, 16),)).module()


class PartlyScripted(Plain):
    def __init__(self, classes: int = 6) -> None:
        super().__init__(classes)
        self.block = torch.jit.script(self.block)


class GrayScripted(Plain):
    """Its first convolution is a program of TorchScript that reads gray images."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__(classes)
        self.conv = torch.jit.script(nn.Conv2d(1, 4, 3, padding=1))


def quantized(classes: int = 6) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(Plain(classes), {nn.Linear}, dtype=torch.qint8)


class Fetches(Plain):
    """A class whose backbone is fetched, unless it is told not to."""

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.block[0] = nn.Conv2d(4, 6, 3, padding=1)
        if pretrained:
            torchvision.models.squeezenet1_1(weights="DEFAULT")


class AlwaysFetches(Plain):
    def __init__(self) -> None:
        super().__init__()
        torchvision.models.squeezenet1_1(weights="DEFAULT")
