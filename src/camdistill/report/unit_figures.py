"""Units as pictures: cards of single ones, and of pairs."""

from collections.abc import Mapping, Sequence

from camdistill.layers.filters import FilterBank
from camdistill.layers.units.unit_cards import Portrait
from camdistill.layers.units.unit_pairs import Pair
from camdistill.report.figures.pictures import Picture
from camdistill.report.figures.tiles import Tile, filter_tiles, patch_tile
from camdistill.report.figures.units import PATCH, SIDE, UnitCard, unit_sheet
from camdistill.report.layer_figures import value_histogram


def unit_picture(
    found: Sequence[Portrait],
    notes: Mapping[int, Sequence[str]],
    filters: FilterBank | None = None,
) -> Picture:
    """Cards of some units of one layer.

    Args:
        found: The portraits.
        notes: What stands out of a unit, by unit.
        filters: Those that the units are made with, unit by unit, where they are of pixels.
    """
    cards = []
    drawn = [] if filters is None else _card_filters(filters)
    for one in found:
        card = card_of(one, notes.get(one.unit, ()))
        if drawn:
            card = card._replace(beside=[*card.beside, (f"filter {one.unit}", drawn[one.unit])])
        cards.append(card)
    return unit_sheet(cards, abreast=2 if len(cards) > 1 else 1)


def _card_filters(bank: FilterBank) -> list[Tile]:
    """Each filter by its own largest weight, and its length below."""
    tiles = filter_tiles(bank.weights.float().cpu().numpy(), size=SIDE)
    norms = bank.norms.tolist()
    return [
        tile._replace(note=f"length {norm:.2g}") for tile, norm in zip(tiles, norms, strict=True)
    ]


def pair_picture(pairs: Sequence[tuple[Pair, Portrait, Portrait]]) -> Picture:
    """Cards of units that do the same: the teacher's on the left, the student's on the right."""
    cards = []
    for pair, teacher, student in pairs:
        close = f"correlation {pair.correlation:.2f} over {pair.images:,} images"
        cards += [
            card_of(teacher, [f"followed by unit {pair.student[1]}, {close}"]),
            card_of(student, [f"follows {teacher.layer} unit {pair.teacher[1]}, {close}"]),
        ]
    return unit_sheet(cards, abreast=2)


def card_of(portrait: Portrait, notes: Sequence[str] = ()) -> UnitCard:
    """A portrait as a card."""
    values = portrait.values.numpy()
    whole = "the whole image" if portrait.known else "an unknown part of the image"
    sees = whole if portrait.seen is None else "{}x{} pixels".format(*portrait.seen)
    active = float((values > 0).mean())
    words = f"active at {100 * active:.1f} % of places; largest {portrait.natural:.3g}"
    lines = [f"sees {sees}; {words}"]
    patches = [
        patch_tile(
            patch.pixels.numpy(),
            size=PATCH,
            inside=patch.inside.numpy(),
            region=None if patch.region is None else patch.region.numpy(),
            note=f"{patch.value:.3g}",
        )
        for patch in portrait.patches
    ]
    beside: list[tuple[str, Tile]] = []
    if portrait.mean is not None:
        mean = patch_tile(
            portrait.mean.pixels.numpy(), size=SIDE, inside=portrait.mean.inside.numpy()
        )
        beside.append((f"mean of the {len(portrait.patches)}", mean))
    if portrait.made is not None:
        lines.append(_made_words(portrait))
        note = "failed" if portrait.failed else f"reached {portrait.reached:.3g}"
        beside.append(
            ("made to excite it", patch_tile(portrait.made.numpy(), size=SIDE, note=note))
        )
    return UnitCard(
        title=f"{portrait.network} {portrait.layer}, unit {portrait.unit}",
        lines=[*lines, *notes],
        patches=patches,
        beside=beside,
        histogram=value_histogram(portrait.values),
        concepts=portrait.concepts,
    )


def _made_words(portrait: Portrait) -> str:
    """What an image reached that was made to excite a unit, beside its control."""
    ratio = portrait.reached / portrait.natural if portrait.natural > 0 else float("nan")
    times = f" ({ratio:.1f}x the largest)" if ratio == ratio else ""
    failed = "failed: " if portrait.failed else ""
    return (
        f"made image: {failed}reached {portrait.reached:.3g}{times}; "
        f"99.9 % of random images stay below {portrait.random:.3g}"
    )
