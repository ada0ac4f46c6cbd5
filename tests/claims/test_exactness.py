"""Row 1: a theorem, found by autograd; a planted breach of it is found too."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from camdistill.claims.claim import ClaimSetup
from camdistill.claims.exactness import run_cam_equality
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Preprocessed


class Crooked(ShallowCNN):
    """Its head pools with unequal weights: no longer CAM's network."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = images
        for index in range(1, self.stages + 1):
            hidden = self.get_submodule(f"stage{index}")(hidden)
        weights = torch.linspace(0.5, 1.5, hidden.shape[2])[:, None]
        return self.linear((hidden * weights).mean((2, 3)).square())  # type: ignore[no-any-return]


def test_alpha_is_the_heads_weight_to_rounding(lab: Callable[..., ClaimSetup]) -> None:
    row = run_cam_equality(lab())
    assert row.passed
    assert all(0 < one.value < 1e-5 for one in row.ours)


def test_a_head_that_is_not_pooling_and_linear_fails(lab: Callable[..., ClaimSetup]) -> None:
    crooked: nn.Module = Preprocessed(Crooked(8, (6, 8), (2, 2))).eval().requires_grad_(False)
    row = run_cam_equality(lab(student=crooked))
    assert row.passed is False
    assert row.ours[0].value < 1e-5 < row.ours[1].value
