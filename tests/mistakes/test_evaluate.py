"""Mistakes of `evaluate` and `pool`: explainers, metrics, runs."""

from pathlib import Path

import pytest

from mistakes import Mistake, check_mistake

ALONE = "evaluate --teacher shallow_cnn --size 16 --data images --count 2"
STUDENT = "runs/tiny/version_0/student.safetensors"
MISTAKES = {
    "empty batch": Mistake(f"{ALONE} --batch 0", r"batch is 0; "),
    "seed below 0": Mistake(f"{ALONE} --seed -1", r"seed is -1; "),
    "unknown device": Mistake(
        f"{ALONE} --device gpu", r"device is 'gpu'; it takes 'cpu', 'cuda' or null; nearest: 'cpu'"
    ),
    "decisions of both": Mistake(
        f"{ALONE} --of both", r"of is 'both'; it takes 'teacher', 'student'"
    ),
    "no student": Mistake(f"{ALONE} --of student", r"there is no student: leave out --of"),
    "layer that gives rows": Mistake(
        f"{ALONE} --layer linear", r"layer 'linear' gives \[2, 10\], which has no spatial size"
    ),
    "mistyped metric": Mistake(
        f"{ALONE} --metrics deletoin", r"no metric 'deletoin'; nearest: 'deletion_mean'"
    ),
    "metric of drawn images": Mistake(
        f"{ALONE} --metrics deletion_rerendered", r"draws images again .* give --data shapes"
    ),
    "metric that needs masks": Mistake(
        f"{ALONE} --metrics pointing_game", r"needs masks, and these images have none"
    ),
    "weights for a metric": Mistake(
        f"{ALONE} --metrics t.safetensors",
        r"holds no metric; give a file that `camdistill learn` wrote",
    ),
    "mistyped explainer": Mistake(
        f"{ALONE} --explainers grad_cma", r"no explainer 'grad_cma'; nearest: 'grad_cam'"
    ),
    "explainer at no layer": Mistake(
        f"{ALONE} --explainers grad_cam@nope", r"no layer 'nope' in ShallowCNN"
    ),
    "explainer named as a control": Mistake(
        f"{ALONE} --explainers random=grad_cam", r"'random' is the name of a control; give another"
    ),
    "explainer with a sign in its name": Mistake(
        f"{ALONE} --explainers a!=grad_cam", r"'a!' can't name an explainer"
    ),
    "function that gives nothing": Mistake(
        f"{ALONE} --explainers own_functions.gives_nothing",
        r"gave a NoneType: it must return a tensor",
    ),
    "function that fails": Mistake(
        f"{ALONE} --explainers own_functions.fails",
        r"function 'own_functions\.fails' fails \(ValueError: no such thing\)",
    ),
    "function that takes nothing": Mistake(
        f"{ALONE} --explainers own_functions.takes_nothing",
        r"is called with \(network, images, classes\)",
    ),
    "number for an explainer": Mistake(
        f"{ALONE} --explainers own_functions.number",
        r"can't be called: name a function of \(network, images, classes\)",
    ),
    "text for arrays": Mistake(
        f"{ALONE} --explainers text.npz", r"'text\.npz' is no \.npz of arrays"
    ),
    "maps of other images": Mistake(
        f"{ALONE} --explainers maps.npz", r"has the shape \[3, 4, 4\] for 2 images"
    ),
    "arrays without maps": Mistake(
        f"{ALONE} --explainers other.npz", r"has no array 'maps'; there are: 'other'"
    ),
    "maps of words": Mistake(f"{ALONE} --explainers words.npz", r"the type <U3: give real numbers"),
    "student of other classes": Mistake(
        f"{ALONE} --explainers {STUDENT}",
        r"tells 6 classes apart, the network that is explained 10",
    ),
    "weights for an explainer": Mistake(
        f"{ALONE} --explainers t.safetensors",
        r"no experiment of camdistill in it; .*name the network",
    ),
    "images too small to measure": Mistake(
        f"evaluate --checkpoint {STUDENT} --data images --size 3 --count 2",
        r"images of 3 pixels can't be cut into 8 cells a side",
    ),
    "switch with a word": Mistake(f"{ALONE} --meta maybe", r"'maybe' belongs to no option"),
    "nothing to pool": Mistake("pool", r"no folders to pool; give two or more"),
    "folder to pool that is not there": Mistake(
        "pool --runs nope", r"no values\.npz in 'nope': name a finished folder of `camdistill eval"
    ),
    "folder that evaluate didn't write": Mistake(
        "pool --runs runs nothing", r"no values\.npz in 'runs': name a finished folder"
    ),
    "file to pool": Mistake(
        "pool --runs tiny.yaml t.safetensors",
        r"'tiny\.yaml' is a file: name the folder that it lies in",
    ),
    "pool into one of its runs": Mistake(
        "pool --runs runs nothing --out nothing",
        r"--out 'nothing' is one of the runs, and would be written over",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_told_in_one_line_with_its_cure(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_mistake(MISTAKES[name], folder, capsys)
