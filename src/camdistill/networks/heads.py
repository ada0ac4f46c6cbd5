"""The last layer of a network, whatever it is called: its size, and another in its place."""

from typing import cast

from torch import nn

from camdistill.errors import UserError
from camdistill.store.atomic_files import check_memory

Head = nn.Linear | nn.Conv2d


def find_head(network: nn.Module) -> tuple[str, Head]:
    """The last linear layer or 1x1 convolution, in the order of definition, with its name.

    Raises:
        UserError: If the network has neither.
    """
    head: tuple[str, Head] | None = None
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
        ):
            head = name, module
    if head is None:
        raise UserError(
            f"{type(network).__name__} has no linear layer or 1x1 convolution as its head; "
            "add one, so that the number of classes is known"
        )
    return head


def head_size(network: nn.Module) -> int:
    """Number of logits."""
    return len(find_head(network)[1].weight)


def swap_head(network: nn.Module, classes: int) -> None:
    """Put an untrained head for so many classes in the place of the old one; the rest stays."""
    name, old = find_head(network)
    device_and_dtype, bias = (old.weight.device, old.weight.dtype), old.bias is not None
    check_memory(old.weight[0].numel() * classes * 4, f"the weights of {classes:,} classes")
    new: Head
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, classes, bias, *device_and_dtype)
    else:
        new = nn.Conv2d(old.in_channels, classes, 1, bias=bias).to(*device_and_dtype)
    if not name:
        raise UserError("the network is a single layer: its head can't be replaced")
    network.set_submodule(name, cast(nn.Module, new))
    # torchvision's SqueezeNet and others keep the number beside the layer.
    for word in ("num_classes", "classes"):
        if getattr(network, word, None) == len(old.weight):
            setattr(network, word, classes)
