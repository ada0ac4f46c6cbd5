"""A network that is known by heart: what it looks at is a formula, not a guess."""

from collections.abc import Sequence

import torch
from torch import nn

from camdistill.types import Images, Logits

LEVELS = 255  # an image's values are multiples of 1 / LEVELS


class ColorReader(nn.Module):
    """Counts the pixels of each class's color: the image's evidence is known pixel by pixel.

    With the colors of Shapes' patches, and a patch that always agrees with the label, it is right
    on every image, and the patch is all that it sees. A unit of `match` is 1 on pixels that have
    its class's color to the last level, and 0 elsewhere; a logit is `gain` times that unit's mean,
    so that the Grad-CAM map of a class is gain / (height * width) on its color and 0 elsewhere. No
    weight is trained or random: an explainer or a metric that fails here is wrong.

    Images are in [0, 1], without normalization. Nothing changes with a small change of the pixels
    (a match is a plateau's edge), so that the plain gradient says nothing about this network.

    Args:
        colors: Colors of each class, red, green and blue in hexadecimal: "e61919".
        gain: Logit of an image that has a class's color everywhere.
    """

    def __init__(self, colors: Sequence[str], gain: float = 1000.0) -> None:
        super().__init__()
        classes = len(colors)
        # Two units a class and channel: how far it is above the color, and how far below.
        self.differences = nn.Conv2d(3, 6 * classes, 1)
        self.relu = nn.ReLU()
        self.total = nn.Conv2d(6 * classes, classes, 1)
        self.match = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(classes, classes)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            for number, color in enumerate(colors):
                for channel, level in enumerate(bytes.fromhex(color)):
                    for side, sign in enumerate((1.0, -1.0)):
                        unit = 6 * number + 2 * channel + side
                        self.differences.weight[unit, channel] = sign
                        self.differences.bias[unit] = -sign * level / LEVELS  # type: ignore[index]
                        # A difference of one level takes the match away, twice over.
                        self.total.weight[number, unit] = -2.0 * LEVELS
                self.total.bias[number] = 1.0  # type: ignore[index]
                self.linear.weight[number, number] = gain

    def forward(self, images: Images) -> Logits:
        """A logit a class: the share of its pixels, times the gain."""
        matched = self.match(self.total(self.relu(self.differences(images))))
        return self.linear(self.pool(matched).flatten(1))  # type: ignore[no-any-return]
