"""Row 18: captions are the scene's truth, words stand for their objects, maps are of the word."""

from collections.abc import Callable

import pytest
import torch

from camdistill.claims import captions
from camdistill.claims.captions import (
    STEPS,
    Captioner,
    ShapeMention,
    encode_sentences,
    find_mentions,
    true_sentences,
    vocabulary,
    word_maps,
)
from camdistill.claims.claim import ClaimSetup, ShapesBatch
from camdistill.claims.networks.small_networks import SmallNetworkRecipe
from camdistill.claims.networks.visual_features import FeatureExtractor
from camdistill.claims.two_object_scenes import Scenes, draw_test_scenes
from camdistill.distill.optimization import Optimization

SHAPES = ("disc", "plus", "bar")


def scenes(places: list[list[list[float]]], classes: list[list[int]]) -> Scenes:
    """Scenes of which only what captions need is there."""
    count = len(places)
    masks = torch.zeros(count, 2, 8, 8, dtype=torch.bool)
    masks[:, 0, :2], masks[:, 1, 6:] = True, True
    images, none = torch.zeros(count, 3, 8, 8), torch.zeros(count, dtype=torch.long)
    bright = torch.tensor([[True, False]]).expand(count, -1)
    return Scenes(
        images,
        torch.tensor(classes),
        masks,
        torch.tensor(places),
        bright,
        ShapesBatch(images, none, none, {}),
    )


def test_sentences_are_the_truth_of_scenes_by_hand() -> None:
    found = scenes(
        [[[5.0, 5.0], [5.0, 20.0]], [[25.0, 9.0], [4.0, 6.0]], [[8.0, 30.0], [9.0, 2.0]]],
        [[0, 1], [2, 0], [1, 2]],
    )
    assert true_sentences(found, SHAPES) == [
        "a bright disc left of a dark plus",
        "a dark disc above a bright bar",
        "a dark bar left of a bright plus",
    ]


def test_spelling_comes_back_as_words_and_ends() -> None:
    words = vocabulary(SHAPES)
    told = ["a dark disc above a bright bar", "a bright disc left of a dark plus"]
    rows = encode_sentences(told, words)
    assert rows.shape == (2, STEPS)
    back = [" ".join(words[word] for word in row if word) for row in rows.tolist()]
    assert back == told
    assert bool((rows[:, -1] == 0).all())


def test_named_words_stand_for_their_objects_and_wrong_words_for_nothing() -> None:
    words = vocabulary(SHAPES)
    found = scenes([[[5.0, 5.0], [5.0, 20.0]]] * 3, [[0, 1]] * 3)
    said = encode_sentences(
        [
            "a bright disc left of a dark plus",
            "a bright plus left of a dark disc",
            "a bright bar left of a dark plus",
        ],
        words,
    )
    first, second = (find_mentions(said, found, words, len(SHAPES), which) for which in (0, 1))
    assert first.step.tolist() == [2, 2, 2]
    assert second.step.tolist() == [7, 7, 7]
    assert torch.equal(first.masks[0], found.masks[0, 0])
    assert torch.equal(first.masks[1], found.masks[1, 1])
    assert not first.masks[2].any()  # there is no bar
    assert torch.equal(second.masks[2], found.masks[2, 1])


def test_a_caption_without_a_second_shape_names_nothing() -> None:
    words = vocabulary(SHAPES)
    found = scenes([[[5.0, 5.0], [5.0, 20.0]]], [[0, 1]])
    said = encode_sentences(["a bright disc left of a dark dark"], words)
    assert not find_mentions(said, found, words, len(SHAPES), 1).masks.any()


@pytest.fixture
def untrained(lab: Callable[..., ClaimSetup]) -> tuple[ClaimSetup, Captioner]:
    here = lab(count=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Captioner(
            FeatureExtractor(here.student), len(vocabulary(here.shapes.class_names))
        )
    return here, network.eval().requires_grad_(False)


def test_hearing_its_own_words_is_what_it_says_alone(
    untrained: tuple[ClaimSetup, Captioner],
) -> None:
    here, network = untrained
    images = draw_test_scenes(here).images
    alone = network(images)
    heard = network.speak(network.backbone(images), alone.argmax(2))
    assert torch.allclose(alone, heard, atol=1e-6)


def test_maps_of_a_word_are_the_gradient_of_its_log_odds(
    untrained: tuple[ClaimSetup, Captioner],
) -> None:
    """The paper's equation, with the gradient by hand through the network's parts."""
    here, network = untrained
    images = draw_test_scenes(here).images
    said = network(images).argmax(2)
    one = ShapeMention(torch.full((4,), 3), said[:, 3], torch.ones(4, 32, 32).bool())
    maps = word_maps(network, images, one)
    last = network.encoder.second(network.encoder.first(network.backbone(images))).requires_grad_()
    state = torch.tanh(
        network.first_state(torch.nn.functional.adaptive_avg_pool2d(last, 4).flatten(1))
    )
    word = torch.zeros(4, dtype=torch.long)
    for step in range(4):
        state = network.cell(network.embedding(word), state)
        word = said[:, step]
    p = network.word_head(state).softmax(1).gather(1, one.word[:, None])[:, 0]
    (slope,) = torch.autograd.grad((p / (1 - p)).log().sum(), last)
    expected = (slope.mean((2, 3), keepdim=True) * last).sum(1).relu().detach()
    grown = torch.nn.functional.interpolate(expected[:, None], (32, 32), mode="bilinear")[:, 0]
    assert torch.allclose(maps["grad_cam"], grown, atol=1e-6, rtol=1e-4)
    product = maps["guided_backprop"] * grown
    assert torch.allclose(maps["guided_grad_cam"], product, atol=1e-7, rtol=1e-3)


@pytest.mark.slow
def test_row_of_an_untaught_captioner(
    lab: Callable[..., ClaimSetup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captions, "IMAGES", 256)
    monkeypatch.setattr(
        captions, "RECIPE", SmallNetworkRecipe(12, 32, Optimization("adamw", lr=5e-3))
    )
    row = captions.run_captioning(lab())
    right = {one.name: one.value for one in row.ours if one.measure.startswith("share")}
    assert right["whole captions"] < 0.5
