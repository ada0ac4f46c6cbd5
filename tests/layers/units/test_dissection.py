import numpy as np
import pytest
import torch
from torch import nn

from camdistill.errors import UserError
from camdistill.layers.units import dissection
from camdistill.layers.units.dissection import DETECTOR, TOPS, dissect


class Colors(nn.Module):
    """Unit 0 is redness, unit 1 is noise that no concept knows, unit 2 is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, images):
        red = images[:, 0] - images[:, 1]
        noise = torch.sin(images[:, 2] * 997)
        return self.layer(torch.stack([red, noise, torch.zeros_like(red)], 1).relu())


@pytest.fixture
def planted(generator: torch.Generator):
    images = torch.rand(40, 3, 12, 12, generator=generator) * 0.2
    red = torch.zeros(40, 12, 12, dtype=torch.bool)
    for number in range(40):
        row, column = torch.randint(0, 8, (2,), generator=generator).tolist()
        red[number, row : row + 4, column : column + 4] = True
    images[:, 0][red] = 1.0
    other = torch.rand(40, 12, 12, generator=generator) < 0.1
    return images, {"red": red, "other": other}


def test_planted_detector_is_found_and_others_are_at_chance(planted) -> None:
    images, masks = planted
    found = dissect(Colors(), images, masks, ["layer"], chunk=7)["layer"]
    name, iou, chance = found.best(0)[0]
    assert name == "red"
    assert iou > 0.85
    assert chance < 0.15
    assert found.detectors.tolist() == [0]
    assert abs(float(found.iou[1, 1] - found.chance[1, 1])) < 0.02
    assert float(found.iou[2].max()) == 0.0, "a dead unit has no mask"
    assert DETECTOR == 0.04


def test_iou_is_that_of_the_masks_on_the_half_that_chose_nothing(planted) -> None:
    images, masks = planted
    found = dissect(Colors(), images, masks, ["layer"])["layer"]
    activations = Colors()(images).numpy()
    choosing, telling = activations[0::2], activations[1::2]
    sample = choosing[:, 0].reshape(len(choosing), -1)[:, ::7].ravel()
    sample.sort()
    ious, held_out = [], []
    for top in TOPS:
        threshold = sample[round((1 - top) * (len(sample) - 1))]
        for part, out, mask in (
            (choosing, ious, masks["red"][0::2].numpy()),
            (telling, held_out, masks["red"][1::2].numpy()),
        ):
            above = part[:, 0] > threshold
            iou = (above & mask).sum() / (above | mask).sum()
            chance = above.mean() * mask.mean()
            chance /= above.mean() + mask.mean() - chance
            out.append((iou, chance))
    best = int(np.argmax([iou - chance for iou, chance in ious]))
    assert np.isclose(float(found.iou[0, 0]), held_out[best][0])
    assert np.isclose(float(found.chance[0, 0]), held_out[best][1])
    assert np.isclose(float(found.top[0, 0]), TOPS[best])


def test_masks_must_fit_the_images(planted) -> None:
    images, masks = planted
    small = {"red": masks["red"][:, :6]}
    with pytest.raises(UserError, match="'red' doesn't fit 40 images of 12x12"):
        dissect(Colors(), images, small, ["layer"])


def test_fewer_than_two_images_have_no_halves_to_choose_and_tell_with(planted) -> None:
    images, masks = planted
    for count in (0, 1):
        few = {name: mask[:count] for name, mask in masks.items()}
        assert dissect(Colors(), images[:count], few, ["layer"]) == {}


@pytest.mark.parametrize("room", [1, 12 * 7 * 144 * 2, 1 << 30])
def test_room_changes_memory_and_nothing_else(
    planted, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, masks = planted
    network = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.ReLU())
    expected = dissect(network, images, masks, ["1"], chunk=7)["1"]
    widths: list[int] = []
    stretched = dissection._resize_outputs

    def watched(output: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        widths.append(output.shape[1])
        return stretched(output, size)

    monkeypatch.setattr(dissection, "_resize_outputs", watched)
    found = dissect(network, images, masks, ["1"], chunk=7, max_bytes=room)["1"]
    for name in ("iou", "chance", "top"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert max(widths) == {1: 1, 1 << 30: 5}.get(room, max(widths))
    assert sum(widths) % 5 == 0
