import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from camdistill.layers.units.patches import (
    cut_patch,
    exceeds_image,
    mean_patch,
    unit_maps,
    whole_image_patch,
)
from camdistill.layers.units.receptive_field import receptive_fields
from camdistill.layers.units.receptive_spans import ReceptiveField, Span
from camdistill.networks.students import ShallowCNN


@settings(max_examples=50, deadline=None)
@given(
    top=st.integers(-9, 9),
    left=st.integers(-9, 9),
    tall=st.integers(1, 12),
    wide=st.integers(1, 12),
)
def test_piece_is_the_padded_image_cut(top: int, left: int, tall: int, wide: int) -> None:
    image = torch.rand(3, 7, 6, generator=torch.Generator().manual_seed(0))
    found = cut_patch(image, (top, left, top + tall, left + wide))
    padded = nn.functional.pad(image, (30, 30, 30, 30), value=0.5)
    cut = padded[:, top + 30 : top + 30 + tall, left + 30 : left + 30 + wide]
    assert torch.equal(found.pixels, cut)
    ones = nn.functional.pad(torch.ones(7, 6), (30, 30, 30, 30))
    assert torch.equal(found.inside, ones[top + 30 :, left + 30 :][:tall, :wide] > 0)


def test_unit_on_its_piece_alone_answers_as_on_the_image(generator: torch.Generator) -> None:
    network = ShallowCNN(4, (4, 5), (1, 2)).eval()
    images = torch.rand(1, 3, 32, 32, generator=generator)
    field = receptive_fields(network, images, ["stage2"])["stage2"]
    assert field is not None
    row, column = 7, 8
    box = field.box(row, column)
    lost = images.clone()
    kept = torch.zeros(32, 32, dtype=torch.bool)
    kept[box[0] : box[2], box[1] : box[3]] = True
    lost[:, :, ~kept] = 0.3
    maps = [unit_maps(network, x, "stage2", range(5))[0, :, row, column] for x in (images, lost)]
    assert torch.equal(*maps)
    patch = cut_patch(images[0], box)
    assert torch.equal(patch.pixels, images[0, :, box[0] : box[2], box[1] : box[3]])
    assert not exceeds_image(field, (32, 32))


def test_whole_image_marks_where_the_unit_is_at_half_its_maximum() -> None:
    image = torch.zeros(3, 8, 8)
    unit_map = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    found = whole_image_patch(image, unit_map)
    assert found.region is not None
    assert found.region[6:, 6:].all()
    assert not found.region[:4].any()
    assert not found.region[:, :4].any()
    dead = whole_image_patch(image, torch.zeros(2, 2))
    assert dead.region is not None
    assert not dead.region.any()


def test_field_that_is_unknown_or_larger_than_the_image_exceeds_it() -> None:
    field = ReceptiveField(Span(9, 1, -4), Span(11, 1, -5))
    assert not exceeds_image(field, (9, 11))
    assert exceeds_image(field, (9, 10))
    assert exceeds_image(field, (8, 11))
    assert exceeds_image(None, (999, 999))


def test_mean_leaves_out_what_is_beyond_an_image() -> None:
    ones, zeros = torch.ones(1, 4, 4), torch.zeros(1, 4, 4)
    inside, outside = cut_patch(ones, (1, 1, 3, 3)), cut_patch(zeros, (-1, 0, 1, 2))
    mean = mean_patch([inside, outside])
    assert mean.pixels.tolist() == [[[1.0, 1.0], [0.5, 0.5]]]
    with pytest.raises(ValueError, match="at least one"):
        mean_patch([])


def test_unit_maps_don_t_depend_on_the_chunk(generator: torch.Generator) -> None:
    network = ShallowCNN(4, (4, 5), (1, 2)).train()
    images = torch.rand(5, 3, 8, 8, generator=generator)
    found = [unit_maps(network, images, "stage1", [2, 0], chunk=n) for n in (2, 32)]
    assert torch.allclose(*found, atol=1e-6)
    assert found[0].shape == (5, 2, 8, 8)
    assert network.training
