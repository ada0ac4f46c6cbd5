"""Some units of some layers, closely: the second look after a sweep."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Bool
from torch import Tensor, nn

from camdistill.layers.sweep.sweep_summary import LayerSummary
from camdistill.layers.units.activation_maximization import maximised
from camdistill.layers.units.dissection import dissect
from camdistill.layers.units.random_images import RandomLevels, random_levels
from camdistill.layers.units.receptive_field import receptive_fields
from camdistill.layers.units.unit_cards import ImagesOf, Portrait, interesting, portraits
from camdistill.types import Images


@dataclass(frozen=True)
class Closeness:
    """How closely to look.

    Attributes:
        units: Units of a layer that are chosen (see `portraits.interesting`).
        steps: Of the images made to excite them; 0 makes none.
        seed: Of these images.
    """

    units: int = 4
    steps: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """Images whose activations are looked at anew.

    Attributes:
        images: In [0, 1], in an order that has nothing to do with classes.
        masks: Where concepts are in them, by name; empty where that isn't known.
        images_of: Any image of the sweep by its number.
    """

    images: Images
    masks: Mapping[str, Bool[Tensor, "batch height width"]]
    images_of: ImagesOf


def close_up(
    network: nn.Module,
    layers: Sequence[LayerSummary],
    sample: Sample,
    how: Closeness,
    *,
    chosen: Mapping[str, Sequence[int]] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Iterator[tuple[str, tuple[Portrait, ...]]]:
    """Portraits, layer by layer as they are done.

    Args:
        network: Takes the sample's images.
        layers: Of a sweep with its top images; only those with a spatial output.
        sample: Images to look at.
        how: How closely.
        chosen: Units by layer, in place of interesting ones.
        on_step: Called after each layer and each step of making images.
    """
    names = [layer.name for layer in layers]
    fields = receptive_fields(network, sample.images, names) if names else {}
    levels = _random_levels(network, layers, sample.images) if how.steps else {}
    for layer in layers:
        found = None
        if sample.masks:
            found = dissect(network, sample.images, sample.masks, [layer.name]).get(layer.name)
        asked = (chosen or {}).get(layer.name)
        units = interesting(layer, how.units, found) if asked is None else tuple(asked)
        if not units:
            continue
        drawn = portraits(
            network,
            layer,
            units,
            sample.images_of,
            field=fields[layer.name],
            sample=sample.images,
            dissection=found,
        )
        if how.steps:
            drawn = _with_made(
                network, layer, drawn, sample.images, levels[layer.name], how, on_step
            )
        if on_step is not None:
            on_step()
        yield layer.name, tuple(drawn)


def _with_made(
    network: nn.Module,
    layer: LayerSummary,
    drawn: Sequence[Portrait],
    images: Images,
    levels: RandomLevels,
    how: Closeness,
    on_step: Callable[[], None] | None,
) -> list[Portrait]:
    """Images made to excite the units: at the input of their non-linearity, where there is one."""
    made = maximised(
        network,
        _excited(layer),
        [one.unit for one in drawn],
        before=layer.pre is not None,
        size=(images.shape[2], images.shape[3]),
        channels=images.shape[1],
        natural=[one.natural for one in drawn],
        levels=levels,
        steps=how.steps,
        seed=how.seed,
        on_step=None if on_step is None else lambda _: on_step(),
    )
    return [
        replace(
            one,
            made=made.images[row],
            reached=float(made.reached[row]),
            random=float(made.random[row]),
            failed=bool(made.failed[row]),
        )
        for row, one in enumerate(drawn)
    ]


def _random_levels(
    network: nn.Module, layers: Sequence[LayerSummary], images: Images
) -> dict[str, RandomLevels]:
    """By the layer's name: what random images of this size do to its units."""
    asked = {_excited(layer): layer.pre is not None for layer in layers}
    size = (images.shape[2], images.shape[3])
    found = random_levels(network, asked, size=size, channels=images.shape[1])
    return {layer.name: found[_excited(layer)] for layer in layers}


def _excited(layer: LayerSummary) -> str:
    """The layer whose units images are made for, as `networks.capture` names it."""
    point = layer.post.point if layer.pre is None else layer.pre.point
    return f"{point.path}#{point.call}"
