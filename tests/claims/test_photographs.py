"""Row 5c: boxes in an image folder, of a network that is trained on it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from camdistill.claims import photographs
from camdistill.claims.claim import ClaimSetup
from camdistill.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of colored squares, with their boxes."""
    monkeypatch.setattr(photographs, "EPOCHS", 1)
    monkeypatch.setenv("CAMDISTILL_CACHE", str(tmp_path / "cache"))
    generator, lines = np.random.default_rng(0), ["path,xmin,ymin,xmax,ymax"]
    for split, count in (("train", 128), ("val", 40)):
        for number in range(count):
            color = number % 2
            pixels = generator.integers(0, 80, (64, 64, 3), dtype=np.uint8)
            x, y = generator.integers(0, 32, 2)
            pixels[y : y + 32, x : x + 32, color] = 220
            name = f"{split}/c{color}/{number}.png"
            path = tmp_path / "squares" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            lines.append(f"{name},{x},{y},{x + 31},{y + 31}")
    (tmp_path / "squares" / "boxes.csv").write_text("\n".join(lines))
    return tmp_path / "squares"


def test_photographs_are_measured_against_their_boxes(
    lab: Callable[..., ClaimSetup], folder: Path
) -> None:
    row = photographs.run_photograph_boxes(replace(lab(), boxes=folder))
    alone = {one.name: one for one in row.ours if one.measure == "box error alone"}
    # A quarter of each image is its object: IoU 0.25 with the whole image, always an error.
    assert alone["whole image"].value == 1
    assert {one.n for one in row.ours} == {16}
    top1 = {
        one.name: one.value for one in row.ours if one.measure == photographs.AT_PAPER_THRESHOLD
    }
    assert all(top1[name] >= alone[name].value for name in top1)


def test_criterion_asks_for_more_than_a_box_around_everything(
    lab: Callable[..., ClaimSetup],
) -> None:
    def wrong(share: float) -> Tensor:
        return (torch.arange(60) < round(60 * share)).double()

    right = wrong(0.8)
    for own, gradient, whole, passed in (
        (0.2, 0.5, 0.6, True),
        (0.2, 0.5, 0.2, False),
        (0.2, 0.1, 0.6, False),
    ):
        table = {"grad_cam": wrong(own), "gradient": wrong(gradient), "whole image": wrong(whole)}
        row = photographs.judge_photographs(lab(count=60), right, table, table)
        assert row.passed is passed


def test_without_boxes_the_row_says_what_it_needs(
    lab: Callable[..., ClaimSetup], folder: Path
) -> None:
    with pytest.raises(UserError, match=r"--boxes FOLDER"):
        photographs.run_photograph_boxes(lab())
    (folder / "boxes.csv").unlink()
    with pytest.raises(UserError, match=r"have no boxes.*boxes.csv"):
        photographs.run_photograph_boxes(replace(lab(), boxes=folder))
