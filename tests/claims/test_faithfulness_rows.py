"""Rows 11, 12, 22 and 26: what should fail does, and the numbers are the definitions'."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from camdistill.claims import depth, faithfulness_rows, localization_maps
from camdistill.claims.claim import ClaimSetup, draw_batch, exact_number
from camdistill.errors import UserError
from camdistill.explain.methods import image_explainer
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.teachers import Preprocessed
from camdistill.perturb.imputers import baseline

GENERATOR = torch.Generator().manual_seed(0)


def around(level: float, count: int = 40) -> Tensor:
    return level + 0.05 * torch.rand(count, generator=GENERATOR)


def correlations(**levels: float) -> dict[int, dict[str, Tensor]]:
    return {side: {name: around(level) for name, level in levels.items()} for side in (1, 2)}


def test_faithfulness_passes_only_above_guided_backpropagation(
    lab: Callable[..., ClaimSetup],
) -> None:
    judged = faithfulness_rows.judge_faithfulness
    good = correlations(grad_cam=0.5, guided_grad_cam=0.5, guided_backprop=0.2)
    assert judged(lab(), good).passed
    for planted in ("grad_cam", "guided_grad_cam"):  # random maps in its place
        bad = {side: table | {planted: around(-0.02)} for side, table in good.items()}
        assert judged(lab(), bad).passed is False
    one_size = {1: good[1], 2: good[2] | {"grad_cam": around(0.1)}}
    assert judged(lab(), one_size).passed is False


def test_rank_correlation_is_with_the_drops_of_a_sliding_occluder(
    lab: Callable[..., ClaimSetup],
) -> None:
    room = lab()
    row = faithfulness_rows.run_faithfulness(room)
    scene = draw_batch(room)
    classes = room.teacher(scene.images).argmax(1)
    maps = image_explainer("grad_cam")(room.teacher, scene.images, classes).relu()
    behind = baseline(scene.images, "blur")
    assert isinstance(behind, Tensor)
    found = []
    for image, hidden, label, one in zip(scene.images, behind, classes, maps, strict=True):
        drops, sums = [], []
        for top in range(0, 32, 4):
            for left in range(0, 32, 4):
                spot = (slice(top, top + 4), slice(left, left + 4))
                changed = image.clone()
                changed[:, *spot] = hidden[:, *spot]
                both = room.teacher(torch.stack([image, changed]))[:, label]
                drops.append(float(both[0] - both[1]))
                sums.append(float(one[spot].sum()))
        found.append(spearmanr(drops, sums).statistic)
    ours = {m.name: m.value for m in row.ours if m.measure == "occluder of 4 pixels"}
    assert ours["grad_cam"] == pytest.approx(np.nanmean(found), abs=0.01)


def test_forwards_are_counted(
    lab: Callable[..., ClaimSetup], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = lab()
    monkeypatch.setattr(faithfulness_rows, "REPEATS", 2)
    monkeypatch.setattr(faithfulness_rows, "TIMED", 4)
    monkeypatch.setattr(
        faithfulness_rows.backbones, "fully_connected_network", lambda lab: lab.student
    )
    row = faithfulness_rows.run_cost(room)
    forwards = {m.name: m.value for m in row.ours if m.measure == "forwards an image"}
    assert forwards["grad_cam, teacher"] == 1
    # squares of 4, 2 apart, the image, and two of the 4 images alone
    assert forwards["occlusion, teacher"] == 15 * 15 + 1 + 2 / 4
    (ratio,) = (
        m.value for m in row.ours if m.measure.startswith("operations") and m.name == "teacher"
    )
    assert ratio == pytest.approx(226, rel=0.05)


def test_cost_fails_where_one_ratio_is_small() -> None:
    good = exact_number("a", 226, 32, "operations, occlusion / grad_cam")
    slow = exact_number("a", 60, 32, "seconds, occlusion / grad_cam")
    assert faithfulness_rows.judge_occlusion_cost([good]).passed
    assert faithfulness_rows.judge_occlusion_cost([good, slow]).passed is False


def test_resolution_needs_finer_maps_that_notice_the_weights(
    lab: Callable[..., ClaimSetup],
) -> None:
    judged = faithfulness_rows.judge_resolution
    sharp = {"grad_cam": around(0.5), "guided_grad_cam": around(0.7)}
    alike = {"grad_cam": around(0.1), "guided_grad_cam": around(0.1)}
    assert judged(lab(), sharp, alike).passed
    assert judged(lab(), sharp, alike | {"guided_grad_cam": around(0.6)}).passed is False
    assert judged(lab(), sharp | {"guided_grad_cam": around(0.4)}, alike).passed is False


def test_maps_that_ignore_the_network_fail_the_gate(
    lab: Callable[..., ClaimSetup], monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_image(method: str) -> Callable[..., Tensor]:
        return lambda network, images, classes: images.mean(1)

    monkeypatch.setattr(faithfulness_rows, "image_explainer", at_image)
    monkeypatch.setattr(localization_maps, "image_explainer", at_image)
    row = faithfulness_rows.run_resolution(lab())
    alike = [m.value for m in row.ours if m.measure == "rank correlation, random weights"]
    assert alike == pytest.approx([1, 1, 1])
    assert row.passed is False


BLOCKS = ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1"]


def by_depth(*levels: float) -> dict[str, dict[str, Tensor]]:
    return {
        measure: {block: around(level) for block, level in zip(BLOCKS, levels, strict=True)}
        for measure in depth.MEASURES
    }


def neighbors(within: float, across: float) -> dict[tuple[str, str], Tensor]:
    return {
        pair: around(within if pair[0][:6] == pair[1][:6] else across) for pair in pairwise(BLOCKS)
    }


def test_layers_must_become_worse_stage_by_stage_and_jump_between(
    lab: Callable[..., ClaimSetup],
) -> None:
    rising = by_depth(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    assert depth.judge_depth(lab(), rising, neighbors(0.9, 0.4)).passed
    assert depth.judge_depth(lab(), rising, neighbors(0.4, 0.9)).passed is False
    dented = by_depth(0.1, 0.2, 0.3, 0.6, 0.5, 0.6)
    assert depth.judge_depth(lab(), dented, neighbors(0.9, 0.4)).passed is False
    one = rising | {depth.MEASURES[0]: dented[depth.MEASURES[0]]}
    assert depth.judge_depth(lab(), one, neighbors(0.9, 0.4)).passed is False


def test_every_block_of_a_residual_network_is_measured(lab: Callable[..., ClaimSetup]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Preprocessed(CifarResNet(14, 8)).eval().requires_grad_(False)
    row = depth.run_depth(lab(teacher=network))
    for measure in depth.MEASURES:
        names = [m.name for m in row.ours if m.measure == measure]
        assert names == BLOCKS
    with pytest.raises(UserError, match=r"ShallowCNN.*--teacher"):
        depth.run_depth(lab())
