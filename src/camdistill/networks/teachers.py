"""Networks by name, with their weights and their normalisation; and the frozen Teacher."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from camdistill.errors import UserError, nearest
from camdistill.networks import torchvision_models
from camdistill.networks.cifar_resnet import CIFAR_DEPTHS, CifarResNet, WideResNet
from camdistill.networks.class_paths import (
    Argument,
    construct,
    demand_harmless,
    parameters_of,
    resolve,
)
from camdistill.networks.fitting import aligned, load_state, mismatch
from camdistill.networks.fusion import fused
from camdistill.networks.heads import head_of, head_size, swap_head
from camdistill.networks.students import ShallowCNN
from camdistill.networks.weights import WeightFile, read_weights
from camdistill.types import Images, Logits

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)

_BUILT_IN: dict[str, tuple[Callable[..., nn.Module], dict[str, Argument]]] = {
    **{f"resnet{depth}": (CifarResNet, {"depth": depth}) for depth in CIFAR_DEPTHS},
    **{
        f"wrn_{depth}_{width}": (WideResNet, {"depth": depth, "width": width})
        for depth, width in ((16, 1), (16, 2), (40, 1), (40, 2))
    },
    "shallow_cnn": (ShallowCNN, {}),
}


@dataclass(frozen=True)
class NetworkSpec:
    """A network, its weights and how it wants its images.

    Args:
        name: resnet20 to resnet110 (CIFAR), wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2, shallow_cnn,
            a network of torchvision such as resnet18, or a class path such as
            package.module.Network.
        weights: A file (safetensors, torch, or a checkpoint of ours), or for torchvision's
            networks DEFAULT or another name of theirs. None is untrained.
        args: Arguments of the network's class.
        mean: Of each channel of images in [0, 1]. The weights' own are taken where they say.
        std: Likewise.
    """

    name: str
    weights: str | None = None
    args: dict[str, Argument] = field(default_factory=dict)
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(
                f"mean {self.mean} and std {self.std}: give three numbers each, std above 0"
            )


def network_names() -> list[str]:
    """Every name that needs no class path."""
    return [*_BUILT_IN, *torchvision_models.names()]


def build(
    spec: NetworkSpec,
    *,
    classes: int | None = None,
    allowed: Sequence[str] | None = None,
    replace_head: bool = False,
) -> nn.Module:
    """The network of a spec, with its weights.

    Args:
        spec: What to build.
        classes: Number of logits. None takes the weights' number, or the network's own.
        allowed: Packages that a class path may begin with, for specs from a checkpoint
            (`class_paths.SAFE_PACKAGES` and what the user trusts); None for any.
        replace_head: Whether weights for another number of classes get a new, untrained head.

    Raises:
        UserError: If there is no such network, its arguments are wrong, or its weights don't fit.
    """
    return _assembled(spec, classes, allowed, replace_head)[0]


def preprocessed(
    spec: NetworkSpec,
    *,
    classes: int | None = None,
    allowed: Sequence[str] | None = None,
    replace_head: bool = False,
) -> "Preprocessed":
    """`build` with the normalisation that the spec or its weights ask for."""
    network, weights = _assembled(spec, classes, allowed, replace_head)
    return Preprocessed(network, *normalisation(spec, weights))


def _assembled(
    spec: NetworkSpec, classes: int | None, allowed: Sequence[str] | None, replace_head: bool
) -> tuple[nn.Module, WeightFile | None]:
    if classes is not None and classes < 1:
        raise UserError(f"{classes} classes: a network needs at least 1")
    if spec.weights is None:
        network = _constructed(spec, classes, allowed)
        if classes is not None and head_size(network) != classes:
            swap_head(network, classes)
        return network, None
    if torchvision_models.names_weights(spec.name, spec.weights):
        path = torchvision_models.downloaded(spec.name, spec.weights)
        weights = read_weights(path)
        network = torchvision_models.pretrained(spec.name, spec.weights, spec.args)
    else:
        weights = read_weights(spec.weights)
        network = _constructed(spec, None, allowed)
        _load(spec, network, weights)
    if classes is not None and (found := head_size(network)) != classes:
        if not replace_head:
            raise UserError(
                f"'{spec.weights}' is for {found} classes, not {classes}: give weights for "
                f"{classes} classes or none; Classifier (in Python replace_head=True) gives these "
                "a new head"
            )
        swap_head(network, classes)
    return network, weights


def _constructed(
    spec: NetworkSpec, classes: int | None, allowed: Sequence[str] | None
) -> nn.Module:
    if spec.name in _BUILT_IN:
        factory, fixed = _BUILT_IN[spec.name]
        return construct(spec.name, factory, _with_classes(factory, spec, classes), fixed)
    if spec.name in torchvision_models.names():
        return torchvision_models.untrained(spec.name, spec.args, classes)
    if "." not in spec.name:
        raise UserError(
            f"no network '{spec.name}'; {nearest(spec.name, network_names())}, or give a class "
            "path such as package.module.Network"
        )
    if allowed is not None:
        demand_harmless(spec.name, spec.args)
    by_path = resolve(spec.name, allowed)
    return construct(spec.name, by_path, _with_classes(by_path, spec, classes), {})


def _with_classes(
    factory: Callable[..., object], spec: NetworkSpec, classes: int | None
) -> Mapping[str, Argument]:
    """The spec's arguments, with the number of classes if the factory has a word for it."""
    word = next((w for w in ("classes", "num_classes") if w in parameters_of(factory)), None)
    if classes is None or word is None or word in spec.args:
        return spec.args
    return {**spec.args, word: classes}


def _load(spec: NetworkSpec, network: nn.Module, weights: WeightFile) -> None:
    state = aligned(network, weights.state)
    name, head = head_of(network)
    rows = state.get(f"{name}.weight" if name else "weight")
    same_inputs = rows is not None and rows.shape[1:] == head.weight.shape[1:]
    if rows is not None and same_inputs and len(rows) != len(head.weight):
        swap_head(network, len(rows))
    if problem := mismatch(network, state):
        alike = [other for other in _BUILT_IN if other != spec.name and _fits(other, weights)]
        cure = f"it fits '{alike[0]}'" if alike else "name the network it was trained as"
        raise UserError(f"'{weights.path}' doesn't fit {spec.name}: it {problem}; {cure}")
    load_state(network, weights)


def _fits(name: str, weights: WeightFile) -> bool:
    factory, fixed = _BUILT_IN[name]
    with torch.device("meta"):
        network = factory(**fixed)
        state = aligned(network, weights.state)
        rows = state.get("linear.weight")
        if rows is not None and rows.ndim == 2:
            swap_head(network, len(rows))
    return not mismatch(network, state)


def normalisation(spec: NetworkSpec, weights: WeightFile | None = None) -> tuple[Triple, Triple]:
    """Mean and standard deviation that a network wants.

    The spec's, where they aren't the default; else those that its weights were trained with, where
    torchvision or the file's metadata (`mean` and `std` as JSON) say them; else the default.
    """
    own = (spec.mean, spec.std)
    if own != (IMAGENET_MEAN, IMAGENET_STD):
        return own
    if spec.weights is not None and torchvision_models.names_weights(spec.name, spec.weights):
        return torchvision_models.normalisation(spec.name, spec.weights)
    if weights is not None and {"mean", "std"} <= set(weights.metadata):
        try:
            mean, std = (json.loads(weights.metadata[key]) for key in ("mean", "std"))
            return (float(mean[0]), float(mean[1]), float(mean[2])), (
                float(std[0]),
                float(std[1]),
                float(std[2]),
            )
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(
                f"the metadata of '{weights.path}' has a mean or std that is not three numbers; "
                "write the file again"
            ) from error
    return own


class Preprocessed(nn.Module):
    """A network that takes images in [0, 1]: it normalises them itself.

    Attributes:
        network: The bare network; layer names are the names inside it.
        mean: Of each channel; not part of the state dict.
        std: Likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def normalise(self, images: Images) -> Images:
        """Images as the network was trained to take them; float32 ones get its weights' type."""
        normalised = (images - self.mean.to(images.dtype)) / self.std.to(images.dtype)
        weight = next(self.network.parameters(), self.mean)
        if images.dtype == torch.float32 and weight.is_floating_point():
            return normalised.to(weight.dtype)
        return normalised

    def forward(self, images: Images) -> Logits:
        """Logits of images in [0, 1]."""
        return self.network(self.normalise(images))  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Preprocessed":
        """What `to`, `cuda`, `bfloat16` and the like are made of; mean and std stay exact."""
        exact = {name: self._buffers[name] for name in ("mean", "std")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def metadata(self) -> dict[str, str]:
        """The normalisation as `save_safetensors` keeps it and `normalisation` reads it."""
        pairs = {"mean": self.mean, "std": self.std}
        return {name: json.dumps(value.flatten().tolist()) for name, value in pairs.items()}


class Teacher(Preprocessed):
    """A frozen network, always in eval mode, and in nobody's checkpoint.

    It moves with the module that holds it, but its network is not among the registered modules:
    no state dict, optimiser, EMA, `train()`, `requires_grad_()` or DDP of the holder sees it, and
    a checkpoint without it loads strictly. Reach it as `teacher.network`.

    Attributes:
        spec: What it was built from; None if it came from `Teacher.of`.
        classes: Number of logits.
        sha256: Of the weights' file, in hexadecimal; None without a file.
        holds_precision: Whether it only moves between devices, whatever its holder is turned into.
    """

    holds_precision = False

    def __init__(self, spec: NetworkSpec, *, allowed: Sequence[str] | None = None) -> None:
        network, weights = _assembled(spec, None, allowed, False)
        super().__init__(network, *normalisation(spec, weights))
        self.spec: NetworkSpec | None = spec
        self.sha256: str | None = weights.sha256 if weights else None
        self._freeze()

    @classmethod
    def of(
        cls,
        network: nn.Module,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> "Teacher":
        """A teacher from a network in memory. The network itself is frozen, not a copy."""
        teacher = cls.__new__(cls)
        Preprocessed.__init__(teacher, network, mean, std)
        teacher.spec, teacher.sha256 = None, None
        teacher._freeze()
        return teacher

    def _freeze(self) -> None:
        network = self.network.eval().requires_grad_(False)
        self.classes = head_size(network)
        del self.network
        # Past nn.Module's own __setattr__, which would register it.
        object.__setattr__(self, "network", network)
        super().train(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode, whatever is asked."""
        self.network.eval()
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Teacher":
        """What `to`, `cuda`, `bfloat16` and the like are made of; the holder's calls ours."""
        fn = _in_its_precision(fn) if self.holds_precision else fn
        self.network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)
        return self

    def fused(self, size: tuple[int, int] = (32, 32), keep: Collection[str] = ()) -> "Teacher":
        """A copy with batch normalisation folded into the convolutions, for speed.

        Layers keep their names. A convolution whose normalisation is folded gives the normalised
        values, so name the convolutions and normalisations whose maps are wanted in `keep`. If
        folding isn't provably the same function, the copy is unfused and the log says why.

        Args:
            size: Height and width in pixels of the images it will see.
            keep: Layers whose own outputs must stay what they are, at whatever call.
        """
        modules = {layer.partition("#")[0] for layer in keep}
        network = fused(self.network, size, modules, self.mean.shape[1])
        copy = type(self).of(network, self.mean.flatten().tolist(), self.std.flatten().tolist())
        copy.spec, copy.sha256 = self.spec, self.sha256
        return copy.to(self.mean.device)


def _in_its_precision(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same move without a change of precision, which would round."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move
