import numpy as np
import pytest

from camdistill.report.figures.tiles import (
    MARK,
    Tile,
    add_border,
    filter_tiles,
    map_tiles,
    patch_tile,
    tile_grid,
)


def _middle(tile: Tile, row: int, column: int, factor: int) -> list[int]:
    return tile.pixels[row * factor + factor // 2, column * factor + factor // 2].tolist()


def test_zero_is_mid_gray_and_the_sign_is_kept_for_each_filters_own_scale() -> None:
    filters = np.zeros((2, 3, 2, 2))
    filters[0, 0, 0, 0], filters[0, 1, 0, 1] = 4.0, -4.0
    filters[1, 2, 1, 1] = 1e-3
    strong, weak = filter_tiles(filters, size=8)
    assert _middle(strong, 0, 0, 4) == [255, 128, 128]
    assert _middle(strong, 0, 1, 4) == [128, 0, 128]
    assert _middle(strong, 1, 1, 4) == [128, 128, 128]
    assert _middle(weak, 1, 1, 4) == [128, 128, 255], "its own scale shows a weak filter's shape"


def test_shared_scale_leaves_weak_and_dead_filters_gray() -> None:
    filters = np.zeros((4, 3, 5, 5))
    filters[:2] = np.random.default_rng(0).normal(size=(2, 3, 5, 5))
    filters[2] = 1e-4
    tiles = filter_tiles(filters, shared=True, size=10, marked={3})
    assert np.abs(tiles[2].pixels.astype(int) - 128).max() <= 1
    assert np.ptp(tiles[0].pixels) > 200
    assert [tile.marked for tile in tiles] == [False, False, False, True]
    norm = np.sqrt((filters[0] ** 2).sum())
    assert tiles[0].note == f"0: {norm:.2g}"


def test_filters_that_are_not_numbers_are_drawn_as_zero() -> None:
    filters = np.full((1, 1, 2, 2), np.nan)
    assert (filter_tiles(filters, size=4)[0].pixels > 240).all()


def test_one_channel_is_diverging_about_white() -> None:
    filters = np.array([[[[1.0, -1.0], [0.0, 0.0]]]])
    (tile,) = filter_tiles(filters, size=4)
    red, blue = _middle(tile, 0, 0, 2), _middle(tile, 0, 1, 2)
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert min(_middle(tile, 1, 0, 2)) > 240


def test_many_channels_become_their_three_main_directions() -> None:
    rng = np.random.default_rng(0)
    filters = np.zeros((6, 8, 3, 3))
    filters[:, 5] = rng.normal(size=(6, 3, 3))
    tiles = filter_tiles(filters, size=9)
    own = filters[:, 5] / np.abs(filters[:, 5]).max((1, 2), keepdims=True)
    shown = np.stack([tile.pixels[1::3, 1::3, 0] for tile in tiles]) / 127.5 - 1
    # The sign of a direction means nothing.
    assert min(np.abs(shown - own).max(), np.abs(shown + own).max()) < 0.01
    assert np.ptp(tiles[0].pixels[..., 1]) == 0


def test_map_tile_is_a_share_of_its_own_maximum_and_nan_is_magenta() -> None:
    maps = np.array([[[0.0, 2.0], [np.nan, -1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    tile, dead = map_tiles(maps, ["a", "b"], size=4)
    assert _middle(tile, 0, 1, 2) == [253, 231, 37]
    assert _middle(tile, 1, 0, 2) == [255, 0, 255]
    assert _middle(tile, 1, 1, 2) == _middle(tile, 0, 0, 2) == [68, 1, 84]
    assert (dead.pixels == np.array([68, 1, 84])).all()
    large = map_tiles(np.random.default_rng(0).random((1, 40, 20)), ["c"], size=20)[0]
    assert large.pixels.shape == (20, 10, 3)


def test_patch_is_bright_where_the_unit_is_active_and_hatched_beyond_the_image() -> None:
    image = np.full((1, 4, 4), 1.0)
    region = np.zeros((4, 4), bool)
    region[:2] = True
    tile = patch_tile(image, size=16, region=region)
    assert tile.pixels[3, 8].tolist() == [255, 255, 255]
    assert tile.pixels[12, 8].max() < 130
    inside = np.ones((4, 4), bool)
    inside[:, 3] = False
    beyond = patch_tile(image * 0, size=16, inside=inside).pixels
    assert (beyond[:, :12] == 0).all()
    assert (beyond[:, 12:] > 200).all()


def test_grid_holds_every_tiles_pixels_in_order() -> None:
    tiles = [Tile(np.full((8, 8, 3), 10 * n, np.uint8), str(n)) for n in range(1, 7)]
    page = tile_grid(tiles, title="six", columns=3)
    places = {}
    for n in range(1, 7):
        rows, columns = np.nonzero((page == 10 * n).all(-1))
        assert len(rows) >= 64
        places[n] = (np.median(rows), np.median(columns))
    assert places[1][0] == places[3][0] < places[4][0]
    assert places[1][1] < places[2][1] < places[3][1]
    assert places[1][1] == places[4][1]


def test_marked_tile_has_a_red_border_and_the_pixels_given_are_not_changed() -> None:
    pixels = np.zeros((6, 6, 3), np.uint8)
    framed = add_border(pixels, MARK)
    assert framed[0, 3].tolist() == list(MARK)
    assert framed[3, 3].tolist() == [0, 0, 0]
    assert not pixels.any()


def test_empty_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one tile"):
        tile_grid([])
