import numpy as np
import pytest

from camdistill.report.figures.depth import LogHistogram
from camdistill.report.figures.depth_maps import LayerMap, depth_panel
from camdistill.report.figures.tiles import Tile
from camdistill.report.figures.units import PATCH, UnitCard, unit_card, unit_sheet


def _patch(level: int, side: int = PATCH) -> Tile:
    return Tile(np.full((side, side, 3), level, np.uint8), "1.23")


def test_card_holds_its_patches_and_pictures() -> None:
    card = UnitCard(
        "teacher layer1, unit 3",
        ["active at 3 % of places"],
        [_patch(10 + n) for n in range(9)],
        [("mean", _patch(150, 96))],
        LogHistogram(np.linspace(-2, 1, 31), np.ones(30), 0.97),
        [("star", 0.4, 0.1), ("disc", 0.05, 0.1)],
    )
    picture = unit_card(card)
    for level in [*range(10, 19), 150]:
        assert (picture == level).all(-1).sum() >= PATCH**2


def test_card_of_a_dead_unit_is_drawn_with_what_is_known() -> None:
    unit_card(UnitCard("dead", ["dead on 100 images"]))
    edges = np.linspace(-2, 1, 31)
    unit_card(UnitCard("dead", histogram=LogHistogram(edges, np.zeros(30), 1.0, nonfinite=2)))


def test_sheet_holds_every_card_and_refuses_none() -> None:
    cards = [UnitCard(str(n), patches=[_patch(20 + n)]) for n in range(3)]
    page = unit_sheet(cards, abreast=2)
    for n in range(3):
        assert (page == 20 + n).all(-1).sum() >= PATCH**2
    with pytest.raises(ValueError, match="at least one card"):
        unit_sheet([])


def test_depth_panel_has_bars_in_proportion_to_the_maxima() -> None:
    image = np.full((3, 8, 8), 0.5)
    maps = {
        "teacher": [LayerMap("a", np.eye(4) * 4.0), LayerMap("b", np.eye(2) * 2.0)],
        "student": [LayerMap("c", np.full((2, 2), -1.0)), LayerMap("d", np.full((2, 2), np.nan))],
    }
    picture = depth_panel(image, {"Grad-CAM": maps}, title="t", size=80)
    bar = np.array([59, 82, 139])
    rows = [int((np.abs(line.astype(int) - bar).max(-1) < 3).sum()) for line in picture]
    assert max(rows) == 80 + 40, "the larger map's bar is a tile long, the other half of it"
    assert (picture == [255, 0, 255]).all(-1).sum() > 1000, "a map that is not a number is magenta"


def test_methods_have_scales_of_their_own() -> None:
    image = np.full((3, 8, 8), 0.5)
    maps = {
        method: {"teacher": [LayerMap("a", np.eye(4) * peak)]}
        for method, peak in (("Grad-CAM", 1.0), ("LayerCAM", 1000.0))
    }
    picture = depth_panel(image, maps, title="t", size=80)
    bar = np.array([59, 82, 139])
    rows = [int((np.abs(line.astype(int) - bar).max(-1) < 3).sum()) for line in picture]
    assert sum(row == 80 for row in rows) == 10, "two bars of a tile's length, 5 pixels high"


def test_depth_panel_wraps_deep_networks_and_refuses_none() -> None:
    image = np.zeros((1, 4, 4))
    layers = [LayerMap(f"block{n}", np.ones((2, 2))) for n in range(23)]
    wide = depth_panel(image, {"Grad-CAM": {"teacher": layers}}).shape
    assert wide[1] < 1200
    with pytest.raises(ValueError, match="at least one layer"):
        depth_panel(image, {"Grad-CAM": {"teacher": []}})


def test_cards_of_other_sizes_share_a_sheet() -> None:
    long = UnitCard("a title that is longer than what a card without any picture holds" * 2)
    cards = [long, UnitCard("short", lines=["one", "two"])]
    sheet = unit_sheet(cards, abreast=2)
    tall, wide, _ = unit_card(cards[0]).shape
    assert sheet.shape[1] == 2 * wide
    assert np.array_equal(sheet[: tall - 1, :wide], unit_card(cards[0])[: tall - 1])
