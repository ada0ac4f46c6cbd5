import numpy as np
import pytest
import torch
import torch.nn.functional as F

from camdistill.explain.maps import fuse, normalize, relu, resize, upsample


@pytest.fixture
def maps(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(3, 6, 8, generator=generator, dtype=torch.float64)


def test_relu_keeps_positive_evidence() -> None:
    assert torch.equal(relu(torch.tensor([[-1.0, 2.0]])), torch.tensor([[0.0, 2.0]]))


def test_normalizations_equal_their_formulas(maps: torch.Tensor) -> None:
    values = maps.numpy()
    low, high = values.min((1, 2), keepdims=True), values.max((1, 2), keepdims=True)
    np.testing.assert_allclose(normalize(maps), (values - low) / (high - low), rtol=1e-12)
    largest = np.abs(values).max((1, 2), keepdims=True)
    np.testing.assert_allclose(normalize(maps, "max"), values / largest, rtol=1e-12)


def test_an_epsilon_is_added_to_the_range_as_peers_do(maps: torch.Tensor) -> None:
    values = maps.numpy()
    low, high = values.min((1, 2), keepdims=True), values.max((1, 2), keepdims=True)
    expected = (values - low) / (high - low + 0.5)
    np.testing.assert_allclose(normalize(maps, epsilon=0.5), expected, rtol=1e-12)
    blank = torch.zeros(1, 2, 2, dtype=torch.float16)
    assert torch.equal(normalize(blank, epsilon=1e-8), blank)  # where 1e-8 is 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["minmax", "max"])
def test_a_blank_map_stays_zero_in_every_precision(dtype: torch.dtype, kind) -> None:
    blank = torch.zeros(2, 3, 4, 4, dtype=dtype)
    assert torch.equal(normalize(blank, kind), blank)
    tiny = torch.full((1, 2, 2), torch.finfo(dtype).tiny, dtype=dtype)
    tiny[0, 0, 0] = 0
    scaled = normalize(tiny, kind)
    assert scaled.dtype == dtype
    assert scaled.max() == 1


def test_a_constant_map_has_no_range() -> None:
    flat = torch.full((1, 3, 3), 0.3)
    flat[0, 1, 1] = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0))
    assert torch.equal(normalize(flat), torch.zeros(1, 3, 3))


def test_normalize_has_finite_gradients_at_blank_maps() -> None:
    blank = torch.zeros(2, 3, 3, requires_grad=True)
    for kind in ("minmax", "max"):
        (gradient,) = torch.autograd.grad(normalize(blank, kind).sum(), blank)
        assert torch.isfinite(gradient).all()


def test_upsample_is_torch_bilinear(maps: torch.Tensor) -> None:
    expected = F.interpolate(maps[:, None], (13, 17), mode="bilinear", align_corners=False)[:, 0]
    assert torch.equal(upsample(maps, (13, 17)), expected)
    classes = torch.stack([maps, -maps], 1)
    assert torch.equal(upsample(classes, (13, 17))[:, 0], expected)


def test_resize_down_averages_cells(maps: torch.Tensor) -> None:
    expected = maps.numpy().reshape(3, 3, 2, 4, 2).mean((2, 4))
    np.testing.assert_allclose(resize(maps, (3, 4)), expected, rtol=1e-12)


def test_resize_down_by_any_ratio_keeps_the_mean(maps: torch.Tensor) -> None:
    smaller = resize(maps, (4, 5))
    torch.testing.assert_close(smaller.mean((1, 2)), maps.mean((1, 2)))
    # 6 cells on 4: the first new cell is 2/3 of old cell 0 and 1/3 of old cell 1
    rows = resize(maps, (4, 8))
    torch.testing.assert_close(rows[:, 0], maps[:, 0] * 2 / 3 + maps[:, 1] / 3)


def test_resize_up_is_bilinear_and_axes_are_treated_apart(maps: torch.Tensor) -> None:
    assert torch.equal(resize(maps, (12, 16)), upsample(maps, (12, 16)))
    torch.testing.assert_close(resize(maps, (12, 4)), upsample(resize(maps, (6, 4)), (12, 4)))
    assert torch.equal(resize(maps, (6, 8)), maps)


def test_resize_is_differentiable_in_half_precision(maps: torch.Tensor) -> None:
    half = maps.bfloat16().requires_grad_()
    resize(half, (3, 3)).sum().backward()
    assert half.grad is not None


def test_resize_is_float32_under_autocast(maps: torch.Tensor) -> None:
    single = maps.float()
    for size in ((4, 5), (12, 4), (3, 8)):
        with torch.autocast("cpu", torch.bfloat16):
            cast = resize(single, size)
        assert cast.dtype == torch.float32
        assert torch.equal(cast, resize(single, size))


def test_resize_of_half_precision_is_averaged_in_float32(maps: torch.Tensor) -> None:
    half = maps.bfloat16()
    assert torch.equal(resize(half, (4, 5)), resize(half.float(), (4, 5)).bfloat16())


def test_resize_can_be_differentiated_after_a_first_use_under_inference_mode() -> None:
    with torch.inference_mode():
        resize(torch.ones(1, 11, 7), (5, 3))  # a ratio that no other test has
    maps = torch.ones(1, 11, 7, requires_grad=True)
    resize(maps, (5, 3)).sum().backward()
    assert maps.grad is not None


def test_fuse_equals_numpy(maps: torch.Tensor) -> None:
    coarse = maps[:, ::2, ::2]
    stack = np.stack([maps.numpy(), upsample(coarse, (6, 8)).numpy()])
    np.testing.assert_allclose(fuse([maps, coarse]), stack.mean(0), rtol=1e-12)
    np.testing.assert_allclose(fuse([maps, coarse], "max"), stack.max(0), rtol=1e-12)
    np.testing.assert_allclose(fuse([maps, coarse], "product"), stack.prod(0), rtol=1e-12)
    assert fuse([maps, coarse], size=(12, 16)).shape == (3, 12, 16)
    with pytest.raises(ValueError, match="no map"):
        fuse([])
