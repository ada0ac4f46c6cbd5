"""How much of the image a map covers. Small maps win, whatever they show.

On a ladder of ever worse maps these three measures rank nearly perfectly, yet they put the mask of
a distractor first. They are an axis beside faithfulness, never a ranking. All take the absolute
values, so rectify a map first if only its evidence for the class counts.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from camdistill.explain.maps import normalize
from camdistill.perturb.ranks import check_finite
from camdistill.types import Maps, PerImage


def gini(maps: Maps) -> PerImage:
    """Returns the Gini index of the absolute values: 0 if constant, near 1 for a single pixel.

    Chalasani et al. 2020, https://arxiv.org/abs/1810.06583, section 2. A blank map is constant: 0.
    """
    values = _sizes(maps).sort(1).values
    count = values.shape[1]
    places = torch.arange(1, count + 1, device=values.device, dtype=values.dtype)
    total = values.sum(1)
    weighted = (values * (count - places + 0.5)).sum(1)
    share = weighted / torch.where(total > 0, total, 1)
    return torch.where(total > 0, 1 - 2 * share / count, 0)


def entropy(maps: Maps) -> PerImage:
    """Returns the entropy in nats of the absolute values as shares of their sum.

    Bhatt et al. 2020, https://arxiv.org/abs/2005.00631, section 3.3. A constant map has ln(h w),
    the largest value. A blank map counts as constant (Quantus gives NaN).
    """
    values = _sizes(maps)
    total = values.sum(1, keepdim=True)
    shares = torch.where(total > 0, values / torch.where(total > 0, total, 1), 1 / values.shape[1])
    nats: Tensor = torch.special.entr(shares).sum(1)
    return nats


def mean_size(maps: Maps) -> PerImage:
    """Returns the mean of the min-max normalized map, in [0, 1]: the complexity in ADCC.

    Poppi et al. 2021, https://arxiv.org/abs/2104.10252, eq. 3. A constant map has no range; its
    value is 1, the worst.
    """
    check_finite(maps)
    share = normalize(maps)
    constant = (share == 0).flatten(1).all(1)
    return torch.where(constant, 1, share.mean((1, 2)))


def _sizes(maps: Maps) -> Float[Tensor, "batch pixels"]:
    """Absolute values as shares of each map's largest, so that sums don't overflow."""
    check_finite(maps)
    float_maps = maps if maps.dtype == torch.float64 else maps.float()
    return normalize(float_maps, "max").abs().flatten(1)
