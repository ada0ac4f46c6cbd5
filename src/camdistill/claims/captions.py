"""Row 18: a captioner of two objects, explained word by word through a score."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from camdistill.claims.claim import Lab, Measured, Row, gain, mean
from camdistill.claims.networks.small_networks import Examples, Recipe, fitted
from camdistill.claims.networks.visual_features import Look, Sight, features_of, log_odds
from camdistill.claims.two_object_scenes import Scenes, held_out, lessons, taught
from camdistill.distill.optimization import Optimisation
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.guided import guided_backprop, guided_grad_cam
from camdistill.explain.maps import relu, upsample
from camdistill.measure.localization import inside_outside
from camdistill.networks.weights import weights_digest
from camdistill.types import Activations, Images, Labels, Maps, Masks, PerImage

IMAGES = 8000
STEPS = 9  # "a bright plus left of a dark bow" and the end
RECIPE = Recipe(20, optimisation=Optimisation("adamw", lr=5e-3, weight_decay=0.05))
END = "<end>"
HIDDEN, WORD = 192, 32

Sentences = Int[Tensor, "n 9"]
Spoken = Float[Tensor, "batch 9 words"]


def vocabulary(shapes: Sequence[str]) -> tuple[str, ...]:
    """All words; the shapes come last."""
    return (END, "a", "bright", "dark", "above", "left", "of", *shapes)


def sentences(scenes: Scenes, shapes: Sequence[str]) -> list[str]:
    """The truth: "a bright plus above a dark bow", "a dark disc left of a dark tee".

    Objects are further apart either upwards or sideways: the upper or the left one comes first.
    """
    told = []
    for place in range(len(scenes.images)):
        down, across = (scenes.places[place, 1] - scenes.places[place, 0]).tolist()
        upright = abs(down) > abs(across)
        first = 0 if (down if upright else across) > 0 else 1
        names = [
            f"a {'bright' if scenes.bright[place, one] else 'dark'} "
            f"{shapes[int(scenes.classes[place, one])]}"
            for one in (first, 1 - first)
        ]
        told.append(f"{names[0]} {'above' if upright else 'left of'} {names[1]}")
    return told


def spelled(told: Sequence[str], words: Sequence[str]) -> Sentences:
    """Sentences as numbers of words, the end repeated."""
    number = {word: place for place, word in enumerate(words)}
    rows = [[number[word] for word in sentence.split()] for sentence in told]
    return torch.tensor([row + [number[END]] * (STEPS - len(row)) for row in rows])


class Captioner(nn.Module):
    """Convolutions and a GRU that says one word after the other, as Show and Tell has it.

    Vinyals et al. 2015, https://arxiv.org/abs/1411.4555.
    """

    def __init__(self, sight: Sight, words: int) -> None:
        super().__init__()
        self.sight = sight
        self.look = Look(sight.units)
        self.start = nn.Linear(self.look.size, HIDDEN)
        self.embedding = nn.Embedding(words, WORD)
        self.cell = nn.GRUCell(WORD, HIDDEN)
        self.say = nn.Linear(HIDDEN, words)

    def forward(self, images: Images) -> Spoken:
        """Scores of every word at every step, the likeliest being what the next step hears."""
        return self.speak(self.sight(images), None)

    def speak(self, features: Activations, heard: Sentences | None) -> Spoken:
        """The same from features; `heard` are the words that it is told it said."""
        state = torch.tanh(self.start(self.look(features)))
        word = torch.zeros(len(features), dtype=torch.long, device=features.device)
        said = []
        for step in range(STEPS):
            state = self.cell(self.embedding(word), state)
            scores = self.say(state)
            said.append(scores)
            word = scores.argmax(1) if heard is None else heard[:, step]
        return torch.stack(said, 1)


def captioner(lab: Lab) -> Captioner:
    """One that was taught true sentences."""
    names = lab.shapes.class_names
    words = vocabulary(names)

    def build() -> Captioner:
        return Captioner(Sight(copy.deepcopy(lab.student)), len(words))

    def examples() -> Examples:
        scenes = lessons(lab, IMAGES)
        told = spelled(sentences(scenes, names), words).to(lab.device)
        return features_of(Sight(lab.student), scenes.images), told

    def loss(network: Captioner, examples: Examples) -> PerImage:
        features, told = examples
        network.sight.eval()
        scores = network.speak(features.float(), told).float()
        return F.cross_entropy(scores.transpose(1, 2), told, reduction="none").mean(1)

    return fitted(
        lab,
        "captioner",
        build,
        examples,
        loss,
        recipe=RECIPE,
        settings={
            "shapes": taught(lab, IMAGES, objects=2).fingerprint,
            "student": weights_digest(lab.student),
        },
    )


class Named(NamedTuple):
    """A shape's word in each image's caption.

    Attributes:
        step: When it was said.
        word: Its number.
        masks: Of the object of that shape; empty where there is none, or two words name it.
    """

    step: Labels
    word: Labels
    masks: Masks


def named(said: Sentences, scenes: Scenes, words: Sequence[str], shapes: int, which: int) -> Named:
    """The first or second word of a shape in captions, and what it stands for."""
    first = len(words) - shapes
    is_shape = said >= first
    order = is_shape.cumsum(1)
    found = is_shape & (order == which + 1)
    step = found.int().argmax(1)
    word = said.gather(1, step[:, None])[:, 0]
    meant = (scenes.classes == (word - first)[:, None]) & found.any(1)[:, None]
    masks = (scenes.masks & meant[:, :, None, None]).any(1)
    return Named(step, word, masks)


def captions(lab: Lab) -> Row:
    """Row 18: maps of a word lie inside what it names."""
    network, scenes = captioner(lab), held_out(lab)
    shapes = lab.shapes.class_names
    words = vocabulary(shapes)
    with torch.no_grad():
        said = network(scenes.images).argmax(2)
    truth = spelled(sentences(scenes, shapes), words).to(lab.device)
    spoken = [named(said, scenes, words, len(shapes), which) for which in (0, 1)]
    ratios = _ratios(lab, network, scenes, spoken)
    above = gain(
        "guided_grad_cam - grad_cam", ratios["guided_grad_cam"], ratios["grad_cam"], lab, RATIO
    )
    beside = gain(
        "grad_cam - guided_backprop", ratios["grad_cam"], ratios["guided_backprop"], lab, RATIO
    )
    uniform = gain("grad_cam - uniform", ratios["grad_cam"], ratios["uniform"], lab, RATIO)
    told = [
        " ".join(words[word] for word in row if words[word] != END) for row in said[:1].tolist()
    ]
    return Row(
        number="18",
        claim="Of a caption's words, maps lie inside the objects that they name: Guided Grad-CAM's "
        "most, then Grad-CAM's, then guided backpropagation's",
        paper="mean activation inside over outside: Guided Grad-CAM 6.38, Grad-CAM 3.27, guided "
        "backpropagation 2.32, uniform 1",
        ours=(
            *_right(lab, said, truth, spoken),
            *(mean(name, values, lab, RATIO) for name, values in ratios.items()),
            above,
            beside,
            uniform,
        ),
        criterion="inside over outside: guided_grad_cam above grad_cam above guided_backprop, and "
        "grad_cam above uniform (paired differences, whole intervals)",
        passed=above.above and beside.above and uniform.above,
        note="maps at the last convolutional layer, of a word's log odds; means of an image's two "
        f"shape words, where they are true. Of the first image it says: {told[0]}",
    )


RATIO, RIGHT = "mean inside over mean outside", "share of the captioner that is right"


def _right(lab: Lab, said: Sentences, truth: Sentences, spoken: list[Named]) -> list[Measured]:
    shapes = torch.stack([one.masks.flatten(1).any(1) for one in spoken], 1).float().mean(1)
    return [
        mean("whole captions", (said == truth).all(1).float(), lab, RIGHT),
        mean("words of shapes", shapes, lab, RIGHT),
    ]


def _ratios(
    lab: Lab, network: Captioner, scenes: Scenes, spoken: Sequence[Named]
) -> dict[str, PerImage]:
    found: dict[str, list[PerImage]] = {}
    for one in spoken:
        for name, maps in word_maps(network, scenes.images, one).items():
            found.setdefault(name, []).append(inside_outside(maps, one.masks))
    return {name: torch.stack(values).nanmean(0) for name, values in found.items()}


def word_maps(network: Captioner, images: Images, one: Named) -> dict[str, Maps]:
    """Maps of one word of each image's caption, by method."""
    size = (images.shape[-2], images.shape[-1])

    def score(spoken: Spoken) -> PerImage:
        rows = torch.arange(len(spoken), device=spoken.device)
        return log_odds(spoken[rows, one.step], one.word)

    (cam,) = grad_cam(network, images, score=score).values()
    (product,) = guided_grad_cam(network, images, score=score).values()
    return {
        "grad_cam": upsample(relu(cam), size),
        "guided_backprop": guided_backprop(network, images, score=score),
        "guided_grad_cam": product,
        "uniform": torch.ones_like(images[:, 0]),
    }
