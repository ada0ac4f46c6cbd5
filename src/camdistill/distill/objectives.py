"""What a network's own maps can be trained to be: one value an image, lower is better.

All are pure and differentiable through the maps: give them maps with a graph
(`grad_cam(..., grad="full")`) and their gradient reaches the weights. Maps are raw and signed, at
the images' resolution where images are changed; sums are in float32 (float64 stays). A map that
says nothing - constant, or nowhere positive where only the evidence counts - has no gradient.

A map can be trained without the decision changing (Heo et al. 2019,
https://arxiv.org/abs/1902.02041), so none of these may judge what it was trained on.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from camdistill.explain.maps import relu
from camdistill.measure.faithfulness import faithfulness_correlation
from camdistill.perturb.bank import Bank
from camdistill.perturb.batched_forward import forward_in_chunks
from camdistill.perturb.probability import log_probabilities
from camdistill.types import Images, Labels, Logits, Maps, PerImage

Forward = Callable[[Images], Logits]
"""A network with a graph to its weights, or with constant ones."""
Form = Literal["log", "probability"]

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
TEMPERATURE = 0.1  # ID-ExpO's, a 64th of the map's range, is 0.06 for a range of 4 deviations
_HALVINGS = {torch.float32: 26, torch.float64: 48}  # of a bracket that is a few deviations wide


def soft_masks(
    maps: Maps, shares: Sequence[float], temperature: float = TEMPERATURE
) -> Float[Tensor, "batch levels height width"]:
    """Soft masks of a map's largest values: at each level exactly that share of the image.

    sigmoid((m - t) / (temperature sd(m))), with t such that the mask's mean is the share: the
    masks that have the most of the map plus their entropy among all of that size. Yoshikawa and
    Iwata 2024 (ID-ExpO, https://arxiv.org/abs/2310.12553) take the midpoint between two sorted
    values for t and the mean gap for the scale. Their masks' sizes depend on the map's histogram,
    so that a network can show more of an image by making its map flat on one side; and their
    logarithm of the map's softmax is the map up to a constant, which cancels. The gradient counts
    how t and sd move: a mask does not change with the map's level and scale.

    Args:
        maps: A constant one gives the share everywhere.
        shares: In (0, 1).
        temperature: In standard deviations of the map; towards 0 the masks become hard.
    """
    if not all(0 < share < 1 for share in shares):
        raise ValueError(f"shares are {list(shares)}; they lie between 0 and 1")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    height, width = maps.shape[1:]
    values = _standardize(_upcast(maps).flatten(1))[:, None] / temperature
    target_shares = torch.tensor(list(shares), dtype=values.dtype, device=values.device)[
        None, :, None
    ]
    limit = _find_limit(values.detach(), target_shares)
    slope = torch.sigmoid(values.detach() - limit)
    slope = slope * (1 - slope)
    # How the limit moves with the values (implicit function theorem); its value is right already.
    total = slope.sum(2, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    limit_shift = (slope / total * (values - values.detach())).sum(2, keepdim=True)
    masks = torch.sigmoid(values - (limit + limit_shift))
    return masks.view(len(maps), len(shares), height, width)


def insertion_deletion(
    forward: Forward,
    images: Images,
    classes: Labels,
    maps: Maps,
    replacement: Images,
    *,
    shares: Sequence[float] = LEVELS,
    temperature: float = TEMPERATURE,
    form: Form = "probability",
    deletion: float = 1.0,
) -> PerImage:
    """Soft deletion minus soft insertion: what is shown should suffice, what is hidden be needed.

    Yoshikawa and Iwata 2024 (ID-ExpO). With a the soft mask of a level, x the image and b what
    stands where it is hidden:

    - "log": mean over levels of -log p(a x + (1 - a) b), plus `deletion` times the mean of
      log p((1 - a) x + a b) less log p(x): theirs. It has no lower bound.
    - "probability": the same of p, without p(x): the metrics themselves, in [-1, `deletion`].

    Deletion is met by fragility too: a network that answers nothing to any changed image has the
    best of it. Ask a network with constant weights (`forward`) to leave the map as the only way.

    Args:
        forward: Answers the changed images, each by itself; it is given some of them at a time.
        images: In [0, 1].
        classes: Classes whose probability is meant.
        maps: At the images' resolution.
        replacement: What stands where an image is hidden: a blurred copy, never black.
        shares: Shares of the image that each level shows or hides.
        temperature: Temperature of the masks.
        form: Form of the loss.
        deletion: Weight of deletion; 0 is insertion alone.
    """
    masks = soft_masks(maps, shares, temperature).to(images.dtype)[:, :, None]
    inserted = torch.lerp(replacement[:, None], images[:, None], masks)
    changed_images = [inserted.flatten(0, 1)]
    if deletion:
        changed_images.append(
            torch.lerp(images[:, None], replacement[:, None], masks).flatten(0, 1)
        )
        if form == "log":
            changed_images.append(images)
    log_probs = log_probabilities(_upcast(forward_in_chunks(forward, torch.cat(changed_images))))
    count = len(images) * len(shares)

    def class_scores(rows: Tensor) -> Tensor:
        rows_by_image = rows.view(len(images), -1, rows.shape[1])
        indices = classes[:, None, None].expand(-1, rows_by_image.shape[1], 1)
        scores = rows_by_image.gather(2, indices)[..., 0]
        return scores if form == "log" else scores.exp()

    loss: Tensor = -class_scores(log_probs[:count]).mean(1)
    if deletion:
        loss = loss + deletion * class_scores(log_probs[count : 2 * count]).mean(1)
        if form == "log":
            loss = loss - deletion * class_scores(log_probs[2 * count :])[:, 0]
    return loss


def unfaithfulness(maps: Maps, bank: Bank) -> PerImage:
    """1 - faithfulness correlation of the map with a perturbation bank, in [0, 2].

    The bank's answers are constant: the map is fitted to what the network does, not the other way
    round. See `measure.faithfulness.faithfulness_correlation`.
    """
    return 1 - faithfulness_correlation(maps, bank)


def contrastive_consistency(maps: Maps, moved_maps: Maps, temperature: float = 0.5) -> PerImage:
    """A view's map should be the image's map, moved: more so than any other image's.

    CGC (Pillai et al. 2022, https://arxiv.org/abs/2110.00527): InfoNCE of cosines, with
    the maps of the batch's other images as negatives. Their map is HiResCAM.

    Args:
        maps: Maps of the views, raw; rectified here.
        moved_maps: The images' own maps under the same views.
        temperature: Temperature of the cosines; theirs is 0.5.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    rows, columns = (
        _normalize_rows(relu(_upcast(raw_maps)).flatten(1)) for raw_maps in (maps, moved_maps)
    )
    similarities = rows @ columns.T / temperature
    return similarities.logsumexp(1) - similarities.diagonal()


def energy_outside(maps: Maps, masks: Bool[Tensor, "batch height width"]) -> PerImage:
    """Share of the map's positive part that lies outside the mask, in [0, 1].

    1 - energy pointing game (Rao et al. 2023, ICCV). An
    image without a mask contributes 0, and so does a map that is nowhere positive.
    """
    evidence = relu(_upcast(maps)).flatten(1)
    scale = evidence.detach().amax(1, keepdim=True)
    evidence = evidence / torch.where(scale > 0, scale, 1)
    total = evidence.sum(1)
    outside = (evidence * ~masks.flatten(1)).sum(1)
    has_energy = masks.flatten(1).any(1) & (total > 0)
    return torch.where(has_energy, outside / torch.where(has_energy, total, 1), 0)


def _find_limit(
    values: Float[Tensor, "batch 1 cells"], target_shares: Float[Tensor, "1 levels 1"]
) -> Float[Tensor, "batch levels 1"]:
    """Where sigmoid(values - limit) has the wanted mean, by bisection."""
    edge = torch.log(
        target_shares / (1 - target_shares)
    )  # of equal values the limit is exactly there
    low = values.amin(2, keepdim=True) - edge
    high = values.amax(2, keepdim=True) - edge
    for _ in range(_HALVINGS[values.dtype]):
        middle = (low + high) / 2
        more = torch.sigmoid(values - middle).mean(2, keepdim=True) > target_shares
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return (low + high) / 2


def _standardize(rows: Float[Tensor, "batch cells"]) -> Float[Tensor, "batch cells"]:
    """With mean 0 and deviation 1; 0 where what is left after centring is rounding."""
    largest = rows.detach().abs().amax(1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1)
    centered = rows - rows.mean(1, keepdim=True)
    blank = centered.detach().abs().amax(1, keepdim=True) <= 16 * torch.finfo(rows.dtype).eps
    square = torch.where(blank, 1, centered.square().mean(1, keepdim=True))
    return torch.where(blank, 0, centered / square.sqrt())


def _normalize_rows(rows: Float[Tensor, "batch cells"]) -> Float[Tensor, "batch cells"]:
    scale = rows.detach().abs().amax(1, keepdim=True)
    return F.normalize(rows / torch.where(scale > 0, scale, 1), dim=1)


def _upcast(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
