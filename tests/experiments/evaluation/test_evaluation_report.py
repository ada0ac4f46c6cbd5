from pathlib import Path

import numpy as np
from PIL import Image

from camdistill import tags
from camdistill.experiments.evaluation.evaluation_report import write_cards
from camdistill.report.tensorboard import read_tags


def test_a_rerun_leaves_no_picture_of_the_former_run(tmp_path: Path) -> None:
    dark, light = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 200, np.uint8)
    first = {tags.FAITHFULNESS: dark, tags.CURVES: dark, tags.BEST_AND_WORST: dark}
    write_cards(first, "first", tmp_path)
    (tmp_path / "mine.png").write_bytes(b"kept")
    (tmp_path / "tensorboard" / "notes.txt").write_text("kept")
    second = {tags.FAITHFULNESS: light, tags.CURVES: None, tags.BEST_AND_WORST: None}
    write_cards(second, "second", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["faithfulness.png", "mine.png"]
    with Image.open(tmp_path / "faithfulness.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), light)
    shown = read_tags(tmp_path / "tensorboard")
    assert [tag for tag, plugin in shown.items() if plugin == "images"] == [tags.FAITHFULNESS]
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1
    assert (tmp_path / "tensorboard" / "notes.txt").exists()
