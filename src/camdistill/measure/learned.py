"""A metric that was learned: how much a map teaches, told from the map, the image and the network.

It is trained on rankings (`studies.metric_learning`): students were taught with many methods' maps,
and what they gained is what the mean score of those maps shall be. No labels are used. What it is
told of an image are planes that any network has, so that a network it never saw has them too.
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

SETTINGS = "camdistill_metric"  # under which a file's metadata keep its size
GRID = 8
PLANES = ("evidence", "energy", "typical", "light", "contrast", "radius")
OF_NETWORK = 3  # the first of these; the others are the image's

AnyMaps = Float[Tensor, "batch rows columns"]
Context = Float[Tensor, "batch planes 8 8"]


@torch.no_grad()
def image_context(
    network: nn.Module, images: Images, classes: Labels, layer: str | None = None
) -> Context:
    """What is known of images without a map, on a grid of 8 x 8; it carries no graph.

    - evidence: Grad-CAM at the layer, signed, over its root mean square
    - energy: the length of each cell's activations, and typical: their cosine with the mean cell's
    - light, contrast: mean and deviation of the pixels of each cell
    - radius: from the middle

    All but the first have mean 0 and deviation 1 in each image.

    Args:
        network: In eval mode; takes images in [0, 1].
        images: In [0, 1].
        classes: Classes whose evidence the maps show.
        layer: Its last spatial one by default.
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
    """Scores of maps; higher teaches more. Differentiable by the maps, and pure.

    The mean of several small networks. Each reads a map beside the context with two convolutions,
    and sums what it found under the map and everywhere. A map is rectified, brought to 8 x 8 and
    standardized first, so that its scale and its size don't matter; a blank one is 0 everywhere.

    Args:
        members: How many networks.
        units: Units of each convolution.
    """

    def __init__(self, members: int = 3, units: int = 8) -> None:
        super().__init__()
        if members < 1 or units < 1:
            raise UserError(f"members {members} and units {units}; give 1 or more")
        self.members = nn.ModuleList(_MapScorer(units) for _ in range(members))
        self.units = units

    def forward(self, maps: AnyMaps, context: Context) -> PerImage:
        """How much each map teaches, in deviations of the gains that it was trained on.

        Args:
            maps: Raw, of any size.
            context: Context of their images and classes.
        """
        return self.scores(maps, context).mean(0)

    def scores(self, maps: AnyMaps, context: Context) -> Float[Tensor, "members batch"]:
        """What each member says."""
        shape = resize(relu(upcast(maps)), (GRID, GRID))
        planes = torch.cat([standardize_planes(shape)[:, None], context.to(shape)], 1)
        total = shape.sum((1, 2), keepdim=True)
        share = shape / torch.where(total > 0, total, 1)
        return torch.stack([member(planes, share) for member in self.members])

    def save(self, path: str | Path, about: Mapping[str, object] | None = None) -> str:
        """Writes a small safetensors file; returns its sha256.

        Args:
            path: The file.
            about: Whatever should be known of how it was made, as JSON.
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
        # Smooth, so that a map that is optimized by it has a gradient everywhere.
        hidden = F.silu(self.second(F.silu(self.first(planes))))
        under = (hidden * share[:, None]).sum((2, 3))
        return self.last(torch.cat([under, hidden.mean((2, 3))], 1))[:, 0]  # type: ignore[no-any-return]


def load_metric(path: str | Path) -> LearnedMetric:
    """A metric that `save` wrote, frozen.

    Raises:
        UserError: If the file is damaged, or holds something else.
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
    """Whether a file's weights are a `LearnedMetric`'s."""
    return SETTINGS in weights.metadata


def standardize_planes(planes: AnyMaps) -> AnyMaps:
    """Mean 0 and deviation 1 in each image; a constant plane is 0."""
    centered = planes - planes.mean((1, 2), keepdim=True)
    square = centered.square().mean((1, 2), keepdim=True)
    constant = square <= 1e-12 * planes.square().amax((1, 2), keepdim=True)
    return torch.where(constant, 0, centered / torch.where(constant, 1, square).sqrt())
