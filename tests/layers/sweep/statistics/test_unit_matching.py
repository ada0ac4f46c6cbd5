import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camdistill.layers.sweep.statistics.unit_matching import MatchSums, pair_layers


def test_units_are_matched_on_the_images_that_are_finite_at_both(
    generator: torch.Generator,
) -> None:
    teacher = [torch.rand(20, c, generator=generator, dtype=torch.float64) for c in (4, 3)]
    student = [torch.rand(20, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    good = torch.rand(2, 20, generator=generator) > 0.3, torch.ones(2, 20, dtype=torch.bool)
    good[1][1] = False  # a layer that is never finite
    teacher[0][~good[0][0]], student[1][:] = torch.nan, torch.nan
    pairs = (range(2), range(2))
    parts = [
        MatchSums.of(
            [one[rows] for one in teacher],
            [one[rows] for one in student],
            pairs,
            (good[0][:, rows], good[1][:, rows]),
        )
        for rows in (slice(8), slice(8, 20))
    ]
    matches = parts[0].merge(parts[1]).matches([("a", 4), ("b", 3)], ["s", "broken"], pairs)
    assert [(one.teacher, one.student) for one in matches] == [("a", "s"), ("b", "s")]
    for layer, match, sound in zip(teacher, matches, good[0], strict=True):
        size = layer.shape[1]
        table = np.corrcoef(layer[sound].numpy().T, student[0][sound].numpy().T)[:size, size:]
        np.testing.assert_allclose(match.correlation, table.max(0), rtol=1e-9)
        assert match.images == int(sound.sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 29))
def test_matches_equal_numpys_correlations_of_everything_stored(seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher = [torch.rand(30, c, generator=generator, dtype=torch.float64) for c in (4, 3)]
    student = [teacher[1][:, [2, 0]] + 0.01 * torch.rand(30, 2, generator=generator).double()]
    pairs = (range(0, 2),)
    every = torch.ones(2, 30, dtype=torch.bool)

    def part(rows: slice) -> MatchSums:
        good = every[:, rows], every[:1, rows]
        return MatchSums.of(
            [one[rows] for one in teacher], [one[rows] for one in student], pairs, good
        )

    state = MatchSums.empty([4, 3], [2], pairs).merge(part(slice(cut))).merge(part(slice(cut, 30)))
    matches = state.matches([("a", 4), ("b", 3)], ["s"], pairs)
    for layer, match in zip(teacher, matches, strict=True):
        size = layer.shape[1]
        table = np.corrcoef(layer.numpy().T, student[0].numpy().T)[:size, size:]
        assert match.best.tolist() == table.argmax(0).tolist()
        np.testing.assert_allclose(match.correlation, table.max(0), rtol=1e-9)
        np.testing.assert_allclose(
            match.partner_correlation, table[match.partner.numpy(), [0, 1]], rtol=1e-9
        )
    assert matches[1].best.tolist() == [2, 0]
    assert matches[1].images == 30


def test_a_unit_that_never_varies_follows_none() -> None:
    teacher = [torch.rand(10, 3, generator=torch.Generator()).double()]
    student = [torch.cat([teacher[0][:, 1:2], torch.full((10, 1), 0.7).double()], 1)]
    every = torch.ones(1, 10, dtype=torch.bool)
    sums = MatchSums.of(teacher, student, (range(1),), (every, every))
    (match,) = sums.matches([("t", 3)], ["s"], (range(1),))
    assert match.best.tolist() == [1, -1]


def test_pairs_are_all_if_they_fit_else_the_nearest_in_depth() -> None:
    assert pair_layers([4] * 6, [4] * 3, 1 << 20) == (range(6),) * 3
    few = pair_layers([4] * 6, [4] * 3, 8 * 3 * 2 * 16)
    assert [len(part) for part in few] == [2, 2, 2]
    assert few[0] == range(0, 2)
    assert few[2] == range(4, 6)
    assert [len(part) for part in pair_layers([1000] * 6, [1000] * 2, 1)] == [1, 1]
