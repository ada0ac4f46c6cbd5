"""Rows 3 to 8: planted maps that deserve it pass, random maps in Grad-CAM's place fail."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camdistill.claims import heads, localization, localization_maps
from camdistill.claims.claim import ClaimSetup
from camdistill.claims.localization import BoxErrors
from camdistill.claims.networks import backbones
from camdistill.errors import UserError
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.teachers import Preprocessed
from camdistill.types import Maps

GENERATOR = torch.Generator().manual_seed(0)


def errors(*shares: float, count: int = 60) -> dict[str, Tensor]:
    """A share of each method's boxes is wrong."""
    return {
        method: (torch.arange(count) < round(share * count)).float()
        for method, share in zip(("grad_cam", "gradient", "random"), shares, strict=True)
    }


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts other maps in a method's place: noisy masks, or noise alone."""

    def plant(lab: ClaimSetup, good: Sequence[str]) -> None:
        known: dict[bytes, Tensor] = {}
        for shapes in (lab.shapes, replace(lab.shapes, split="val")):
            rendered = shapes.render(lab.ids)
            for pixels, mask in zip(rendered.pixels, rendered.masks["object"], strict=True):
                known[pixels.tobytes()] = torch.from_numpy(mask).float()

        def at_image(method: str) -> Callable[[nn.Module, Tensor, Tensor], Maps]:
            def explain(network: nn.Module, images: Tensor, classes: Tensor) -> Maps:
                noise = torch.rand(images[:, 0].shape, generator=GENERATOR)
                pixels = (images * 255).round().byte().numpy()
                masks = [known[np.ascontiguousarray(one).tobytes()] for one in pixels]
                return torch.stack(masks) + 0.1 * noise if method in good else noise

            return explain

        monkeypatch.setattr(localization_maps, "image_explainer", at_image)

    return plant


@pytest.mark.parametrize(
    ("shares", "passed"),
    [
        ((0.1, 0.5, 0.9), True),
        ((0.5, 0.1, 0.9), False),
        ((0.1, 0.9, 0.9), False),
        ((0.9, 0.9, 0.9), False),
    ],
)
def test_boxes_pass_only_where_errors_rise_along_the_order(
    lab: Callable[..., ClaimSetup], shares: tuple[float, ...], passed: bool
) -> None:
    found = BoxErrors(errors(*shares), errors(0.1, 0.5, 0.9), dict.fromkeys(errors(0, 0, 0), 0.5))
    row = localization.judge_boxes(lab(count=60), "3", "it", "56.51 %", found)
    assert row.passed is passed
    assert localization.judge_own_thresholds(lab(count=60), {"it": found}).passed
    first = {one.name: one for one in row.ours if one.measure == localization.AT_PAPER_THRESHOLD}
    assert [round(first[name].value, 6) for name in localization.COMPARED] == list(shares)


def test_own_thresholds_must_hold_in_all_networks(lab: Callable[..., ClaimSetup]) -> None:
    good = BoxErrors({}, errors(0.1, 0.5, 0.9), {})
    bad = BoxErrors({}, errors(0.6, 0.5, 0.9), {})
    assert localization.judge_own_thresholds(lab(count=60), {"a": good, "b": good}).passed
    assert localization.judge_own_thresholds(lab(count=60), {"a": good, "b": bad}).passed is False


def test_masks_in_grad_cams_place_beat_noise_in_the_gradients(
    lab: Callable[..., ClaimSetup], planted: Callable[..., None]
) -> None:
    room = lab(count=24)
    planted(room, ["grad_cam"])
    found = localization.measure_box_errors(room, room.student)
    wrong = (
        localization_maps.top_classes(room.student, localization_maps.draw_batch(room).images)
        != localization_maps.draw_batch(room).labels
    )
    # A box of the mask itself is right: only the class can be wrong.
    assert torch.equal(found.at_own_threshold["grad_cam"], wrong.float())
    assert found.at_own_threshold["gradient"].mean() > 0.8


def test_noise_in_grad_cams_place_fails(
    lab: Callable[..., ClaimSetup], planted: Callable[..., None]
) -> None:
    room = lab(count=24)
    planted(room, ["gradient"])
    assert localization.run_boxes_student(room).passed is False


def test_a_wrong_class_is_an_error_whatever_the_box() -> None:
    found = localization._top1(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([False, True, False]))
    assert found.tolist() == [0, 1, 1]


def test_rejection_counts_for_absent_classes_and_against_present_ones() -> None:
    # Two asked classes are there: pointed at rightly, and missed; two are absent.
    peaks = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    right = torch.tensor([[1.0, 0.0, -1.0, -1.0]])
    for least, accuracy, precision, recall in (
        (0.0, 1 / 4, 1 / 4, 1 / 2),
        (1.5, 2 / 4, 1 / 3, 1 / 2),
        (3.5, 3 / 4, 1.0, 1 / 2),
        (9.0, 2 / 4, float("nan"), 0.0),
    ):
        found = localization._rejection_scores(peaks, right, least)
        assert found["accuracy"].item() == pytest.approx(accuracy)
        assert found["precision"].item() == pytest.approx(precision, nan_ok=True)
        assert found["recall"].item() == pytest.approx(recall)
    assert 2 < localization._best_peak(peaks, right) <= 4


def test_pointing_fails_where_the_gradient_points_as_well(lab: Callable[..., ClaimSetup]) -> None:
    good = {name: torch.full((30,), 0.9) for name in ("accuracy", "precision", "recall")}
    poor = {name: torch.full((30,), 0.4) for name in good}
    table = {"grad_cam": good, "never rejecting": poor, "gradient": poor}
    assert localization.judge_pointing(lab(), table).passed
    assert localization.judge_pointing(lab(), table | {"gradient": good}).passed is False


def test_pointing_asks_about_both_objects(lab: Callable[..., ClaimSetup]) -> None:
    row = localization.run_pointing(lab())
    recall = [one.value for one in row.ours if one.measure == "recall"]
    assert all(0 <= value <= 1 for value in recall)
    assert {one.name for one in row.ours if one.measure == "accuracy"} == {
        "grad_cam",
        "gradient",
        "never rejecting",
    }


def test_seeds_and_costs_are_judged_over_trainings(lab: Callable[..., ClaimSetup]) -> None:
    room = lab(count=40)
    high = [torch.rand(40, generator=GENERATOR) * 0.1 + 0.6 for _ in range(3)]
    low = [one - 0.2 for one in high]
    assert localization.judge_segmentation_seeds(room, {"grad_cam": high, "cam": low}).passed
    assert (
        localization.judge_segmentation_seeds(room, {"grad_cam": low, "cam": high}).passed is False
    )
    # One training that turned out otherwise: nothing can be said of trainings.
    mixed = [high[0], low[0] - 0.3, low[0] - 0.3]
    turned = [low[0], high[0], low[0] - 0.3]
    assert (
        localization.judge_segmentation_seeds(room, {"grad_cam": mixed, "cam": turned}).passed
        is False
    )
    better = {"flattened": high, "pooled": low}
    assert heads.judge_pooling_cost(room, better, {"grad_cam": low, "cam": high}).passed
    assert heads.judge_pooling_cost(room, better, {"grad_cam": high, "cam": low}).passed is False
    worse = {"flattened": low, "pooled": high}
    assert heads.judge_pooling_cost(room, worse, {"grad_cam": low, "cam": high}).passed is False


def test_both_heads_stand_on_the_students_trunk(
    lab: Callable[..., ClaimSetup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbones, "IMAGES", 128)
    monkeypatch.setattr(backbones, "EPOCHS", 1)
    room = lab()
    before = {key: value.clone() for key, value in room.student.state_dict().items()}
    flat, pooled = backbones.fully_connected_network(room), backbones.pooling_network(room)
    for name in ("stage1.conv.weight", "stage2.conv.weight"):
        own = room.student.network.get_parameter(name)
        for network in (flat, pooled):
            # One step from there, and not from a start of its own.
            moved = network.network.get_parameter(name) - own
            assert 0 < moved.abs().mean() < 0.2 * own.abs().mean()
    assert all(torch.equal(value, before[key]) for key, value in room.student.state_dict().items())
    row = heads.run_any_head(room)
    assert row.passed
    assert {one.name: one.value for one in row.ours if one.measure == "has a CAM"} == {
        "pooling": 1,
        "fully connected": 0,
        "transformer": 0,
    }


def test_a_student_without_stages_is_a_mistake_in_one_line(lab: Callable[..., ClaimSetup]) -> None:
    deep = Preprocessed(CifarResNet(8, 8)).eval()
    with pytest.raises(UserError, match=r"CifarResNet.*--student"):
        backbones.fully_connected_network(lab(student=deep))


def test_a_network_with_blank_maps_is_not_explained(lab: Callable[..., ClaimSetup]) -> None:
    room = lab()
    blank = room.teacher
    blank.network.linear.weight.zero_()
    assert heads._is_explainable(blank, localization_maps.draw_batch(room).images) is False
    assert heads._is_explainable(room.student, localization_maps.draw_batch(room).images) is True
