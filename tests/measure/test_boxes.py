import numpy as np
import pytest
import scipy.ndimage
import torch

from camdistill.measure.boxes import (
    box_around,
    box_iou,
    box_of,
    inside_boxes,
    localization_error,
)


def test_box_is_that_of_scipys_largest_component(generator: torch.Generator) -> None:
    maps = torch.randn(30, 1, 5, 5, generator=generator)
    maps = torch.nn.functional.interpolate(maps, size=(21, 17), mode="bilinear")[:, 0]
    found = box_of(maps, 0.3)
    for values, box in zip(maps.numpy(), found, strict=True):
        labels, count = scipy.ndimage.label(values >= 0.3 * values.max(), np.ones((3, 3)))
        sizes = [(labels == number).sum() for number in range(1, count + 1)]
        best = [n + 1 for n, size in enumerate(sizes) if size == max(sizes)]
        boxes = []
        for number in best:
            rows, columns = np.nonzero(labels == number)
            boxes.append([columns.min(), rows.min(), columns.max(), rows.max()])
        assert box.tolist() in boxes


def test_a_long_winding_part_is_one_part() -> None:
    maps = torch.zeros(1, 9, 9)
    maps[0, ::2] = 1
    for row in range(1, 9, 2):
        maps[0, row, 0 if row % 4 == 1 else 8] = 1
    assert box_of(maps).tolist() == [[0, 0, 8, 8]]


def test_iou_of_boxes_counts_inclusive_pixels(generator: torch.Generator) -> None:
    corners = torch.randint(0, 12, (20, 2, 2, 2), generator=generator).sort(2).values
    first, second = corners.flatten(2).float().unbind(1)
    for one, other, found in zip(first, second, box_iou(first, second), strict=True):
        grids = []
        for xmin, ymin, xmax, ymax in (one.long().tolist(), other.long().tolist()):
            grid = np.zeros((12, 12), bool)
            grid[ymin : ymax + 1, xmin : xmax + 1] = True
            grids.append(grid)
        expected = (grids[0] & grids[1]).sum() / (grids[0] | grids[1]).sum()
        assert found.item() == pytest.approx(expected)


def test_error_is_the_papers() -> None:
    maps = torch.zeros(5, 10, 10)
    maps[0, 2:6, 2:6] = 1.0  # right
    maps[1, 2:6, 2:6] = 1.0
    maps[1, 0, 0] = 8.0  # below 15 % of this one there is nothing else
    maps[2, 2:6, 2:6] = 1.0
    maps[2, 5:9, 5:9] = 0.14  # below the threshold
    maps[4, 2:6, 2:6] = 1.0
    boxes = torch.tensor([[2.0, 2, 5, 5]]).repeat(5, 1)
    boxes[4] = torch.nan
    found = localization_error(maps, boxes)
    assert found[:4].tolist() == [0, 1, 0, 1]  # a blank map has no box: an error
    assert found[4].isnan()
    right = torch.tensor([False, True, True, True, True])
    assert localization_error(maps, boxes, correct=right)[:3].tolist() == [1, 1, 0]


def test_boxes_of_masks() -> None:
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 1, 7] = masks[0, 4, 3] = True
    found = box_around(masks)
    assert found[0].tolist() == [3, 1, 7, 4]
    assert found[1].isnan().all()
    filled = inside_boxes(found, (6, 8))
    expected = np.zeros((6, 8), bool)
    expected[1:5, 3:8] = True
    np.testing.assert_array_equal(filled[0].numpy(), expected)
    assert not filled[1].any()
