from pathlib import Path

import numpy as np
from PIL import Image

from camdistill.report.figures.pictures import save_png


def test_png_keeps_every_pixel(tmp_path: Path) -> None:
    picture = np.random.default_rng(5).integers(0, 256, (9, 4, 3), np.uint8)
    path = save_png(tmp_path / "new" / "a.png", picture)
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
