"""Row 13: a network whose counterfactuals are known, and one that has none."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from camdistill.claims.claim import ClaimSetup
from camdistill.claims.counterfactuals import removal_gain, run_counterfactuals
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Preprocessed


class Corners(nn.Module):
    """Class 0 is brightness at the top, class 1 at the bottom."""

    def forward(self, images: Tensor) -> Tensor:
        gray = images.mean(1)
        return torch.stack([gray[:, :16].sum((1, 2)), gray[:, 16:].sum((1, 2))], 1) / 20


def test_removing_what_speaks_against_a_class_raises_it_and_what_speaks_for_it_lowers() -> None:
    images = torch.zeros(2, 3, 32, 32)
    images[:, :, 4:8, 4:8] = images[:, :, 24:28, 24:28] = 1
    classes = torch.tensor([0, 1])
    maps = torch.zeros(2, 32, 32)
    maps[0, 24:28, 24:28] = maps[1, 4:8, 4:8] = 1  # what speaks against each
    generator = torch.Generator().manual_seed(0)
    against = removal_gain(Corners(), images, classes, maps, generator)
    supporting = removal_gain(Corners(), images, classes, maps.flip(0), generator)
    assert bool((against > 0.01).all())
    assert bool((supporting < -0.01).all())


def test_row_fails_for_a_network_without_evidence(lab: Callable[..., ClaimSetup]) -> None:
    blank = ShallowCNN(8, (6, 8), (2, 2))
    nn.init.zeros_(blank.linear.weight)
    row = run_counterfactuals(lab(teacher=Preprocessed(blank).eval().requires_grad_(False)))
    assert row.passed is False
    covered = [one.value for one in row.ours if one.measure == "energy on the other object"]
    assert covered == [0.0, 0.0, 0.0]
