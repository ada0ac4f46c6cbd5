"""Row 16: no bias is found where there is none; planted ones are; cures learn what is told."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from camdistill.claims import bias
from camdistill.claims.bias import (
    CURES,
    ShortcutScores,
    _score_differences,
    cure_network,
    draw_conflicting_batch,
    shortcut_scores,
)
from camdistill.claims.claim import ClaimSetup
from camdistill.claims.networks.small_networks import SmallNetworkRecipe
from camdistill.data.shapes_painting import PATCH_COLORS
from camdistill.distill.optimization import Optimization
from camdistill.explain.gradcam import grad_cam
from camdistill.networks.teachers import Preprocessed
from camdistill.types import PerImage


class Patch(nn.Module):
    """Answers with the class whose color the patch has: it looks at nothing else.

    Patches are the only flat squares of saturated colors; the network knows two of them.
    """

    def __init__(self, colors: Tensor) -> None:
        super().__init__()
        self.colors = nn.Parameter(colors)
        self.cells = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        far = (images[:, None] - self.colors[None, :, :, None, None]).abs().sum(2)
        return self.cells(0.05 - far).mean((2, 3)) * 1000


def test_a_network_of_the_patch_alone_is_found_out(lab: Callable[..., ClaimSetup]) -> None:
    colors = torch.from_numpy(PATCH_COLORS[:8]).float() / 255
    whole = Preprocessed(Patch(colors), (0.0,) * 3, (1.0,) * 3).eval()
    found = draw_conflicting_batch(lab(count=32))
    seen = shortcut_scores(whole, found)
    assert seen.right.tolist() == [[0.0] * 32]
    share = found.masks["shortcut"].flatten(1).float().mean(1)
    assert torch.allclose(seen.on_patch[0], 1 / share)  # all of its energy
    assert float(seen.on_object.max()) == 0


def test_patch_disagrees_in_every_image_and_the_lab_images_have_none(
    lab: Callable[..., ClaimSetup],
) -> None:
    here = lab()
    rendered = dataclasses.replace(here.shapes, split="conflict", shortcut=0.9).render(here.ids)
    assert bool((rendered.shortcut_labels != rendered.labels).all())
    assert bool(draw_conflicting_batch(here).masks["shortcut"].flatten(1).any(1).all())


def test_networks_that_are_alike_differ_by_nothing(lab: Callable[..., ClaimSetup]) -> None:
    here = lab(count=32)
    seen = shortcut_scores(here.teacher, draw_conflicting_batch(here))
    for one in _score_differences(here, seen, seen, "none"):
        assert (one.value, one.low, one.high) == (0, 0, 0)
        assert not one.above_zero


def test_moved_is_the_paired_difference(lab: Callable[..., ClaimSetup]) -> None:
    ones, zeros = torch.ones(3, 16), torch.zeros(3, 16)
    accuracy, patch = _score_differences(
        lab(), ShortcutScores(ones, zeros, ones), ShortcutScores(zeros, ones * 3, ones), ""
    )
    assert (accuracy.value, patch.value) == (1, -3)
    assert accuracy.above_zero


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bias, "TRAIN", 256)
    monkeypatch.setattr(bias, "EPOCHS", 1)
    monkeypatch.setattr(bias, "SEEDS", 1)
    monkeypatch.setattr(bias, "CURE", SmallNetworkRecipe(1, 64, Optimization("adamw", lr=2e-3)))


def examples(lab: ClaimSetup) -> tuple[Tensor, ...]:
    found = draw_conflicting_batch(lab)
    (maps,) = grad_cam(lab.teacher, found.images, None, found.labels).values()
    logits = lab.teacher(found.images)
    return found.images, found.labels, found.masks["object"], logits, maps


@pytest.mark.parametrize("name", CURES)
def test_losses_are_one_value_an_image_and_reach_the_weights(
    lab: Callable[..., ClaimSetup], name: str
) -> None:
    here = lab()
    network = here.student.requires_grad_(True).train()
    losses: PerImage = CURES[name](network, examples(here))
    assert losses.shape == (16,)
    losses.mean().backward()
    first = network.network.get_submodule("stage1.conv")
    assert isinstance(first, nn.Conv2d)
    assert first.weight.grad is not None
    assert float(first.weight.grad.abs().sum()) > 0


def test_teachers_own_logits_and_maps_are_where_distillation_ends(
    lab: Callable[..., ClaimSetup],
) -> None:
    here = lab()
    losses = CURES["teacher's logits and maps"](here.teacher, examples(here))
    assert float(losses.detach().abs().max()) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_cure_starts_from_the_biased_network_and_changes_it(lab: Callable[..., ClaimSetup]) -> None:
    here = lab(count=32)
    before = bias.shortcut_network(here, bias.BIASED, here.seed)
    after = cure_network(here, "balanced", here.seed)
    names = [name for name, _ in before.named_parameters()]
    states = before.state_dict(), after.state_dict()
    assert all(not torch.equal(states[0][name], states[1][name]) for name in names)
    row = bias.run_bias_removal(here)
    assert row.passed is False  # hardly trained: nothing to find
    assert {one.n for one in row.ours} == {32}
