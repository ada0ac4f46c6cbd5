"""Inspects selected units closely, after a sweep."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Bool
from torch import Tensor, nn

from camdistill.layers.sweep.sweep_summary import LayerSummary
from camdistill.layers.units.activation_maximization import maximize_activation
from camdistill.layers.units.dissection import dissect
from camdistill.layers.units.random_images import RandomLevels, random_levels
from camdistill.layers.units.receptive_field import receptive_fields
from camdistill.layers.units.unit_cards import (
    ImagesOf,
    UnitRecord,
    build_unit_records,
    select_units,
)
from camdistill.types import Images


@dataclass(frozen=True)
class InspectionOptions:
    """How closely to look.

    Attributes:
        units: Units of a layer that are chosen (see `unit_cards.select_units`).
        steps: Steps of the images made to excite them; 0 makes none.
        seed: Seed of these images.
    """

    units: int = 4
    steps: int = 256
    seed: int = 0


@dataclass(frozen=True)
class InspectionSample:
    """Images whose activations are looked at anew.

    Attributes:
        images: In [0, 1], in an order that has nothing to do with classes.
        masks: Where concepts are in them, by name; empty where that isn't known.
        images_of: Any image of the sweep by its number.
    """

    images: Images
    masks: Mapping[str, Bool[Tensor, "batch height width"]]
    images_of: ImagesOf


def inspect_units(
    network: nn.Module,
    layers: Sequence[LayerSummary],
    sample: InspectionSample,
    options: InspectionOptions,
    *,
    units_by_layer: Mapping[str, Sequence[int]] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Iterator[tuple[str, tuple[UnitRecord, ...]]]:
    """Portraits, layer by layer as they are done.

    Args:
        network: Takes the sample's images.
        layers: Layers of a sweep with its top images; only those with a spatial output.
        sample: Images to look at.
        options: How closely.
        units_by_layer: Units by layer, in place of interesting ones.
        on_step: Called after each layer and each step of making images.
    """
    names = [layer.name for layer in layers]
    fields = receptive_fields(network, sample.images, names) if names else {}
    levels = _random_levels(network, layers, sample.images) if options.steps else {}
    for layer in layers:
        dissection = None
        if sample.masks:
            dissection = dissect(network, sample.images, sample.masks, [layer.name]).get(layer.name)
        requested = (units_by_layer or {}).get(layer.name)
        units = (
            select_units(layer, options.units, dissection)
            if requested is None
            else tuple(requested)
        )
        if not units:
            continue
        records = build_unit_records(
            network,
            layer,
            units,
            sample.images_of,
            field=fields[layer.name],
            sample=sample.images,
            dissection=dissection,
        )
        if options.steps:
            records = _add_exciting_images(
                network, layer, records, sample.images, levels[layer.name], options, on_step
            )
        if on_step is not None:
            on_step()
        yield layer.name, tuple(records)


def _add_exciting_images(
    network: nn.Module,
    layer: LayerSummary,
    records: Sequence[UnitRecord],
    images: Images,
    levels: RandomLevels,
    options: InspectionOptions,
    on_step: Callable[[], None] | None,
) -> list[UnitRecord]:
    """Images made to excite the units: at the input of their non-linearity, where there is one."""
    exciting_images = maximize_activation(
        network,
        _excitation_point(layer),
        [record.unit for record in records],
        before=layer.pre is not None,
        size=(images.shape[2], images.shape[3]),
        channels=images.shape[1],
        natural=[record.natural for record in records],
        levels=levels,
        steps=options.steps,
        seed=options.seed,
        on_step=None if on_step is None else lambda _: on_step(),
    )
    return [
        replace(
            record,
            exciting_image=exciting_images.images[row],
            reached=float(exciting_images.reached[row]),
            random=float(exciting_images.random[row]),
            failed=bool(exciting_images.failed[row]),
        )
        for row, record in enumerate(records)
    ]


def _random_levels(
    network: nn.Module, layers: Sequence[LayerSummary], images: Images
) -> dict[str, RandomLevels]:
    """By the layer's name: what random images of this size do to its units."""
    before_by_layer = {_excitation_point(layer): layer.pre is not None for layer in layers}
    size = (images.shape[2], images.shape[3])
    levels = random_levels(network, before_by_layer, size=size, channels=images.shape[1])
    return {layer.name: levels[_excitation_point(layer)] for layer in layers}


def _excitation_point(layer: LayerSummary) -> str:
    """The layer whose units images are made for, as `networks.capture` names it."""
    point = layer.post.point if layer.pre is None else layer.pre.point
    return f"{point.path}#{point.call}"
