import math

import numpy as np
import pytest
import torch
from torch import nn

from camdistill.errors import UserError
from camdistill.layers.units.activation_maximization import (
    COLORS,
    maximize_activation,
    render_spectra,
)
from camdistill.layers.units.random_images import RandomLevels, random_levels
from camdistill.networks.students import ShallowCNN


def test_painted_is_the_formula_in_numpy(generator: torch.Generator) -> None:
    spectrum = torch.randn(2, 3, 6, 5, 2, generator=generator, dtype=torch.float64)
    found = render_spectra(torch.view_as_complex(spectrum), (2, 3, 6, 8)).numpy()
    z = spectrum.numpy()[..., 0] + 1j * spectrum.numpy()[..., 1]
    rows, columns = np.fft.fftfreq(6)[:, None], np.fft.rfftfreq(8)[None]
    frequency = np.maximum(np.sqrt(rows**2 + columns**2), 1 / 8)
    flat = np.fft.irfft2(z * math.sqrt(48) / frequency, s=(6, 8)) / 4
    colors = COLORS.numpy().astype(np.float64)
    mix = colors / np.linalg.norm(colors, axis=0).max()
    mixed = np.einsum("dc,ncij->ndij", mix, flat)
    assert np.allclose(found, 1 / (1 + np.exp(-mixed)), atol=1e-6)


class Planted(nn.Module):
    """Unit 0 wants vertical stripes, unit 1 their opposite, before a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, (1, 4), bias=False)
        self.relu = nn.ReLU(inplace=True)
        kernel = torch.tensor([1.0, 1.0, -1.0, -1.0])
        self.layer.weight.data = torch.stack([kernel, -kernel]).view(2, 1, 1, 4)

    def forward(self, images):
        return self.relu(self.layer(images) - 3.0).mean((2, 3))


def test_image_reaches_what_no_larger_value_is_possible_for() -> None:
    found = maximize_activation(
        Planted(), "layer", [0, 1], size=(16, 16), channels=1, steps=200, natural=[1.0, 4.0]
    )
    # Two pixels at 1, two at 0: at most 2.
    assert (found.reached > 1.9).all()
    assert (found.reached <= 2).all()
    assert torch.allclose(found.ratio, found.reached / torch.tensor([1.0, 4.0]))
    response = nn.functional.conv2d(found.images, Planted().layer.weight)
    best = torch.stack([response[n, n].amax() for n in range(2)])
    assert torch.allclose(found.reached, best)


def test_a_unit_that_is_off_is_excited_by_its_relus_input() -> None:
    found = maximize_activation(
        Planted(), "relu", [1], before=True, size=(16, 16), channels=1, steps=150, robust=False
    )
    # The convolution gives at most 2, and 3 is taken away.
    given = nn.functional.conv2d(found.images, Planted().layer.weight.detach())[:, 1] - 3
    assert -1.2 < float(given.max()) <= -1.0
    assert float(found.reached) == 0.0
    off = maximize_activation(
        Planted(), "relu", [1], size=(16, 16), channels=1, steps=5, robust=False
    )
    assert float(off.reached) == 0.0


@pytest.mark.parametrize("bounded", [nn.ReLU6(), nn.Sigmoid(), nn.Tanh(), nn.ReLU()])
def test_what_was_reached_is_of_the_scale_of_what_was_natural(bounded: nn.Module) -> None:
    """What goes in reaches 20; a bounded layer still gives its bound, so the ratio is 1 at most."""
    layer = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(layer.weight, 20.0)
    network = nn.Sequential(layer, bounded)
    natural = float(bounded(torch.tensor(20.0)))
    found = maximize_activation(
        network,
        "1",
        [0],
        before=True,
        size=(8, 8),
        channels=1,
        steps=60,
        robust=False,
        natural=[natural],
    )
    with torch.no_grad():
        expected = float(network(found.images).max())
    assert float(found.reached) == pytest.approx(expected, rel=1e-6)
    assert 0.6 < float(found.ratio) <= 1 + 1e-6


def test_same_seed_same_images_and_units_don_t_disturb_each_other() -> None:
    network = ShallowCNN(3, (4, 5), (1, 2))
    settings = {"size": (16, 16), "steps": 4, "robust": False}
    both = maximize_activation(network, "stage2.bn", [1, 3], **settings)
    again = maximize_activation(network, "stage2.bn", [1, 3], **settings)
    assert torch.equal(both.images, again.images)
    alone = maximize_activation(network, "stage2.bn", [1], **settings)
    assert torch.allclose(alone.images[0], both.images[0], atol=1e-5)


def test_robust_images_stay_in_range_and_at_their_size() -> None:
    network = ShallowCNN(3, (4, 5), (1, 2))
    found = maximize_activation(network, "stage1.bn", [0], size=(20, 12), steps=3)
    assert found.images.shape == (1, 3, 20, 12)
    assert 0 <= float(found.images.min()) <= float(found.images.max()) <= 1
    assert math.isnan(float(found.ratio[0]))


def test_network_is_left_as_it_was_also_after_an_error() -> None:
    network = ShallowCNN(3, (4, 5), (1, 2)).train()
    network.linear.weight.requires_grad_(False)
    with pytest.raises(UserError, match="no unit 9"):
        maximize_activation(network, "stage1.bn", [9], size=(8, 8), steps=1)
    assert network.training
    assert network.stage1.conv.weight.requires_grad
    assert not network.linear.weight.requires_grad
    assert network.stage1.conv.weight.grad is None


class Hidden(nn.Module):
    """Two edge filters that a gray image leaves off (at most 2 - 1), and a unit made of them."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, (1, 4))
        self.second = nn.Conv2d(2, 1, 1)
        self.relu = nn.ReLU()
        kernel = torch.tensor([1.0, 1.0, -1.0, -1.0])
        self.first.weight.data = torch.stack([kernel, -kernel]).view(2, 1, 1, 4)
        nn.init.constant_(self.first.bias, -1.0)
        nn.init.constant_(self.second.weight, 3.0)
        nn.init.constant_(self.second.bias, bias)

    def forward(self, images):
        return self.relu(self.second(self.first(images).relu())).mean((2, 3))


def test_a_unit_whose_parts_are_all_off_at_gray_is_excited() -> None:
    network = Hidden()
    gray = torch.full((1, 1, 16, 16), 0.5, requires_grad=True)
    network(gray).sum().backward()
    assert gray.grad is not None
    assert float(gray.grad.abs().max()) == 0, "the start that used to be has no gradient"
    found = maximize_activation(
        network, "relu", [0], before=True, size=(16, 16), channels=1, steps=150, natural=[2.0]
    )
    # An edge filter gives at most 2 - 1, and only one of the two is on.
    assert 2.5 < float(found.reached) <= 3.0
    assert float(found.reached) > float(found.random)
    assert not bool(found.failed)


def test_a_unit_that_nothing_excites_is_told_to_have_failed() -> None:
    """Before its ReLU it was moved all the same, further than by random images."""
    settings = {"before": True, "size": (16, 16), "channels": 1, "steps": 60}
    found = maximize_activation(Hidden(bias=-10.0), "relu", [0], **settings)
    assert float(found.reached) == 0
    assert bool(found.failed)
    constant = Hidden(bias=1.0)
    nn.init.constant_(constant.second.weight, 0.0)
    found = maximize_activation(constant, "relu", [0], **settings)
    assert float(found.reached) == float(found.random) == 1.0
    assert bool(found.failed), "it is the same for every image"


def test_image_of_a_linear_filter_is_the_filters_sign(generator: torch.Generator) -> None:
    """w.x over x in [0, 1] is largest, the sum of the positive weights, where x is 1 for w > 0."""
    layer = nn.Conv2d(1, 1, 5, bias=False)
    layer.weight.data = torch.randn(1, 1, 5, 5, generator=generator)
    layer.weight.data += 0.3 * layer.weight.data.sign()
    found = maximize_activation(
        nn.Sequential(layer), "0", [0], size=(15, 15), channels=1, steps=400, robust=False
    )
    best = float(layer.weight.detach().clamp(min=0).sum())
    assert 0.97 * best < float(found.reached) <= best
    # The output is 11x11, so its middle is 5, 5, which sees rows and columns 5 to 9.
    seen = found.images[0, 0, 5:10, 5:10]
    assert torch.equal(seen > 0.5, layer.weight[0, 0] > 0)
    assert not bool(found.failed)


def test_second_try_is_made_where_the_first_is_no_better_than_chance() -> None:
    network = Hidden()
    settings = {"before": True, "size": (16, 16), "channels": 1, "steps": 12}
    nothing = RandomLevels(torch.full((1,), -9.0), torch.zeros(1))
    first = maximize_activation(network, "relu", [0], levels=nothing, **settings)
    assert not bool(first.failed)
    wanted = RandomLevels(first.reached.clone(), first.reached.clone())
    second = maximize_activation(network, "relu", [0], levels=wanted, **settings)
    assert float(second.reached) > float(first.reached)
    assert not bool(second.failed)
    hopeless = maximize_activation(
        network, "relu", [0], levels=RandomLevels(torch.full((1,), 9.0), torch.ones(1)), **settings
    )
    assert bool(hopeless.failed)
    assert float(hopeless.reached) >= float(first.reached), "the better of two tries is kept"


def test_random_level_is_the_percentile_of_the_largest_values() -> None:
    shown: list[torch.Tensor] = []

    class Watched(Planted):
        def forward(self, images):
            shown.append(images.clone())
            return super().forward(images)

    network = Watched().train()
    levels = random_levels(network, {"relu": True, "layer": False}, size=(8, 8), channels=1)
    assert network.training
    images = torch.cat(shown)
    assert len(images) == 2 * 1000
    white, natural = images[:1000], images[1000:]
    assert abs(float(white.mean()) - 0.5) < 0.01
    assert abs(float(white.var()) - 1 / 12) < 0.01
    # Neighbors of natural images are alike, and their contrast differs.
    assert float((natural[..., 1:] - natural[..., :-1]).std() / natural.std()) < 1.3
    spread = natural.flatten(1).std(1)
    assert float(spread.max() / spread.min()) > 5
    response = nn.functional.conv2d(images, network.layer.weight.detach())
    largest = response.amax((2, 3)).double().numpy()
    expected = np.maximum(*(np.quantile(part, 0.999, axis=0) for part in np.split(largest, 2)))
    np.testing.assert_allclose(levels["layer"].output.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(levels["relu"].excitation.numpy(), expected - 3, rtol=1e-6)
    np.testing.assert_allclose(levels["relu"].output.numpy(), np.maximum(expected - 3, 0))
