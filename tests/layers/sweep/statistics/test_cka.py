import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camdistill.layers.sweep.statistics.cka import CkaSums, gram_matrices, group_sizes

NAMES = [("teacher", "a"), ("teacher", "b"), ("student", "c")]


def hsic(first: np.ndarray, second: np.ndarray) -> float:
    """Song et al. 2012, eq. 5, term by term."""
    n = len(first)
    k, m = (x @ x.T * (1 - np.eye(n)) for x in (first, second))
    ones = np.ones(n)
    return (
        np.trace(k @ m)
        + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (ones @ k @ m @ ones)
    ) / (n * (n - 3))


def features(seed: int, images: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(images, 6, generator=generator, dtype=torch.float64)
    second = first[:, :3] + torch.randn(images, 3, generator=generator, dtype=torch.float64)
    return [first, second, second.relu() + 4]


def sums(layers: list[torch.Tensor], sound: torch.Tensor | None = None) -> CkaSums:
    if sound is None:
        sound = torch.ones(len(layers), len(layers[0]), dtype=torch.bool)
    return CkaSums.of([gram_matrices(layer) for layer in layers], sound)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(4, 11), min_size=1, max_size=4))
def test_streaming_equals_the_formula_group_by_group(seed: int, sizes: list[int]) -> None:
    batches = [features(seed + number, size) for number, size in enumerate(sizes)]
    state = CkaSums.empty(3)
    for batch in batches:
        state = state.merge(sums(batch))

    def mean(row: int, column: int) -> float:
        return sum(len(b[0]) * hsic(b[row].numpy(), b[column].numpy()) for b in batches)

    found = state.similarity(NAMES)
    assert (found.images, found.batches) == (sum(sizes), len(sizes))
    for row in range(3):
        for column in range(3):
            own = mean(row, row) * mean(column, column)
            if mean(row, row) > 0.01 and mean(column, column) > 0.01:
                expected = mean(row, column) / own**0.5
                assert float(found.cka[row, column]) == pytest.approx(expected, rel=1e-7)


def test_closed_form_of_uncorrelated_features() -> None:
    """CKA of X = Z A, Y = Z B for white Z is |A'B|^2 / (|AA'| |BB'|) (Kornblith 2019, eq. 5)."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2000, 4, generator=generator, dtype=torch.float64)
    a = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    b = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    state = CkaSums.empty(2)
    for part in z.split(64):
        state = state.merge(sums([part @ a, part @ b]))
    expected = (a.T @ b).norm() ** 2 / ((a @ a.T).norm() * (b @ b.T).norm())
    found = float(state.similarity(NAMES[:2]).cka[0, 1])
    assert found == pytest.approx(float(expected), abs=0.02)


def test_rotation_and_scale_change_nothing_and_a_layer_is_itself() -> None:
    layer, other, _ = features(0, 40)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator()))[0]
    found = sums([layer, 7 * layer @ turn + 3, other]).similarity(NAMES).cka
    assert float(found[0, 1]) == pytest.approx(1)
    assert float(found[0, 2]) == pytest.approx(float(found[1, 2]))
    torch.testing.assert_close(found.diagonal(), torch.ones(3, dtype=torch.float64))


def test_independent_layers_have_none_even_in_small_batches() -> None:
    """Biased CKA is 0.6 to 0.9 here."""
    generator = torch.Generator().manual_seed(0)
    state = CkaSums.empty(2)
    for _ in range(200):
        state = state.merge(sums([torch.randn(8, 64, generator=generator) for _ in range(2)]))
    assert abs(float(state.similarity(NAMES[:2]).cka[0, 1])) < 0.03


def test_where_there_is_no_cka_the_reason_is_told() -> None:
    few = sums([one[:3] for one in features(0, 5)]).similarity(NAMES)
    assert few.cka.isnan().all()
    assert few.reasons[0, 2] == "no group had 4 sound images or more"
    first, second, _ = features(0, 20)
    constant = torch.full((20, 8), 0.3)
    found = sums([first, second, constant]).similarity(NAMES)
    assert found.reasons.keys() == {(0, 2), (1, 2), (2, 2)}
    assert found.reasons[0, 2] == "student c is the same for every image"
    assert found.cka[:, 2].isnan().all()
    assert found.cka[:2, :2].isfinite().all()


def test_broken_images_are_left_out_and_a_small_last_batch_does_no_harm() -> None:
    layers = features(3, 12)
    broken = [one.clone() for one in layers]
    broken[1][5] = torch.nan
    sound = torch.arange(12) != 5
    expected = sums([one[sound] for one in layers]).similarity(NAMES)
    last = [one[:2] for one in features(4, 5)]
    found = sums(broken, sound.expand(3, -1)).merge(sums(last)).similarity(NAMES)
    torch.testing.assert_close(found.cka, expected.cka)
    assert found.images == 11


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_two_layers_are_compared_on_the_images_that_are_finite_at_both(
    seed: int, shares: list[float]
) -> None:
    """A layer that is broken for some images, or all, takes nothing from the others."""
    sizes, generator = (17, 9), torch.Generator().manual_seed(seed)
    state, batches = CkaSums.empty(3), []
    for number, size in enumerate(sizes):
        layers = [one.clone() for one in features(seed + number, size)]
        sound = torch.rand(3, size, generator=generator) >= torch.tensor(shares)[:, None]
        for layer, good in zip(layers, sound, strict=True):
            layer[~good] = torch.nan
        batches.append((layers, sound))
        state = state.merge(sums(layers, sound))
    found = state.similarity(NAMES)
    for row in range(3):
        for column in range(row, 3):
            totals, images = np.zeros(3), 0
            for layers, sound in batches:
                both = sound[row] & sound[column]
                if int(both.sum()) < 4:
                    continue
                one, two = (layers[place][both].numpy() for place in (row, column))
                images += len(one)
                totals += len(one) * np.array([hsic(one, two), hsic(one, one), hsic(two, two)])
            assert int(state.images[row, column]) == images
            if not images:
                assert (row, column) in found.reasons
                assert found.cka[row, column].isnan()
            elif min(totals[1:]) > 0.01:
                expected = totals[0] / (totals[1] * totals[2]) ** 0.5
                assert float(found.cka[row, column]) == pytest.approx(expected, rel=1e-6)


def test_grams_are_the_same_in_every_layout(generator: torch.Generator) -> None:
    output = torch.randn(5, 3, 4, 6, generator=generator)
    expected = output.flatten(1).double() @ output.flatten(1).double().T
    for layout in (torch.contiguous_format, torch.channels_last):
        (found,) = gram_matrices(output.contiguous(memory_format=layout))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(st.integers(1, 1000))
def test_groups_are_even_and_of_64_at_most(images: int) -> None:
    sizes = group_sizes(images)
    assert sum(sizes) == images
    assert max(sizes) <= 64
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-images // 64)


def test_a_large_batch_is_compared_in_groups() -> None:
    layers = features(1, 130)
    state = CkaSums.empty(3)
    for rows in (slice(44), slice(44, 87), slice(87, 130)):
        state = state.merge(sums([one[rows] for one in layers]))
    found = sums(layers).similarity(NAMES)
    torch.testing.assert_close(found.cka, state.similarity(NAMES).cka)
    assert (found.images, found.batches) == (130, 3)


def test_between_takes_the_part_of_two_networks() -> None:
    found = sums(features(0, 10)).similarity(NAMES)
    torch.testing.assert_close(found.between("teacher", "student"), found.cka[:2, 2:])
    assert found.names("teacher") == ("a", "b")
