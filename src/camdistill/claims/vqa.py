"""Row 20: a network that answers questions about an image, explained through a score."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from camdistill.claims.claim import Lab, Measured, Row, gain, mean
from camdistill.claims.networks.small_networks import Examples, Recipe, fitted
from camdistill.claims.networks.visual_features import WIDTH, Look, Sight, features_of, log_odds
from camdistill.claims.two_object_scenes import Scenes, held_out, lessons, taught
from camdistill.claims.vqa_data import APART, Asked, Language, Words, all_asked
from camdistill.distill.optimization import Optimisation
from camdistill.explain.compare import spearman
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.guided import guided_backprop
from camdistill.explain.maps import relu, resize, upsample
from camdistill.explain.perturbation import occlusion
from camdistill.explain.variants import hires_cam
from camdistill.measure.localization import energy_pointing_game
from camdistill.networks.weights import weights_digest
from camdistill.types import Activations, Images, Maps, PerImage

IMAGES = 8000
RECIPE = Recipe(24, 256, Optimisation("adamw", lr=5e-3, weight_decay=0.05))
PATCH, STRIDE = 8, 4  # of the occlusion: a quarter of an image's side, as large as an object
WORD, HIDDEN = 16, 64
METHODS = ("grad_cam", "guided_backprop", "hires_cam")


class Answerer(nn.Module):
    """A question, read by a GRU, scales and shifts what the convolutions see."""

    def __init__(self, sight: Sight, words: int, answers: int) -> None:
        super().__init__()
        self.sight = sight
        self.look = Look(sight.units)
        self.embedding = nn.Embedding(words, WORD)
        self.reading = nn.GRU(WORD, HIDDEN, batch_first=True)
        self.turning = nn.Linear(HIDDEN, 2 * WIDTH)
        self.saying = nn.Sequential(
            nn.Linear(self.look.size + HIDDEN, 128), nn.ReLU(), nn.Linear(128, answers)
        )

    def forward(self, images: Images, questions: Words) -> Float[Tensor, "batch answers"]:
        """Scores of all answers."""
        return self.answer(self.sight(images), questions)

    def answer(self, features: Activations, questions: Words) -> Float[Tensor, "batch answers"]:
        """The same from features."""
        _, last = self.reading(self.embedding(questions))
        meaning = last[0]
        scale, shift = self.turning(meaning).chunk(2, dim=1)
        seen = self.look(features, scale, shift)
        return self.saying(torch.cat([seen, meaning], 1))  # type: ignore[no-any-return]


class About(nn.Module):
    """An answering network that was asked one question: what it takes is images alone.

    Its output is a dict, as such networks give more than one thing: a score must take it apart.
    """

    def __init__(self, network: Answerer, question: Int[Tensor, "6"]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("question", question, persistent=False)

    def forward(self, images: Images) -> dict[str, Tensor]:
        """Scores of all answers."""
        question = self.get_buffer("question").expand(len(images), -1)
        return {"answers": self.network(images, question)}


def answerer(lab: Lab) -> Answerer:
    """A network that was taught true answers."""
    language = Language(lab.shapes.class_names)

    def build() -> Answerer:
        sight = Sight(copy.deepcopy(lab.student))
        return Answerer(sight, len(language.words), len(language.answers))

    def examples() -> Examples:
        scenes = lessons(lab, IMAGES)
        features = features_of(Sight(lab.student), scenes.images)
        whole = [one for kind in all_asked(language, scenes).values() for one in kind]
        columns = [torch.stack(part, 1) for part in zip(*whole, strict=True)]
        questions, answers, _, sensible = columns
        return features, questions, torch.where(sensible, answers, -1)

    known = language.spelled(language.questions).to(lab.device)
    return fitted(
        lab,
        "answerer",
        build,
        examples,
        lambda network, some: _loss(network, some, known),
        recipe=RECIPE,
        settings={
            "shapes": taught(lab, IMAGES, objects=2).fingerprint,
            "student": weights_digest(lab.student),
            "apart": APART,
        },
    )


def _loss(network: Answerer, examples: Examples, known: Words) -> PerImage:
    """Of one question of each image, drawn: the look at an image is the same for all."""
    features, questions, answers = examples
    network.sight.eval()
    # By the CPU's generator, which is seeded for the training.
    drawn = torch.randint(questions.shape[1], (len(features), 1)).to(features.device)
    question, answer = (one.gather(1, drawn)[:, 0] for one in (questions, answers))
    scores = network.answer(features.float(), known[question])
    return F.cross_entropy(scores.float(), answer, reduction="none", ignore_index=-1)


class Explained(NamedTuple):
    """What was measured of a question about each image.

    Attributes:
        right: Whether the answer is true.
        correlation: Of maps with occlusion, by method.
        energy: Of Grad-CAM, on both objects.
    """

    right: PerImage
    correlation: dict[str, PerImage]
    energy: Float[Tensor, "n 2"]


def answers(lab: Lab) -> Row:
    """Row 20: maps of an answer agree with occlusion, and lie on what the question is about."""
    network, scenes, language = answerer(lab), held_out(lab), Language(lab.shapes.class_names)
    ours: list[Measured] = []
    correlations: dict[str, list[PerImage]] = {name: [] for name in METHODS}
    moves: list[PerImage] = []
    for kind, asked in all_asked(language, scenes).items():
        lab.tell(f"questions about {kind}")
        found = [explained(network, language, scenes, one) for one in asked[:2]]
        told = [
            torch.where(one.sensible, each.right, torch.nan)
            for one, each in zip(asked, found, strict=False)
        ]
        ours.append(mean(kind, torch.stack(told).nanmean(0), lab, RIGHT))
        for name, known in correlations.items():
            known.append(_where_right(told, [each.correlation[name] for each in found]))
            ours.append(mean(f"{kind}: {name}", known[-1], lab, CORRELATION))
        moves.append(moved(asked[:2], found, told))
        ours.append(mean(kind, moves[-1], lab, MOVE))
    whole = {name: torch.stack(known).nanmean(0) for name, known in correlations.items()}
    overall = [mean(f"all: {name}", one, lab, CORRELATION) for name, one in whole.items()]
    beyond = gain(
        "all: grad_cam - guided_backprop",
        whole["grad_cam"],
        whole["guided_backprop"],
        lab,
        CORRELATION,
    )
    follow = mean("all", torch.stack(moves).nanmean(0), lab, MOVE)
    return Row(
        number="20",
        claim="Of a network that answers questions, Grad-CAM agrees with occlusion more than "
        "guided backpropagation does, and shows what the question is about",
        paper="rank correlation with occlusion: Grad-CAM 0.60, guided backpropagation 0.42",
        ours=(*ours, *overall, beyond, follow),
        criterion="over all questions the rank correlation of grad_cam is above that of "
        "guided_backprop, and its energy moves to the object that is asked about (whole intervals)",
        passed=beyond.above and follow.above,
        note="where the answers are true; the log odds of the answer are explained, at the last "
        f"convolutional layer; occlusion is of {PATCH} pixels every {STRIDE}. Energy on an object "
        "when it is asked about, less when the other one is. hires_cam is Grad-CAM whose gradients "
        "are not pooled over places, which answers may be read from",
    )


RIGHT, CORRELATION, MOVE = (
    "answers that are true",
    "rank correlation with occlusion",
    "energy that follows the question",
)


def explained(network: Answerer, language: Language, scenes: Scenes, asked: Asked) -> Explained:
    """Explains the own answers to a question about each image, those that are alike at once."""
    device = scenes.images.device
    known = language.spelled(language.questions).to(device)
    with torch.no_grad():
        own = network(scenes.images, known[asked.questions]).argmax(1)
    count = len(own)
    correlation = {name: torch.empty(count, device=device) for name in METHODS}
    energy = torch.empty(count, 2, device=device)
    for question, answer in sorted(set(zip(asked.questions.tolist(), own.tolist(), strict=True))):
        rows = ((asked.questions == question) & (own == answer)).nonzero()[:, 0]
        maps = answer_maps(About(network, known[question]).eval(), scenes.images[rows], answer)
        hidden = maps.pop("occlusion")
        for name, values in maps.items():
            correlation[name][rows] = spearman(_cells(values), _cells(hidden))
        for one in (0, 1):
            energy[rows, one] = energy_pointing_game(maps["grad_cam"], scenes.masks[rows, one])
    return Explained((own == asked.answers).float(), correlation, energy)


def answer_maps(network: nn.Module, images: Images, answer: int) -> dict[str, Maps]:
    """Maps of one answer's log odds at the images' resolution, by method."""

    def score(output: dict[str, Tensor]) -> PerImage:
        scores = output["answers"]
        return log_odds(scores, torch.full((len(scores),), answer, device=scores.device))

    size = (images.shape[-2], images.shape[-1])
    (cam,) = grad_cam(network, images, score=score).values()
    (unpooled,) = hires_cam(network, images, score=score).values()
    return {
        "grad_cam": upsample(relu(cam), size),
        "guided_backprop": guided_backprop(network, images, score=score),
        "hires_cam": upsample(relu(unpooled), size),
        "occlusion": occlusion(network, images, patch=PATCH, stride=STRIDE, score=score),
    }


def moved(pair: Sequence[Asked], found: Sequence[Explained], told: Sequence[Tensor]) -> PerImage:
    """Energy on an object when it is asked about, less when the other one is."""
    first, second = (
        each.energy.gather(1, one.about[:, None])[:, 0]
        - other.energy.gather(1, one.about[:, None])[:, 0]
        for one, each, other in zip(pair, found, reversed(found), strict=True)
    )
    both = (told[0] == 1) & (told[1] == 1)
    return torch.where(both, (first + second) / 2, torch.nan)


def _where_right(told: Sequence[Tensor], values: Sequence[PerImage]) -> PerImage:
    kept = [
        torch.where(right == 1, one, torch.nan) for right, one in zip(told, values, strict=True)
    ]
    return torch.stack(kept).nanmean(0)


def _cells(maps: Maps) -> Float[Tensor, "batch rows columns"]:
    return resize(maps, (8, 8))
