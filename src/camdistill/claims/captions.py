"""Row 18: a captioner of two objects, explained word by word through a score."""

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
from camdistill.distill.optimization import Optimization
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.guided import guided_backprop, guided_grad_cam
from camdistill.explain.maps import relu, upsample
from camdistill.measure.localization import inside_outside
from camdistill.networks.weights import weights_digest
from camdistill.types import Activations, Images, Labels, Maps, Masks, PerImage

IMAGES = 8000
STEPS = 9  # "a bright plus left of a dark bow" and the end
RECIPE = SmallNetworkRecipe(20, optimization=Optimization("adamw", lr=5e-3, weight_decay=0.05))
END = "<end>"
HIDDEN, WORD = 192, 32

Sentences = Int[Tensor, "n 9"]
WordScores = Float[Tensor, "batch 9 words"]


def vocabulary(shapes: Sequence[str]) -> tuple[str, ...]:
    """All words; the shapes come last."""
    return (END, "a", "bright", "dark", "above", "left", "of", *shapes)


def true_sentences(scenes: Scenes, shapes: Sequence[str]) -> list[str]:
    """The truth: "a bright plus above a dark bow", "a dark disc left of a dark tee".

    Objects are further apart either upwards or sideways: the upper or the left one comes first.
    """
    texts = []
    for index in range(len(scenes.images)):
        down, across = (scenes.centers[index, 1] - scenes.centers[index, 0]).tolist()
        upright = abs(down) > abs(across)
        first = 0 if (down if upright else across) > 0 else 1
        names = [
            f"a {'bright' if scenes.bright[index, which] else 'dark'} "
            f"{shapes[int(scenes.classes[index, which])]}"
            for which in (first, 1 - first)
        ]
        texts.append(f"{names[0]} {'above' if upright else 'left of'} {names[1]}")
    return texts


def encode_sentences(texts: Sequence[str], words: Sequence[str]) -> Sentences:
    """Sentences as numbers of words, the end repeated."""
    number = {word: index for index, word in enumerate(words)}
    rows = [[number[word] for word in sentence.split()] for sentence in texts]
    return torch.tensor([row + [number[END]] * (STEPS - len(row)) for row in rows])


class Captioner(nn.Module):
    """Convolutions and a GRU that says one word after the other, as Show and Tell has it.

    Vinyals et al. 2015, https://arxiv.org/abs/1411.4555.
    """

    def __init__(self, backbone: FeatureExtractor, words: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.encoder = FeatureEncoder(backbone.units)
        self.first_state = nn.Linear(self.encoder.size, HIDDEN)
        self.embedding = nn.Embedding(words, WORD)
        self.cell = nn.GRUCell(WORD, HIDDEN)
        self.word_head = nn.Linear(HIDDEN, words)

    def forward(self, images: Images) -> WordScores:
        """Scores of every word at every step, the likeliest being what the next step hears."""
        return self.speak(self.backbone(images), None)

    def speak(self, features: Activations, target_words: Sentences | None) -> WordScores:
        """The same from features; `target_words` are the words that it is told it said."""
        state = torch.tanh(self.first_state(self.encoder(features)))
        word = torch.zeros(len(features), dtype=torch.long, device=features.device)
        scores_by_step = []
        for step in range(STEPS):
            state = self.cell(self.embedding(word), state)
            scores = self.word_head(state)
            scores_by_step.append(scores)
            word = scores.argmax(1) if target_words is None else target_words[:, step]
        return torch.stack(scores_by_step, 1)


def train_captioner(setup: ClaimSetup) -> Captioner:
    """One that was taught true sentences."""
    names = setup.shapes.class_names
    words = vocabulary(names)

    def build() -> Captioner:
        return Captioner(FeatureExtractor(copy.deepcopy(setup.student)), len(words))

    def examples() -> Examples:
        scenes = draw_training_scenes(setup, IMAGES)
        targets = encode_sentences(true_sentences(scenes, names), words).to(setup.device)
        return features_of(FeatureExtractor(setup.student), scenes.images), targets

    def loss(network: Captioner, examples: Examples) -> PerImage:
        features, targets = examples
        network.backbone.eval()
        scores = network.speak(features.float(), targets).float()
        return F.cross_entropy(scores.transpose(1, 2), targets, reduction="none").mean(1)

    return fit_or_load(
        setup,
        "captioner",
        build,
        examples,
        loss,
        recipe=RECIPE,
        settings={
            "shapes": training_shapes(setup, IMAGES, objects=2).fingerprint,
            "student": weights_digest(setup.student),
        },
    )


class ShapeMention(NamedTuple):
    """A shape's word in each image's caption.

    Attributes:
        step: When it was said.
        word: Its number.
        masks: Masks of the object of that shape; empty where there is none, or two words name it.
    """

    step: Labels
    word: Labels
    masks: Masks


def find_mentions(
    predicted: Sentences, scenes: Scenes, words: Sequence[str], shapes: int, which: int
) -> ShapeMention:
    """The first or second word of a shape in captions, and what it stands for."""
    first = len(words) - shapes
    is_shape = predicted >= first
    order = is_shape.cumsum(1)
    is_word = is_shape & (order == which + 1)
    step = is_word.int().argmax(1)
    word = predicted.gather(1, step[:, None])[:, 0]
    matches = (scenes.classes == (word - first)[:, None]) & is_word.any(1)[:, None]
    masks = (scenes.masks & matches[:, :, None, None]).any(1)
    return ShapeMention(step, word, masks)


def run_captioning(setup: ClaimSetup) -> ClaimResult:
    """Row 18: maps of a word lie inside what it names."""
    network, scenes = train_captioner(setup), draw_test_scenes(setup)
    shapes = setup.shapes.class_names
    words = vocabulary(shapes)
    with torch.no_grad():
        predicted = network(scenes.images).argmax(2)
    truth = encode_sentences(true_sentences(scenes, shapes), words).to(setup.device)
    mentions = [find_mentions(predicted, scenes, words, len(shapes), which) for which in (0, 1)]
    ratios = _ratios_by_method(setup, network, scenes, mentions)
    guided_gain = gain(
        "guided_grad_cam - grad_cam", ratios["guided_grad_cam"], ratios["grad_cam"], setup, RATIO
    )
    grad_cam_gain = gain(
        "grad_cam - guided_backprop", ratios["grad_cam"], ratios["guided_backprop"], setup, RATIO
    )
    uniform_gain = gain("grad_cam - uniform", ratios["grad_cam"], ratios["uniform"], setup, RATIO)
    caption_texts = [
        " ".join(words[word] for word in row if words[word] != END)
        for row in predicted[:1].tolist()
    ]
    return ClaimResult(
        number="18",
        claim="Of a caption's words, maps lie inside the objects that they name: Guided Grad-CAM's "
        "most, then Grad-CAM's, then guided backpropagation's",
        paper="mean activation inside over outside: Guided Grad-CAM 6.38, Grad-CAM 3.27, guided "
        "backpropagation 2.32, uniform 1",
        ours=(
            *_caption_accuracies(setup, predicted, truth, mentions),
            *(mean(name, values, setup, RATIO) for name, values in ratios.items()),
            guided_gain,
            grad_cam_gain,
            uniform_gain,
        ),
        criterion="inside over outside: guided_grad_cam above grad_cam above guided_backprop, and "
        "grad_cam above uniform (paired differences, whole intervals)",
        passed=guided_gain.above_zero and grad_cam_gain.above_zero and uniform_gain.above_zero,
        note="maps at the last convolutional layer, of a word's log odds; means of an image's two "
        f"shape words, where they are true. Of the first image it says: {caption_texts[0]}",
    )


RATIO, RIGHT = "mean inside over mean outside", "share of the captioner that is right"


def _caption_accuracies(
    setup: ClaimSetup, predicted: Sentences, truth: Sentences, mentions: list[ShapeMention]
) -> list[ClaimMeasurement]:
    shapes = (
        torch.stack([mention.masks.flatten(1).any(1) for mention in mentions], 1).float().mean(1)
    )
    return [
        mean("whole captions", (predicted == truth).all(1).float(), setup, RIGHT),
        mean("words of shapes", shapes, setup, RIGHT),
    ]


def _ratios_by_method(
    setup: ClaimSetup, network: Captioner, scenes: Scenes, mentions: Sequence[ShapeMention]
) -> dict[str, PerImage]:
    ratios: dict[str, list[PerImage]] = {}
    for mention in mentions:
        for name, maps in word_maps(network, scenes.images, mention).items():
            ratios.setdefault(name, []).append(inside_outside(maps, mention.masks))
    return {name: torch.stack(values).nanmean(0) for name, values in ratios.items()}


def word_maps(network: Captioner, images: Images, mention: ShapeMention) -> dict[str, Maps]:
    """Maps of one word of each image's caption, by method."""
    size = (images.shape[-2], images.shape[-1])

    def score(word_scores: WordScores) -> PerImage:
        rows = torch.arange(len(word_scores), device=word_scores.device)
        return log_odds(word_scores[rows, mention.step], mention.word)

    (cam,) = grad_cam(network, images, score=score).values()
    (product,) = guided_grad_cam(network, images, score=score).values()
    return {
        "grad_cam": upsample(relu(cam), size),
        "guided_backprop": guided_backprop(network, images, score=score),
        "guided_grad_cam": product,
        "uniform": torch.ones_like(images[:, 0]),
    }
