import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from torch import Tensor

from camdistill.explain.compare import pearson
from camdistill.measure import controls

from .conftest import OBJECT


def test_edges_equal_scipys_sobel(images: Tensor) -> None:
    gray = images.mean(1).numpy()
    expected = [
        np.hypot(*(scipy.ndimage.sobel(one, axis, mode="nearest") for axis in (0, 1))) / 8
        for one in gray
    ]
    np.testing.assert_allclose(controls.sobel_edges(images).numpy(), expected, atol=1e-12)


def test_center_is_a_gaussian_of_a_quarter_of_the_side(images: Tensor) -> None:
    ticks = np.linspace(-1, 1, 16)
    bump = scipy.stats.norm.pdf(ticks, scale=0.5)
    expected = np.outer(bump, bump) / bump.max() ** 2
    found = controls.center(images)[0].numpy()
    np.testing.assert_allclose(found / found.max(), expected / expected.max(), rtol=1e-5)


def test_random_maps_are_of_their_generator_alone(images: Tensor) -> None:
    for make in (controls.random_maps, controls.smooth_random_maps):
        first, again, other = (make(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert first.shape == (5, 16, 16)
    step = controls.smooth_random_maps(images, torch.Generator().manual_seed(0)).diff(dim=2).abs()
    assert (
        step.mean()
        < 0.3
        * controls.random_maps(images, torch.Generator().manual_seed(0)).diff(dim=2).abs().mean()
    )


def test_ladder_falls_by_its_rungs_from_the_map_to_noise() -> None:
    maps = OBJECT.float().expand(200, -1, -1)
    found = controls.ladder(maps, torch.Generator().manual_seed(0))
    alike = [pearson(rung, maps).mean().item() for rung in found]
    assert alike[0] == pytest.approx(1)
    assert abs(alike[-1]) < 0.1
    assert alike == sorted(alike, reverse=True)
    # mean and spread are the map's on each end, so that no rung is larger than another
    ends = found[[0, -1]].flatten(2)
    torch.testing.assert_close(ends.mean(2), torch.zeros(2, 200), atol=1e-5, rtol=0)
    torch.testing.assert_close(ends.square().mean(2), torch.ones(2, 200), atol=1e-4, rtol=0)


def test_inverted_and_blurred_copies(images: Tensor) -> None:
    maps = images.mean(1)
    assert torch.equal(controls.invert(maps), -maps)
    expected = scipy.ndimage.gaussian_filter(maps.numpy(), (0, 2, 2))
    np.testing.assert_allclose(controls.blur_maps(maps).numpy(), expected, atol=1e-12)
    assert torch.equal(controls.mask_maps(OBJECT[None]), OBJECT[None].float())
