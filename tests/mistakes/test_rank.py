"""Mistakes of `rank`, `adapt`, `learn` and `refine`."""

from pathlib import Path

import pytest

from mistakes import Mistake, check_mistake

RANK = "rank -c rank.yaml"
REFINE = "refine -c refine.yaml"
ADAPT = "adapt -c adapt.yaml"
LEARN = "learn -c learn.yaml"
STUDENT = "runs/tiny/version_0/student.safetensors"
MISTAKES = {
    "mistyped method": Mistake(
        f"{RANK} --methods grad_cma",
        r"no method 'grad_cma'; nearest: 'grad_cam'.*or give maps\.npz",
    ),
    "method at no layer": Mistake(
        f"{RANK} --methods grad_cam@nope", r"no layer 'nope' in ShallowCNN"
    ),
    "maps of too few images": Mistake(
        f"{RANK} --methods maps.npz", r"maps\.npz has no map of training image 3"
    ),
    "arrays without maps": Mistake(
        f"{RANK} --methods other.npz", r"other\.npz holds \['other'\], not 'maps'"
    ),
    "function that nobody trusts": Mistake(
        f"{RANK} --methods own_functions.fails",
        r"lies outside camdistill: .*add `--trust own_functions`",
    ),
    "function that fails": Mistake(
        f"{RANK} --methods own_functions.fails --trust own_functions",
        r"'own_functions\.fails' fails \(ValueError: no such thing\)",
    ),
    "function that gives nothing": Mistake(
        f"{RANK} --methods own_functions.gives_nothing --trust own_functions",
        r"gives a NoneType for 16 images; give maps",
    ),
    "function that gives no numbers": Mistake(
        f"{RANK} --methods own_functions.gives_nan --trust own_functions",
        r"gives maps that are not numbers; mend the method",
    ),
    "function that is not there": Mistake(
        f"{RANK} --methods own_functions.nope --trust own_functions",
        r"can't import 'own_functions\.nope'",
    ),
    "mask that Shapes have not": Mistake(
        f"{RANK} --methods mask:nope", r"Shapes have no mask 'nope'; there are: 'object'"
    ),
    "weights for an explainer": Mistake(
        f"{RANK} --methods t.safetensors",
        r"holds no explainer; give a file that `camdistill adapt` wrote",
    ),
    "too few images": Mistake(f"{RANK} --n 0", r"n is \[0\]; students need 8 images or more"),
    "more images than there are": Mistake(
        f"{RANK} --n 100000", r"n is 100000, but there are 40 training images; take fewer"
    ),
    "unknown control": Mistake(f"{RANK} --controls nope", r"controls is 'nope'; it takes 'random'"),
    "control of no method": Mistake(
        f"{RANK} --controls_of nope", r"controls_of has 'nope', which is not among the study's"
    ),
    "control at no n": Mistake(
        f"{RANK} --controls_n 7",
        r"controls_n has 7, which is not among the study's; there are: '16'",
    ),
    "share below 0": Mistake(
        f"{RANK} --shares -0.5", r"shares is \[-0\.5\]; they lie between 0 and 1"
    ),
    "processes below 0": Mistake(f"{RANK} --workers -1", r"workers is -1; "),
    "no students at once": Mistake(f"{RANK} --stack 0", r"stack is 0; "),
    "no steps": Mistake(f"{RANK} --recipe.steps 0", r"recipe\.steps (is )?0"),
    "no betas": Mistake(f"{RANK} --tuning.betas []", r"tuning\.betas is \[\]; "),
    "no students": Mistake(f"{RANK} --students {{}}", r"students is \[\]; give at least one"),
    "student that is a word": Mistake(
        f"{RANK} --students '{{a: resnet20}}'", r"students is 'resnet20'; it takes named values"
    ),
    "student that is trained": Mistake(
        f"{RANK} --students '{{a: {{name: resnet18, weights: DEFAULT}}}}'",
        r"students\.a has weights; students start untrained",
    ),
    "student too deep for the images": Mistake(
        f"{RANK} --students '{{a: {{name: alexnet}}}}'",
        r"the student 'alexnet' can't run on an image of 3x32x32",
    ),
    "teacher that is a word": Mistake(
        "rank --teacher resnet18", r"teacher is 'resnet18'; it takes named values"
    ),
    "teacher that is not there": Mistake(
        f"{RANK} --teacher.name resnet21", r"no network 'resnet21'; nearest: .*'resnet20'"
    ),
    "no training images": Mistake(f"{RANK} --data.train 0", r"(train is 0|length=0)"),
    "too many classes of Shapes": Mistake(
        f"{RANK} --data.classes 99", r"(classes is 99|classes=99)"
    ),
    "odd size of Shapes": Mistake(
        f"{RANK} --data.size 33", r"Shapes of size 33: choose 32, 64 or 96"
    ),
    "config of a refinement": Mistake(
        "rank -c refine.yaml",
        r"refine\.yaml is a config of `camdistill refine`; rank has no option",
    ),
    "unknown objective": Mistake(
        f"{REFINE} --objective.kind nope",
        r"objective\.kind is 'nope'; it takes 'insertion_deletion'",
    ),
    "learned objective without a file": Mistake(
        f"{REFINE} --objective.kind learned", r"objective\.kind is learned with no objective\.file"
    ),
    "learned objective in weights": Mistake(
        f"{REFINE} --objective.kind learned --objective.file t.safetensors",
        r"holds no metric; give a file",
    ),
    "fidelity to nobody": Mistake(
        f"{REFINE} --objective.kind fidelity", r"there is no objective\.teacher; name it"
    ),
    "objective without shares": Mistake(
        f"{REFINE} --objective.shares []", r"objective\.shares is \[\]; give shares between 0 and 1"
    ),
    "starts twice": Mistake(
        f"{REFINE} --checkpoints {STUDENT}",
        r"give either checkpoints, or a network to train start networks of",
    ),
    "no start": Mistake(
        "refine -c given.yaml",
        r"no start network: give --checkpoints FILE \.\.\., or --network\.name",
    ),
    "no epochs": Mistake(f"{REFINE} --recipe.epochs 0", r"recipe\.epochs is 0; give 1 or more"),
    "too few images to judge on": Mistake(
        f"{REFINE} --judging.images 1", r"judging\.images (is )?1"
    ),
    "word for a list": Mistake(
        f"{REFINE} --judging.held_out grad_cam", r"judging\.held_out is 'grad_cam'; it takes a list"
    ),
    "trained start with weights": Mistake(
        f"{REFINE} --network.weights t.safetensors",
        r"network has weights; give them as --checkpoints",
    ),
    "nothing to refine": Mistake("refine", r"data is missing; give --data or set it in the config"),
    "adaptation on no images": Mistake(
        f"{ADAPT} --adaptation.n 0", r"adaptation\.n is 0; students need 8 images or more"
    ),
    "adaptation without judges": Mistake(
        f"{ADAPT} --adaptation.judges []", r"adaptation\.judges: give one or more seeds"
    ),
    "adaptation without rounds": Mistake(
        f"{ADAPT} --adaptation.rounds 0", r"adaptation\.rounds 0 and patience 2; give 1 or more"
    ),
    "adaptation at no rate": Mistake(f"{ADAPT} --adaptation.lr 0", r"adaptation\.lr is 0\.0; "),
    "nothing to adapt": Mistake(
        "adapt", r"teacher\.name, data, students, n are missing; give a config"
    ),
    "learning without steps": Mistake(f"{LEARN} --fit.steps 0", r"fit\.steps is 0; "),
    "learning from one image": Mistake(
        f"{LEARN} --images 1", r"1 images; give at least one ranking \(studies\) and 2 images"
    ),
    "studies that are a word": Mistake(
        f"{LEARN} --studies nope", r"studies is 'nope'; it takes named values"
    ),
    "nothing to learn from": Mistake(
        "learn", r"studies is missing; give --studies or set it in the config"
    ),
    "config of a ranking to learn from": Mistake(
        "learn -c rank.yaml", r"is a config of `camdistill rank`; learn has no option"
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_told_in_one_line_with_its_cure(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_mistake(MISTAKES[name], folder, capsys)
