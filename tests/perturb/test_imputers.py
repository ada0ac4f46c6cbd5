import numpy as np
import pytest
import scipy.ndimage
import scipy.sparse as sparse
import scipy.sparse.linalg
import torch
from numpy.typing import NDArray

from camdistill.data.shapes import Shapes
from camdistill.perturb import imputers
from camdistill.perturb.imputers import baseline, gaussian_blur, noisy_linear
from camdistill.perturb.ranks import first_pixels, ranks

Array = NDArray[np.floating]


def shapes(count: int, size: int) -> torch.Tensor:
    pixels = Shapes("test", count, size=size).render(np.arange(count)).pixels
    return torch.from_numpy(pixels).double() / 255


def solved_directly(image: Array, hole: NDArray[np.bool_]) -> Array:
    """Rong et al. 2022, equation by equation, with a sparse LU."""
    _, height, width = image.shape
    number = np.full((height, width), -1)
    number[hole] = np.arange(hole.sum())
    matrix = sparse.lil_matrix((hole.sum(), hole.sum()))
    right = np.zeros((hole.sum(), len(image)))
    offsets = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    for y, x in zip(*np.nonzero(hole), strict=True):
        row = number[y, x]
        for dy, dx in offsets:
            if not (0 <= y + dy < height and 0 <= x + dx < width):
                continue
            weight = 1 / 6 if 0 in (dy, dx) else 1 / 12
            matrix[row, row] += weight
            if hole[y + dy, x + dx]:
                matrix[row, number[y + dy, x + dx]] -= weight
            else:
                right[row] += weight * image[:, y + dy, x + dx]
    filled = image.copy()
    solution = scipy.sparse.linalg.spsolve(matrix.tocsc(), right)
    filled[:, hole] = solution.reshape(len(right), -1).T
    return filled


def holes(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Blobs and single pixels, from a tenth of the image to nearly all of it."""
    coarse = torch.randn(count, 1, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")[:, 0]
    rough = torch.randn(count, size, size, generator=generator)
    order = torch.cat([ranks(maps, generator) for maps in (smooth, rough)])
    counts = [int(share * size**2) for share in (0.1, 0.5, 0.9, 0.98)]
    return first_pixels(order, counts).flatten(0, 1)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_fill_is_within_1e_3_of_a_sparse_direct_solve(
    size: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    count = 2
    removed = holes(count, size, generator)
    images = shapes(count, size).repeat_interleave(len(removed) // count, 0)
    found = noisy_linear(images.to(dtype), removed, noise=0)
    for image, hole, filled in zip(images, removed, found, strict=True):
        expected = solved_directly(image.numpy(), hole.numpy())
        assert np.abs(filled.numpy() - expected).max() < 1e-3


# pytorch-grad-cam asks NumPy to wrap a tensor in the way of NumPy 1
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_linear_fill_equals_pytorch_grad_cams(generator: torch.Generator) -> None:
    road = pytest.importorskip("pytorch_grad_cam.metrics.road")
    removed = holes(1, 32, generator)
    image = shapes(1, 32).float()
    found = noisy_linear(image.expand(len(removed), -1, -1, -1), removed, noise=0)
    imputer = road.NoisyLinearImputer(noise=0)
    for hole, filled in zip(removed, found, strict=True):
        assert (filled - imputer(image[0], (~hole).float())).abs().max() < 1e-3


def test_linear_ramp_is_filled_in_exactly_and_what_is_kept_keeps_its_bits() -> None:
    # A linear function is its neighbors' mean wherever all eight exist.
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    image = torch.stack([0.1 * y, 0.3 + 0.05 * x, 0.02 * (x + y)])[None].double()
    removed = torch.zeros(1, 9, 9, dtype=torch.bool)
    removed[:, 2:7, 1:8] = True
    found = noisy_linear(image, removed, noise=0, tolerance=1e-12)
    torch.testing.assert_close(found, image, rtol=0, atol=1e-5)
    assert torch.equal(found[:, :, ~removed[0]], image[:, :, ~removed[0]])


def test_a_batch_is_filled_in_as_its_images_alone(generator: torch.Generator) -> None:
    removed = holes(2, 32, generator)
    images = shapes(2, 32).repeat_interleave(8, 0)
    together = noisy_linear(images, removed, noise=0)
    alone = [noisy_linear(images[i, None], removed[i, None], noise=0) for i in range(16)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9)


def test_noise_has_its_size_falls_in_holes_alone_and_comes_from_the_generator() -> None:
    images = torch.full((8, 3, 32, 32), 0.5)
    removed = torch.zeros(8, 32, 32, dtype=torch.bool)
    removed[:, 4:28] = True
    found, again = (
        noisy_linear(images, removed, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(found, again)
    added = (found - images).movedim(1, -1)
    assert added[removed].std().item() == pytest.approx(0.01, rel=0.03)
    assert (added[~removed] == 0).all()
    with pytest.raises(ValueError, match="needs a generator"):
        noisy_linear(images, removed)


def test_black_surroundings_and_untouched_images_end_at_once() -> None:
    images = torch.zeros(2, 3, 16, 16)
    images[:, :, :4] = 1
    removed = torch.zeros(2, 16, 16, dtype=torch.bool)
    removed[0, 8:12] = True
    found = noisy_linear(images, removed, noise=0)
    torch.testing.assert_close(found, images, rtol=0, atol=1e-3)


def test_an_image_of_which_nothing_is_left_is_refused() -> None:
    removed = torch.zeros(2, 8, 8, dtype=torch.bool)
    removed[1] = True
    with pytest.raises(ValueError, match="nothing left"):
        noisy_linear(torch.rand(2, 3, 8, 8), removed, noise=0)


def test_blur_equals_scipy(generator: torch.Generator) -> None:
    images = torch.rand(2, 3, 20, 24, generator=generator, dtype=torch.float64)
    for sigma in (0.7, 2.5):
        expected = scipy.ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma))
        np.testing.assert_allclose(gaussian_blur(images, sigma).numpy(), expected, atol=1e-12)
    torch.testing.assert_close(gaussian_blur(images), gaussian_blur(images, 20 / 8))


def test_baselines_are_what_they_are_called(generator: torch.Generator) -> None:
    images = torch.rand(2, 3, 8, 8, generator=generator)
    assert (baseline(images, "black") == 0).all()
    assert (baseline(images, "gray") == 0.5).all()
    expected = np.broadcast_to(images.numpy().mean((2, 3))[:, :, None, None], images.shape)
    np.testing.assert_allclose(baseline(images, "mean").numpy(), expected, rtol=1e-6)
    assert all(baseline(images, kind).shape == images.shape for kind in imputers.BASELINES)
    with pytest.raises(Exception, match=r"nearest: .blur.|Type-check"):
        baseline(images, "blurr")  # type: ignore[arg-type]
