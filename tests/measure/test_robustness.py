import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camdistill.explain.maps import upsample
from camdistill.measure.robustness import local_lipschitz, max_sensitivity

METRICS = (max_sensitivity, local_lipschitz)


def square(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    return images.mean(1) ** 2


def test_values_equal_numpy_over_the_same_samples(images: Tensor) -> None:
    classes, network = torch.zeros(5).long(), nn.Identity()
    drawn = np.stack(
        [
            torch.rand(images.shape, generator=one).numpy()
            for one in [torch.Generator().manual_seed(3)]
            for _ in range(6)
        ]
    )
    nearby = images.numpy() + 0.05 * (2 * drawn - 1)
    maps = (images.numpy().mean(1) ** 2).reshape(5, -1)
    change = np.linalg.norm((nearby.mean(2) ** 2).reshape(6, 5, -1) - maps, axis=2)
    size, step = np.linalg.norm(maps, axis=1), (nearby - images.numpy()).reshape(6, 5, -1)
    expected = ((change / size).max(0), (change / np.linalg.norm(step, axis=2)).max(0) / size)
    for metric, value in zip(METRICS, expected, strict=True):
        generator = torch.Generator().manual_seed(3)
        found = metric(square, network, images, classes, generator, radius=0.05, samples=6)
        np.testing.assert_allclose(found.numpy(), value, rtol=1e-6)


def test_max_sensitivity_equals_captums_in_distribution(images: Tensor) -> None:
    captum = pytest.importorskip("captum.metrics")

    def theirs(inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (square(nn.Identity(), inputs[0], torch.zeros(len(inputs[0])))[:, None],)

    generator = torch.Generator().manual_seed(0)
    found = max_sensitivity(
        square, nn.Identity(), images, torch.zeros(5).long(), generator, radius=0.02, samples=200
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = captum.sensitivity_max(
            theirs, images, perturb_radius=0.02, n_perturb_samples=200
        )
    # both are maxima of 200 draws, which differ by a few percent
    torch.testing.assert_close(found, expected.to(found), rtol=0.1, atol=0)


def test_a_constant_map_is_a_failure_and_not_the_best(images: Tensor) -> None:
    for metric in METRICS:
        generator = torch.Generator().manual_seed(0)
        found = metric(
            lambda *_: torch.full((5, 16, 16), 0.5),
            nn.Identity(),
            images,
            torch.zeros(5).long(),
            generator,
        )
        assert found.isnan().all()


def test_a_map_that_is_constant_up_to_rounding_is_one_too(images: Tensor) -> None:
    flat = upsample(torch.full((5, 5, 7), 0.1), (16, 16))
    assert flat.unique().numel() > 1  # what bilinear interpolation makes of 0.1
    for metric in METRICS:
        generator = torch.Generator().manual_seed(0)
        classes = torch.zeros(5).long()
        found = metric(lambda *_: flat, nn.Identity(), images, classes, generator)
        assert found.isnan().all()


def test_scale_of_a_map_changes_nothing(images: Tensor) -> None:
    for metric in METRICS:
        first, second = (
            metric(
                lambda n, x, c, factor=factor: factor * square(n, x, c),
                nn.Identity(),
                images,
                torch.zeros(5).long(),
                torch.Generator().manual_seed(0),
            )
            for factor in (1, 1e4)
        )
        torch.testing.assert_close(first, second)
