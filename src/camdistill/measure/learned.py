"""A learned metric: how much a map teaches, predicted from the map, the image and the network.

It is trained on rankings (`experiments.learned_metric`). Students were taught with many methods'
maps, and the metric learns to predict their gain by the mean score of those maps. No labels are
used. Its inputs from an image are planes that any network has, so that a network that it never saw
has them too.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from camdistill.errors import UserError
from camdistill.explain.engine.request import upcast
from camdistill.explain.gradcam import explain_images, last_layer
from camdistill.explain.maps import relu, resize
from camdistill.networks.weights import WeightFile, read_weights, save_safetensors
from camdistill.types import Images, Labels, PerImage

SETTINGS = "camdistill_metric"  # key of the metric's size in a file's metadata
GRID = 8
PLANES = ("evidence", "energy", "typical", "light", "contrast", "radius")
OF_NETWORK = 3  # the first planes are the network's; the others are the image's

AnyMaps = Float[Tensor, "batch rows columns"]
Context = Float[Tensor, "batch planes 8 8"]


@torch.no_grad()
def image_context(
    network: nn.Module, images: Images, classes: Labels, layer: str | None = None
) -> Context:
    """Returns planes that describe images without a map, on a grid of 8 x 8; they carry no graph.

    - evidence: Grad-CAM at the layer, signed, divided by its root mean square
    - energy: the length of each cell's activations
    - typical: the cosine of each cell's activations with the mean cell's
    - light, contrast: mean and standard deviation of the pixels of each cell
    - radius: distance from the middle

    All but the first have mean 0 and standard deviation 1 in each image.

    Args:
        network: In eval mode; takes images in [0, 1].
        images: In [0, 1].
        classes: The class whose evidence is used, one for each image.
        layer: Layer of the network; None is its last spatial one.
    """
    name = layer or last_layer(network, images)
    explanation = explain_images(network, images, [name], classes)
    activations = upcast(explanation.activations[name])
    evidence = resize(upcast(explanation.maps[name]), (GRID, GRID))
    size = evidence.square().mean((1, 2), keepdim=True).sqrt()
    energy = activations.square().sum(1).sqrt()
    typical = F.cosine_similarity(activations, activations.mean((2, 3), keepdim=True), dim=1)
    gray = upcast(images).mean(1)
    light = resize(gray, (GRID, GRID))
    contrast = (resize(gray.square(), (GRID, GRID)) - light.square()).clamp_min(0).sqrt()
    line = torch.linspace(-1, 1, GRID, device=images.device, dtype=gray.dtype)
    radius = (line[:, None].square() + line[None].square()).sqrt().expand_as(light)
    others = [resize(energy, (GRID, GRID)), resize(typical, (GRID, GRID)), light, contrast, radius]
    planes = [
        evidence / torch.where(size > 0, size, 1),
        *(standardize_planes(plane_values) for plane_values in others),
    ]
    return torch.stack([plane.float() for plane in planes], 1)


class LearnedMetric(nn.Module):
    """Scores maps; a higher score means that a map teaches more.

    The score is differentiable with respect to the maps, and has no side effects. It is the mean of
    several small networks. Each reads a map beside the context with two convolutions, and averages
    the result under the map and everywhere. A map is first rectified, brought to 8 x 8 and
    standardized, so that its scale and its size don't matter; a blank one is 0 everywhere.

    Args:
        members: Number of networks.
        units: Number of units of each convolution.

    Raises:
        UserError: If there is less than 1 member or unit.
    """

    def __init__(self, members: int = 3, units: int = 8) -> None:
        super().__init__()
        if members < 1 or units < 1:
            raise UserError(f"members {members} and units {units}; give 1 or more")
        self.members = nn.ModuleList(_MapScorer(units) for _ in range(members))
        self.units = units

    def forward(self, maps: AnyMaps, context: Context) -> PerImage:
        """Returns how much each map teaches, in standard deviations of the training data's gains.

        Args:
            maps: Raw maps of any size.
            context: The `image_context` of their images and classes.
        """
        return self.scores(maps, context).mean(0)

    def scores(self, maps: AnyMaps, context: Context) -> Float[Tensor, "members batch"]:
        """Returns the score by each member."""
        shape = resize(relu(upcast(maps)), (GRID, GRID))
        planes = torch.cat([standardize_planes(shape)[:, None], context.to(shape)], 1)
        total = shape.sum((1, 2), keepdim=True)
        share = shape / torch.where(total > 0, total, 1)
        return torch.stack([member(planes, share) for member in self.members])

    def save(self, path: str | Path, about: Mapping[str, object] | None = None) -> str:
        """Writes a small safetensors file and returns its sha256.

        Args:
            path: Path of the file.
            about: Any facts about how it was made, as JSON.
        """
        size = {"members": len(self.members), "units": self.units}
        settings = json.dumps({**size, "about": dict(about or {})})
        return save_safetensors(path, self.state_dict(), {SETTINGS: settings})


class _MapScorer(nn.Module):
    def __init__(self, units: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1 + len(PLANES), units, 3, padding=1)
        self.second = nn.Conv2d(units, units, 3, padding=1)
        self.last = nn.Linear(2 * units, 1)

    def forward(self, planes: Float[Tensor, "..."], share: Float[Tensor, "..."]) -> Tensor:
        # SiLU is smooth, so that a map that is optimized by the metric has a gradient everywhere.
        hidden = F.silu(self.second(F.silu(self.first(planes))))
        under = (hidden * share[:, None]).sum((2, 3))
        return self.last(torch.cat([under, hidden.mean((2, 3))], 1))[:, 0]  # type: ignore[no-any-return]


def load_metric(path: str | Path) -> LearnedMetric:
    """Returns a metric that `save` wrote, frozen.

    Raises:
        UserError: If the file is damaged, or contains something else.
    """
    weights = read_weights(path)
    if not holds_metric(weights):
        raise UserError(f"'{path}' holds no metric; give a file that `camdistill learn` wrote")
    try:
        size = json.loads(weights.metadata[SETTINGS])
        metric = LearnedMetric(int(size["members"]), int(size["units"]))
        metric.load_state_dict(weights.state)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"the metric in '{path}' can't be read ({type(error).__name__}); write it again"
        ) from error
    return metric.requires_grad_(False).eval()


def holds_metric(weights: WeightFile) -> bool:
    """Returns whether a file's weights are a `LearnedMetric`'s."""
    return SETTINGS in weights.metadata


def standardize_planes(planes: AnyMaps) -> AnyMaps:
    """Returns planes with mean 0 and standard deviation 1 in each image; a constant plane is 0."""
    centered = planes - planes.mean((1, 2), keepdim=True)
    square = centered.square().mean((1, 2), keepdim=True)
    constant = square <= 1e-12 * planes.square().amax((1, 2), keepdim=True)
    return torch.where(constant, 0, centered / torch.where(constant, 1, square).sqrt())
