"""A metric learned from bags of maps: a planted property is found, and statistics are right."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, spearmanr

from camdistill.errors import UserError
from camdistill.experiments.learned_metric.metric_baselines import metric_agreements
from camdistill.experiments.learned_metric.metric_report import (
    compare_metrics,
    is_surely_best,
    metric_verdict,
)
from camdistill.experiments.learned_metric.metric_training import (
    Bag,
    BagSet,
    MetricRecipe,
    arm_group,
    fit_metric,
    leave_out,
    score_bag,
    score_unseen_methods,
    score_unseen_networks,
    split_images,
)
from camdistill.experiments.ranking.ranking_arms import Arm
from camdistill.measure.learned import PLANES

IMAGES = 80
QUICK = MetricRecipe(steps=150, images=16, members=2, units=8)


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("camdistill.experiments.learned_metric.metric_baselines.RESAMPLES", 300)


def planted(seed: int, count: int = 14, noise: float = 0.02) -> BagSet:
    """A network whose maps are worth what they show of the plane "energy", whatever else they show.

    Each arm has a share of it, and for the rest another plane, smooth noise or a place.
    """
    generator = torch.Generator().manual_seed(seed)
    known = torch.randn(IMAGES, len(PLANES), 8, 8, generator=generator)
    draw = np.random.default_rng(seed)
    bags = []
    for number in range(count):
        share = number / (count - 1)
        kind = number % 3
        rest = [known[:, 2], torch.randn(IMAGES, 8, 8, generator=generator), known[:, 4]][kind]
        maps = (share * known[:, 1] + (1 - share) * rest).relu() ** (1 + kind / 2)
        gains = 0.2 * share + noise * draw.standard_normal(3)
        bags.append(Bag(f"method{number}", f"group{number // 2}", number > 1, maps, gains))
    order = torch.randperm(IMAGES, generator=generator)
    return BagSet(bags, known, (order[: IMAGES // 2], order[IMAGES // 2 :]))


def orders(found: Mapping[str, float], lessons: BagSet) -> float:
    gains = {bag.name: bag.gain for bag in lessons.bags}
    return float(spearmanr([found[name] for name in gains], list(gains.values())).statistic)


@pytest.mark.slow
def test_the_planted_property_is_found_for_methods_it_never_saw() -> None:
    lessons = {"one": planted(0)}
    steps: list[tuple[int, int]] = []
    found = score_unseen_methods(lessons, QUICK, lambda *done: steps.append(done))
    assert set(found["one"]) == {bag.name for bag in lessons["one"].bags}
    assert orders(found["one"], lessons["one"]) > 0.8
    assert steps[-1] == (7, 7)


@pytest.mark.slow
def test_and_for_a_network_it_never_saw() -> None:
    lessons = {"one": planted(0, 8), "other": planted(1, 8)}
    found = score_unseen_networks(lessons, QUICK, lambda *_: None)
    for name, one in lessons.items():
        assert orders(found[name], one) > 0.8
    assert score_unseen_networks({"one": planted(0)}, QUICK, lambda *_: None) == {}


@pytest.mark.slow
def test_gains_without_a_reason_are_not_foretold() -> None:
    """Shuffled gains: what a metric says of methods it never saw has nothing to do with them."""
    lessons = planted(0)
    draw = np.random.default_rng(5)
    gains = draw.permutation([bag.gain for bag in lessons.bags])
    bags = [
        Bag(bag.name, bag.group, bag.of_method, bag.maps, np.array([gain, gain]))
        for bag, gain in zip(lessons.bags, gains, strict=True)
    ]
    shuffled = BagSet(bags, lessons.context, lessons.halves)
    found = score_unseen_methods({"one": shuffled}, QUICK, lambda *_: None)
    assert abs(orders(found["one"], shuffled)) < 0.6


def test_what_is_left_out_changes_nothing() -> None:
    """Bit for bit: the bags of the left-out group may hold anything."""
    lessons = planted(0)
    spoilt = [
        Bag(bag.name, bag.group, bag.of_method, bag.maps * torch.nan, bag.gains * 1e6)
        if bag.group == "group2"
        else bag
        for bag in lessons.bags
    ]
    other = BagSet(spoilt, lessons.context, lessons.halves)
    how = MetricRecipe(steps=5, images=8, members=1, units=3)
    first, second = (
        fit_metric({"one": one}, leave_out("group2"), how).state_dict() for one in (lessons, other)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_images_that_are_asked_about_were_not_trained_on() -> None:
    lessons = planted(0)
    asked = lessons.halves[1]
    maps = [bag.maps.clone() for bag in lessons.bags]
    for one in maps:
        one[asked] = torch.nan
    bags = [
        Bag(bag.name, bag.group, bag.of_method, own, bag.gains)
        for bag, own in zip(lessons.bags, maps, strict=True)
    ]
    known = lessons.context.clone()
    known[asked] = torch.nan
    how = MetricRecipe(steps=5, images=8, members=1, units=3)
    metric = fit_metric({"one": BagSet(bags, known, lessons.halves)}, leave_out("none"), how)
    assert all(bool(torch.isfinite(value).all()) for value in metric.state_dict().values())
    assert np.isfinite(score_bag(metric, lessons, lessons.bags[0])).all()
    assert len(score_bag(metric, lessons, lessons.bags[0])) == len(asked)


def test_layers_controls_and_mixtures_of_a_method_are_one_group() -> None:
    arms = [
        Arm("grad_cam@layer3"),
        Arm("grad_cam@layer1", "shuffled"),
        Arm("grad_cam@layer3", share=0.5),
    ]
    assert {arm_group(arm) for arm in arms} == {"grad_cam"}
    assert arm_group(Arm("mask:parts", "inverted")) == "mask:parts"
    assert arm_group(Arm(control="center")) == "center"


def scored(seed: int = 3) -> tuple[list[Bag], dict[str, float], dict[str, dict[str, float]]]:
    draw = np.random.default_rng(seed)
    gains = draw.normal(size=(3, 12)) * 0.02 + np.linspace(0, 0.2, 12)
    blank = torch.zeros(1, 8, 8)
    bags = [Bag(f"m{k}", f"g{k // 2}", True, blank, gains[:, k]) for k in range(12)]
    learned = {f"m{k}": float(gains[:, k].mean()) for k in range(12)}
    others = {
        "road": {f"m{k}": float(draw.normal()) for k in range(12)},
        "gini": {f"m{k}": float(-gains[:, k].mean()) for k in range(12)},
        "iou": {f"m{k}": 1.0 for k in range(12)},
    }
    return bags, learned, others


def test_agreements_are_scipys() -> None:
    bags, learned, others = scored()
    found = metric_agreements(bags, learned, others)
    gains = [bag.gain for bag in bags]
    for name, scores in {"learned": learned, **others}.items():
        if name == "iou":  # all alike: no order, 0 rather than NaN
            assert found[name].tau.mean == found[name].rho.mean == 0
            continue
        own = [scores[bag.name] for bag in bags]
        assert found[name].tau.mean == pytest.approx(kendalltau(own, gains).statistic)
        assert found[name].rho.mean == pytest.approx(spearmanr(own, gains).statistic)
        assert found[name].tau.low <= found[name].tau.mean <= found[name].tau.high + 1e-9
    assert next(iter(found)) == "learned"
    assert found["learned"].over is None
    gap = found["gini"].over
    assert gap is not None
    assert gap.mean == pytest.approx(2.0)
    assert gap.low > 0


def test_an_interval_of_an_unrelated_metric_holds_zero() -> None:
    bags, learned, others = scored()
    tau = metric_agreements(bags, learned, others)["road"].tau
    assert tau.low < 0 < tau.high


def test_only_a_sure_win_over_every_metric_is_one() -> None:
    bags, learned, others = scored()
    maps = torch.zeros(4, len(PLANES), 8, 8)
    lessons = {"one": BagSet(bags, maps, (torch.arange(2), torch.arange(2, 4)))}
    whole = compare_metrics(lessons, {"method": {"one": learned}}, {"one": others})
    assert is_surely_best(whole)
    assert "null" not in metric_verdict(whole["one, unseen method"])
    rival = {**others, "road": {name: value + 0.001 for name, value in learned.items()}}
    whole = compare_metrics(lessons, {"method": {"one": learned}}, {"one": rival})
    assert not is_surely_best(whole)
    assert metric_verdict(whole["one, unseen method"]).endswith("surely above 2 of 3: a null")
    # without a rival nothing is beaten
    whole = compare_metrics(lessons, {"method": {"one": learned}}, {"one": {}})
    assert not is_surely_best(whole)
    assert metric_verdict(whole["one, unseen method"]).endswith("a null")


def test_mistakes_are_one_line() -> None:
    with pytest.raises(UserError, match="steps is 0; give 1 or more"):
        MetricRecipe(steps=0)


def test_an_image_of_two_rankings_is_learned_from_in_both_or_in_none() -> None:
    ids = {"a": torch.arange(300), "b": torch.arange(400).flip(0), "c": torch.arange(300)}
    halves = split_images(ids, 0)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for name in ("a", "c"):  # the same images: the same halves, as one ranking alone has them
        assert torch.equal(halves[name][0], order[:150])
        assert torch.equal(halves[name][1], order[150:])
    learned, asked = (
        {int(one) for name, parts in halves.items() for one in ids[name][parts[half]]}
        for half in (0, 1)
    )
    assert not learned & asked
    assert len(halves["b"][0]) == len(halves["b"][1]) == 200
