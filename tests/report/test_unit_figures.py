"""What a unit's card says."""

from dataclasses import replace

import torch

from camdistill.layers.units.unit_cards import UnitRecord
from camdistill.report.unit_figures import build_card

PORTRAIT = UnitRecord(
    network="student",
    layer="stage2",
    unit=7,
    patches=(),
    mean=None,
    receptive_size=(5, 5),
    values=torch.zeros(10),
    natural=2.0,
    exciting_image=torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)),
    reached=3.2,
    random=1.1,
)


def test_card_says_what_was_reached_beside_what_random_images_reach() -> None:
    card = build_card(PORTRAIT)
    expected = "made image: reached 3.2 (1.6x the largest); 99.9 % of random images stay below 1.1"
    assert expected in card.lines
    assert [tile.note for name, tile in card.beside if name == "made to excite it"] == [
        "reached 3.2"
    ]


def test_card_of_an_image_that_excites_no_more_than_chance_says_failed() -> None:
    card = build_card(replace(PORTRAIT, reached=0.0, failed=True))
    expected = "made image: failed: reached 0 (0.0x the largest); 99.9 % of random images"
    assert any(line.startswith(expected) for line in card.lines)
    assert [tile.note for _, tile in card.beside] == ["failed"]
