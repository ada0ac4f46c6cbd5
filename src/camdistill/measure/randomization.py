"""Randomization gates: whether a map depends on what the network learned, and on the class.

They are gates, not rankings. Adebayo et al. 2018, https://arxiv.org/abs/1810.03292, in the forms of
Hedström et al. 2024, https://arxiv.org/abs/2401.06465. Layers are randomized from the first on, and
maps are compared without absolute values. The mean leaves out the trained network's own map (of
which Quantus 0.6 takes 1.0 into every score).
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.compare import spearman
from camdistill.networks.capture import unwrap
from camdistill.perturb.ranks import check_finite
from camdistill.types import Explain, Images, Labels, Logits, Maps, PerImage

BINS = 100


def smooth_randomization(
    explain: Explain,
    network: nn.Module,
    images: Images,
    classes: Labels,
    generator: torch.Generator,
    *,
    samples: int = 10,
    noise: float = 0.1,
) -> dict[str, PerImage]:
    """Returns the rank correlation of the map with the maps of ever more randomized networks.

    Lower is a pass. Maps are means over noisy copies of the image, as the noise of single maps
    looks like change.

    Args:
        explain: The explainer that gives the maps.
        network: In eval mode; not changed.
        images: In [0, 1].
        classes: The class of the maps, whatever a randomized network predicts.
        generator: Generator of the weights and of the noise; all networks get the same noise.
        samples: Noisy copies of each image; 1 with `noise=0` is the plain test.
        noise: Standard deviation, as a share of the images' range.

    Returns:
        Correlations by layer; this layer and all before it are randomized.
    """
    span = float(images.max() - images.min())
    shape = (samples, *images.shape)
    noise_samples = torch.randn(shape, generator=generator, device=generator.device)
    noisy = images + noise * span * noise_samples.to(images)

    def mean_map(candidate: nn.Module) -> Maps:
        total = torch.stack([explain(candidate, copies, classes) for copies in noisy]).mean(0)
        check_finite(total)
        return total

    trained = mean_map(network)
    return {
        layer: spearman(mean_map(randomized), trained)
        for layer, randomized in _randomize_layers(network, generator)
    }


def efficient_randomization(
    explain: Explain,
    network: nn.Module,
    images: Images,
    classes: Labels,
    generator: torch.Generator,
) -> PerImage:
    """Returns the relative rise of the map's entropy when all layers are randomized.

    Higher is a pass. The value is (H(random) - H(trained)) / H(trained). H is the entropy of a
    histogram of 100 bins over the map's range. The value is NaN where the trained network's map is
    constant.
    """
    before = _histogram_entropy(explain(network, images, classes))
    *_, (_, randomized) = _randomize_layers(network, generator)
    after = _histogram_entropy(explain(randomized, images, classes))
    return torch.where(before > 0, (after - before) / torch.where(before > 0, before, 1), torch.nan)


def random_logit(
    explain: Explain,
    network: nn.Module,
    images: Images,
    classes: Labels,
    logits: Logits,
    generator: torch.Generator,
) -> PerImage:
    """Returns the rank correlation of the map with that of a random other class; lower is a pass.

    Sixt et al. 2020, https://arxiv.org/abs/1912.09818. The value is 1 where the map is the same for
    all classes.

    Raises:
        UserError: If the network has fewer than two classes.
    """
    number = logits.shape[1]
    if number < 2:
        raise UserError(
            "random_logit draws another class, and the network has one: leave it out of --metrics"
        )
    shift = torch.randint(
        1, number, classes.shape, generator=generator, device=generator.device
    ).to(classes.device)
    class_maps = explain(network, images, classes)
    other_maps = explain(network, images, (classes + shift) % number)
    for maps in (class_maps, other_maps):
        check_finite(maps)
    return spearman(class_maps, other_maps)


def _randomize_layers(
    network: nn.Module, generator: torch.Generator
) -> Iterator[tuple[str, nn.Module]]:
    """Yields a copy of the network, whose layers are randomized one by one from the input on.

    Convolutions and linear layers get torch's initial distribution, normalizations their initial
    scale and shift. Running statistics are no parameters and stay.
    """
    randomized = copy.deepcopy(network)
    layers = {
        name: module
        for name, module in unwrap(randomized).named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    if not layers:
        raise ValueError("the network has no parameters to randomize")
    for name, module in layers.items():
        with torch.no_grad():
            _redraw(module, generator)
        yield name, randomized


def _redraw(module: nn.Module, generator: torch.Generator) -> None:
    """Draws weights uniformly within 1 / sqrt(fan-in), like torch's convolutions and linears."""
    weight = next((p for p in module.parameters(recurse=False) if p.dim() > 1), None)
    for name, parameter in module.named_parameters(recurse=False):
        if weight is None:
            parameter.fill_(1.0 if name == "weight" else 0.0)
        else:
            bound = weight[0].numel() ** -0.5
            uniform = torch.rand(parameter.shape, generator=generator, device=generator.device)
            parameter.copy_(bound * (2 * uniform - 1))


def _histogram_entropy(maps: Maps) -> PerImage:
    check_finite(maps)
    values = (maps if maps.dtype == torch.float64 else maps.float()).flatten(1)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    span = torch.where(high > low, high - low, 1)
    bins = ((values - low) / span * BINS).long().clamp(max=BINS - 1)
    counts = torch.zeros(len(values), BINS, device=values.device, dtype=values.dtype)
    counts.scatter_add_(1, bins, torch.ones_like(values))
    nats: Tensor = torch.special.entr(counts / values.shape[1]).sum(1)
    return nats
