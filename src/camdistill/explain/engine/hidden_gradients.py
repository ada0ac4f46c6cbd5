"""What hides a gradient: reentrant checkpoints (torch.utils.checkpoint), or the code itself."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from torch import nn
from torch.utils.checkpoint import CheckpointError, CheckpointFunction

from camdistill.errors import UserError
from camdistill.networks.capture import (
    inspection_mode,
    layer_names,
    unwrap,
    unwrap_outer,
    visit_layers,
)
from camdistill.types import Images


@contextmanager
def refuse_reentrant() -> Iterator[None]:
    """Turns autograd's own refusals of checkpoints, and of frozen tensors, into a line.

    Raises:
        UserError: The graph inside the block goes through a reentrant checkpoint, through one that
            runs otherwise in the backward, or through weights made under inference_mode.
    """
    try:
        yield
    except CheckpointError as error:
        raise UserError(
            "the network's checkpoints (torch.utils.checkpoint) keep other tensors when they run "
            "again in the backward: ask for a layer outside them, or don't call checkpoint"
        ) from error
    except RuntimeError as error:
        if "Inference tensors cannot be saved" in str(error):
            raise UserError(
                "the network's weights were made under torch.inference_mode, and such tensors "
                "have no gradients: build or load the network outside of it"
            ) from error
        if "use_reentrant=True" not in str(error):
            raise
        raise UserError(_refusal("the network", "what is asked for")) from error


def describe_missing_gradient(network: nn.Module, images: Images, names: Sequence[str]) -> str:
    """What to say where a score has no gradient at one of the layers, or at the pixels.

    Args:
        network: Bare or wrapped.
        images: That it was asked about.
        names: The layers; none stands for the pixels.
    """
    inner = type(unwrap(network)).__name__
    places = f"every one of the layers {list(names)}" if names else "the pixels"
    if _in_reentrant(network, images, names or layer_names(network)):
        return _refusal(inner, places)
    return (
        f"the score of {inner} has no gradient at {places}: ask for what it is computed from, "
        "without detach or no_grad in between"
    )


def _refusal(network: str, where: str) -> str:
    return (
        f"{network} uses reentrant checkpoints (torch.utils.checkpoint), which hide gradients at "
        f"{where}: call checkpoint with use_reentrant=False, or not at all"
    )


def _in_reentrant(network: nn.Module, images: Images, names: Sequence[str]) -> bool:
    """Whether a layer runs inside a reentrant checkpoint, seen from the calls that led there."""
    is_inside = False

    def look(_: str, __: object) -> None:
        nonlocal is_inside
        frame: FrameType | None = sys._getframe()
        while frame is not None and not is_inside:
            is_inside = frame.f_code is CheckpointFunction.forward.__code__
            frame = frame.f_back

    with inspection_mode(network), visit_layers(network, names, look, required=False):
        unwrap_outer(network)(images[:1])
    return is_inside
