"""Samples images by their numbers, whatever their order or process."""

from jaxtyping import Int
from torch import Tensor

ALL = 1 << 62


def integers_by_id(ids: Int[Tensor, "batch"], seed: int) -> Int[Tensor, "batch"]:
    """A number in [0, 2^62) of each image, as good as random (the finaliser of SplitMix64)."""
    # int64 wraps around; a right shift must not drag the sign along.
    mixed = ids.long() * _signed(0x9E3779B97F4A7C15) + _signed(seed * 0xD1342543DE82EF95)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shift_right(mixed, shift)) * _signed(factor)
    return _shift_right(mixed ^ _shift_right(mixed, 31), 2)


def sample_mask(ids: Int[Tensor, "batch"], share: float, seed: int) -> Tensor:
    """Whether each image is among a share of all."""
    return integers_by_id(ids, seed) < int(share * ALL)


def _shift_right(values: Tensor, places: int) -> Tensor:
    return (values >> places) & ((1 << (64 - places)) - 1)


def _signed(number: int) -> int:
    number %= 1 << 64
    return number - (1 << 64) if number >= 1 << 63 else number
