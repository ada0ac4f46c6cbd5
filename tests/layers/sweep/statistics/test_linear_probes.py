import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from camdistill.layers.sweep.sampling import ALL, integers_by_id, sample_mask
from camdistill.layers.sweep.statistics import linear_probes
from camdistill.layers.sweep.statistics.linear_probes import ProbeSums, copy_untrained
from camdistill.networks.students import ShallowCNN

CHANNELS = (5, 3)


def data(seed: int, images: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 4, (images,), generator=generator)
    centers = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(images, 8, generator=generator, dtype=torch.float64)
    whole = (centers[labels] + 0.7 * noise).float().double()
    return [whole[:, :5], whole[:, 5:]], labels, torch.arange(images)


def swept(parts: list[torch.Tensor], seed: int = 3, images: int = 120) -> ProbeSums:
    features, labels, ids = data(seed, images)
    state = ProbeSums.empty(CHANNELS, 4)
    for part in parts:
        one = ProbeSums.of([layer[part] for layer in features], labels[part], ids[part], 4, 0)
        state = state.merge(one)
    return state


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(120)), st.lists(st.integers(1, 119), max_size=4))
def test_order_and_batches_do_not_matter(order: list[int], cuts: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_probes, "MAX_HELD_OUT", 9)
        whole = swept([torch.arange(120)])
        parts = torch.tensor_split(torch.tensor(order), sorted(cuts))
        state = swept([part for part in parts if len(part)])
    assert len(whole.held) == 9
    for name in ("labels", "held", "held_labels", "held_draws"):
        assert torch.equal(getattr(state, name), getattr(whole, name))
    for name in ("totals", "outers", "crosses"):
        for one, two in zip(getattr(state, name), getattr(whole, name), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert state.accuracies() == whole.accuracies()


def test_accuracy_is_that_of_ridge_regression_on_stored_features() -> None:
    features, labels, ids = data(3, 120)
    state = swept([torch.arange(120)])
    known = labels >= 0
    held = known & sample_mask(ids, linear_probes.HELD_OUT, 0)
    fitted = known & ~held
    for layer, accuracy in zip(features, state.accuracies(), strict=True):
        x, hot = layer[fitted].numpy(), np.eye(4)[labels[fitted]]
        mean, n = x.mean(0), len(x)
        centered = x - mean
        ridge = n * linear_probes.RIDGE * centered.var(0).mean()
        weights = np.linalg.lstsq(
            np.vstack([centered, ridge**0.5 * np.eye(x.shape[1])]),
            np.vstack([hot - hot.mean(0), np.zeros((x.shape[1], 4))]),
            rcond=None,
        )[0]
        scores = (layer[held].numpy() - mean) @ weights + hot.mean(0)
        right = (scores.argmax(1) == labels[held].numpy()).mean()
        assert accuracy == pytest.approx(right)
        assert accuracy > 0.3
    commonest = labels[fitted].bincount().argmax()
    expected = float((labels[held] == commonest).double().mean())
    assert state.chances() == [pytest.approx(expected)] * 2


def test_a_probe_without_images_tells_nothing() -> None:
    empty = ProbeSums.empty(CHANNELS, 4)
    assert np.isnan(empty.accuracies()).all()
    assert np.isnan(empty.chances()).all()


def test_a_layers_probe_is_of_the_images_that_are_finite_there() -> None:
    """The first layer is broken for a third of the images, and takes nothing from the second."""
    features, labels, ids = data(3, 120)
    broken = torch.arange(120) % 3 == 0
    features[0][broken] = torch.nan
    state = ProbeSums.empty(CHANNELS, 4)
    for part in torch.arange(120).split(17):
        one = ProbeSums.of([layer[part] for layer in features], labels[part], ids[part], 4, 0)
        state = state.merge(one)
    whole = swept([torch.arange(120)])
    assert state.accuracies()[1] == whole.accuracies()[1]
    assert state.test_counts()[1] == whole.test_counts()[1]
    kept = (~broken).nonzero().flatten()
    alone = ProbeSums.of([one[kept] for one in features], labels[kept], ids[kept], 4, 0)
    assert state.accuracies()[0] == pytest.approx(alone.accuracies()[0])
    assert state.chances()[0] == alone.chances()[0]
    assert 0 < state.test_counts()[0] == alone.test_counts()[0] < whole.test_counts()[0]


def test_draws_are_even_and_differ_with_the_seed() -> None:
    ids = torch.arange(20_000)
    numbers = integers_by_id(ids, 0)
    assert 0 <= int(numbers.min()) <= int(numbers.max()) < ALL
    assert len(numbers.unique()) == len(ids)
    shares = torch.histc(numbers.double() / ALL, 10, 0, 1) / len(ids)
    assert (shares - 0.1).abs().max() < 0.01
    both = sample_mask(ids, 0.5, 0) == sample_mask(ids, 0.5, 1)
    assert float(both.double().mean()) == pytest.approx(0.5, abs=0.02)


def test_splitmix_is_the_published_one() -> None:
    """In Python's integers, which don't wrap around by themselves."""
    mask = (1 << 64) - 1
    for number in (0, 1, 12345):
        z = number * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        assert int(integers_by_id(torch.tensor([number]), 0)) == (z ^ z >> 31) >> 2


def test_untrained_copies_have_fresh_weights_and_the_batchs_statistics() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ShallowCNN(3, (4, 6), (1, 2)).eval()
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    fresh = copy_untrained(network, images, 1)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    assert isinstance(fresh, nn.Module)
    assert not any(module.training for module in fresh.modules())
    assert not torch.equal(fresh.stage1.conv.weight, network.stage1.conv.weight)
    hidden = fresh.stage1.conv(images)
    torch.testing.assert_close(fresh.stage1.bn.running_mean, hidden.mean((0, 2, 3)))
    again = copy_untrained(network, images, 1)
    assert torch.equal(fresh.stage1.conv.weight, again.stage1.conv.weight)
