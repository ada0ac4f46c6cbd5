"""Row 20: answers are the scene's truth; energy follows planted questions and no others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from camdistill.claims import vqa
from camdistill.claims.claim import ClaimSetup, ShapesBatch
from camdistill.claims.networks.small_networks import SmallNetworkRecipe
from camdistill.claims.networks.visual_features import FeatureExtractor
from camdistill.claims.two_object_scenes import Scenes, draw_test_scenes
from camdistill.claims.vqa import (
    QuestionScores,
    SingleQuestionNetwork,
    VQANetwork,
    answer_maps,
    energy_shift,
    score_question,
)
from camdistill.claims.vqa_data import (
    SIDES,
    Language,
    QuestionBatch,
    all_questions,
    questions_about_object,
    questions_about_side,
)
from camdistill.distill.optimization import Optimization

LANGUAGE = Language(("disc", "plus", "bar"))


def scene() -> Scenes:
    """A bright plus at the upper right, a dark disc at the lower left."""
    images, none = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
    masks = torch.zeros(1, 2, 32, 32, dtype=torch.bool)
    masks[0, 0, 2:8, 22:28], masks[0, 1, 22:28, 2:8] = True, True
    return Scenes(
        images,
        torch.tensor([[1, 0]]),
        masks,
        torch.tensor([[[5.0, 25.0], [25.0, 5.0]]]),
        torch.tensor([[True, False]]),
        ShapesBatch(images, none, none, {}),
    )


def said(asked: QuestionBatch) -> tuple[str, str, int]:
    question, answer = int(asked.questions[0]), int(asked.answers[0])
    return LANGUAGE.questions[question], LANGUAGE.answers[answer], int(asked.about[0])


def test_questions_and_answers_of_a_scene_by_hand() -> None:
    found = {
        kind: [said(one) for one in asked]
        for kind, asked in all_questions(LANGUAGE, scene()).items()
    }
    assert found == {
        "shape": [
            ("which shape is on the left", "disc", 1),
            ("which shape is on the right", "plus", 0),
            ("which shape is on the top", "plus", 0),
            ("which shape is on the bottom", "disc", 1),
        ],
        "brightness": [
            ("is the plus bright or dark", "bright", 0),
            ("is the disc bright or dark", "dark", 1),
        ],
        "side": [
            ("on which side is the plus", "right", 0),
            ("on which side is the disc", "left", 1),
        ],
    }


def test_sides_are_not_asked_about_where_there_is_hardly_one() -> None:
    level = scene()._replace(centers=torch.tensor([[[5.0, 12.0], [25.0, 10.0]]]))
    assert [bool(questions_about_side(level, side).sensible[0]) for side in range(4)] == [
        False,
        False,
        True,
        True,
    ]
    assert not questions_about_object(LANGUAGE, level, "side", 0).sensible[0]
    assert questions_about_object(LANGUAGE, level, "brightness", 0).sensible[0]


def test_questions_are_spelled_in_words_that_tell_them_apart() -> None:
    rows = LANGUAGE.encode(LANGUAGE.questions)
    assert rows.shape == (len(SIDES) + 2 * 3, 6)
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)
    back = [" ".join(LANGUAGE.words[word] for word in row) for row in rows.tolist()]
    assert back == list(LANGUAGE.questions)


def test_energy_follows_the_question_where_planted() -> None:
    one = torch.zeros(2, dtype=torch.long)
    asked = [QuestionBatch(one, one, one + which, one == 0) for which in (0, 1)]
    right = torch.ones(2)
    # The first image's map is on what is asked about; the second's never moves.
    energy = [torch.tensor([[0.8, 0.1], [0.5, 0.3]]), torch.tensor([[0.2, 0.7], [0.5, 0.3]])]
    found = [QuestionScores(right, {}, one) for one in energy]
    assert torch.allclose(energy_shift(asked, found, [right, right]), torch.tensor([0.6, 0.0]))
    wrong = torch.tensor([0.0, 1.0])
    assert energy_shift(asked, found, [right, wrong]).isnan().tolist() == [True, False]


class Pointing(nn.Module):
    """Answers 0 by the brightness at the left, 1 by that at the right."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.ReLU()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        gray = self.seen(images).mean(1)
        left, right = gray[:, :, :16].sum((1, 2)), gray[:, :, 16:].sum((1, 2))
        return {"answers": torch.stack([left, right, torch.zeros_like(left)], 1) / 40}


def test_occlusion_shows_what_the_answer_reads() -> None:
    images = torch.zeros(2, 3, 32, 32)
    images[:, :, 4:12, 4:12] = images[:, :, 20:28, 20:28] = 0.8
    maps = answer_maps(Pointing().eval(), images, 0)
    hidden = maps["occlusion"]
    assert float(hidden[:, 4:12, 4:12].mean()) > 0.01
    # What speaks for the other answer: without it the log odds rise.
    assert float(hidden[:, 20:28, 20:28].mean()) < -0.01
    assert float(maps["guided_backprop"][:, :, 16:].abs().max()) == 0


@pytest.fixture
def untrained(lab: Callable[..., ClaimSetup]) -> tuple[ClaimSetup, VQANetwork, Language]:
    here = lab(count=12)
    language = Language(here.shapes.class_names)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = VQANetwork(
            FeatureExtractor(here.student), len(language.words), len(language.answers)
        )
    return here, network.eval().requires_grad_(False), language


def test_images_explained_together_are_as_each_alone(
    untrained: tuple[ClaimSetup, VQANetwork, Language],
) -> None:
    here, network, language = untrained
    scenes = draw_test_scenes(here)
    asked = questions_about_object(language, scenes, "brightness", 0)
    whole = score_question(network, language, scenes, asked)
    own = network(scenes.images, language.encode(language.questions)[asked.questions]).argmax(1)
    question = language.encode(language.questions)[int(asked.questions[3])]
    about = SingleQuestionNetwork(network, question).eval()
    maps = answer_maps(about, scenes.images[3:4], int(own[3]))["grad_cam"]
    share = (maps * scenes.masks[3:4, 1]).sum() / maps.sum()
    assert abs(float(whole.energy[3, 1]) - float(share)) < 1e-5
    assert float(whole.right[3]) == float(own[3] == asked.answers[3])


@pytest.mark.slow
def test_row_of_an_untaught_network(
    lab: Callable[..., ClaimSetup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vqa, "IMAGES", 256)
    monkeypatch.setattr(vqa, "RECIPE", SmallNetworkRecipe(4, 64, Optimization("adamw", lr=5e-3)))
    row = vqa.run_vqa(lab(count=32))
    assert row.number == "20"
    right = {one.name: one.value for one in row.ours if one.measure == "answers that are true"}
    assert right["shape"] < 0.7
