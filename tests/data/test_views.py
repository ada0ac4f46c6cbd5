"""Views against slicing, torchvision, grid_sample and Python integers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from camdistill.data.views import (
    RATIO,
    Augment,
    View,
    draw_view,
    identity_view,
    uniforms_by_id,
    view_images,
    view_maps,
)
from camdistill.errors import UserError

MASK = 2**64 - 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(n: int = 6, size: tuple[int, int] = (9, 12), seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=generator(seed))


def splitmix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def boxes_inside(n: int, seed: int = 0) -> torch.Tensor:
    extent = 0.3 + 0.7 * torch.rand(n, 2, generator=generator(seed))
    corner = torch.rand(n, 2, generator=generator(seed + 1)) * (1 - extent)
    return torch.cat([corner, extent], dim=1)


def by_grid_sample(source: torch.Tensor, view: View, size: tuple[int, int]) -> torch.Tensor:
    """Edge-clamped bilinear sampling at the centers of the target's pixels, in float64."""
    top, left, height, width = view.box.double().unbind(1)
    y = top[:, None] + height[:, None] * (torch.arange(size[0]) + 0.5) / size[0]
    x = left[:, None] + width[:, None] * (torch.arange(size[1]) + 0.5) / size[1]
    grid = torch.stack(
        [
            (2 * x - 1)[:, None, :].expand(-1, size[0], -1),
            (2 * y - 1)[:, :, None].expand(-1, -1, size[1]),
        ],
        dim=-1,
    )
    flipped = torch.stack(
        [one.flip(-1) if flip else one for one, flip in zip(source, view.flip, strict=True)]
    )
    return F.grid_sample(
        flipped.double(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )


@given(
    seed=st.integers(-(2**63), 2**64),
    epoch=st.integers(0, 10_000),
    ids=st.lists(st.integers(0, 2**62), min_size=1, max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_uniforms_are_splitmix_in_python_integers(seed: int, epoch: int, ids: list[int]) -> None:
    golden = 0x9E3779B97F4A7C15
    expected = []
    for number in ids:
        key = splitmix((splitmix((seed + golden) & MASK) + epoch) & MASK)
        row = splitmix((key + (number + 1) * golden) & MASK)
        bits = [splitmix((row + column * golden) & MASK) >> 40 for column in (1, 2, 3)]
        expected.append([bit / 2**24 for bit in bits])
    drawn = uniforms_by_id(torch.tensor(ids), 3, seed=seed, epoch=epoch)
    assert drawn.tolist() == expected


def test_uniforms_are_uniform_and_columns_epochs_and_seeds_are_independent() -> None:
    ids = torch.arange(20_000)
    columns = [
        uniforms_by_id(ids, 2, seed=seed, epoch=epoch)[:, column].numpy()
        for seed, epoch, column in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1)]
    ]
    for column in columns:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
        # neighbors in the order of the ids
        assert abs(np.corrcoef(column[1:], column[:-1])[0, 1]) < 0.03
    correlations = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlations).max() < 0.03


@given(order=st.permutations(list(range(12))), cut=st.integers(1, 11))
@settings(max_examples=30, deadline=None)
def test_a_view_depends_on_the_id_and_not_on_the_batch(order: list[int], cut: int) -> None:
    augment = Augment(crop="resized", flip=True)
    whole = draw_view(augment, torch.arange(12), (32, 32), seed=3, epoch=2)
    ids = torch.tensor(order)
    for part in (ids[:cut], ids[cut:]):
        view = draw_view(augment, part, (32, 32), seed=3, epoch=2)
        assert torch.equal(view.box, whole.box[part])
        assert torch.equal(view.flip, whole.flip[part])


def test_flips_are_half_and_do_not_depend_on_the_crop() -> None:
    ids = torch.arange(20_000)
    flips = [
        draw_view(Augment(crop=crop, flip=True), ids, (32, 32), seed=0, epoch=0).flip
        for crop in ("none", "pad", "resized")
    ]
    assert torch.equal(flips[0], flips[1])
    assert torch.equal(flips[0], flips[2])
    assert abs(flips[0].float().mean() - 0.5) < 0.015
    assert not draw_view(Augment(), ids, (32, 32), seed=0, epoch=0).flip.any()


def test_pad_draws_every_shift_equally_often() -> None:
    view = draw_view(Augment(crop="pad"), torch.arange(81_000), (32, 32), seed=0, epoch=0)
    shifts = (view.box[:, :2] * 32).numpy()
    assert np.array_equal(shifts, np.rint(shifts))
    counts = np.histogram2d(shifts[:, 0], shifts[:, 1], bins=np.arange(-4, 6) - 0.5)[0]
    assert counts.sum() == 81_000
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


def test_resized_boxes_lie_inside_with_the_areas_and_ratios_asked_for() -> None:
    augment = Augment(crop="resized", scale=(0.25, 0.5))
    top, left, height, width = (
        draw_view(augment, torch.arange(20_000), (32, 64), seed=0, epoch=0).box.double().unbind(1)
    )
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    unclamped = (height < 1) & (width < 1)
    area = (height * width)[unclamped]
    assert area.min() >= 0.25 - 1e-6
    assert area.max() <= 0.5 + 1e-6
    ratio = (width * 64 / (height * 32))[unclamped]
    assert ratio.min() >= RATIO[0] - 1e-5
    assert ratio.max() <= RATIO[1] + 1e-5


@given(seed=st.integers(0, 1000), padding=st.integers(0, 15), flip=st.booleans())
@settings(max_examples=50, deadline=None)
def test_padded_crop_and_flip_equal_torchvision(seed: int, padding: int, flip: bool) -> None:
    images = some_images(seed=seed)
    augment = Augment(crop="pad", padding=padding, flip=flip)
    view = draw_view(augment, torch.arange(6), (9, 12), seed=seed, epoch=1)
    moved = view_images(images, view)
    for image, flipped, box, result in zip(images, view.flip, view.box, moved, strict=True):
        top, left = round(box[0].item() * 9), round(box[1].item() * 12)
        assert abs(top) <= padding
        expected = TF.hflip(image) if flipped else image
        expected = TF.crop(TF.pad(expected, [padding] * 4), top + padding, left + padding, 9, 12)
        assert torch.equal(result, expected)
        assert result.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_identity_view_returns_the_images_and_maps(dtype: torch.dtype) -> None:
    images = some_images().to(dtype)
    assert torch.equal(view_images(images, identity_view(6)), images)
    general = identity_view(6)._replace(shift=False)
    assert torch.allclose(view_images(images, general).double(), images.double(), atol=1e-4)
    maps = torch.randn(6, 7, 5, generator=generator())
    assert torch.allclose(view_maps(maps, identity_view(6), flipped=False), maps, atol=1e-6)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_flipping_twice_changes_nothing(seed: int) -> None:
    images = some_images(seed=seed)
    mirror = identity_view(6)._replace(flip=torch.rand(6, generator=generator(seed)) < 0.5)
    assert torch.equal(view_images(view_images(images, mirror), mirror), images)
    maps = torch.randn(6, 4, 5, generator=generator(seed))
    twice = view_maps(view_maps(maps, mirror, flipped=False), mirror, flipped=False)
    assert torch.allclose(twice, maps, atol=1e-6)


@pytest.mark.parametrize("size", [(5, 6), (18, 24), (13, 7), (9, 12)])
def test_resizing_the_whole_image_equals_torch_antialiased(size: tuple[int, int]) -> None:
    images = some_images().double()
    resized = view_images(images, identity_view(6), size)
    expected = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
    assert torch.allclose(resized, expected, atol=1e-4)


@pytest.mark.parametrize("flip", [False, True])
def test_enlarged_boxes_equal_grid_sample(flip: bool) -> None:
    images = some_images(size=(16, 16))
    view = View(torch.tensor([flip, False] * 3), boxes_inside(6))
    moved = view_images(images.double(), view)
    assert torch.allclose(moved, by_grid_sample(images, view, (16, 16)), atol=1e-3)
    whole = view_images(images, view)
    assert whole.dtype == torch.uint8
    assert torch.equal(whole, moved.round().to(torch.uint8))


def test_a_box_on_pixel_borders_shrinks_to_the_mean_of_its_pixels() -> None:
    # tent of 2 pixels over a linear ramp: the mean is the value at the center
    ramp = torch.arange(16.0).expand(1, 3, 16, 16).contiguous()
    box = torch.tensor([[0.25, 0.25, 0.5, 0.5]])
    moved = view_images(ramp, View(torch.tensor([False]), box), (4, 4))
    assert torch.allclose(moved[0, 0, 1], torch.tensor([4.5, 6.5, 8.5, 10.5]), atol=1e-5)


def test_a_general_box_outside_the_image_is_black_there() -> None:
    images = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    view = View(torch.tensor([False]), torch.tensor([[-0.5, 0.25, 1.0, 1.0]]))
    moved = view_images(images, view)
    expected = torch.zeros_like(images)
    expected[:, :, 4:, :6] = 200
    assert torch.equal(moved, expected)


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(-3, 3),
    columns=st.integers(-3, 3),
    flip=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_a_shift_by_whole_cells_is_a_roll_inside(
    seed: int, rows: int, columns: int, flip: bool
) -> None:
    maps = torch.randn(2, 8, 8, generator=generator(seed))
    box = torch.tensor([[rows / 8, columns / 8, 1.0, 1.0]] * 2)
    moved = view_maps(maps, View(torch.tensor([flip] * 2), box, shift=True), flipped=False)
    expected = (maps.flip(-1) if flip else maps).roll((-rows, -columns), (1, 2))
    inside = (
        slice(None),
        slice(max(-rows, 0), 8 - max(rows, 0)),
        slice(max(-columns, 0), 8 - max(columns, 0)),
    )
    assert torch.allclose(moved[inside], expected[inside], atol=1e-6)


def test_maps_go_on_with_their_edge_outside() -> None:
    maps = torch.arange(1.0, 17.0).view(1, 4, 4)
    view = View(torch.tensor([False]), torch.tensor([[-0.5, 0.0, 1.0, 1.0]]), shift=True)
    moved = view_maps(maps, view, flipped=False)
    assert torch.allclose(moved[0, :3], maps[0, :1].expand(3, 4))
    assert torch.allclose(moved[0, 3], maps[0, 1])


def test_moved_maps_equal_grid_sample_also_for_fractional_shifts() -> None:
    maps = torch.randn(6, 8, 6, generator=generator())
    shifted = torch.tensor([[0.03, -0.11, 1.0, 1.0]] * 3)
    view = View(torch.arange(6) % 2 == 0, torch.cat([shifted, boxes_inside(3)]))
    expected = by_grid_sample(maps[:, None], view, (8, 6))[:, 0]
    assert torch.allclose(view_maps(maps, view, flipped=False).double(), expected, atol=1e-5)


def test_autocast_changes_neither_images_nor_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, 16, 16), generator=generator, dtype=torch.uint8)
    maps = torch.randn(6, 5, 5, generator=generator)
    view = draw_view(Augment("resized", flip=True), torch.arange(6), (16, 16), seed=0, epoch=0)
    for images in (pixels, pixels / 255):
        with torch.autocast("cpu", torch.bfloat16):
            moved, shifted = view_images(images, view), view_maps(maps, view, flipped=False)
        assert moved.dtype == images.dtype
        assert torch.equal(moved, view_images(images, view))
        assert torch.equal(shifted, view_maps(maps, view, flipped=False))


def test_maps_of_the_flipped_image_need_only_the_box() -> None:
    maps = torch.randn(6, 8, 6, generator=generator())
    view = View(torch.arange(6) % 2 == 0, boxes_inside(6))
    flipped = torch.where(view.flip[:, None, None], maps.flip(-1), maps)
    assert torch.allclose(
        view_maps(maps, view, flipped=False), view_maps(flipped, view, flipped=True), atol=1e-6
    )


@pytest.mark.parametrize("cells", [(1.0, 0.0), (-1.0, 2.0), (0.5, 0.0), (0.25, -0.5)])
def test_moved_map_is_the_map_of_the_moved_image_for_a_pooling_network(
    cells: tuple[float, float],
) -> None:
    """Network: 4x4 means. Whole cells: any image. Parts of cells: images constant in each cell."""

    def network(images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images, 4).mean(dim=1)

    whole = all(shift == int(shift) for shift in cells)
    images = torch.rand(4, 3, 32, 32, generator=generator())
    if not whole:
        images = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4, mode="nearest")
    box = torch.tensor([[cells[0] / 8, cells[1] / 8, 1.0, 1.0]] * 4)
    view = View(torch.tensor([True, False] * 2), box, shift=True)
    inside = (slice(None), slice(2, 6), slice(2, 6))
    of_moved = network(view_images(images, view))[inside]
    moved = view_maps(network(images), view, flipped=False)[inside]
    assert torch.allclose(moved, of_moved, atol=1e-6)


@pytest.mark.parametrize("options", [{"padding": -1}, {"scale": (0.0, 1.0)}, {"scale": (0.9, 0.5)}])
def test_impossible_augmentation_is_told(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Augment(**options)


@pytest.mark.parametrize(("padding", "refused"), [(8, False), (9, True), (500, True)])
def test_shifts_by_more_than_half_an_image_are_refused(padding: int, refused: bool) -> None:
    augment = Augment(crop="pad", padding=padding)
    if refused:
        with pytest.raises(
            UserError, match=rf"padding is {padding} for images of 16x20.*8 or less"
        ):
            augment.check_size((16, 20))
    else:
        augment.check_size((16, 20))
    Augment(crop="none", padding=padding).check_size((16, 20))
