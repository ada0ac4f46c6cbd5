"""Receptive fields as spans of pixels along each axis.

Unit u of a layer sees the pixels [start + u stride, start + u stride + size - 1] along an axis
(Araujo et al. 2019, https://distill.pub/2019/computing-receptive-fields, sections 2 and 3).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Span:
    """What units see along one axis, in pixels; it may reach beyond the image.

    Attributes:
        size: How many pixels.
        stride: Pixels from one unit to the next.
        start: First pixel of unit 0; negative where it begins in the padding.
    """

    size: int = 1
    stride: int = 1
    start: int = 0

    def apply_window(self, kernel: int, stride: int, padding: int, dilation: int = 1) -> "Span":
        """After a convolution or pooling."""
        return Span(
            self.size + (kernel - 1) * dilation * self.stride,
            self.stride * stride,
            self.start - padding * self.stride,
        )

    def join(self, other: "Span") -> "Span | None":
        """What both see together; None if their units don't move together."""
        if self.stride != other.stride:
            return None
        start = min(self.start, other.start)
        end = max(self.start + self.size, other.start + other.size)
        return Span(end - start, self.stride, start)

    def pixels(self, unit: int) -> tuple[int, int]:
        """First pixel, and the one after the last."""
        first = self.start + unit * self.stride
        return first, first + self.size


@dataclass(frozen=True)
class ReceptiveField:
    """What a layer's units see.

    Attributes:
        rows: Along the height.
        columns: Along the width.
        gated: Whether a factor computed from the whole image (squeeze and excitation, group
            normalization) multiplies it: the field is then of all other paths.
    """

    rows: Span
    columns: Span
    gated: bool = False

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Top, left, bottom, right in pixels, the last two exclusive; may exceed the image."""
        (top, bottom), (left, right) = self.rows.pixels(row), self.columns.pixels(column)
        return top, left, bottom, right


Field = ReceptiveField | Literal["unknown"] | None
