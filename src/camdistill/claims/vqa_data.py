"""Questions about two objects, and their true answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from camdistill.claims.two_object_scenes import Scenes
from camdistill.types import Labels

SIDES = ("left", "right", "top", "bottom")
TONES = ("bright", "dark")
PLACES = ("left", "right")
APART = 4.0  # pixels between centers, or a side is not asked about

Words = Int[Tensor, "n 6"]


@dataclass(frozen=True)
class Language:
    """Questions and answers about Shapes.

    Attributes:
        shapes: Names of the classes.
    """

    shapes: tuple[str, ...]

    @property
    def questions(self) -> tuple[str, ...]:
        """All there are: of a shape by its side, of a brightness and a side by the shape."""
        return (
            *(f"which shape is on the {side}" for side in SIDES),
            *(f"is the {shape} bright or dark" for shape in self.shapes),
            *(f"on which side is the {shape}" for shape in self.shapes),
        )

    @property
    def answers(self) -> tuple[str, ...]:
        """Shapes, brightnesses, sides."""
        return (*self.shapes, *TONES, *PLACES)

    @property
    def words(self) -> tuple[str, ...]:
        """Of questions, in the order of their first use."""
        return tuple(dict.fromkeys(" ".join(self.questions).split()))

    def encode(self, questions: Sequence[str]) -> Words:
        """Questions as numbers of words."""
        number = {word: index for index, word in enumerate(self.words)}
        return torch.tensor([[number[word] for word in question.split()] for question in questions])


class QuestionBatch(NamedTuple):
    """A question about each image, with its true answer.

    Attributes:
        questions: Numbers in `Language.questions`.
        answers: Numbers in `Language.answers`.
        about: Which of the two objects is asked about.
        sensible: Whether the image has an answer: two objects at one height have no upper one.
    """

    questions: Labels
    answers: Labels
    about: Labels
    sensible: Bool[Tensor, "n"]


def questions_about_side(scenes: Scenes, side: int) -> QuestionBatch:
    """Which shape is on a side."""
    axis = 1 if SIDES[side] in ("left", "right") else 0
    places = scenes.centers[:, :, axis]
    last = SIDES[side] in ("right", "bottom")
    about = places.argmax(1) if last else places.argmin(1)
    apart = (places[:, 0] - places[:, 1]).abs() >= APART
    answers = scenes.classes.gather(1, about[:, None])[:, 0]
    return QuestionBatch(torch.full_like(answers, side), answers, about, apart)


def questions_about_object(
    language: Language, scenes: Scenes, kind: str, which: int
) -> QuestionBatch:
    """The brightness or the side of one of the objects, named by its shape."""
    shapes, classes = len(language.shapes), scenes.classes[:, which]
    about = torch.full_like(classes, which)
    if kind == "brightness":
        dark = (~scenes.bright[:, which]).long()
        sensible = torch.ones_like(dark, dtype=torch.bool)
        return QuestionBatch(len(SIDES) + classes, shapes + dark, about, sensible)
    across = scenes.centers[:, :, 1]
    right = (across[:, which] > across[:, 1 - which]).long()
    apart = (across[:, 0] - across[:, 1]).abs() >= APART
    first = shapes + len(TONES)
    return QuestionBatch(len(SIDES) + shapes + classes, first + right, about, apart)


def all_questions(language: Language, scenes: Scenes) -> dict[str, list[QuestionBatch]]:
    """By type: of shapes four questions an image, of the others one of each object.

    The first two of a type are about different objects.
    """
    return {
        "shape": [questions_about_side(scenes, side) for side in range(len(SIDES))],
        "brightness": [
            questions_about_object(language, scenes, "brightness", which) for which in (0, 1)
        ],
        "side": [questions_about_object(language, scenes, "side", which) for which in (0, 1)],
    }
