import hashlib

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from camdistill.report.figures.depth_maps import LayerMap, depth_panel
from camdistill.report.figures.maps import PanelRow, map_panel, overlay
from camdistill.report.figures.pictures import Sheet

VIRIDIS, RED_BLUE = mpl.colormaps["viridis"], mpl.colormaps["RdBu_r"]
MAGENTA = (255, 0, 255)


def black(height: int = 32, width: int = 32, channels: int = 3) -> np.ndarray:
    return np.zeros((channels, height, width), np.float32)


def over_black(share: float) -> np.ndarray:
    """What README and legend say: 60 % of viridis over an image whose black is 35 % gray."""
    return 255 * (0.6 * np.array(VIRIDIS(float(share))[:3]) + 0.4 * 0.35)


def has(picture: np.ndarray, color: np.ndarray | tuple[int, ...], off: float = 1.0) -> bool:
    return bool((np.abs(picture.astype(float) - np.asarray(color)) <= off).all(-1).any())


def test_maximum_of_the_map_has_the_top_color_at_its_place() -> None:
    share = np.zeros((4, 4))
    share[1, 2] = 1
    drawn = overlay(black(), share, 132, 132)  # cells of 33 pixels have one in their middle
    assert np.allclose(drawn[33 + 16, 66 + 16], over_black(1), atol=1)
    assert np.allclose(drawn[5, 5], over_black(0), atol=1)


def test_overlay_grows_bilinearly_as_torch_does() -> None:
    share = np.random.default_rng(0).random((5, 7)).astype(np.float32)
    drawn = overlay(black(10, 14), share, 60, 84).astype(float)
    grown = F.interpolate(
        torch.from_numpy(share)[None, None], (60, 84), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    expected = 255 * (0.6 * VIRIDIS(grown)[..., :3] + 0.4 * 0.35)
    assert np.abs(drawn - expected).max() < 5, "a step of viridis is up to 4 levels"
    assert np.abs(drawn - expected).mean() < 0.5


def test_small_images_keep_square_pixels() -> None:
    image = np.random.default_rng(1).random((3, 4, 4)).astype(np.float32)
    panel = map_panel([PanelRow(image, np.ones((2, 2), np.float32))], size=64)
    tile = np.kron(np.rint(np.moveaxis(image, 0, -1) * 255), np.ones((16, 16, 1)))
    assert find(panel, tile.astype(np.uint8)) is not None


def find(picture: np.ndarray, tile: np.ndarray) -> tuple[int, int] | None:
    """Where a tile stands in a picture, exactly."""
    height, width, _ = tile.shape
    for top, left in np.argwhere((picture == tile[0, 0]).all(-1)):
        if np.array_equal(picture[top : top + height, left : left + width], tile):
            return int(top), int(left)
    return None


def test_difference_is_symmetric_red_where_the_student_has_more() -> None:
    teacher, student = np.zeros((2, 4, 4), np.float32)
    teacher[0, 0], student[3, 3] = 5, 2
    panel = map_panel([PanelRow(black(), teacher, student)], size=128)
    mirrored = map_panel([PanelRow(black(), student, teacher)], size=128)
    tile, other = difference_tile(panel), difference_tile(mirrored)
    blue, white, red = (255 * np.array(RED_BLUE(level)[:3]) for level in (0.0, 0.5, 1.0))
    assert np.allclose(tile[5, 5], blue, atol=2)
    assert np.allclose(tile[-6, -6], red, atol=2)
    assert np.allclose(tile[64, 64], white, atol=2)
    assert np.allclose(other[5, 5], red, atol=2)


def difference_tile(panel: np.ndarray, side: int = 128) -> np.ndarray:
    """The last tile of a one-row panel: found by its gray frame."""
    frame = (panel == 200).all(-1)
    top = int(np.argmax(frame.sum(1) >= side))
    left = int(np.argmax(frame[top : top + side].sum(0) >= side))
    return panel[top : top + side, left : left + side].astype(float)


def test_own_scale_ignores_strength_and_shared_scale_shows_it() -> None:
    teacher = np.arange(16, dtype=np.float32).reshape(4, 4)
    own = map_panel([PanelRow(black(), teacher, teacher * 0.5)], size=128)
    white = 255 * np.array(RED_BLUE(0.5)[:3])
    assert np.allclose(difference_tile(own)[1:-1, 1:-1], white, atol=2)
    shared = map_panel([PanelRow(black(), teacher, teacher * 0.5)], size=128, scale="shared")
    half = 255 * np.array(RED_BLUE(0.25)[:3])
    assert np.allclose(difference_tile(shared)[-3, -3], half, atol=3)


def test_negative_evidence_is_not_drawn() -> None:
    mixed = np.array([[-9.0, 1.0], [0.0, -2.0]], np.float32)
    rectified = np.maximum(mixed, 0)
    assert np.array_equal(
        map_panel([PanelRow(black(), mixed, rectified)]),
        map_panel([PanelRow(black(), rectified, mixed)]),
    )


def test_nan_is_magenta_where_it_is_and_the_rest_is_drawn() -> None:
    share = np.full((4, 4), 0.5)
    share[0, 3] = np.nan
    drawn = overlay(black(), share, 64, 64)
    assert (drawn[:16, 48:] == MAGENTA).all()
    assert not (drawn[20:] == MAGENTA).all(-1).any()
    assert np.allclose(drawn[40, 10], over_black(0.5), atol=1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_maps_that_are_not_finite_draw_without_a_warning(value: float) -> None:
    teacher = np.full((3, 3), value, np.float32)
    student = np.eye(3, dtype=np.float32)
    panel = map_panel([PanelRow(black(), teacher, student)])
    assert has(panel, MAGENTA)
    assert has(panel, over_black(1), off=3), "the sound map is drawn"


def test_blank_map_is_drawn_at_zero_and_constant_map_at_one() -> None:
    blank, constant = np.zeros((3, 3), np.float32), np.full((3, 3), 2, np.float32)
    panel = map_panel([PanelRow(black(), blank, constant)], size=128)
    for share in (0, 1):
        color = np.rint(over_black(share)).astype(np.uint8)
        tile = np.broadcast_to(color, (128, 128, 3))
        assert find(panel, tile) is not None


def test_gray_image_is_drawn_as_its_rgb_twin() -> None:
    image = np.random.default_rng(2).random((1, 17, 23)).astype(np.float32)
    grid = np.random.default_rng(3).random((5, 3)).astype(np.float32)
    assert np.array_equal(
        map_panel([PanelRow(image, grid)]), map_panel([PanelRow(np.repeat(image, 3, 0), grid)])
    )


@pytest.mark.parametrize("shape", [(1, 1), (37, 53), (224, 224), (301, 7), (96, 96), (128, 64)])
def test_any_size_of_image_keeps_its_proportions(shape: tuple[int, int]) -> None:
    row = PanelRow(np.ones((3, *shape), np.float32) * 0.25, np.ones((7, 7), np.float32))
    panel = map_panel([row], size=128)
    rows, columns = np.nonzero((panel == 64).all(-1))
    height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
    exact = (height - 1) / (width + 1) <= shape[0] / shape[1] <= (height + 1) / (width - 1)
    assert exact, "up to a pixel"
    assert 64 <= max(height, width) <= 192


def test_rows_of_unequal_kind_stand_in_one_panel() -> None:
    grid = np.eye(4, dtype=np.float32)
    panel = map_panel(
        [PanelRow(black(), grid, grid, ("a",)), PanelRow(black(16, 24), grid, None, ("b",))]
    )
    assert panel.dtype == np.uint8


def test_abreast_makes_the_panel_wide() -> None:
    rows = [PanelRow(black(), np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32))] * 4
    tall, wide = map_panel(rows), map_panel(rows, abreast=2)
    assert tall.shape[0] > wide.shape[0]
    assert tall.shape[1] < wide.shape[1]


def test_caption_is_not_read_as_mathematics() -> None:
    panel = map_panel([PanelRow(black(), np.eye(2, dtype=np.float32), None, ("$cost_1 $\\frac",))])
    assert (panel < 128).any()


def test_arguments_are_left_as_they_were() -> None:
    generator = np.random.default_rng(4)
    image, teacher, student = (generator.random(s, np.float32) for s in ((3, 8, 8), (4, 4), (2, 2)))
    before = [hashlib.sha256(array.tobytes()).digest() for array in (image, teacher, student)]
    map_panel([PanelRow(image, teacher, student)])
    after = [hashlib.sha256(array.tobytes()).digest() for array in (image, teacher, student)]
    assert before == after


def test_nothing_to_draw_is_a_programmers_mistake() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        map_panel([])
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        map_panel([PanelRow(black(channels=4), np.eye(2, dtype=np.float32))])


def test_maximum_stands_with_its_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written below a map; an explainer of any kind has no unit that is known."""
    written: list[str] = []
    monkeypatch.setattr(Sheet, "write", lambda *given, **_: written.append(given[3]))
    peak = np.array([[0.0, 1.9], [0.0, 0.0]], np.float32)
    map_panel([PanelRow(black(), peak, peak)])
    assert written.count("max 1.9 logits/cell") == 2
    written.clear()
    map_panel([PanelRow(black(), peak)], unit="")
    assert written.count("max 1.9") == 1
    written.clear()
    depth_panel(black(), {"Grad-CAM": {"teacher": [LayerMap("a", peak)]}})
    assert "bar below a map: its maximum in logits per cell, one scale a method" in written
    assert "1.9   2x2" in written
