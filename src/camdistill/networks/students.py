"""The shallow networks that learn from teachers, and what a network costs."""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from camdistill.errors import UserError
from camdistill.types import Activations, Images, Logits

Strided = Float[Tensor, "batch units_out height_out width_out"]


class Stage(nn.Module):
    """A convolution, batch normalization and ReLU; the output is the activation after the ReLU."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, kernel_size: int, residual: bool
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.residual = residual and stride == 1 and inputs == outputs

    def forward(self, activations: Activations) -> Strided:
        """Activations after the ReLU."""
        hidden = self.bn(self.conv(activations))
        if self.residual:
            hidden = hidden + activations
        return self.relu(hidden)  # type: ignore[no-any-return]


class ShallowCNN(nn.Module):
    """A few convolutions, global average pooling and a linear head.

    The stages are the layers `stage1`, `stage2`, ...; the head is `linear`. As the head is GAP +
    linear, the Grad-CAM map of the last stage is exact in closed form: the class's weights over
    the activations (Zhou et al. 2016, eq. 2, https://arxiv.org/abs/1512.04150, divided by h w).

    Args:
        classes: Number of logits.
        channels: Units of each stage; as many stages as numbers.
        strides: Stride of each stage's convolution.
        in_channels: Channels of the images.
        kernel_size: Size of every convolution in pixels, odd.
        residual: Whether a stage adds its input before the ReLU where the shapes agree.

    Raises:
        UserError: If the stages can't be built from these numbers.
    """

    def __init__(
        self,
        classes: int = 10,
        channels: Sequence[int] = (32, 64, 128, 128, 192),
        strides: Sequence[int] = (1, 2, 2, 1, 1),
        in_channels: int = 3,
        *,
        kernel_size: int = 3,
        residual: bool = False,
    ) -> None:
        super().__init__()
        for name, setting in {"channels": channels, "strides": strides}.items():
            if isinstance(setting, str) or not all(isinstance(entry, int) for entry in setting):
                raise UserError(f"{name} is {setting!r}: give whole numbers, such as [32, 64]")
        if not channels or len(channels) != len(strides):
            raise UserError(
                f"channels has {len(channels)} numbers and strides {len(strides)}: "
                "give one of each for every stage, at least one"
            )
        sizes = {"classes": [classes], "channels": channels, "strides": strides}
        for name, numbers in (sizes | {"in_channels": [in_channels]}).items():
            if min(numbers) < 1:
                raise UserError(f"{name} has {min(numbers)}: every number is 1 or more")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"kernel_size is {kernel_size}: take an odd number such as 3 or 5")
        inputs = [in_channels, *channels]
        self.stages = len(channels)
        for index, (before, after, stride) in enumerate(
            zip(inputs, channels, strides, strict=False), start=1
        ):
            self.add_module(f"stage{index}", Stage(before, after, stride, kernel_size, residual))
        self.linear = nn.Linear(channels[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def last_stage(self) -> str:
        """Name of the last spatial layer, the one that the head pools."""
        return f"stage{self.stages}"

    def forward(self, images: Images) -> Logits:
        """Logits of normalized images."""
        hidden = images
        for index in range(1, self.stages + 1):
            hidden = self.get_submodule(f"stage{index}")(hidden)
        return self.linear(hidden.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def parameter_count(network: nn.Module) -> int:
    """Numbers that training can change; buffers such as running means don't count."""
    return sum(parameter.numel() for parameter in network.parameters())


def multiply_adds(network: nn.Module, size: tuple[int, int], channels: int = 3) -> int:
    """Multiply-adds of the convolutions and matrix products for one image.

    Counted on shapes alone (torch's meta device), on a copy.

    Args:
        network: Any network that takes [B, C, H, W].
        size: Height and width of the image in pixels.
        channels: Channels of the image.
    """
    shadow = copy.deepcopy(network).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        shadow(torch.empty(1, channels, *size, device="meta"))
    # torch counts a multiply-add as two operations.
    return counter.get_total_flops() // 2
