from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from camdistill.layers.profiles import profiles, rows_by_layer
from camdistill.layers.sweep.layer_sweep import LayerSweep
from camdistill.layers.sweep.sweep_plan import SweepOptions
from camdistill.layers.through_depth import spread_layers, stage_ends, through_depth
from camdistill.layers.units.dissection import Dissection
from camdistill.layers.units.receptive_field import receptive_fields
from camdistill.layers.units.unit_cards import build_unit_records, select_units
from camdistill.layers.units.unit_inspection import (
    InspectionOptions,
    InspectionSample,
    inspect_units,
)
from camdistill.networks.students import ShallowCNN


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = ShallowCNN(4, (4, 5, 6), (1, 2, 2)).eval()
    made.stage2.bn.bias.data[3] = -100.0  # a dead unit
    return made


@pytest.fixture
def images(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(20, 3, 24, 24, generator=generator)


@pytest.fixture
def swept(network: nn.Module, images: torch.Tensor):
    looking = LayerSweep({"student": network}, images, options=SweepOptions(cka=False))
    numbers = torch.arange(20) + 100
    for start in range(0, 20, 8):
        looking.update(images[start : start + 8], numbers[start : start + 8])
    return looking.result()


def _stage2(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network.stage2(network.stage1(images))


def test_patches_are_where_the_unit_answers_most_in_its_images(network, images, swept) -> None:
    layer = swept.layer("student", "stage2")
    asked = []

    def images_of(numbers):
        asked.append(list(numbers))
        return images[[number - 100 for number in numbers]]

    field = receptive_fields(network, images, ["stage2"])["stage2"]
    found = build_unit_records(network, layer, [1, 3], images_of, field=field, sample=images[:6])
    outputs = _stage2(network, images)[:, 1]
    best = outputs.flatten(1).amax(1).sort(descending=True, stable=True)
    one = found[0]
    assert [patch.image - 100 for patch in one.patches] == best.indices[:9].tolist()
    assert np.allclose([patch.value for patch in one.patches], best.values[:9])
    first = one.patches[0]
    cell = int(outputs[first.image - 100].flatten().argmax())
    row, column = divmod(cell, outputs.shape[2])
    # Kernels of 3 with a padding of 1: 1 + 2 + 2 pixels, in steps of 2.
    assert first.box == (2 * row - 2, 2 * column - 2, 2 * row + 3, 2 * column + 3)
    assert one.receptive_size == (5, 5)
    assert one.natural == pytest.approx(float(best.values[0]))
    assert torch.allclose(one.values, outputs[:6].flatten(), atol=1e-6)
    assert found[1].patches == ()
    assert found[1].mean is None
    assert asked == [sorted({patch.image for patch in one.patches})], "each image once"


def test_unit_that_sees_more_than_the_image_has_whole_images(network, images, swept) -> None:
    layer = swept.layer("student", "stage3")
    found = build_unit_records(
        network,
        layer,
        [2],
        lambda numbers: images[[number - 100 for number in numbers]],
        field=None,
        sample=images[:4],
    )[0]
    assert found.receptive_size is None
    assert found.mean is None
    for patch in found.patches:
        assert torch.equal(patch.pixels, images[patch.image - 100])
        assert patch.region is not None
        assert patch.region.any()


def test_interesting_units_are_selective_or_know_a_concept_and_never_dead(swept) -> None:
    layer = swept.layer("student", "stage2")
    chosen = select_units(layer, 3)
    lifetime = layer.sparsity.lifetime.nan_to_num(-1)
    assert 3 not in chosen
    others = [unit for unit in range(5) if unit not in (*chosen, 3)]
    assert min(lifetime[list(chosen)]) >= max(lifetime[others])
    iou = torch.zeros(5, 2)
    iou[4, 1], iou[3, 0] = 0.5, 0.9
    known = Dissection("stage2", ("a", "b"), iou, torch.zeros(5, 2), iou)
    assert select_units(layer, 1, known) == (4,), "the dead unit's mask is chance"


def test_close_up_looks_at_the_chosen_units_in_their_order(network, images, swept) -> None:
    sample = InspectionSample(
        images, {}, lambda numbers: images[[number - 100 for number in numbers]]
    )
    layers = swept.networks["student"]
    steps = []
    found = dict(
        inspect_units(
            network,
            layers,
            sample,
            InspectionOptions(units=2, steps=3),
            units_by_layer={"stage2": [4, 0]},
            on_step=lambda: steps.append(1),
        )
    )
    assert [one.unit for one in found["stage2"]] == [4, 0]
    assert len(found["stage1"]) == 2
    assert len(steps) == 3 * (3 + 1)
    for one in found["stage2"]:
        assert one.exciting_image is not None
        assert one.exciting_image.shape == (3, 24, 24)
        with torch.no_grad():
            before = network.stage2.bn(
                network.stage2.conv(network.stage1(one.exciting_image[None]))
            )
        reached = max(float(before[0, one.unit].max()), 0.0)
        assert one.reached == pytest.approx(reached, rel=1e-4)


def test_pictures_through_depth_are_of_the_first_networks_class(network, images, swept) -> None:
    other = ShallowCNN(4, (3,), (2,)).eval()
    networks = {"teacher": network, "student": other}
    layers = {"teacher": ["stage1", "stage3"], "student": ["stage1"]}
    found = through_depth(networks, images[:9], list("abcdefghi"), layers, feature_count=2)
    with torch.no_grad():
        tops = network(images[:9]).argmax(1).tolist()
        likely = other(images[:9]).softmax(1)
    assert [one.explained_class for one in found] == tops
    for row, one in enumerate(found):
        assert one.tops["student"][0] == int(likely[row].argmax())
        assert one.tops["student"][1] == pytest.approx(float(likely[row].max()), rel=1e-5)
        view = one.views["student"]["stage1"]
        # GAP and a linear head: the map is the class's weights, divided by the cells that each
        # logit is a mean over, over the activations.
        with torch.no_grad():
            activations = other.stage1(images[row : row + 1])[0]
            alpha = other.linear.weight[tops[row]] / activations[0].numel()
            expected = torch.einsum("k,kij->ij", alpha, activations)
        torch.testing.assert_close(view.grad_cam, expected, rtol=1e-4, atol=1e-7)
        assert len(view.units) == 2
        assert torch.allclose(view.features, activations[list(view.units)], atol=1e-6)


def test_feature_maps_of_chosen_units_in_their_order(network, images) -> None:
    (found,) = through_depth(
        {"student": network}, images[:1], ["a"], {"student": ["stage1"]}, units={"stage1": [2, 0]}
    )
    view = found.views["student"]["stage1"]
    with torch.no_grad():
        activations = network.stage1(images[:1])[0]
    assert view.units == (2, 0)
    assert torch.allclose(view.features, activations[[2, 0]], atol=1e-6)


def test_layers_are_spread_over_depth_and_stages_end_at_each_resolution(swept) -> None:
    layers = swept.networks["student"]
    assert spread_layers(layers, 2) == ["stage1", "stage3"]
    assert spread_layers(layers, 9) == ["stage1", "stage2", "stage3"]
    assert spread_layers(layers, 1) == ["stage3"]
    assert spread_layers(layers, 1, {"stage2", "elsewhere"}) == ["stage2", "stage3"]
    again = (
        *layers,
        replace(layers[2], name="stage4"),
        replace(layers[2], name="v", shape=(9, 1, 1)),
    )
    assert stage_ends(again, 2) == ["stage2", "stage4"]


def test_profiles_are_the_summaries_in_order_of_depth(swept) -> None:
    table = profiles(swept)
    layers = swept.networks["student"]
    assert table["dead"]["student"].values == (0.0, 0.2, 0.0)
    assert table["dead"]["student"].depth == (0.0, 50.0, 100.0)
    assert table["dead"]["student"].layers == ("stage1", "stage2", "stage3")
    active = [float(layer.units.active.double().mean()) for layer in layers]
    assert np.allclose(table["active"]["student"].values, active)
    assert "probe" not in table, "not asked for"
    assert "best_cka" not in table, "one network"
    row = rows_by_layer(swept)["student"]["stage2"]
    assert row["dead_units"] == [3]
    assert len(row["unit_mean"]) == 5
