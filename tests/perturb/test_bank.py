import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.perturb.bank import BankPlan, build_bank
from camdistill.perturb.batched_forward import logits_of, score_changes
from camdistill.perturb.imputers import baseline


class Counting(nn.Module):
    """Logits that are weighted sums, and how many images were asked in each forward."""

    def __init__(self, side: int) -> None:
        super().__init__()
        drawn = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(9))
        self.weight = nn.Parameter(drawn.double())
        self.forwards: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.forwards.append(len(images))
        return torch.einsum("bchw,kchw->bk", images, self.weight)


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.rand(3, 3, 10, 10, generator=generator, dtype=torch.float64)


def test_scores_of_changes_are_those_of_the_changed_images(
    images: Tensor, generator: torch.Generator
) -> None:
    network = Counting(10)
    removed = torch.rand(3, 7, 10, 10, generator=generator) < 0.4
    classes = torch.tensor([2, 0, 3])
    shown = baseline(images, "mean")
    found = score_changes(network, images, classes, removed, shown)
    for image in range(3):
        for change in range(7):
            hole = removed[image, change].numpy()
            changed = np.where(hole, shown[image].numpy(), images[image].numpy())
            logits = (network.weight.detach().numpy() * changed).sum((1, 2, 3))
            one = logits[classes[image]]
            assert found.logits[image, change].item() == pytest.approx(one)
            likely = np.exp(one) / np.exp(logits).sum()
            assert found.probabilities[image, change].item() == pytest.approx(likely)


def test_a_callable_stands_for_a_data_sets_own_rendering(images: Tensor) -> None:
    network, other = Counting(10), torch.flip(images, (3,))
    removed = torch.ones(1, 1, 10, 10, dtype=torch.bool)

    def rendered(given: Tensor, holes: Tensor) -> Tensor:
        assert torch.equal(given, images)
        assert holes.shape == (3, 10, 10)
        return other

    found = score_changes(network, images, torch.zeros(3).long(), removed, rendered)
    torch.testing.assert_close(found.logits[:, 0], network(other)[:, 0])


def test_forwards_are_bounded_whatever_the_number_of_changes(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("camdistill.perturb.batched_forward._PIXELS_ON_CPU", 800)
    network = Counting(10)
    removed = torch.zeros(1, 9, 10, 10, dtype=torch.bool)
    score_changes(network, images, torch.zeros(3).long(), removed, images)
    assert network.forwards == [8, 8, 8, 3]


def test_networks_that_answer_by_chance_are_refused(images: Tensor) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(300, 2)).double()
    with pytest.raises(UserError, match=r"'1' is in train mode.*call \.eval\(\)"):
        logits_of(network, images)
    assert logits_of(network.eval(), images).shape == (3, 2)


def test_outputs_that_are_no_logits_are_refused(images: Tensor) -> None:
    with pytest.raises(UserError, match=r"gives \[3, 3, 10, 10\], not logits"):
        logits_of(nn.Identity(), images)


def test_bank_asks_what_its_plan_says_and_nothing_twice(
    images: Tensor, generator: torch.Generator
) -> None:
    network, plan = Counting(10), BankPlan(5, {0.2: 6, 0.5: 4}, (1, 3))
    found = build_bank(network, images, baseline(images, "gray"), generator, plan=plan)
    assert plan.forwards == 6 + 4 + 25 + 9
    assert sum(network.forwards) == 3 * (plan.forwards + 1)
    assert found.subsets[0.2].cells.flatten(2).sum(2).unique().tolist() == [5]
    assert found.subsets[0.5].cells.flatten(2).sum(2).unique().tolist() == [12]
    assert found.occluders[3].cells.flatten(2).sum(2).unique().tolist() == [9]
    assert len(found.occluders[1].cells.unique(dim=1)[0]) == 25
    # other subsets for each image
    assert not torch.equal(found.subsets[0.2].cells[0], found.subsets[0.2].cells[1])


def test_drops_and_sums_equal_numpy_pixel_by_pixel(
    images: Tensor, generator: torch.Generator
) -> None:
    network = Counting(10)
    maps = torch.randn(3, 10, 10, generator=generator, dtype=torch.float64)
    found = build_bank(
        network, images, baseline(images, "black"), generator, plan=BankPlan(4, {0.25: 5})
    )
    # 10 pixels in 4 cells: borders where floor(4 i / 10) steps
    edges = [0, 3, 5, 8, 10]
    for image in range(3):
        weight = network.weight[found.classes[image]].detach().numpy()
        for probe in (found.subsets[0.25], found.occluders[2]):
            cells = probe.cells[image if len(probe.cells) > 1 else 0].numpy()
            for change in range(cells.shape[0]):
                hole = np.zeros((10, 10), bool)
                for row, column in zip(*np.nonzero(cells[change]), strict=True):
                    rows = slice(edges[row], edges[row + 1])
                    hole[rows, edges[column] : edges[column + 1]] = True
                drop = (weight * images[image].numpy() * hole).sum()
                assert probe.logit_drops[image, change].item() == pytest.approx(drop)
                total = maps[image].numpy()[hole].sum()
                assert probe.sums(maps)[image, change].item() == pytest.approx(total)


def test_own_top_class_is_watched_unless_one_is_given(
    images: Tensor, generator: torch.Generator
) -> None:
    network, gray = Counting(10), baseline(images, "gray")
    found = build_bank(network, images, gray, generator, plan=BankPlan(2, {}, (1,)))
    assert torch.equal(found.classes, network(images).argmax(1))
    given = torch.tensor([1, 1, 2])
    found = build_bank(network, images, gray, generator, classes=given, plan=BankPlan(2, {}, (1,)))
    torch.testing.assert_close(found.logits, network(images).gather(1, given[:, None])[:, 0])


def test_answers_do_not_depend_on_how_many_masks_are_held_at_once(
    images: Tensor, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    gray, plan = baseline(images, "gray"), BankPlan(5, {0.2: 6}, (2,))
    whole = build_bank(Counting(10), images, gray, torch.Generator().manual_seed(1), plan=plan)
    monkeypatch.setattr("camdistill.perturb.bank._MASK_BYTES", 1300)  # one or two images
    parts = build_bank(Counting(10), images, gray, torch.Generator().manual_seed(1), plan=plan)
    for one, other in (
        (whole.subsets[0.2], parts.subsets[0.2]),
        (whole.occluders[2], parts.occluders[2]),
    ):
        torch.testing.assert_close(one.logit_drops, other.logit_drops)
        torch.testing.assert_close(one.probability_drops, other.probability_drops)
