"""What the captioner sees with, and the score that is explained."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from camdistill.claims.claim import ClaimSetup
from camdistill.claims.networks.visual_features import (
    FeatureEncoder,
    FeatureExtractor,
    features_of,
    log_odds,
)


def test_log_odds_are_of_the_own_answers_and_have_log_p_s_direction() -> None:
    scores = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    own = torch.tensor([0, 3, 2, 2])
    odds = log_odds(scores, own)
    p = scores.softmax(1).gather(1, own[:, None])[:, 0]
    assert torch.allclose(odds, (p / (1 - p)).log())
    (ours,) = torch.autograd.grad(odds.sum(), scores)
    log_p = scores.log_softmax(1).gather(1, own[:, None])[:, 0]
    (theirs,) = torch.autograd.grad(log_p.sum(), scores)
    assert torch.allclose(ours * (1 - p)[:, None], theirs)


def test_log_odds_keep_a_gradient_where_p_is_one_to_rounding() -> None:
    scores = torch.tensor([[90.0, 0.0, 0.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(log_odds(scores, torch.tensor([0])).sum(), scores)
    assert slope.tolist() == [[1.0, -0.5, -0.5]]


def test_sight_is_pixels_and_two_stages_on_the_last_grid(lab: Callable[..., ClaimSetup]) -> None:
    student = lab().student
    sight = FeatureExtractor(student)
    images = torch.rand(2, 3, 32, 32)
    found = sight(images)
    normal = student.normalize(images)
    first = student.network.get_submodule("stage1")(normal)
    last = student.network.get_submodule("stage2")(first)
    assert torch.equal(found[:, 9:], last)
    assert torch.allclose(found[:, 3:9], F.avg_pool2d(first, 2), atol=1e-6)
    assert torch.allclose(found[:, :3], F.avg_pool2d(normal, 4), atol=1e-6)
    assert sight.units == 17
    assert features_of(sight, images).dtype == torch.float16


def test_look_without_a_question_is_convolutions_and_with_one_changes() -> None:
    look = FeatureEncoder(5).eval()
    features = torch.rand(2, 5, 8, 8)
    plain = look(features)
    none = torch.zeros(2, 64)
    assert torch.equal(look(features, none, none), plain)
    assert plain.shape == (2, look.size)
    assert not torch.equal(look(features, none + 1, none), plain)
