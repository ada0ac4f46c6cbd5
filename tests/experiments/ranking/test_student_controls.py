"""Every control says nothing of its image but what its name allows."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import sobel
from torch import nn

from camdistill.experiments.ranking.student_controls import (
    CONTROLS,
    Control,
    blur_and_restore,
    class_mean,
    control_maps,
    mix_maps,
    randomize_weights,
    shuffle_in_class,
    spectrum_noise,
)
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Teacher

N = 24


@pytest.fixture
def maps(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(N, 8, 8, generator=generator, dtype=torch.float64)


@pytest.fixture
def classes(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 4, (N,), generator=generator)


@pytest.fixture
def images(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(N, 3, 16, 16, generator=generator)


@pytest.mark.parametrize("kind", [kind for kind in CONTROLS if kind != "randomized"])
def test_controls_keep_shape_and_depend_on_the_seed_alone(
    kind: Control, maps: torch.Tensor, classes: torch.Tensor, images: torch.Tensor
) -> None:
    before = maps.clone()
    torch.manual_seed(3)
    first = control_maps(kind, maps, classes, images, 5)
    torch.manual_seed(4)
    again = control_maps(kind, maps, classes, images, 5)
    assert torch.equal(first, again)
    assert first.shape == maps.shape
    assert first.dtype == maps.dtype
    assert torch.isfinite(first).all()
    assert torch.equal(maps, before)
    draws = {"random", "spectrum", "shuffled", "shuffled_in_class"}
    other = control_maps(kind, maps, classes, images, 6)
    assert torch.equal(first, other) == (kind not in draws)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_spectrum_noise_has_each_maps_power_spectrum_and_mean(
    height: int, width: int, seed: int
) -> None:
    maps = np.random.default_rng(seed).random((3, height, width))
    noise = spectrum_noise(torch.from_numpy(maps), seed).numpy()
    wanted, found = (np.abs(np.fft.fft2(part)) ** 2 for part in (maps, noise))
    np.testing.assert_allclose(found, wanted, atol=1e-9)
    np.testing.assert_allclose(noise.mean((1, 2)), maps.mean((1, 2)), atol=1e-9)


def test_spectrum_noise_forgets_where_the_map_was(maps: torch.Tensor) -> None:
    bumps = torch.zeros(500, 8, 8, dtype=torch.float64)
    bumps[:, 1:3, 1:3] = 1
    noise = spectrum_noise(bumps, 0)
    by_cell = noise.mean(0) - noise.mean()
    assert by_cell.abs().max() < 5 * noise.std() / 500**0.5
    assert maps.shape == spectrum_noise(maps, 0).shape


def test_shuffled_gives_every_image_anothers_map(maps: torch.Tensor) -> None:
    found = shuffle_in_class(maps, torch.zeros(N, dtype=torch.int64), 1)
    owner = [int((maps == row).all((1, 2)).nonzero()) for row in found]
    assert sorted(owner) == list(range(N))
    assert all(place != giver for place, giver in enumerate(owner))


def test_shuffled_in_class_keeps_the_class(maps: torch.Tensor, classes: torch.Tensor) -> None:
    classes[classes == 3] = 2
    classes[5] = 3  # alone in its class
    found = control_maps("shuffled_in_class", maps, classes, torch.rand(N, 3, 4, 4), 1)
    owner = [int((maps == row).all((1, 2)).nonzero()) for row in found]
    assert sorted(owner) == list(range(N))
    assert all(classes[place] == classes[giver] for place, giver in enumerate(owner))
    assert [place for place, giver in enumerate(owner) if place == giver] == [5]


def test_means_are_means(maps: torch.Tensor, classes: torch.Tensor, images: torch.Tensor) -> None:
    mean = control_maps("mean", maps, classes, images, 0)
    np.testing.assert_allclose(mean[3], maps.numpy().mean(0), atol=1e-12)
    by_class = class_mean(maps, classes)
    for number in range(N):
        own = maps.numpy()[(classes == classes[number]).numpy()].mean(0)
        np.testing.assert_allclose(by_class[number], own, atol=1e-12)


def test_class_means_of_many_images_are_made_in_parts(
    maps: torch.Tensor, classes: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = class_mean(maps, classes)
    monkeypatch.setattr("camdistill.experiments.ranking.student_controls.ROWS", 7)
    torch.testing.assert_close(class_mean(maps, classes), whole)


def test_edges_are_sobels_magnitude_averaged_over_cells(
    maps: torch.Tensor, classes: torch.Tensor, images: torch.Tensor
) -> None:
    gray = images.double().mean(1).numpy()
    slopes = [
        np.hypot(sobel(one, 0, mode="nearest"), sobel(one, 1, mode="nearest")) / 8 for one in gray
    ]
    cells = np.stack(slopes).reshape(N, 8, 2, 8, 2).mean((2, 4))
    found = control_maps("edges", maps, classes, images, 0)
    np.testing.assert_allclose(found, cells, atol=1e-6)


def test_center_is_one_bump_in_the_middle_for_all(
    maps: torch.Tensor, classes: torch.Tensor, images: torch.Tensor
) -> None:
    found = control_maps("center", maps, classes, images, 0)
    assert torch.equal(found[0], found[7])
    torch.testing.assert_close(found[0], found[0].flip(0).T)
    assert (found[0, 3, :4].diff() > 0).all()
    # sigma is half of half the side: a quarter
    fallen = float(found[0, 3, 1] / found[0, 3, 3])
    assert fallen == pytest.approx(np.exp(-(2.5**2 - 0.5**2) / (2 * 2.0**2)), abs=0.06)


def test_inverted_turns_the_order_of_cells_and_stays_positive(
    maps: torch.Tensor, classes: torch.Tensor, images: torch.Tensor
) -> None:
    found = control_maps("inverted", maps, classes, images, 0)
    assert (found >= 0).all()
    first, second = maps.flatten(1).argsort(1), found.flatten(1).argsort(1)
    assert torch.equal(first, second.flip(1))


def test_blurred_keeps_the_mean_of_blocks_and_loses_what_is_finer() -> None:
    checker = (torch.arange(8)[:, None] + torch.arange(8)[None]) % 2
    found = blur_and_restore(checker.double()[None])
    torch.testing.assert_close(found, torch.full_like(found, 0.5))
    constant = torch.full((1, 7, 5), 3.0)
    torch.testing.assert_close(blur_and_restore(constant), constant)


def test_mixing_is_of_maps_of_length_one(maps: torch.Tensor) -> None:
    other = shuffle_in_class(maps, torch.zeros(N, dtype=torch.int64), 0)
    units = [part / part.flatten(1).norm(dim=1)[:, None, None] for part in (maps, 7 * other)]
    torch.testing.assert_close(
        mix_maps(3 * maps, 7 * other, 0.25), 0.25 * units[0] + 0.75 * units[1]
    )
    torch.testing.assert_close(mix_maps(maps, other, 1.0), units[0])
    with pytest.raises(ValueError, match="share is"):
        mix_maps(maps, other, 1.5)


def test_randomized_teacher_is_another_function_and_the_first_stays() -> None:
    torch.manual_seed(0)
    teacher = Teacher.from_network(CifarResNet(20, 10))
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    state = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    other = randomize_weights(teacher, images, 3)
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, state[name])
    changed = dict(other.network.named_parameters())
    assert all(
        not torch.equal(changed[name], value)
        for name, value in teacher.network.named_parameters()
        if value.ndim > 1
    )
    # its normalizations have the statistics of the images: in eval mode as in train mode
    assert not other.network.training
    with torch.no_grad():
        still = other(images)
        other.network.train()
        moving = other.network(other.normalize(images))
        other.network.eval()
    torch.testing.assert_close(still, moving, rtol=0.05, atol=0.05)
    assert still.std() > 1e-3
    again = randomize_weights(teacher, images, 3)
    torch.testing.assert_close(again(images), still)
    assert not torch.allclose(randomize_weights(teacher, images, 4)(images), still)


def test_wrong_use_is_refused(maps: torch.Tensor, classes: torch.Tensor) -> None:
    assert set(get_args(Control)) == set(CONTROLS)
    with pytest.raises(ValueError, match="24 maps, 24 classes, 2 images"):
        control_maps("mean", maps, classes, torch.rand(2, 3, 8, 8), 0)
    with pytest.raises(ValueError, match="not made from maps"):
        control_maps("randomized", maps, classes, torch.rand(N, 3, 8, 8), 0)


def test_randomized_network_without_normalization_keeps_biases_at_zero() -> None:
    teacher = Teacher.from_network(ShallowCNN(4, (4,), (2,)))
    other = randomize_weights(teacher, torch.rand(8, 3, 8, 8), 0)
    assert not other.network.linear.bias.any()


def test_random_teacher_without_batch_normalization_is_alive() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    other = randomize_weights(Teacher.from_network(network), images, 0)
    norm = other.network[1]
    assert (norm.weight == 1).all()
    assert not norm.bias.any()
    assert float(other(images).std(0).min()) > 1e-4
