"""Draws what Shapes can draw: one row a variant, masks and interventions below.

python docs/examples/shapes_sheet.py [docs/pictures/shapes-data.png]
"""

import sys
from pathlib import Path

import numpy as np

from camdistill.data.shapes import RenderedShapes, Shapes
from camdistill.report.figures.pictures import save_png
from camdistill.report.figures.tiles import Tile, patch_tile, tile_grid

ABREAST, SIDE = 8, 80
INDICES = np.arange(ABREAST)


def tiles(found: RenderedShapes, notes: tuple[str, ...], mask: str | None = None) -> list[Tile]:
    """One tile an image, its label below; with a mask, all else is dimmed."""
    return [
        patch_tile(
            found.pixels[n] / np.float32(255),
            size=SIDE,
            region=None if mask is None else found.masks[mask][n],
            note=notes[found.labels[n]],
        )
        for n in range(ABREAST)
    ]


def main() -> None:
    """Draws the sheet."""
    plain = Shapes("test", ABREAST)
    biased = Shapes("test", ABREAST, shortcut=1.0)
    pair = Shapes("test", ABREAST, objects=2)
    either = Shapes("test", ABREAST, objects=2, task="xor")
    names = plain.class_names
    rows = [
        *tiles(plain.render(INDICES), names),
        *tiles(plain.render(INDICES), names, "object"),
        *tiles(plain.render(INDICES, swap_class=1), names),
        *tiles(plain.render(INDICES, remove=("object",)), names),
        *tiles(biased.render(INDICES), names),
        *tiles(pair.render(INDICES), names),
        *tiles(either.render(INDICES), ("0", "1")),
    ]
    sheet = tile_grid(
        rows,
        title="Shapes",
        lines=[
            "rows: as they are; the object's mask; another class in the same pose; without the "
            "object; with a patch",
            "that agrees with the label; two objects; xor: 1 is a disc or a triangle, not both",
        ],
        columns=ABREAST,
    )
    save_png(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/pictures/shapes-data.png"), sheet)


if __name__ == "__main__":
    main()
