"""Images of two objects: centers and brightness by hand, and what stands in them."""

import dataclasses
from collections.abc import Callable

import torch

from camdistill.claims.claim import ClaimSetup, ShapesBatch
from camdistill.claims.two_object_scenes import (
    _scenes,
    draw_test_scenes,
    draw_training_scenes,
    render_without,
    training_shapes,
)


def test_centers_and_brightness_of_a_drawing_by_hand() -> None:
    images = torch.full((1, 3, 8, 8), 0.5)
    first, second = torch.zeros(1, 8, 8, dtype=torch.bool), torch.zeros(1, 8, 8, dtype=torch.bool)
    first[0, 1:4, 0:3], second[0, 6, 5:8] = True, True
    images[:, :, first[0]] = 0.9
    images[:, :, second[0]] = 0.1
    masks = {"object": first, "second": second, "background": ~(first | second)}
    found = _scenes(ShapesBatch(images, torch.tensor([2]), torch.tensor([5]), masks))
    assert found.centers.tolist() == [[[2.0, 1.0], [6.0, 6.0]]]
    assert found.bright.tolist() == [[True, False]]
    assert found.classes.tolist() == [[2, 5]]


def test_lessons_are_other_images_than_those_held_out(lab: Callable[..., ClaimSetup]) -> None:
    here = lab()
    ours, others = draw_test_scenes(here), draw_training_scenes(here, 16)
    assert not torch.equal(ours.images, others.images)
    assert bool((ours.classes[:, 0] != ours.classes[:, 1]).all())
    assert training_shapes(here, 16).split == "train"


def test_drawn_without_the_second_object_changes_its_pixels_alone(
    lab: Callable[..., ClaimSetup],
) -> None:
    here = lab()
    scenes = draw_test_scenes(here)
    alone = render_without(here, dataclasses.replace(here.shapes, objects=2), ["second"])
    changed = (alone != scenes.images).any(1)
    assert bool((changed <= scenes.masks[:, 1]).all())
    assert float(changed[scenes.masks[:, 1]].float().mean()) > 0.9
