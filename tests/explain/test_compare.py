import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camdistill.explain.compare import cosine, l1, l2, pearson, spearman


@pytest.fixture
def pair(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.randn(5, 4, 6, generator=generator, dtype=torch.float64)
    second = 0.5 * first + torch.randn(5, 4, 6, generator=generator, dtype=torch.float64)
    return first.relu(), second.relu()  # zeros are ties


def test_pearson_equals_scipy(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    first, second = (maps.flatten(1).numpy() for maps in pair)
    expected = [scipy.stats.pearsonr(a, b)[0] for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(pearson(*pair).numpy(), expected, rtol=1e-12)


def test_spearman_equals_scipy_with_ties(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    first, second = (maps.flatten(1).numpy() for maps in pair)
    expected = [scipy.stats.spearmanr(a, b)[0] for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(spearman(*pair).numpy(), expected, rtol=1e-12)


def test_cosine_and_distances_equal_numpy(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = (maps.flatten(1).numpy() for maps in pair)
    a = a / np.linalg.norm(a, axis=1, keepdims=True)
    b = b / np.linalg.norm(b, axis=1, keepdims=True)
    np.testing.assert_allclose(cosine(*pair).numpy(), (a * b).sum(1), rtol=1e-12)
    np.testing.assert_allclose(l2(*pair).numpy(), np.linalg.norm(a - b, axis=1), rtol=1e-12)
    np.testing.assert_allclose(l1(*pair).numpy(), np.abs(a - b).sum(1), rtol=1e-12)


def test_hand_numbers() -> None:
    first = torch.tensor([[[0.0, 3.0], [4.0, 0.0]]])
    second = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    assert cosine(first, second).item() == pytest.approx(0.8)
    assert l2(first, second).item() == pytest.approx(0.4**0.5)
    assert l1(first, second).item() == pytest.approx(0.8)
    # ranks 0.5 2 3 0.5 and 1 1 3 1: covariance 2.25, variances 4.5 and 3
    assert spearman(first, second).item() == pytest.approx(2.25 * 4 / 3 / (4.5 * 3) ** 0.5)


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3, 1e-30, 1e30])
def test_a_constant_map_has_no_shape_and_is_worth_0(constant: float) -> None:
    other = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(1))
    flat = torch.full((3, 5, 5), constant, requires_grad=True)
    for measure in (pearson, spearman):
        assert torch.equal(measure(flat, other), torch.zeros(3))
        assert torch.equal(measure(other, flat), torch.zeros(3))
    pearson(flat, other).sum().backward()
    assert torch.equal(flat.grad, torch.zeros(3, 5, 5))


def test_a_blank_map_has_cosine_0_and_distance_1_and_finite_gradients() -> None:
    other = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(1))
    blank = torch.zeros(3, 5, 5, requires_grad=True)
    assert torch.equal(cosine(blank, other), torch.zeros(3))
    torch.testing.assert_close(l2(blank, other), torch.ones(3))
    for measure in (pearson, cosine, l2, l1):
        (gradient,) = torch.autograd.grad(measure(blank, other).sum(), blank)
        assert torch.isfinite(gradient).all()


def test_equal_maps_have_a_finite_gradient() -> None:
    maps = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for measure in (pearson, cosine, l2, l1):
        (gradient,) = torch.autograd.grad(measure(maps, maps.detach()).sum(), maps)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("measure", [pearson, cosine, l2, l1])
def test_gradients_equal_finite_differences(measure) -> None:
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: measure(m, reference), (maps,))


def test_half_precision_is_compared_in_float32() -> None:
    maps = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(1))
    tiny = (maps * 1e-6).half()  # its squares are below float16's smallest number
    for measure in (pearson, cosine):
        value = measure(tiny, maps.half())
        assert value.dtype == torch.float32
        assert (value > 0.9).all()
    huge = maps * 1e30  # its squares are above float32's largest
    torch.testing.assert_close(cosine(huge, maps), torch.ones(4))


def test_maps_of_different_size_are_refused() -> None:
    with pytest.raises(Exception, match=r"resize|Type-check"):
        cosine(torch.rand(2, 4, 4), torch.rand(2, 8, 2))


@settings(deadline=None, max_examples=30)
@given(st.floats(0.1, 10), st.floats(-5, 5), st.integers(0, 1000))
def test_correlations_ignore_scale_and_offset(scale: float, offset: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(pearson(scale * a + offset, b), pearson(a, b))
    torch.testing.assert_close(spearman(scale * a + offset, b), spearman(a, b))
    torch.testing.assert_close(cosine(scale * a, b), cosine(a, b))
