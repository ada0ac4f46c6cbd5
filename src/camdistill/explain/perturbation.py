"""Explanations that ask the network about changed images: occlusion, RISE, Score-CAM.

They need no gradient, and many forwards: each says how many an image. Forwards are as large as
`memory` allows (an estimate from the sizes of the layers' outputs, `explain.engine.memory`). Other
arguments are those of `explain.gradcam.explain_images`.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.engine.request import Classes, Score, upcast
from camdistill.explain.engine.tokens import Layout
from camdistill.explain.gradcam import explain_images
from camdistill.explain.maps import normalize, upsample
from camdistill.explain.masked_forward import Fill, make_scorer
from camdistill.types import Images

Logits = Callable[..., Tensor] | None
PixelMaps = Float[Tensor, "batch *classes height width"]


@torch.no_grad()
def occlusion(
    network: nn.Module,
    images: Images,
    classes: Classes = None,
    *,
    patch: int | None = None,
    stride: int | None = None,
    fill: Fill = "zero",
    score: Score = "logit",
    logits: Logits = None,
    memory: int | None = None,
) -> PixelMaps:
    """How much the score falls when a square covers a pixel; the mean over all squares that do.

    Zeiler and Fergus 2014, section 4.2, https://arxiv.org/abs/1311.2901, who show the score at the
    square's place. Squares slide from edge to edge; the last of a row ends at the border. At the
    defaults there are 225 forwards an image.

    Args:
        network: Network as for `explain.gradcam.explain_images`, like all that isn't named here.
        images: Images as for `explain_images`.
        classes: Classes as for `explain_images`.
        patch: Side of the square in pixels; None is an eighth of the shorter side.
        stride: Pixels between squares; None is half a patch.
        fill: What covers. The paper's is gray, 0 after normalization.
        score: Score as for `explain_images`.
        logits: Logits as for `explain_images`.
        memory: Bytes that one forward may take, about; None is 32 MiB on
            a CPU, 512 MiB elsewhere.
    """
    height, width = images.shape[-2:]
    patch = max(min(height, width) // 8, 1) if patch is None else patch
    stride = max(patch // 2, 1) if stride is None else stride
    if not 1 <= patch <= min(height, width) or stride < 1:
        raise UserError(
            f"patch is {patch} and stride {stride} for images of {height}x{width}: give a patch "
            f"of 1 to {min(height, width)} and a stride of 1 or more"
        )
    scorer = make_scorer(network, images, classes, score=score, logits=logits, memory=memory)
    tops, lefts = (_starts(side, patch, stride, images.device) for side in (height, width))

    def cover(number: Tensor) -> Tensor:
        rows = _inside(tops[number // len(lefts)], patch, height)
        return rows[:, :, None] & _inside(lefts[number % len(lefts)], patch, width)[:, None]

    count = len(tops) * len(lefts)
    covered_scores = scorer.score_masks(
        lambda _, number: 1 - cover(number).to(images.dtype), count, fill
    )
    drops = (scorer.scores[..., None] - covered_scores).view(
        *covered_scores.shape[:2], len(tops), len(lefts)
    )
    # A square is a row's interval times a column's, and so are sums over squares.
    rows, columns = (
        _inside(starts, patch, side).to(drops.dtype)
        for starts, side in ((tops, height), (lefts, width))
    )
    covering = rows.sum(0)[:, None] * columns.sum(0)
    with torch.autocast(images.device.type, enabled=False):
        total = rows.T @ drops @ columns
    return scorer.match_classes(torch.where(covering > 0, total / covering.clamp(min=1), 0))


@torch.no_grad()
def rise(
    network: nn.Module,
    images: Images,
    classes: Classes = None,
    *,
    masks: int = 1000,
    cells: int = 7,
    keep: float = 0.5,
    seed: int = 0,
    fill: Fill = "zero",
    score: Score = "probability",
    logits: Logits = None,
    memory: int | None = None,
) -> PixelMaps:
    """RISE: sum_m S(x through M_m) M_m / (N keep), over random masks M.

    Petsiuk et al. 2018, eq. 6 and section 3.2, https://arxiv.org/abs/1806.07421. Masks are random
    grids, enlarged bilinearly by a whole cell more than the image and cut at a random place. As in
    the paper, S is a probability and masked pixels are 0 after normalization. N forwards an image.

    Args:
        network: Network as for `explain.gradcam.explain_images`, like all that isn't named here.
        images: Images as for `explain_images`.
        classes: Classes as for `explain_images`.
        masks: N, the same for all images; the paper takes 4000 and 8000, less is noisier.
        cells: Cells of a grid, along each side.
        keep: Share of cells that are kept.
        seed: Seed of the masks.
        fill: What shows where a mask is 0.
        score: Score as for `explain_images`.
        logits: Logits as for `explain_images`.
        memory: Bytes that one forward may take, about; None is 32 MiB on
            a CPU, 512 MiB elsewhere.
    """
    if masks < 1 or cells < 1 or not 0 < keep < 1:
        raise UserError(
            f"masks is {masks}, cells {cells}, keep {keep}: give 1 or more masks and cells, and a "
            "share between 0 and 1"
        )
    scorer = make_scorer(network, images, classes, score=score, logits=logits, memory=memory)
    size = (images.shape[-2], images.shape[-1])
    random_masks = _RandomMasks(masks, cells, keep, size, seed, images.device)
    masked_scores = scorer.score_masks(lambda _, number: random_masks(number), masks, fill)
    total = masked_scores.new_zeros(*masked_scores.shape[:2], *size)
    for part in torch.split(torch.arange(masks, device=images.device), scorer.chunk_size):
        with torch.autocast(images.device.type, enabled=False):
            total += torch.einsum(
                "bnm,mhw->bnhw",
                masked_scores[..., part],
                random_masks(part).to(masked_scores.dtype),
            )
    return scorer.match_classes(total / (masks * keep))


@torch.no_grad()
def score_cam(
    network: nn.Module,
    images: Images,
    layers: Sequence[str] | None = None,
    classes: Classes = None,
    *,
    fill: Fill = "zero",
    score: Score = "logit",
    layout: Layout = "auto",
    logits: Logits = None,
    memory: int | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """Score-CAM: sum_k w_k A_kij, w = softmax over k of S(x times unit k's enlarged map in [0, 1]).

    Wang et al. 2020, algorithm 1, https://arxiv.org/abs/1910.01279. The score of a black image,
    which the paper subtracts, cancels in the softmax. The authors' code has no softmax over units:
    its w_k is the class's probability. We follow the paper; `score` chooses what S is. A unit that
    is constant in space shows nothing and gets no weight, as in their code. A layer costs as many
    forwards an image as it has units.

    Args:
        network: Network as for `explain.gradcam.explain_images`, like all that isn't named here.
        images: Images as for `explain_images`.
        layers: Layers as for `explain_images`.
        classes: Classes as for `explain_images`.
        fill: What shows where a unit is 0; "zero" is the paper's product.
        score: Score as for `explain_images`.
        layout: Layout as for `explain_images`.
        logits: Logits as for `explain_images`.
        memory: Bytes that one forward may take, about; None is 32 MiB on
            a CPU, 512 MiB elsewhere.
    """
    explanation = explain_images(
        network, images, layers, score=score, layout=layout, logits=logits, maps=False
    )
    scorer = make_scorer(network, images, classes, score=score, logits=logits, memory=memory)
    size = (images.shape[-2], images.shape[-1])
    maps = {}
    for name, values in explanation.activations.items():
        activations = upcast(values)
        units = activations.shape[1]

        def unit_mask(
            image: Tensor, number: Tensor, layer_activations: Tensor = activations
        ) -> Tensor:
            return normalize(upsample(layer_activations[image, number], size))

        unit_scores = scorer.score_masks(unit_mask, units, fill)
        varies = activations.flatten(2).amax(2) > activations.flatten(2).amin(2)
        varying_scores = torch.where(varies[:, None], unit_scores, -torch.inf)
        # Where every unit is constant the softmax is of nothing.
        weights = varying_scores.softmax(2).nan_to_num()
        with torch.autocast(images.device.type, enabled=False):
            combined = torch.einsum("bnk,bkhw->bnhw", weights.to(activations), activations)
        maps[name] = scorer.match_classes(combined)
    return maps


def _starts(side: int, patch: int, stride: int, device: torch.device) -> Tensor:
    """Where squares begin along a side; the last one ends at the border."""
    last = side - patch
    starts = list(range(0, last + 1, stride))
    return torch.tensor(starts if starts[-1] == last else [*starts, last], device=device)


def _inside(starts: Tensor, patch: int, side: int) -> Tensor:
    """Which pixels of a side each interval has, [n, side]."""
    places = torch.arange(side, device=starts.device)
    return (places >= starts[:, None]) & (places < starts[:, None] + patch)


class _RandomMasks:
    """RISE's masks; grids and places are kept, pixels are made when asked for."""

    def __init__(
        self,
        masks: int,
        cells: int,
        keep: float,
        size: tuple[int, int],
        seed: int,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size = size
        self.cell = tuple(-(-side // cells) for side in size)
        grids = torch.rand(masks, 1, cells, cells, generator=generator) < keep
        self.grids = grids.float().to(device)
        offsets = [torch.randint(side, (masks,), generator=generator) for side in self.cell]
        self.tops, self.lefts = (offset.to(device) for offset in offsets)

    def __call__(self, number: Tensor) -> Tensor:
        cells = self.grids.shape[-1]
        large = [(cells + 1) * side for side in self.cell]
        grown = torch.nn.functional.interpolate(
            self.grids[number], size=large, mode="bilinear", align_corners=False
        )[:, 0]
        rows, columns = (
            starts[number, None] + torch.arange(side, device=number.device)
            for starts, side in zip((self.tops, self.lefts), self.size, strict=True)
        )
        first = torch.arange(len(number), device=number.device)[:, None, None]
        return grown[first, rows[:, :, None], columns[:, None]]
