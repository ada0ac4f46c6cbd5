"""Networks by name, with their weights and their normalization; and the frozen Teacher."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from camdistill.errors import UserError, check_number, nearest
from camdistill.networks import torchvision_models
from camdistill.networks.cifar_resnet import CIFAR_DEPTHS, CifarResNet, WideResNet
from camdistill.networks.class_paths import (
    Argument,
    check_safe_arguments,
    construct,
    factory_parameters,
    offline_arguments,
    resolve,
)
from camdistill.networks.fitting import align_names, describe_mismatch, load_weights
from camdistill.networks.fusion import fuse_network
from camdistill.networks.heads import find_head, head_size, swap_head
from camdistill.networks.network_checks import SUSPECT, check_built, check_explainable
from camdistill.networks.students import ShallowCNN
from camdistill.networks.training_facts import TrainingFacts, Triple, training_facts
from camdistill.networks.weights import WeightFile, read_weights
from camdistill.networks.wrapper import Wrapper
from camdistill.types import Images

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
        args: Arguments of the network's class. A file of ours that trained this network says them.
        mean: Mean of each channel of images in [0, 1]. The weights' own are taken where they say.
        std: Standard deviation of each channel.
    """

    name: str
    weights: str | None = None
    args: dict[str, Argument] = field(default_factory=dict)
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3:
            raise UserError(f"mean {self.mean} and std {self.std}: give three numbers each")
        check_moments(self.mean, self.std)


def check_moments(mean: Sequence[float], std: Sequence[float], where: str = "") -> None:
    """Checks a normalization of images in [0, 1].

    Args:
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        where: It was found, for the message.

    Raises:
        UserError: One can't be: NaN, a deviation of 0, or the mean of images in [0, 255].
    """
    cure = f"give numbers for images in [0, 1], which an std above 0 divides{where}"
    for value in mean:
        check_number("mean", value, "[-1, 2]", cure)
    for value in std:
        check_number("std", value, "(0, inf)", cure)


def network_names() -> list[str]:
    """Every name that needs no class path."""
    return [*_BUILT_IN, *torchvision_models.model_names()]


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
    return _assemble(spec, classes, allowed, replace_head)[0]


def build_preprocessed(
    spec: NetworkSpec,
    *,
    classes: int | None = None,
    allowed: Sequence[str] | None = None,
    replace_head: bool = False,
) -> "Preprocessed":
    """`build` with the normalization that the spec or its weights ask for."""
    network, weights, facts = _assemble(spec, classes, allowed, replace_head)
    return Preprocessed(network, *normalization(spec, weights), facts=facts)


def _assemble(
    spec: NetworkSpec, classes: int | None, allowed: Sequence[str] | None, replace_head: bool
) -> tuple[nn.Module, WeightFile | None, TrainingFacts]:
    if classes is not None and classes < 1:
        raise UserError(f"{classes} classes: a network needs at least 1")
    if spec.weights is None:
        network = _construct(spec, classes, allowed)
        check_built(network, spec.name)
        if classes is not None and head_size(network) != classes:
            swap_head(network, classes)
        return network, None, TrainingFacts()
    if torchvision_models.is_weight_name(spec.name, spec.weights):
        path = torchvision_models.download_weights(spec.name, spec.weights)
        weights = read_weights(path)
        network = torchvision_models.build_pretrained(spec.name, spec.weights, spec.args)
        facts = torchvision_models.weight_facts(spec.name, spec.weights)
    else:
        weights = read_weights(spec.weights)
        facts = training_facts(weights)
        network = _build_trained(spec, weights, facts, allowed)
    if classes is not None and (head_classes := head_size(network)) != classes:
        if not replace_head:
            raise UserError(
                f"'{spec.weights}' is for {head_classes} classes, not {classes}: give weights for "
                f"{classes} classes or none; Classifier (in Python replace_head=True) gives these "
                "a new head"
            )
        swap_head(network, classes)
    return network, weights, facts


def _build_trained(
    spec: NetworkSpec, weights: WeightFile, facts: TrainingFacts, allowed: Sequence[str] | None
) -> nn.Module:
    """The network with the weights of a file, built as the file says if it is of this network."""
    build_spec = spec
    if facts.name == spec.name and not spec.args:
        check_safe_arguments(spec.name, facts.args)
        build_spec = replace(spec, args=dict(facts.args))
    network = _construct(build_spec, facts.classes if facts.name == spec.name else None, allowed)
    check_built(network, spec.name)
    _load_weights(spec, network, weights, facts.name)
    return network


def _construct(spec: NetworkSpec, classes: int | None, allowed: Sequence[str] | None) -> nn.Module:
    if spec.name in _BUILT_IN:
        factory, fixed = _BUILT_IN[spec.name]
        return construct(spec.name, factory, _add_classes(factory, spec, classes), fixed)
    if spec.name in torchvision_models.model_names():
        return torchvision_models.build_untrained(spec.name, spec.args, classes)
    if "." not in spec.name:
        raise UserError(
            f"no network '{spec.name}'; {nearest(spec.name, network_names())}, or give a class "
            "path such as package.module.Network"
        )
    if allowed is not None:
        check_safe_arguments(spec.name, spec.args)
    by_path = resolve(spec.name, allowed)
    args = _add_classes(by_path, spec, classes)
    return construct(spec.name, by_path, args, offline_arguments(by_path, spec.args))


def _add_classes(
    factory: Callable[..., object], spec: NetworkSpec, classes: int | None
) -> Mapping[str, Argument]:
    """The spec's arguments, with the number of classes if the factory has a word for it."""
    word = next((w for w in ("classes", "num_classes") if w in factory_parameters(factory)), None)
    if classes is None or word is None or word in spec.args:
        return spec.args
    return {**spec.args, word: classes}


def _load_weights(
    spec: NetworkSpec, network: nn.Module, weights: WeightFile, trained_name: str
) -> None:
    state = align_names(network, weights.state)
    name, head = find_head(network)
    rows = state.get(f"{name}.weight" if name else "weight")
    same_inputs = rows is not None and rows.shape[1:] == head.weight.shape[1:]
    if rows is not None and same_inputs and len(rows) != len(head.weight):
        swap_head(network, len(rows))
    if problem := describe_mismatch(network, state):
        alike = [
            candidate
            for candidate in _BUILT_IN
            if candidate != spec.name and _can_load(candidate, weights)
        ]
        cure = f"it fits '{alike[0]}'" if alike else "name the network it was trained as"
        if trained_name and trained_name != spec.name:
            cure = f"it was trained as '{trained_name}'"
        raise UserError(f"'{weights.path}' doesn't fit {spec.name}: it {problem}; {cure}")
    load_weights(network, weights)


def _can_load(name: str, weights: WeightFile) -> bool:
    factory, fixed = _BUILT_IN[name]
    with torch.device("meta"):
        network = factory(**fixed)
        state = align_names(network, weights.state)
        rows = state.get("linear.weight")
        if rows is not None and rows.ndim == 2:
            swap_head(network, len(rows))
    return not describe_mismatch(network, state)


def normalization(spec: NetworkSpec, weights: WeightFile | None = None) -> tuple[Triple, Triple]:
    """Mean and standard deviation that a network wants.

    The spec's, where they aren't the default; else those that its weights were trained with, where
    torchvision or the file (its experiment, or `mean` and `std` as JSON) says; else the default.
    """
    spec_moments = (spec.mean, spec.std)
    if spec_moments != (IMAGENET_MEAN, IMAGENET_STD):
        return spec_moments
    facts = TrainingFacts()
    if spec.weights is not None and torchvision_models.is_weight_name(spec.name, spec.weights):
        facts = torchvision_models.weight_facts(spec.name, spec.weights)
    elif weights is not None:
        facts = training_facts(weights)
    if facts.mean is None or facts.std is None:
        return spec_moments
    where = f"; '{spec.weights}' has these in its metadata: write it again"
    check_moments(facts.mean, facts.std, where)
    return facts.mean, facts.std


class Preprocessed(Wrapper):
    """A network that takes images in [0, 1]: it normalizes them itself.

    Attributes:
        network: The bare network; layer names are the names inside it.
        mean: Mean of each channel; not part of the state dict.
        std: Standard deviation of each channel.
        facts: What the network's weights say of their training.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        *,
        facts: TrainingFacts = TrainingFacts(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__()
        check_moments(mean, std)
        self.network = network
        self.facts = facts
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def normalize(self, images: Images) -> Images:
        """Images as the network was trained to take them; float32 ones get its weights' type."""
        normalized = (images - self.mean.to(images.dtype)) / self.std.to(images.dtype)
        weight = next(self.network.parameters(), self.mean)
        if images.dtype == torch.float32 and weight.is_floating_point():
            return normalized.to(weight.dtype)
        return normalized

    def forward(self, images: Images) -> object:
        """What the network gives for images in [0, 1]: logits, where it classifies."""
        return self.network(self.normalize(images))

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
        """The normalization as `save_safetensors` keeps it and `normalization` reads it."""
        pairs = {"mean": self.mean, "std": self.std}
        return {name: json.dumps(value.flatten().tolist()) for name, value in pairs.items()}


class Teacher(Preprocessed):
    """A frozen network, always in eval mode, and in nobody's checkpoint.

    It moves with the module that holds it, but its network is not among the registered modules:
    no state dict, optimizer, EMA, `train()`, `requires_grad_()` or DDP of the holder sees it, and
    a checkpoint without it loads strictly. Reach it as `teacher.network`.

    Attributes:
        spec: What it was built from; None if it came from `Teacher.from_network`.
        classes: Number of logits.
        sha256: SHA-256 of the weights' file, in hexadecimal; None without a file.
        holds_precision: Whether it only moves between devices, whatever its holder is turned into.
    """

    holds_precision = False

    def __init__(self, spec: NetworkSpec, *, allowed: Sequence[str] | None = None) -> None:
        network, weights, facts = _assemble(spec, None, allowed, False)
        super().__init__(network, *normalization(spec, weights), facts=facts)
        self.spec: NetworkSpec | None = spec
        self.sha256: str | None = weights.sha256 if weights else None
        self._freeze()

    @classmethod
    def from_network(
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
        suspects = [part for part in self.network.modules() if isinstance(part, SUSPECT)]
        check_explainable(self.network, type(self.network).__name__, suspects)
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
        fn = _keep_precision(fn) if self.holds_precision else fn
        self.network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)
        return self

    def fuse_batch_norm(
        self, size: tuple[int, int] = (32, 32), keep: Collection[str] = ()
    ) -> "Teacher":
        """A copy with batch normalization folded into the convolutions, for speed.

        Layers keep their names. A convolution whose normalization is folded gives the normalized
        values, so name the convolutions and normalizations whose maps are wanted in `keep`. If
        folding isn't provably the same function, the copy is unfused and the log says why.

        Args:
            size: Height and width in pixels of the images it will see.
            keep: Layers whose own outputs must stay what they are, at whatever call.
        """
        modules = {layer.partition("#")[0] for layer in keep}
        network = fuse_network(self.network, size, modules, self.mean.shape[1])
        copy = type(self).from_network(
            network, self.mean.flatten().tolist(), self.std.flatten().tolist()
        )
        copy.spec, copy.sha256, copy.facts = self.spec, self.sha256, self.facts
        return copy.to(self.mean.device)


def _keep_precision(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same move without a change of precision, which would round."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move
