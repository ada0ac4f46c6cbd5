"""Rows 14 and 15: networks whose evidence is planted, and attacks with a known end."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from camdistill.claims.claim import ClaimSetup, ShapesBatch
from camdistill.claims.failures import (
    BUDGET,
    SURE,
    _difference_of_means,
    attack,
    judge_failures,
    run_adversarial,
)
from camdistill.networks.teachers import Preprocessed


class Colors(nn.Module):
    """Class 0 is red, class 1 is green, summed over the cells of `layer`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.AvgPool2d(4)
        self.pool = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.layer(images))[:, :2].mean((2, 3)) * 40


def colorful(count: int) -> tuple[ShapesBatch, Tensor, Tensor]:
    """Red objects (class 0) and larger, greener distractors (class 1), which the network answers.

    In every other image there is a second green patch in the object, so that not the distractor is
    to blame; without the distractor those stay wrong.
    """
    images = torch.zeros(count, 3, 32, 32)
    masks = {name: torch.zeros(count, 32, 32).bool() for name in ("object", "distractor")}
    masks["object"][:, 4:12, 4:12] = masks["distractor"][:, 20:28, 20:28] = True
    images[:, 0][masks["object"]] = 0.5
    images[0::2, 1] = torch.where(masks["distractor"][0::2], 0.8, 0.0)
    images[1::2, 1] = torch.where(masks["object"][1::2], 0.8, 0.0)
    alone = images.clone()
    alone[:, 1] = torch.where(masks["distractor"], 0.0, alone[:, 1])
    labels = torch.zeros(count, dtype=torch.long)
    return ShapesBatch(images, labels, labels, masks), torch.ones_like(labels), alone


def test_planted_causes_of_errors_are_found(lab: Callable[..., ClaimSetup]) -> None:
    found, answers, alone = colorful(40)
    row = judge_failures(lab(), Colors(), found, answers, alone, 100)
    by_name = {(one.name, one.measure): one for one in row.ours}
    assert by_name["distractor blamed", "share"].value == 0.5
    mended = "share mended without the distractor"
    assert by_name["blamed", mended].value == 1
    assert by_name["not blamed", mended].value == 0
    cause = by_name["blamed - not blamed", mended]
    assert (cause.value, cause.low, cause.high) == (1, 1, 1)
    assert by_name["errors", "share"].value == 0.4
    assert row.passed


def test_maps_that_say_the_same_of_both_classes_explain_no_error(
    lab: Callable[..., ClaimSetup],
) -> None:
    found, answers, alone = colorful(40)

    class Gray(Colors):
        def forward(self, images: Tensor) -> Tensor:
            whole = super().forward(images).sum(1, keepdim=True)
            return torch.cat([whole, whole + 1], 1)

    row = judge_failures(lab(), Gray(), found, answers, alone, 100)
    moved = [one for one in row.ours if one.name in ("wrong - true class", "true - wrong class")]
    assert [one.value for one in moved] == [0, 0]
    assert row.passed is False


def test_difference_of_groups_against_the_normal_interval(lab: Callable[..., ClaimSetup]) -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(400, generator=generator, dtype=torch.float64) + 1
    second = torch.randn(300, generator=generator, dtype=torch.float64)
    found = _difference_of_means("a - b", first, second, lab(), "")
    spread = float((first.var() / 400 + second.var() / 300).sqrt())
    assert abs(found.value - float(first.mean() - second.mean())) < 1e-12
    assert found.low is not None
    assert found.high is not None
    assert abs((found.high - found.low) / (2 * 1.96 * spread) - 1) < 0.1


def test_attack_reaches_what_it_can_and_stays_in_its_budget() -> None:
    class Linear(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            gray = images.mean((1, 2, 3)) - 0.5
            return torch.stack([-gray, gray], 1) * 200

    images = torch.full((2, 3, 8, 8), 0.49)
    images[1] = 0.1  # too far: the budget ends before the border
    targets = torch.tensor([1, 1])
    found = attack(Linear(), images, targets)
    sure = Linear()(found).softmax(1)[:, 1]
    assert float(sure[0]) > SURE
    assert float(sure[1]) < 0.01
    change = (found - images).abs().amax((1, 2, 3))
    assert float(change.max()) <= BUDGET + 1e-6
    assert float(change[0]) < float(change[1])  # it stopped when it was sure
    assert torch.equal(images[0], torch.full((3, 8, 8), 0.49))


def test_row_without_a_successful_attack_says_nothing(lab: Callable[..., ClaimSetup]) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.AvgPool2d(4)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images).mean((2, 3)).repeat(1, 3)[:, :8] * 0.01

    row = run_adversarial(lab(teacher=Preprocessed(Constant())))
    assert row.passed is None
    assert [one.value for one in row.ours] == [0.0]
