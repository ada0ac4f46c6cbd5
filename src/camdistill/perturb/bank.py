"""The perturbation bank: what a network answers to changes that no explainer chose.

The changes are random subsets of an image's cells and sliding occluders. Asked once for a network
and images, the answers serve every explainer: faithfulness correlation, sensitivity-n, infidelity
and the rank correlation with occlusion take sums of a map over the same cells, and no forward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.perturb.batched_forward import Shown, changed_scores, logits_of
from camdistill.perturb.probability import probabilities
from camdistill.types import Images, Labels, Maps, PerImage

_MASK_BYTES = 2**26  # of the masks that are held at once


@dataclass(frozen=True)
class Plan:
    """What a bank asks about.

    Attributes:
        cells: An image is cut into so many cells along each side: of 4 pixels at 32.
        subsets: How many random subsets, by the share of the cells that each removes.
        occluders: Sides of the sliding occluders, in cells; they slide by one cell.
    """

    cells: int = 8
    subsets: Mapping[float, int] = field(default_factory=lambda: {0.25: 64})
    occluders: Sequence[int] = (1, 2)

    @property
    def forwards(self) -> int:
        """Of each image, the unchanged one not counted."""
        return sum(self.subsets.values()) + sum((self.cells - n + 1) ** 2 for n in self.occluders)


@dataclass(frozen=True)
class Probe:
    """Changes of one kind, and what they took from each image's score.

    Attributes:
        cells: The cells that each change removes; a first axis of 1 is the same for all images.
        logit_drops: Score of the image minus that of the changed one.
        probability_drops: Likewise of probabilities.
    """

    cells: Bool[Tensor, "#batch changes rows columns"]
    logit_drops: Float[Tensor, "batch changes"]
    probability_drops: Float[Tensor, "batch changes"]

    def sums(self, maps: Maps) -> Float[Tensor, "batch changes"]:
        """What a map at the images' resolution assigns to the pixels of each change."""
        wide = maps if maps.dtype == torch.float64 else maps.float()
        rows = _in_cell(maps.shape[1], self.cells.shape[2], wide)
        columns = _in_cell(maps.shape[2], self.cells.shape[3], wide)
        by_cell = (rows.T @ wide @ columns).flatten(1)
        chosen = self.cells.flatten(2).to(wide.dtype).expand(len(maps), -1, -1)
        return torch.bmm(chosen, by_cell[..., None])[..., 0]


@dataclass(frozen=True)
class Bank:
    """A network's answers about some images.

    Attributes:
        size: The images' height and width.
        classes: Whose score was watched, one an image.
        logits: Of the unchanged images.
        probabilities: Likewise.
        subsets: Random subsets by the share that they remove.
        occluders: Sliding occluders by their side in cells.
    """

    size: tuple[int, int]
    classes: Labels
    logits: PerImage
    probabilities: PerImage
    subsets: dict[float, Probe]
    occluders: dict[int, Probe]


def bank(
    network: nn.Module,
    images: Images,
    shown: Shown,
    generator: torch.Generator,
    *,
    classes: Labels | None = None,
    plan: Plan | None = None,
) -> Bank:
    """Asks a network about the plan's changes of each image.

    Args:
        network: In eval mode.
        images: In [0, 1] for a network that normalises them itself.
        shown: What stands where something is removed: `imputers.baseline(images, "grey")`.
        generator: Draws the subsets, other ones for each image.
        classes: Whose score is watched; None is the network's own top class.
        plan: What is asked.
    """
    plan = plan or Plan()
    own = logits_of(network, images)
    watched = own.argmax(1) if classes is None else classes
    logits = own.gather(1, watched[:, None])
    likely = probabilities(own).gather(1, watched[:, None])

    def probe(cells: Bool[Tensor, "#batch changes rows columns"]) -> Probe:
        found = []
        for rows in torch.split(torch.arange(len(images)), _block(cells, images)):
            some = slice(int(rows[0]), int(rows[-1]) + 1)
            removed = _on_pixels(cells[some] if len(cells) > 1 else cells, images)
            behind = shown[some] if isinstance(shown, Tensor) else shown
            found.append(changed_scores(network, images[some], watched[some], removed, behind))
        return Probe(
            cells,
            logits - torch.cat([one.logits for one in found]),
            likely - torch.cat([one.probabilities for one in found]),
        )

    subsets = {
        share: probe(_subsets(len(images), number, share, plan.cells, generator).to(images.device))
        for share, number in plan.subsets.items()
    }
    occluders = {
        side: probe(_occluders(plan.cells, side).to(images.device)) for side in plan.occluders
    }
    size = (images.shape[2], images.shape[3])
    return Bank(size, watched, logits[:, 0], likely[:, 0], subsets, occluders)


def _block(cells: Bool[Tensor, "_ changes rows columns"], images: Images) -> int:
    """So many images that their changes' masks stay small."""
    return max(1, _MASK_BYTES // (cells.shape[1] * images[0, 0].numel())) if len(images) else 1


def _subsets(
    images: int, number: int, share: float, cells: int, generator: torch.Generator
) -> Bool[Tensor, "images number cells cells"]:
    drawn = torch.rand(images, number, cells**2, generator=generator, device=generator.device)
    taken = drawn.argsort(2).argsort(2) < round(share * cells**2)
    return taken.view(images, number, cells, cells)


def _occluders(cells: int, side: int) -> Bool[Tensor, "1 positions cells cells"]:
    places = torch.arange(cells - side + 1)
    ticks = torch.arange(cells)
    covers = (ticks >= places[:, None]) & (ticks < places[:, None] + side)
    return (covers[:, None, :, None] & covers[None, :, None, :]).flatten(0, 1)[None]


def _cell_of(pixels: int, cells: int) -> Tensor:
    """Of each pixel along a side; cells differ by a pixel where they don't divide the side."""
    if pixels < cells:
        raise UserError(
            f"images of {pixels} pixels can't be cut into {cells} cells a side, as this measure "
            "does: give larger images"
        )
    return torch.arange(pixels) * cells // pixels


def _in_cell(pixels: int, cells: int, like: Tensor) -> Float[Tensor, "pixels cells"]:
    return torch.nn.functional.one_hot(_cell_of(pixels, cells), cells).to(like)


def _on_pixels(
    cells: Bool[Tensor, "_ changes rows columns"], images: Images
) -> Bool[Tensor, "_ changes height width"]:
    rows = _cell_of(images.shape[2], cells.shape[2]).to(cells.device)
    columns = _cell_of(images.shape[3], cells.shape[3]).to(cells.device)
    return cells[:, :, rows[:, None], columns]
