"""What the captioner and the answering network see with: a trained student's stages, frozen."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Preprocessed
from camdistill.types import Activations, Images, Labels, PerImage

WIDTH, NARROW, CELLS = 64, 48, 4


class FeatureExtractor(nn.Module):
    """The last stage's units, beside them the middle one's and the pixels, pooled to its grid.

    The last alone knows shapes but hardly brightness, which it was taught to ignore.
    """

    def __init__(self, student: Preprocessed) -> None:
        super().__init__()
        assert isinstance(student.network, ShallowCNN), "the lab's student is a shallow one"
        self.student = student
        self.stages = student.network.stages
        self.middle = max(1, self.stages // 2)
        with torch.no_grad():
            self.units = self(student.mean.new_zeros(1, 3, 32, 32)).shape[1]

    def forward(self, images: Images) -> Float[Tensor, "batch units rows columns"]:
        """Units of all three."""
        pixels = hidden = middle = self.student.normalize(images)
        for stage in range(1, self.stages + 1):
            hidden = self.student.network.get_submodule(f"stage{stage}")(hidden)
            middle = hidden if stage == self.middle else middle
        grid = (hidden.shape[-2], hidden.shape[-1])
        pooled = [F.adaptive_avg_pool2d(planes, grid) for planes in (pixels, middle)]
        return torch.cat([*pooled, hidden], 1)


class ConvBlock(nn.Module):
    """A convolution, batch normalization and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()

    def forward(self, activations: Activations) -> Float[Tensor, "batch outputs height width"]:
        """Activations after the ReLU."""
        return self.relu(self.bn(self.conv(activations)))  # type: ignore[no-any-return]


class FeatureEncoder(nn.Module):
    """Convolutions that are trained, then few cells whose places are kept, as a vector."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.first = ConvBlock(inputs, WIDTH)
        self.second = ConvBlock(WIDTH, NARROW)

    @property
    def size(self) -> int:
        """Of the vector."""
        return NARROW * CELLS**2

    def forward(
        self, features: Activations, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Float[Tensor, "batch size"]:
        """The vector; scale and shift [B, WIDTH] are what a question makes of the first's units.

        Feature-wise modulation, Perez et al. 2018, https://arxiv.org/abs/1709.07871.
        """
        hidden = self.first(features)
        if scale is not None and shift is not None:
            hidden = F.relu(hidden * (1 + scale[..., None, None]) + shift[..., None, None])
        return F.adaptive_avg_pool2d(self.second(hidden), CELLS).flatten(1)


def log_odds(scores: Float[Tensor, "batch answers"], answers: Labels) -> PerImage:
    """The log odds, log p - log(1 - p), of each image's own answer.

    Their gradient is that of log p, which the paper takes for captions, over 1 - p: the same map
    but for its scale, and no blank one where p is 1 to rounding.
    """
    wide = scores if scores.dtype == torch.float64 else scores.float()
    others = wide.scatter(1, answers[:, None], -torch.inf)
    return wide.gather(1, answers[:, None])[:, 0] - others.logsumexp(1)


@torch.no_grad()
def features_of(
    extractor: FeatureExtractor, images: Images
) -> Float[Tensor, "batch units rows columns"]:
    """Features in half precision: what is frozen is looked through once."""
    return torch.cat([extractor(part).half() for part in torch.split(images, 256)])
