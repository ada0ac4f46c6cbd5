"""Records of single units: patches, excitation, optimized image and concepts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.layers.sweep.sweep_summary import LayerSummary
from camdistill.layers.units.dissection import Dissection
from camdistill.layers.units.patches import (
    Patch,
    cut_patch,
    exceeds_image,
    mean_patch,
    unit_maps,
    whole_image_patch,
)
from camdistill.layers.units.receptive_spans import Field, ReceptiveField
from camdistill.types import Images

PATCHES = 9  # as many as Zeiler and Fergus (2014) show

ImagesOf = Callable[[Sequence[int]], Images]


@dataclass(frozen=True)
class UnitRecord:
    """One unit.

    Attributes:
        network: Name of the network, as in the layer's summary.
        layer: Its name.
        unit: Channel.
        patches: What excites it most, the best first; empty for a dead unit.
        mean: Mean of the patches; None where they are whole images, or there are none.
        receptive_size: Pixels along height and width that it sees; None where it is the whole
            image, or isn't known.
        field_known: Whether it is known what it sees.
        values: A sample of its activations at all places.
        exciting_image: An image made to excite it; None if not asked for.
        reached: Its activation there, as `natural` is; NaN without.
        natural: Its largest over the data.
        random: What 99.9 % of random images stay below, as `reached` is; NaN without an
            exciting image.
        failed: Whether `exciting_image` excites it no more than that.
        concepts: What it responds to: name, intersection over union, chance; the best first.
    """

    network: str
    layer: str
    unit: int
    patches: tuple[Patch, ...]
    mean: Patch | None
    receptive_size: tuple[int, int] | None
    values: Float[Tensor, "samples"]
    natural: float
    exciting_image: Float[Tensor, "channels tall wide"] | None = None
    reached: float = float("nan")
    random: float = float("nan")
    failed: bool = False
    concepts: tuple[tuple[str, float, float], ...] = ()
    field_known: bool = True


def select_units(
    layer: LayerSummary, count: int, dissection: Dissection | None = None
) -> tuple[int, ...]:
    """Units to look at, by number: those that know a concept best, or are the most selective.

    Selective is a high lifetime sparsity, among units that are active in 1 % of the images or more.

    Args:
        layer: Its summary.
        count: At most so many.
        dissection: Dissection of that layer, where masks are known.
    """
    if dissection is not None:
        score = (dissection.iou - dissection.chance).max(1).values.float()
    else:
        score = layer.sparsity.lifetime.float().nan_to_num(-1.0)
    active_enough = layer.units.image_active >= 0.01
    score = torch.where(active_enough.to(score.device), score, score - 10.0)
    order = score.argsort(descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))


def build_unit_records(
    network: nn.Module,
    layer: LayerSummary,
    units: Sequence[int],
    images_of: ImagesOf,
    *,
    field: Field,
    sample: Images,
    dissection: Dissection | None = None,
) -> list[UnitRecord]:
    """Portraits of some units of one layer, from the places that a sweep found.

    Args:
        network: Takes what `images_of` gives.
        layer: Its summary of the sweep.
        units: Channels.
        images_of: Images by their numbers, in [0, 1].
        field: Receptive field of the layer.
        sample: Images of whose activations the histogram is.
        dissection: Dissection of the layer, where masks are known.
    """
    top = layer.top
    wanted_numbers = {
        int(number)
        for unit in units
        for number in top.images[unit, :PATCHES].tolist()
        if number >= 0 and float(top.values[unit, 0]) > 0
    }
    numbers = sorted(wanted_numbers)
    top_images = images_of(numbers) if numbers else sample[:0]
    row_by_number = {number: row for row, number in enumerate(numbers)}
    size = (sample.shape[2], sample.shape[3])
    large = exceeds_image(field, size)
    receptive_size = (
        (field.rows.size, field.columns.size) if isinstance(field, ReceptiveField) else None
    )
    maps = unit_maps(network, top_images, layer.name, units) if large and numbers else None
    values = unit_maps(network, sample, layer.name, units)
    top_images = top_images.cpu()
    records = []
    for column, unit in enumerate(units):
        patches = []
        for rank in range(min(PATCHES, top.values.shape[1])):
            number, value = int(top.images[unit, rank]), float(top.values[unit, rank])
            if number < 0 or not value > 0:
                continue
            row = row_by_number[number]
            if maps is not None:
                patch = whole_image_patch(top_images[row], maps[row, column])
            else:
                assert isinstance(field, ReceptiveField), "else it exceeds the image"
                cell = int(top.rows[unit, rank]), int(top.columns[unit, rank])
                patch = cut_patch(top_images[row], field.box(*cell))
            patches.append(replace(patch, value=value, image=number))
        records.append(
            UnitRecord(
                network=layer.network,
                layer=layer.name,
                unit=unit,
                patches=tuple(patches),
                mean=mean_patch(patches) if patches and maps is None else None,
                receptive_size=receptive_size,
                values=values[:, column].flatten(),
                natural=float(top.values[unit, 0]),
                concepts=tuple(dissection.best(unit)) if dissection is not None else (),
                field_known=field != "unknown",
            )
        )
    return records
