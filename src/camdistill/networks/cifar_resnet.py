"""Residual networks for 32x32 images: ResNet-20 to 110 and wide ResNets.

The names of layers are those of the released weights and of torchvision: `conv1`, `layer1` to
`layer3` (the three stages), `layer1.0.relu` (called twice in a block), `linear`.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.types import Activations, Images, Logits

Strided = Float[Tensor, "batch units_out height_out width_out"]

CIFAR_DEPTHS = (20, 32, 44, 56, 110)


def _conv3x3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def _initialize(network: nn.Module) -> None:
    """He et al. 2015, eq. 10, for every weight, as in the released code of both papers."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class PaddedShortcut(nn.Module):
    """The identity, thinned out by the stride and padded with channels of zeros.

    Option A of He et al. 2016, section 3.3 (https://arxiv.org/abs/1512.03385): no parameters. The
    paper doesn't say on which side the zeros go; the released weights have half on either side.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.before, self.after = channels // 2, channels - channels // 2
        self.stride = stride

    def forward(self, activations: Activations) -> Strided:
        """The input at the block's output shape."""
        thinned = activations[:, :, :: self.stride, :: self.stride]
        return F.pad(thinned, (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the shortcut added before the second ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = _conv3x3(outputs, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else PaddedShortcut(outputs - inputs, stride)

    def forward(self, activations: Activations) -> Strided:
        """Activations after the block's second ReLU."""
        hidden = self.relu(self.bn1(self.conv1(activations)))
        hidden = self.bn2(self.conv2(hidden)) + self.shortcut(activations)
        return self.relu(hidden)  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """A ResNet of 6n + 2 layers for small images.

    He et al. 2016, section 4.2: a 3x3 convolution, three stages of n blocks with 16, 32 and 64
    channels, global average pooling and a linear layer. The weights of
    github.com/akamaster/pytorch_resnet_cifar10 fit. `layer3` is the last spatial layer, after its
    ReLU, so its class activation map is exact.

    Args:
        depth: Layers with weights: 20, 32, 44, 56, 110 or any other 6n + 2.
        classes: Number of logits.

    Raises:
        UserError: If the depth is not 6n + 2.
    """

    last_stage = "layer3"

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"no CIFAR ResNet of depth {depth}: take 6n + 2, such as 20, 56 or 110")
        blocks = (depth - 2) // 6
        self.conv1 = _conv3x3(3, 16, 1)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)
        _initialize(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, images: Images) -> Logits:
        """Logits of normalized images."""
        hidden = self.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        return self.linear(hidden.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class WideBlock(nn.Module):
    """BN, ReLU and convolution twice; where channels change, the shortcut is a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs, 1)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, activations: Activations) -> Strided:
        """The sum of shortcut and convolutions, before any ReLU."""
        activated = self.relu(self.bn1(activations))
        shortcut = activations if self.shortcut is None else self.shortcut(activated)
        hidden = self.relu(self.bn2(self.conv1(activated)))
        return self.conv2(hidden) + shortcut  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """A wide ResNet, WRN-depth-width, with activations before the convolutions.

    Zagoruyko & Komodakis 2016 (https://arxiv.org/abs/1605.07146), table 1, without dropout. The
    groups conv2 to conv4 of the paper are `layer1` to `layer3` here; they end before a ReLU. The
    last spatial layer is `relu`, after the last batch normalization `bn`.

    Args:
        depth: Layers with weights: 16, 28, 40 or any other 6n + 4.
        width: Channels as a multiple of 16, 32 and 64.
        classes: Number of logits.

    Raises:
        UserError: If the depth is not 6n + 4, or the width not positive.
    """

    last_stage = "relu"

    def __init__(self, depth: int, width: int, classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise UserError(f"no wide ResNet of depth {depth}: take 6n + 4, such as 16, 28 or 40")
        if width < 1:
            raise UserError(f"width is {width}: a wide ResNet's width is 1 or more")
        blocks = (depth - 4) // 6
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = _conv3x3(3, channels[0], 1)
        self.layer1 = self._stage(channels[0], channels[1], blocks, 1)
        self.layer2 = self._stage(channels[1], channels[2], blocks, 2)
        self.layer3 = self._stage(channels[2], channels[3], blocks, 2)
        self.bn = nn.BatchNorm2d(channels[3])
        self.relu = nn.ReLU()
        self.linear = nn.Linear(channels[3], classes)
        _initialize(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = WideBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(WideBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, images: Images) -> Logits:
        """Logits of normalized images."""
        hidden = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        hidden = self.relu(self.bn(hidden))
        return self.linear(hidden.mean(dim=(2, 3)))  # type: ignore[no-any-return]
