"""The record of one student in the run log of a ranking."""

import base64
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StudentRecord:
    """What came out of one student.

    Attributes:
        key: Key of everything that decides the run: equal keys, equal runs.
        family: Which students.
        n: Images that it learned from.
        arm: Name of the arm: whose maps the student learned from.
        beta: Their weight.
        seed: The student's.
        val: Agreement with the teacher on the validation images.
        test: On the test images.
        kl: From the teacher's probabilities on the test images, in nats.
        agrees: Whether it agrees, by test image; packed.
        images: How many test images.
        seconds: Wall clock.
    """

    key: str
    family: str
    n: int
    arm: str
    beta: float
    seed: int
    val: float
    test: float
    kl: float
    agrees: str
    images: int
    seconds: float

    def scores(self) -> NDArray[np.bool_]:
        """Agreement by test image."""
        packed = np.frombuffer(base64.b64decode(self.agrees), np.uint8)
        return np.unpackbits(packed, count=self.images).astype(np.bool_)


def pack_bits(agrees: NDArray[np.bool_]) -> str:
    """Agreement by test image as text."""
    return base64.b64encode(np.packbits(agrees).tobytes()).decode()
