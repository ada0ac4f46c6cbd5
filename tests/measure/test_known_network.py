"""Every metric of faithfulness and place where the truth is a mask, and the decoy has a shape."""

import numpy as np
import pytest
import torch
from torch import Tensor

from camdistill.data.shapes import Shapes
from camdistill.explain.gradcam import grad_cam
from camdistill.measure.faithfulness import (
    faithfulness_correlation,
    infidelity,
    sensitivity_n,
)
from camdistill.measure.localization import (
    average_precision,
    energy_pointing_game,
    iou,
    pointing_game,
    relevance_rank_accuracy,
)
from camdistill.measure.removal import deletion, insertion, road
from camdistill.networks.analytic import ColorReader
from camdistill.perturb.bank import Bank, BankPlan, build_bank
from camdistill.perturb.imputers import baseline
from camdistill.perturb.ranks import ranks

COUNT = 6
SHAPES = Shapes("test", COUNT, shortcut=1.0, shortcut_cells=2.0)


@pytest.fixture(scope="module")
def network() -> ColorReader:
    return ColorReader(SHAPES.patch_colors).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.from_numpy(SHAPES.render(np.arange(COUNT)).pixels) / 255


@pytest.fixture(scope="module")
def masks() -> dict[str, Tensor]:
    found = SHAPES.render(np.arange(COUNT)).masks
    return {name: torch.from_numpy(found[name]) for name in ("shortcut", "object", "distractor")}


@pytest.fixture(scope="module")
def answers(network: ColorReader, images: Tensor) -> Bank:
    # Cells of one pixel: a subset removes what a map's sum counts, and not a pixel more.
    plan = BankPlan(32, {0.25: 40, 0.5: 20}, (4,))
    return build_bank(
        network, images, baseline(images, "gray"), torch.Generator().manual_seed(0), plan=plan
    )


def test_its_own_grad_cam_is_perfect_by_every_correlation(
    network: ColorReader, images: Tensor, answers: Bank
) -> None:
    maps = grad_cam(network, images)["match"]
    for metric, best in ((faithfulness_correlation, 1), (sensitivity_n, 1), (infidelity, 0)):
        torch.testing.assert_close(
            metric(maps, answers).float(), torch.full((COUNT,), float(best)), rtol=0, atol=1e-4
        )


def test_object_and_distractor_say_nothing_of_this_network(
    answers: Bank, masks: dict[str, Tensor]
) -> None:
    for decoy in ("object", "distractor"):
        found = faithfulness_correlation(masks[decoy].float(), answers)
        assert abs(float(found.mean())) < 0.25, "four standard errors; the truth has 1"


def test_its_own_grad_cam_is_at_the_patch_by_every_measure_of_place(
    network: ColorReader, images: Tensor, masks: dict[str, Tensor]
) -> None:
    maps, patch = grad_cam(network, images)["match"], masks["shortcut"]
    order = ranks(maps, torch.Generator().manual_seed(0))
    ones = torch.ones(COUNT)
    for found in (
        relevance_rank_accuracy(order, patch),
        pointing_game(order, patch),
        energy_pointing_game(maps, patch),
        iou(maps, patch),
        average_precision(maps, patch),
    ):
        torch.testing.assert_close(found.float(), ones, rtol=0, atol=1e-3)


def test_removal_ends_exactly_where_the_patch_ends(
    network: ColorReader, images: Tensor, masks: dict[str, Tensor]
) -> None:
    classes, patch = network(images).argmax(1), masks["shortcut"]
    share = 8 * 8 / 32**2
    fractions = (0.0, share, 0.5)
    order = ranks(patch.float(), torch.Generator().manual_seed(0))
    shown = baseline(images, "gray")
    gone = deletion(network, images, classes, order, shown, fractions).probabilities
    torch.testing.assert_close(gone[:, 1:], torch.full((COUNT, 2), 1 / 8), rtol=0, atol=1e-5)
    come = insertion(network, images, classes, order, shown, fractions).probabilities
    torch.testing.assert_close(come[:, 0], torch.full((COUNT,), 1 / 8), rtol=0, atol=1e-5)
    assert (come[:, 1:] > 0.99).all()
    # The decoy's removal changes nothing, whatever it looks like.
    decoy = ranks(masks["object"].float() - patch.float(), torch.Generator().manual_seed(0))
    kept = deletion(network, images, classes, decoy, shown, (0.0, 0.05)).probabilities
    assert (kept > 0.99).all()


def test_road_tells_the_patch_from_the_object(
    network: ColorReader, images: Tensor, masks: dict[str, Tensor]
) -> None:
    classes = network(images).argmax(1)
    found = {}
    for name, mask in masks.items():
        order = ranks(mask.float(), torch.Generator().manual_seed(0))
        curves = road(network, images, classes, order, torch.Generator().manual_seed(1))
        found[name] = float(curves.combine().mean())
    assert found["shortcut"] > 0.4
    assert abs(found["object"]) < 0.15
    assert abs(found["distractor"]) < 0.15
