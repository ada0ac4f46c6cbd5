"""Mistakes of `analyze`, `export`, `report` and `claims`."""

from pathlib import Path

import pytest

from mistakes import Mistake, check_mistake

ALONE = "analyze --teacher shallow_cnn --size 16 --data images --count 2 --steps 0 --cards 0"
EXPORT = "export --checkpoint runs/tiny/version_0/student.safetensors --format torch"
STUDENT = "runs/tiny/version_0/student.safetensors"
MISTAKES = {
    "pattern of no layer": Mistake(
        f"{ALONE} --layers 'nope*'", r"no layer 'nope\*' .*Patterns such as 'layer3\.\*' work too"
    ),
    "unit without a number": Mistake(
        f"{ALONE} --units stage1", r"unit 'stage1': give a layer and a number, such as stage3:17"
    ),
    "unit below 0": Mistake(
        f"{ALONE} --units stage1:-1", r"unit 'stage1:-1': give a layer and a number"
    ),
    "unit beyond the last": Mistake(
        f"{ALONE} --units stage1:99", r"stage1 has no unit 99; it has 0 to 31"
    ),
    "unit of no layer": Mistake(
        f"{ALONE} --units stage9:1",
        r"no layer 'stage9' is looked at; nearest: .*--layers chooses others",
    ),
    "cards below 0": Mistake(f"{ALONE} --cards -1", r"cards is -1; "),
    "steps in words": Mistake(f"{ALONE} --steps many", r"steps is 'many'; it takes a whole number"),
    "pictures below 0": Mistake(f"{ALONE} --pictures -1", r"pictures is -1; "),
    "device that nobody has": Mistake(
        f"{ALONE} --device tpu", r"device is 'tpu'; it takes 'cpu', 'cuda'"
    ),
    "report in a file": Mistake(
        f"{ALONE} --out tiny.yaml", r"--out is 'tiny\.yaml', but 'tiny\.yaml' is a file"
    ),
    "nothing to analyze": Mistake(
        "analyze --data images", r"give either --checkpoint FILE .* or --teacher NAME"
    ),
    "layer of neither": Mistake(
        f"analyze --checkpoint {STUDENT} --data images --layers stage9",
        r"no layer 'stage9' in the teacher and none in the student",
    ),
    "mistyped format": Mistake(
        f"{EXPORT} --format onxx",
        r"format is 'onxx'; it takes 'onnx', 'torch', 'both'; nearest: 'onnx'",
    ),
    "layer that is not pooled": Mistake(
        f"{EXPORT} --layer stage1", r"layer 'stage1' of ShallowCNN has no closed form"
    ),
    "layer that is not there": Mistake(
        f"{EXPORT} --layer nope", r"no layer 'nope' in ShallowCNN; there are"
    ),
    "nothing to export": Mistake(
        "export", r"checkpoint is missing; give --checkpoint or set it in the config"
    ),
    "nothing to show": Mistake("report", r"run is missing; give --run or set it in the config"),
    "folder without events": Mistake(
        "report --run nothing", r"no TensorBoard events in 'nothing'; give a folder"
    ),
    "file to show": Mistake("report --run tiny.yaml", r"no TensorBoard events in 'tiny\.yaml'"),
    "port beyond the last": Mistake(
        "report --run runs/tiny --port 99999999", r"port is 99999999; "
    ),
    "port in words": Mistake(
        "report --run runs/tiny --port http", r"port is 'http'; it takes a whole number or null"
    ),
    "host that is not there": Mistake(
        "report --run runs/tiny --host 'not a host'", r"host is 'not a host', which isn't known"
    ),
    "row that is not there": Mistake(
        "claims --rows 99", r"no row '99'; nearest: '9'; --rows takes any of"
    ),
    "too few images for a claim": Mistake(
        "claims --rows 1 --count 3", r"count is 3; give 16 or more images"
    ),
    "network that is not there": Mistake(
        "claims --rows 1 --count 16 --teacher nope.safetensors",
        r"no file 'nope\.safetensors': start the command where",
    ),
    "network of other classes": Mistake(
        f"claims --rows 1 --count 16 --teacher {STUDENT}", r"tells 6 classes apart, Shapes has 8"
    ),
    "photographs without boxes": Mistake(
        "claims --rows 5c --boxes images", r"no boxes\.csv in 'images'"
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_told_in_one_line_with_its_cure(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_mistake(MISTAKES[name], folder, capsys)
