import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from camdistill.measure import localization as local
from camdistill.perturb.ranks import ranks

from .conftest import OBJECT, contest


@pytest.fixture
def masks(generator: torch.Generator) -> Tensor:
    return torch.rand(6, 9, 11, generator=generator) < 0.3


@pytest.fixture
def maps(generator: torch.Generator) -> Tensor:
    """With ties: a third of the values are 0."""
    return torch.randn(6, 9, 11, generator=generator).sub(0.5).relu().sub(0.1)


def test_values_equal_numpy(masks: Tensor, maps: Tensor, generator: torch.Generator) -> None:
    distinct = torch.randn(6, 9, 11, generator=generator)
    order = ranks(distinct, generator)
    found = {
        "rra": local.relevance_rank_accuracy(order, masks),
        "point": local.pointing_game(order, masks),
        "near": local.pointing_game(order, masks, 2.5),
        "energy": local.energy_pointing_game(maps, masks),
        "lift": local.energy_lift(maps, masks),
        "iou": local.iou(maps, masks, 0.4),
        "best": local.iou(maps, masks, None),
        "ratio": local.inside_outside(maps, masks),
    }
    for image in range(6):
        mask, values = masks[image].numpy(), distinct[image].numpy()
        places = np.argsort(-values.ravel())
        inside = mask.ravel()[places]
        assert found["rra"][image].item() == pytest.approx(inside[: mask.sum()].mean())
        assert found["point"][image].item() == inside[0]
        y, x = divmod(places[0], 11)
        away = min(np.hypot(y - v, x - u) for v, u in zip(*np.nonzero(mask), strict=True))
        assert found["near"][image].item() == (away <= 2.5)
        one = maps[image].numpy()
        positive = np.maximum(one, 0)
        energy = positive[mask].sum() / positive.sum()
        assert found["energy"][image].item() == pytest.approx(energy, rel=1e-5)
        assert found["lift"][image].item() == pytest.approx(energy / mask.mean(), rel=1e-5)
        ratio = positive[mask].mean() / positive[~mask].mean()
        assert found["ratio"][image].item() == pytest.approx(ratio, rel=1e-5)
        share = (one - one.min()) / (one.max() - one.min())

        def overlap(step: float, share=share, mask=mask) -> float:  # type: ignore[no-untyped-def]
            return float(((share > step) & mask).sum() / ((share > step) | mask).sum())

        assert found["iou"][image].item() == pytest.approx(overlap(0.4))
        best = max(overlap(step / 20) for step in range(1, 20))
        assert found["best"][image].item() == pytest.approx(best)


def test_average_precision_equals_scikit_learn_with_ties(masks: Tensor, maps: Tensor) -> None:
    found = local.average_precision(maps, masks)
    for mask, values, one in zip(masks.numpy(), maps.numpy(), found, strict=True):
        expected = average_precision_score(mask.ravel(), values.ravel())
        assert one.item() == pytest.approx(expected, rel=1e-5)


def test_rank_and_mass_accuracy_equal_quantus(masks: Tensor, generator: torch.Generator) -> None:
    quantus = pytest.importorskip("quantus")
    maps = torch.rand(6, 9, 9, generator=generator)
    square = masks[:, :, :9]
    ranked = local.relevance_rank_accuracy(ranks(maps, generator), square)
    mass = local.energy_pointing_game(maps, square)
    options = {"abs": False, "normalise": False, "disable_warnings": True}
    for peer, ours in (
        (quantus.RelevanceRankAccuracy, ranked),
        (quantus.RelevanceMassAccuracy, mass),
    ):
        theirs = peer(return_aggregate=False, **options)(
            None,
            np.zeros((6, 1, 9, 9)),
            np.zeros(6, int),
            maps.numpy()[:, None].copy(),
            s_batch=square.numpy()[:, None],
        )
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5)


def test_negative_evidence_is_no_energy() -> None:
    # Quantus 0.6's RelevanceMassAccuracy sums signed values: this map gets (3 - 1) / (3 - 1 + 1) =
    # 2 / 3 from it. Of the evidence for the class, 3 of 4 lie in the mask.
    maps = torch.tensor([[[3.0, -1.0], [1.0, 0.0]]])
    masks = torch.tensor([[[True, True], [False, False]]])
    assert local.energy_pointing_game(maps, masks).item() == pytest.approx(0.75)


def test_a_near_constant_map_points_by_chance() -> None:
    # Quantus 0.6's PointingGame is a hit if any tied maximum lies in the mask: always, here.
    masks = torch.zeros(4000, 4, 4, dtype=torch.bool)
    masks[:, :2, :2] = True
    order = ranks(torch.ones(4000, 4, 4), torch.Generator().manual_seed(0))
    share = local.pointing_game(order, masks).mean().item()
    assert share == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)


def test_images_without_ground_truth_are_nan_and_blank_maps_fail() -> None:
    generator = torch.Generator().manual_seed(0)
    maps, masks = torch.rand(3, 6, 6, generator=generator), torch.ones(3, 6, 6, dtype=torch.bool)
    masks[:, 3:] = False
    masks[1], maps[2] = False, 0.0
    order = ranks(maps, generator)
    for values in (
        local.relevance_rank_accuracy(order, masks),
        local.pointing_game(order, masks),
        local.energy_pointing_game(maps, masks),
        local.energy_lift(maps, masks),
        local.iou(maps, masks),
        local.average_precision(maps, masks),
        local.inside_outside(maps, masks),
    ):
        assert values.isnan().tolist() == [False, True, False]
    for metric in (local.energy_pointing_game, local.energy_lift, local.iou, local.inside_outside):
        assert metric(maps, masks)[2] == 0
    # of a blank map each pixel has the same chance: what it gets is the mask's share
    assert local.average_precision(maps, masks)[2] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="have NaN"):
        local.energy_pointing_game(maps / 0, masks)


def test_oracle_is_best_and_constant_never(generator: torch.Generator) -> None:
    count = 40
    masks = OBJECT.expand(count, -1, -1)
    maps = contest(generator, count)
    orders = {name: ranks(one, generator) for name, one in maps.items()}
    tables = {
        "rra": {n: local.relevance_rank_accuracy(o, masks) for n, o in orders.items()},
        "point": {n: local.pointing_game(o, masks) for n, o in orders.items()},
    }
    for metric in (local.energy_lift, local.iou, local.average_precision, local.inside_outside):
        tables[metric.__name__] = {name: metric(one, masks) for name, one in maps.items()}
    for key, table in tables.items():
        means = {name: values.mean().item() for name, values in table.items()}
        assert means["oracle"] == max(means.values()), key
        assert means["constant"] < means["oracle"], key
