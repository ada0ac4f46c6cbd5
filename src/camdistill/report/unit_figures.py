"""The pictures of units: cards of single units and of pairs."""

from collections.abc import Mapping, Sequence

from camdistill.layers.filters import FilterBank
from camdistill.layers.units.unit_cards import UnitRecord
from camdistill.layers.units.unit_pairs import UnitPair
from camdistill.report.figures.pictures import Picture
from camdistill.report.figures.tiles import Tile, filter_tiles, patch_tile
from camdistill.report.figures.units import PATCH, SIDE, UnitCard, unit_sheet
from camdistill.report.layer_figures import value_histogram


def unit_picture(
    records: Sequence[UnitRecord],
    notes: Mapping[int, Sequence[str]],
    filters: FilterBank | None = None,
) -> Picture:
    """Cards of some units of one layer.

    Args:
        records: The portraits.
        notes: What stands out of a unit, by unit.
        filters: Those that the units are made with, unit by unit, where they are of pixels.
    """
    cards = []
    filters_by_unit = [] if filters is None else _card_filters(filters)
    for record in records:
        card = build_card(record, notes.get(record.unit, ()))
        if filters_by_unit:
            card = card._replace(
                beside=[*card.beside, (f"filter {record.unit}", filters_by_unit[record.unit])]
            )
        cards.append(card)
    return unit_sheet(cards, abreast=2 if len(cards) > 1 else 1)


def _card_filters(bank: FilterBank) -> list[Tile]:
    """Each filter by its own largest weight, and its length below."""
    tiles = filter_tiles(bank.weights.float().cpu().numpy(), size=SIDE)
    norms = bank.norms.tolist()
    return [
        tile._replace(note=f"length {norm:.2g}") for tile, norm in zip(tiles, norms, strict=True)
    ]


def pair_picture(pairs: Sequence[tuple[UnitPair, UnitRecord, UnitRecord]]) -> Picture:
    """Cards of units that do the same: the teacher's on the left, the student's on the right."""
    cards = []
    for pair, teacher, student in pairs:
        close = f"correlation {pair.correlation:.2f} over {pair.images:,} images"
        cards += [
            build_card(teacher, [f"followed by unit {pair.student[1]}, {close}"]),
            build_card(student, [f"follows {teacher.layer} unit {pair.teacher[1]}, {close}"]),
        ]
    return unit_sheet(cards, abreast=2)


def build_card(record: UnitRecord, notes: Sequence[str] = ()) -> UnitCard:
    """A portrait as a card."""
    values = record.values.numpy()
    whole_words = "the whole image" if record.field_known else "an unknown part of the image"
    field_words = (
        whole_words
        if record.receptive_size is None
        else "{}x{} pixels".format(*record.receptive_size)
    )
    active = float((values > 0).mean())
    words = f"active at {100 * active:.1f} % of places; largest {record.natural:.3g}"
    lines = [f"sees {field_words}; {words}"]
    patches = [
        patch_tile(
            patch.pixels.numpy(),
            size=PATCH,
            inside=patch.inside.numpy(),
            region=None if patch.region is None else patch.region.numpy(),
            note=f"{patch.value:.3g}",
        )
        for patch in record.patches
    ]
    beside: list[tuple[str, Tile]] = []
    if record.mean is not None:
        mean = patch_tile(record.mean.pixels.numpy(), size=SIDE, inside=record.mean.inside.numpy())
        beside.append((f"mean of the {len(record.patches)}", mean))
    if record.exciting_image is not None:
        lines.append(_describe_exciting_image(record))
        note = "failed" if record.failed else f"reached {record.reached:.3g}"
        beside.append(
            ("made to excite it", patch_tile(record.exciting_image.numpy(), size=SIDE, note=note))
        )
    return UnitCard(
        title=f"{record.network} {record.layer}, unit {record.unit}",
        lines=[*lines, *notes],
        patches=patches,
        beside=beside,
        histogram=value_histogram(record.values),
        concepts=record.concepts,
    )


def _describe_exciting_image(record: UnitRecord) -> str:
    """What an image reached that was made to excite a unit, beside its control."""
    ratio = record.reached / record.natural if record.natural > 0 else float("nan")
    times = f" ({ratio:.1f}x the largest)" if ratio == ratio else ""
    failed = "failed: " if record.failed else ""
    return (
        f"made image: {failed}reached {record.reached:.3g}{times}; "
        f"99.9 % of random images stay below {record.random:.3g}"
    )
