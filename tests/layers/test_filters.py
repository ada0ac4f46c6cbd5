import numpy as np
import pytest
import torch
from torch import nn

from camdistill.errors import UserError
from camdistill.layers.filters import first_filters, summarize_weights, weight_summaries
from camdistill.layers.sweep.statistics.histograms import bin_edges
from camdistill.layers.sweep.sweep_summary import Point
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Preprocessed


def _randomized(network: nn.Module, generator: torch.Generator) -> nn.Module:
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return network.eval()


def test_first_filters_are_the_change_of_the_normalized_unit_by_a_pixel(
    generator: torch.Generator,
) -> None:
    network = Preprocessed(
        _randomized(ShallowCNN(3, (4,), (1,)), generator), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    ).double()
    bank = first_filters(network, torch.rand(1, 3, 8, 8, dtype=torch.float64))
    assert (bank.layer, bank.folded, bank.per_pixel) == ("stage1.conv", "stage1.bn", True)
    # Finite difference of the unit before its ReLU, exact as it is linear.
    gray = torch.full((1, 3, 8, 8), 0.5, dtype=torch.float64)
    for channel, row, column in [(0, 0, 0), (1, 2, 1), (2, 1, 2)]:
        brighter = gray.clone()
        brighter[0, channel, 3 + row, 3 + column] += 1
        stage = network.network.stage1
        units = [stage.bn(stage.conv(network.normalize(x))) for x in (gray, brighter)]
        difference = (units[1] - units[0])[0, :, 4, 4]
        assert torch.allclose(bank.weights[:, channel, row, column], difference)


def test_filters_of_a_bare_network_are_in_its_own_units(generator: torch.Generator) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    bank = first_filters(network, torch.rand(1, 1, 8, 8, generator=generator))
    assert torch.equal(bank.weights, network[0].weight)
    assert bank.folded == ""
    assert not bank.per_pixel
    assert torch.allclose(bank.norms, network[0].weight.flatten(1).pow(2).sum(1).sqrt())


def test_network_without_a_convolution_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="Sequential runs no two-dimensional convolution"):
        first_filters(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2))


POINT = Point("student", "conv", 0, "post")


def test_summary_of_weights_is_numpys(generator: torch.Generator) -> None:
    weights = torch.randn(8, 3, 3, 3, generator=generator)
    found = summarize_weights(weights, POINT)
    own = weights.double().numpy()
    assert found.count == weights.numel() == found.signed.finite == found.sizes.finite
    assert np.isclose(found.mean, own.mean())
    assert np.isclose(found.std, own.std())
    assert np.isclose(found.limit, np.abs(own).max())
    assert np.allclose(found.norms, np.linalg.norm(own.reshape(8, -1), axis=1))
    counts, _ = np.histogram(np.abs(own), bin_edges().numpy())
    assert found.sizes.counts.tolist() == counts.tolist()
    assert found.signed.negatives == (own < 0).sum()


def test_weights_that_are_not_numbers_are_counted_and_left_out() -> None:
    weights = torch.tensor([[1.0, float("nan")], [float("inf"), -2.0]])
    found = summarize_weights(weights, POINT)
    assert found.signed.nonfinite == 2
    assert found.signed.finite == 2
    assert (found.mean, found.limit) == (-0.5, 2.0)


def test_dead_layer_is_all_zeros() -> None:
    found = summarize_weights(torch.zeros(4, 3), POINT)
    assert found.limit == 0
    assert found.sizes.zero_share == 1.0


def test_summaries_name_every_layer_with_weights() -> None:
    assert list(weight_summaries(ShallowCNN(3, (4, 4), (1, 2)))) == [
        "stage1.conv",
        "stage2.conv",
        "linear",
    ]
