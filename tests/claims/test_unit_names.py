"""Row 17: names by hand, and precision of units that are known."""

import torch

from camdistill.claims.unit_names import name_units, precisions
from camdistill.layers.units.dissection import Dissection


def test_units_are_named_after_what_they_cover_most_above_chance() -> None:
    iou = torch.tensor([[0.30, 0.10], [0.20, 0.25], [0.03, 0.01]], dtype=torch.float64)
    chance = torch.tensor([[0.05, 0.05], [0.02, 0.20], [0.0, 0.0]], dtype=torch.float64)
    found = Dissection("layer", ("plus", "disc"), iou, chance, torch.zeros_like(iou))
    # The second unit's IoU with plus is 0.18 above chance, with disc 0.05; the third has no name.
    assert name_units(found, ("disc", "triangle", "plus")).tolist() == [2, 2, -1]


def test_precision_counts_units_of_the_images_own_class() -> None:
    names = torch.tensor([0, 0, 0, 0, 1, 1, -1, 1, 1, 2])
    alphas = torch.arange(10.0, 0.0, -1.0)[None]
    first = precisions(alphas, torch.tensor([0]), names)
    assert {name: round(float(value), 6) for name, value in first.items()} == {
        "top": 0.8,
        "bottom": 0.0,
        "random": 0.4,
    }
    second = precisions(-alphas, torch.tensor([1]), names)
    assert {name: round(float(value), 6) for name, value in second.items()} == {
        "top": 0.6,
        "bottom": 0.2,
        "random": 0.4,
    }
