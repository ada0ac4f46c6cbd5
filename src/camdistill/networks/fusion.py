"""Batch normalization folded into the convolutions before it: the same function, faster."""

import copy
import logging
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

log = logging.getLogger(__name__)

# Double precision leaves this much between the fused network and the other one.
TOLERANCE = 1e-8
_NORMS = (
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    *("cudnn_batch_norm", "miopen_batch_norm"),  # what torch calls on a GPU
)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which convolution's output goes into which normalization, and nowhere else."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: Counter[int] = Counter()
        # Outputs of convolutions are kept alive: a freed one's id could come back.
        self.conv_by_output: dict[int, tuple[Tensor, Tensor]] = {}
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        input_ids = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self.uses.update(input_ids)
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if id(leaf) not in input_ids:
                # A new tensor may have the id of one that is gone.
                self.uses.pop(id(leaf), None)
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.conv_by_output[id(output)] = (output, args[1])
        elif name in _NORMS and id(args[0]) in self.conv_by_output:
            output_of_conv, weight = self.conv_by_output[id(args[0])]
            self.pairs.append((output_of_conv, weight, args[3]))
        return output


def find_foldable(network: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Names of convolutions whose only reader is one batch normalization, with its name.

    Read off a real forward pass of these images; the network must be in eval mode. Only torch's
    own two classes count: a subclass may do more.
    """
    convs = {
        id(module.weight): name
        for name, module in network.named_modules()
        if type(module) is nn.Conv2d
    }
    norms = {
        id(module.running_mean): name
        for name, module in network.named_modules()
        if type(module) is nn.BatchNorm2d and module.running_mean is not None
    }
    with torch.no_grad(), _Recorder() as recorder:
        network(images)
    return [
        (convs[id(weight)], norms[id(mean)])
        for output, weight, mean in recorder.pairs
        if recorder.uses[id(output)] == 1
        and recorder.uses[id(weight)] == 1
        and recorder.uses[id(mean)] == 1
        and id(weight) in convs
        and id(mean) in norms
    ]


def fold_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution that does what a convolution and a batch normalization in eval mode do."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias
    folded = copy.deepcopy(conv)
    folded.weight = nn.Parameter((conv.weight * scale.view(-1, 1, 1, 1)).detach(), False)
    folded.bias = nn.Parameter(bias.detach(), False)
    return folded


def fuse_network(
    network: nn.Module, size: tuple[int, int], keep: Collection[str] = (), channels: int = 3
) -> nn.Module:
    """A frozen copy in eval mode with every batch normalization folded that can be.

    A folded normalization becomes an identity, so layers keep their names; the convolution before
    it then gives the normalized values. Folding is done and checked in float64 on the CPU; where
    the copy disagrees or can't run, it comes back unfused and the log says why.

    Args:
        network: The network; it is not changed.
        size: Height and width in pixels of images that it takes.
        keep: Layers whose own outputs must stay what they are.
        channels: Channels of the images.
    """
    unfused = copy.deepcopy(network).eval().requires_grad_(False)
    exact = copy.deepcopy(unfused).cpu().double()
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(2, channels, *size, generator=noise, dtype=torch.float64)
    try:
        with torch.no_grad():
            expected = exact(images)
        pairs = find_foldable(exact, images)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        log.warning("teacher stays unfused: it can't run on %d x %d images: %s", *size, error)
        return unfused
    pairs = [(conv, norm) for conv, norm in pairs if conv not in keep and norm not in keep]
    for conv, norm in pairs:
        folded = fold_norm(exact.get_submodule(conv), exact.get_submodule(norm))  # type: ignore[arg-type]
        exact.set_submodule(conv, folded)
        exact.set_submodule(norm, nn.Identity())
    with torch.no_grad():
        error_of_fused = (exact(images) - expected).abs().max() / expected.abs().max().clamp_min(
            1e-30
        )
    if not error_of_fused <= TOLERANCE:
        log.warning("teacher stays unfused: folding changes its logits by %g", error_of_fused)
        return unfused
    for conv, norm in pairs:
        weight = unfused.get_submodule(conv).weight
        assert isinstance(weight, Tensor)
        folded_conv = exact.get_submodule(conv).to(weight.device, weight.dtype)
        unfused.set_submodule(conv, folded_conv.to(memory_format=_layout(weight)))
        unfused.set_submodule(norm, nn.Identity())
    return unfused


def _layout(weight: Tensor) -> torch.memory_format:
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    both = channels_last and weight.is_contiguous()
    return torch.channels_last if channels_last and not both else torch.contiguous_format
