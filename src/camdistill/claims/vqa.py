"""Row 20: a network that answers questions about an image, explained through a score."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from camdistill.claims.claim import ClaimMeasurement, ClaimResult, ClaimSetup, gain, mean
from camdistill.claims.networks.small_networks import Examples, SmallNetworkRecipe, fit_or_load
from camdistill.claims.networks.visual_features import (
    WIDTH,
    FeatureEncoder,
    FeatureExtractor,
    features_of,
    log_odds,
)
from camdistill.claims.two_object_scenes import (
    Scenes,
    draw_test_scenes,
    draw_training_scenes,
    training_shapes,
)
from camdistill.claims.vqa_data import APART, Language, QuestionBatch, Words, all_questions
from camdistill.distill.optimization import Optimization
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
RECIPE = SmallNetworkRecipe(24, 256, Optimization("adamw", lr=5e-3, weight_decay=0.05))
PATCH, STRIDE = 8, 4  # of the occlusion: a quarter of an image's side, as large as an object
WORD, HIDDEN = 16, 64
METHODS = ("grad_cam", "guided_backprop", "hires_cam")


class VQANetwork(nn.Module):
    """A question, read by a GRU, scales and shifts what the convolutions see."""

    def __init__(self, backbone: FeatureExtractor, words: int, answers: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.encoder = FeatureEncoder(backbone.units)
        self.embedding = nn.Embedding(words, WORD)
        self.question_gru = nn.GRU(WORD, HIDDEN, batch_first=True)
        self.modulation = nn.Linear(HIDDEN, 2 * WIDTH)
        self.head = nn.Sequential(
            nn.Linear(self.encoder.size + HIDDEN, 128), nn.ReLU(), nn.Linear(128, answers)
        )

    def forward(self, images: Images, questions: Words) -> Float[Tensor, "batch answers"]:
        """Scores of all answers."""
        return self.answer(self.backbone(images), questions)

    def answer(self, features: Activations, questions: Words) -> Float[Tensor, "batch answers"]:
        """The same from features."""
        _, states = self.question_gru(self.embedding(questions))
        question_vector = states[0]
        scale, shift = self.modulation(question_vector).chunk(2, dim=1)
        encoded = self.encoder(features, scale, shift)
        return self.head(torch.cat([encoded, question_vector], 1))  # type: ignore[no-any-return]


class SingleQuestionNetwork(nn.Module):
    """An answering network that was asked one question: what it takes is images alone.

    Its output is a dict, as such networks give more than one thing: a score must take it apart.
    """

    def __init__(self, network: VQANetwork, question: Int[Tensor, "6"]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("question", question, persistent=False)

    def forward(self, images: Images) -> dict[str, Tensor]:
        """Scores of all answers."""
        question = self.get_buffer("question").expand(len(images), -1)
        return {"answers": self.network(images, question)}


def train_vqa_network(setup: ClaimSetup) -> VQANetwork:
    """A network that was taught true answers."""
    language = Language(setup.shapes.class_names)

    def build() -> VQANetwork:
        backbone = FeatureExtractor(copy.deepcopy(setup.student))
        return VQANetwork(backbone, len(language.words), len(language.answers))

    def examples() -> Examples:
        scenes = draw_training_scenes(setup, IMAGES)
        features = features_of(FeatureExtractor(setup.student), scenes.images)
        entries = [entry for kind in all_questions(language, scenes).values() for entry in kind]
        columns = [torch.stack(part, 1) for part in zip(*entries, strict=True)]
        questions, answers, _, sensible = columns
        return features, questions, torch.where(sensible, answers, -1)

    question_words = language.encode(language.questions).to(setup.device)
    return fit_or_load(
        setup,
        "answerer",
        build,
        examples,
        lambda network, batch: _loss(network, batch, question_words),
        recipe=RECIPE,
        settings={
            "shapes": training_shapes(setup, IMAGES, objects=2).fingerprint,
            "student": weights_digest(setup.student),
            "apart": APART,
        },
    )


def _loss(network: VQANetwork, examples: Examples, question_words: Words) -> PerImage:
    """Of one question of each image, drawn: the look at an image is the same for all."""
    features, questions, answers = examples
    network.backbone.eval()
    # By the CPU's generator, which is seeded for the training.
    picks = torch.randint(questions.shape[1], (len(features), 1)).to(features.device)
    question, answer = (column.gather(1, picks)[:, 0] for column in (questions, answers))
    scores = network.answer(features.float(), question_words[question])
    return F.cross_entropy(scores.float(), answer, reduction="none", ignore_index=-1)


class QuestionScores(NamedTuple):
    """What was measured of a question about each image.

    Attributes:
        right: Whether the answer is true.
        correlation: Correlation of maps with occlusion, by method.
        energy: Energy of Grad-CAM, on both objects.
    """

    right: PerImage
    correlation: dict[str, PerImage]
    energy: Float[Tensor, "n 2"]


def run_vqa(setup: ClaimSetup) -> ClaimResult:
    """Row 20: maps of an answer agree with occlusion, and lie on what the question is about."""
    network, scenes, language = (
        train_vqa_network(setup),
        draw_test_scenes(setup),
        Language(setup.shapes.class_names),
    )
    ours: list[ClaimMeasurement] = []
    correlations: dict[str, list[PerImage]] = {name: [] for name in METHODS}
    moves: list[PerImage] = []
    for kind, batches in all_questions(language, scenes).items():
        setup.announce(f"questions about {kind}")
        scores_by_question = [
            score_question(network, language, scenes, entry) for entry in batches[:2]
        ]
        correct = [
            torch.where(entry.sensible, scores.right, torch.nan)
            for entry, scores in zip(batches, scores_by_question, strict=False)
        ]
        ours.append(mean(kind, torch.stack(correct).nanmean(0), setup, RIGHT))
        for name, values in correlations.items():
            values.append(
                _mean_where_correct(
                    correct, [scores.correlation[name] for scores in scores_by_question]
                )
            )
            ours.append(mean(f"{kind}: {name}", values[-1], setup, CORRELATION))
        moves.append(energy_shift(batches[:2], scores_by_question, correct))
        ours.append(mean(kind, moves[-1], setup, MOVE))
    mean_correlations = {
        name: torch.stack(values).nanmean(0) for name, values in correlations.items()
    }
    overall = [
        mean(f"all: {name}", entry, setup, CORRELATION) for name, entry in mean_correlations.items()
    ]
    difference = gain(
        "all: grad_cam - guided_backprop",
        mean_correlations["grad_cam"],
        mean_correlations["guided_backprop"],
        setup,
        CORRELATION,
    )
    mean_shift = mean("all", torch.stack(moves).nanmean(0), setup, MOVE)
    return ClaimResult(
        number="20",
        claim="Of a network that answers questions, Grad-CAM agrees with occlusion more than "
        "guided backpropagation does, and shows what the question is about",
        paper="rank correlation with occlusion: Grad-CAM 0.60, guided backpropagation 0.42",
        ours=(*ours, *overall, difference, mean_shift),
        criterion="over all questions the rank correlation of grad_cam is above that of "
        "guided_backprop, and its energy moves to the object that is asked about (whole intervals)",
        passed=difference.above_zero and mean_shift.above_zero,
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


def score_question(
    network: VQANetwork, language: Language, scenes: Scenes, batch: QuestionBatch
) -> QuestionScores:
    """Explains the own answers to a question about each image, those that are alike at once."""
    device = scenes.images.device
    question_words = language.encode(language.questions).to(device)
    with torch.no_grad():
        predictions = network(scenes.images, question_words[batch.questions]).argmax(1)
    count = len(predictions)
    correlation = {name: torch.empty(count, device=device) for name in METHODS}
    energy = torch.empty(count, 2, device=device)
    for question, answer in sorted(
        set(zip(batch.questions.tolist(), predictions.tolist(), strict=True))
    ):
        rows = ((batch.questions == question) & (predictions == answer)).nonzero()[:, 0]
        maps = answer_maps(
            SingleQuestionNetwork(network, question_words[question]).eval(),
            scenes.images[rows],
            answer,
        )
        occlusion_maps = maps.pop("occlusion")
        for name, values in maps.items():
            correlation[name][rows] = spearman(_cells(values), _cells(occlusion_maps))
        for which in (0, 1):
            energy[rows, which] = energy_pointing_game(maps["grad_cam"], scenes.masks[rows, which])
    return QuestionScores((predictions == batch.answers).float(), correlation, energy)


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


def energy_shift(
    pair: Sequence[QuestionBatch],
    scores_by_question: Sequence[QuestionScores],
    correct: Sequence[Tensor],
) -> PerImage:
    """Energy on an object when it is asked about, less when the other one is."""
    first, second = (
        scores.energy.gather(1, batch.about[:, None])[:, 0]
        - other_scores.energy.gather(1, batch.about[:, None])[:, 0]
        for batch, scores, other_scores in zip(
            pair, scores_by_question, reversed(scores_by_question), strict=True
        )
    )
    both = (correct[0] == 1) & (correct[1] == 1)
    return torch.where(both, (first + second) / 2, torch.nan)


def _mean_where_correct(correct: Sequence[Tensor], values: Sequence[PerImage]) -> PerImage:
    masked = [
        torch.where(right == 1, entry, torch.nan)
        for right, entry in zip(correct, values, strict=True)
    ]
    return torch.stack(masked).nanmean(0)


def _cells(maps: Maps) -> Float[Tensor, "batch rows columns"]:
    return resize(maps, (8, 8))
