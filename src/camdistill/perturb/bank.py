"""The perturbation bank: a network's scores on changes that no explainer chose.

The changes are random subsets of an image's cells and sliding occluders. The network is evaluated
once on them, and the scores serve every explainer. Faithfulness correlation, sensitivity-n,
infidelity and the rank correlation with occlusion sum a map over the same cells, and need no
further forward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.perturb.batched_forward import Replacement, logits_of, score_changes
from camdistill.perturb.probability import probabilities
from camdistill.types import Images, Labels, Maps, PerImage

_MASK_BYTES = 2**26  # bytes of the masks that are in memory at once


@dataclass(frozen=True)
class BankPlan:
    """The changes that a bank evaluates.

    Attributes:
        cells: Number of cells along each side of an image; a cell has 4 pixels at 32.
        subsets: Number of random subsets, by the share of the cells that each removes.
        occluders: Sides of the sliding occluders, in cells; they slide by one cell.
    """

    cells: int = 8
    subsets: Mapping[float, int] = field(default_factory=lambda: {0.25: 64})
    occluders: Sequence[int] = (1, 2)

    @property
    def forwards(self) -> int:
        """Number of forwards for each image, without that of the unchanged image."""
        return sum(self.subsets.values()) + sum((self.cells - n + 1) ** 2 for n in self.occluders)


@dataclass(frozen=True)
class PerturbationSet:
    """Changes of one kind, and how much they lower each image's score.

    Attributes:
        cells: The cells that each change removes; a first axis of 1 is the same for all images.
        logit_drops: Logit of the unchanged image minus that of the changed one.
        probability_drops: Probability of the unchanged image minus that of the changed one.
    """

    cells: Bool[Tensor, "#batch changes rows columns"]
    logit_drops: Float[Tensor, "batch changes"]
    probability_drops: Float[Tensor, "batch changes"]

    def sums(self, maps: Maps) -> Float[Tensor, "batch changes"]:
        """Sums a map at the images' resolution over the pixels of each change."""
        float_maps = maps if maps.dtype == torch.float64 else maps.float()
        rows = _cell_indicator(maps.shape[1], self.cells.shape[2], float_maps)
        columns = _cell_indicator(maps.shape[2], self.cells.shape[3], float_maps)
        by_cell = (rows.T @ float_maps @ columns).flatten(1)
        chosen = self.cells.flatten(2).to(float_maps.dtype).expand(len(maps), -1, -1)
        return torch.bmm(chosen, by_cell[..., None])[..., 0]


@dataclass(frozen=True)
class Bank:
    """A network's scores on the changes of some images.

    Attributes:
        size: The images' height and width in pixels.
        classes: The class whose score is measured, one for each image.
        logits: That class's logit for each unchanged image.
        probabilities: That class's probability for each unchanged image.
        subsets: Random subsets by the share of cells that they remove.
        occluders: Sliding occluders by their side in cells.
    """

    size: tuple[int, int]
    classes: Labels
    logits: PerImage
    probabilities: PerImage
    subsets: dict[float, PerturbationSet]
    occluders: dict[int, PerturbationSet]


def build_bank(
    network: nn.Module,
    images: Images,
    replacement: Replacement,
    generator: torch.Generator,
    *,
    classes: Labels | None = None,
    plan: BankPlan | None = None,
) -> Bank:
    """Evaluates a network on the plan's changes of each image.

    Args:
        network: In eval mode.
        images: In [0, 1] for a network that normalizes them itself.
        replacement: What replaces the removed pixels, such as `imputers.baseline(images, "gray")`.
        generator: Draws the subsets, different ones for each image.
        classes: The class whose score is measured; None is the network's top class.
        plan: The changes; None is the default `BankPlan()`.
    """
    plan = plan or BankPlan()
    all_logits = logits_of(network, images)
    target_classes = all_logits.argmax(1) if classes is None else classes
    logits = all_logits.gather(1, target_classes[:, None])
    class_probabilities = probabilities(all_logits).gather(1, target_classes[:, None])

    def measure_drops(cells: Bool[Tensor, "#batch changes rows columns"]) -> PerturbationSet:
        score_chunks = []
        for rows in torch.split(torch.arange(len(images)), _images_at_once(cells, images)):
            chunk = slice(int(rows[0]), int(rows[-1]) + 1)
            removed = _on_pixels(cells[chunk] if len(cells) > 1 else cells, images)
            chunk_replacement = (
                replacement[chunk] if isinstance(replacement, Tensor) else replacement
            )
            score_chunks.append(
                score_changes(
                    network, images[chunk], target_classes[chunk], removed, chunk_replacement
                )
            )
        return PerturbationSet(
            cells,
            logits - torch.cat([scores.logits for scores in score_chunks]),
            class_probabilities - torch.cat([scores.probabilities for scores in score_chunks]),
        )

    subsets = {
        share: measure_drops(
            _subsets(len(images), number, share, plan.cells, generator).to(images.device)
        )
        for share, number in plan.subsets.items()
    }
    occluders = {
        side: measure_drops(_occluders(plan.cells, side).to(images.device))
        for side in plan.occluders
    }
    size = (images.shape[2], images.shape[3])
    return Bank(size, target_classes, logits[:, 0], class_probabilities[:, 0], subsets, occluders)


def _images_at_once(cells: Bool[Tensor, "_ changes rows columns"], images: Images) -> int:
    """Number of images whose changes' masks fit into `_MASK_BYTES`, at least 1."""
    return max(1, _MASK_BYTES // (cells.shape[1] * images[0, 0].numel())) if len(images) else 1


def _subsets(
    images: int, number: int, share: float, cells: int, generator: torch.Generator
) -> Bool[Tensor, "images number cells cells"]:
    random_values = torch.rand(
        images, number, cells**2, generator=generator, device=generator.device
    )
    removed = random_values.argsort(2).argsort(2) < round(share * cells**2)
    return removed.view(images, number, cells, cells)


def _occluders(cells: int, side: int) -> Bool[Tensor, "1 positions cells cells"]:
    places = torch.arange(cells - side + 1)
    ticks = torch.arange(cells)
    covers = (ticks >= places[:, None]) & (ticks < places[:, None] + side)
    return (covers[:, None, :, None] & covers[None, :, None, :]).flatten(0, 1)[None]


def _cell_of(pixels: int, cells: int) -> Tensor:
    """Cell of each pixel along a side; cells differ by a pixel if they don't divide the side."""
    if pixels < cells:
        raise UserError(
            f"images of {pixels} pixels can't be cut into {cells} cells a side, as this measure "
            "does: give larger images"
        )
    return torch.arange(pixels) * cells // pixels


def _cell_indicator(pixels: int, cells: int, like: Tensor) -> Float[Tensor, "pixels cells"]:
    return torch.nn.functional.one_hot(_cell_of(pixels, cells), cells).to(like)


def _on_pixels(
    cells: Bool[Tensor, "_ changes rows columns"], images: Images
) -> Bool[Tensor, "_ changes height width"]:
    rows = _cell_of(images.shape[2], cells.shape[2]).to(cells.device)
    columns = _cell_of(images.shape[3], cells.shape[3]).to(cells.device)
    return cells[:, :, rows[:, None], columns]
