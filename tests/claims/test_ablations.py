"""Rows 23 to 25: variants are their formulas, and the criteria can fail."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from camdistill.claims import ablations
from camdistill.claims.claim import ClaimSetup, draw_batch
from camdistill.claims.networks import backbones
from camdistill.claims.networks.backbones import FlattenedCNN
from camdistill.networks.teachers import Preprocessed

COUNT = 400


def wrong(share: float) -> list[Tensor]:
    """Of five trainings that differ a little."""
    return [
        (torch.arange(COUNT) < round(share * COUNT) + run).float() if share else torch.zeros(COUNT)
        for run in range(5)
    ]


@pytest.fixture
def flat() -> Preprocessed:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = FlattenedCNN(8, (6, 8), (2, 2))
    return Preprocessed(network).double().eval().requires_grad_(False)


def by_hand(network: nn.Module, images: Tensor, classes: Tensor, rule: str) -> Tensor:
    """dS/dA at every cell of the last stage, the head's one ReLU by a rule."""
    inner = network.network
    cells = inner.stage2(inner.stage1(network.normalize(images))).requires_grad_()
    before = inner.hidden(torch.flatten(F.max_pool2d(cells, 2), 1))
    backward = inner.linear.weight[classes]
    through = {
        "plain": backward * (before > 0),
        "guided": backward.clamp(min=0) * (before > 0),
        "deconvnet": backward.clamp(min=0),
    }[rule]
    (gradient,) = torch.autograd.grad((before * through.detach()).sum(), cells)
    return gradient


@pytest.mark.parametrize(
    ("name", "rule", "weigh"),
    [
        ("grad_cam", "plain", lambda g: g.mean((2, 3))),
        ("largest gradient", "plain", lambda g: g.flatten(2).max(2).values),
        ("|gradients|", "plain", lambda g: g.abs().mean((2, 3))),
        ("guided ReLU", "guided", lambda g: g.mean((2, 3))),
        ("deconvnet ReLU", "deconvnet", lambda g: g.mean((2, 3))),
    ],
)
def test_variant_is_its_formula(
    lab: Callable[..., ClaimSetup],
    flat: Preprocessed,
    name: str,
    rule: str,
    weigh: Callable[[Tensor], Tensor],
) -> None:
    images = draw_batch(lab()).images.double()
    classes = flat(images).argmax(1)
    inner = flat.network
    cells = inner.stage2(inner.stage1(flat.normalize(images)))
    weights = weigh(by_hand(flat, images, classes, rule))
    small = (weights[:, :, None, None] * cells).sum(1)
    expected = F.interpolate(small[:, None], (32, 32), mode="bilinear")[:, 0]
    found = ablations.VARIANTS[name](flat, images, classes)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_relu_row_fails_where_maps_without_it_are_no_worse(lab: Callable[..., ClaimSetup]) -> None:
    for without, passed in ((0.5, True), (0.2, False), (0.1, False)):
        table = {
            ablations.AT_CHOSEN_THRESHOLD: {"with ReLU": wrong(0.2), "without": wrong(without)}
        }
        assert ablations.judge_relu(lab(count=COUNT), table).passed is passed


def test_one_training_that_turned_out_otherwise_is_no_verdict(
    lab: Callable[..., ClaimSetup],
) -> None:
    mixed = [wrong(share)[0] for share in (0.9, 0.1, 0.6, 0.2, 0.8)]
    table = {ablations.AT_CHOSEN_THRESHOLD: {"with ReLU": wrong(0.3), "without": mixed}}
    assert ablations.judge_relu(lab(count=COUNT), table).passed is False


def test_pooling_row_fails_only_where_the_largest_is_better(lab: Callable[..., ClaimSetup]) -> None:
    for largest, passed in ((0.5, True), (0.3, True), (0.0, False)):
        table = {"grad_cam": wrong(0.3), "largest gradient": wrong(largest)}
        assert ablations.judge_pooling(lab(count=COUNT), table).passed is passed


def test_rules_row_is_about_the_deconvnet(lab: Callable[..., ClaimSetup]) -> None:
    table = {
        "grad_cam": wrong(0.2),
        "|gradients|": wrong(0.0),
        "guided ReLU": wrong(0.9),
        "deconvnet ReLU": wrong(0.2),
    }
    assert ablations.judge_backward_rules(lab(count=COUNT), table).passed is False
    assert ablations.judge_backward_rules(
        lab(count=COUNT), table | {"deconvnet ReLU": wrong(0.6)}
    ).passed


def test_rows_are_made_of_the_network_with_fully_connected_layers(
    lab: Callable[..., ClaimSetup], flat: Preprocessed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbones, "fully_connected_network", lambda lab, run: flat.float())
    room = lab()
    for claim, number in (
        (ablations.run_relu_ablation, "23"),
        (ablations.run_pooling_ablation, "24"),
        (ablations.run_backward_rules, "25"),
    ):
        row = claim(room)
        assert row.number == number
        assert all(
            0 <= one.value <= 1 for one in row.ours if one.measure == ablations.AT_CHOSEN_THRESHOLD
        )
