"""Row 9: observers are right where maps show the class, and at chance where they show none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from camdistill.claims import discrimination
from camdistill.claims.claim import ClaimSetup
from camdistill.claims.discrimination import (
    draw_silhouettes,
    edges_of,
    observer_accuracy,
    outlines,
    run_discrimination,
    train_shape_observer,
    visualizations,
)
from camdistill.claims.two_object_scenes import draw_test_scenes
from camdistill.explain.guided import guided_grad_cam


class Reads(nn.Module):
    """Answers with the class that is written into a picture's first row."""

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures[:, 0, 0, :8]


def test_observer_is_right_where_the_class_is_in_the_picture_and_at_chance_where_not() -> None:
    classes = torch.tensor([[0, 5], [3, 1]])
    pictures = torch.zeros(2, 2, 8, 8)
    pictures[torch.arange(2)[:, None], torch.arange(2), 0, classes] = 1.0
    assert observer_accuracy(Reads(), pictures, classes).tolist() == [1.0, 1.0]
    assert observer_accuracy(Reads(), pictures.flip(1), classes).tolist() == [0.0, 0.0]
    same = pictures[:, :1].expand(-1, 2, -1, -1)  # a map that is the same for both classes
    assert observer_accuracy(Reads(), same, classes).tolist() == [0.5, 0.5]
    assert observer_accuracy(Reads(), torch.zeros(2, 2, 8, 8), classes).tolist() == [0.5, 0.5]


def test_product_is_guided_grad_cam(lab: Callable[..., ClaimSetup]) -> None:
    here = lab()
    scenes = draw_test_scenes(here)
    shown = visualizations(here.teacher, scenes.images, scenes.classes)
    (own,) = guided_grad_cam(here.teacher, scenes.images, None, scenes.classes).values()
    assert torch.allclose(shown["guided_grad_cam"], own, atol=1e-6)
    assert all(one.shape == (16, 2, 32, 32) for one in shown.values())


def test_outlines_and_edges_by_hand() -> None:
    mask = torch.zeros(1, 7, 7, dtype=torch.bool)
    mask[0, 2:5, 2:5] = True
    expected = torch.zeros(7, 7)
    expected[1:6, 1:6] = 1
    expected[3, 3] = 0
    assert torch.equal(outlines(mask)[0], expected)
    flat = edges_of(torch.full((1, 3, 8, 8), 0.3))
    assert float(flat.abs().max()) < 1e-6


def test_drawings_show_what_is_meant_most_brightly() -> None:
    """On average; speckle and noise may hide a single one."""
    own, other = torch.zeros(64, 16, 16).bool(), torch.zeros(64, 16, 16).bool()
    own[:, 2:6, 2:6], other[:, 10:14, 10:14] = True, True
    none = torch.zeros_like(own)
    shown = draw_silhouettes(own, other, none, torch.Generator().manual_seed(0))
    assert float(shown[own].mean()) > 1.5 * float(shown[other].mean())
    assert float(shown.max()) == 1


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discrimination, "PAIRS", 64)
    monkeypatch.setattr(discrimination, "OWN_MAPS", 16)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_row_of_untrained_networks_holds_nothing(lab: Callable[..., ClaimSetup]) -> None:
    row = run_discrimination(lab())
    assert row.passed is False
    assert {one.n for one in row.ours} == {16}


@pytest.mark.slow
def test_observer_of_shapes_knows_shapes(
    lab: Callable[..., ClaimSetup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discrimination, "PAIRS", 1200)
    here = lab(count=100)
    scenes = draw_test_scenes(here)
    ideal = torch.stack([outlines(mask) for mask in scenes.masks.unbind(1)], 1)
    assert float(observer_accuracy(train_shape_observer(here), ideal, scenes.classes).mean()) > 0.7
