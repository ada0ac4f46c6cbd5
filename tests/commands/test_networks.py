"""Networks for a command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from camdistill.cli import main
from camdistill.distill.checkpoints import load
from camdistill.networks.teachers import NetworkSpec, Teacher, build
from camdistill.networks.training_facts import EXPERIMENT, dump_experiment
from camdistill.networks.weights import read_weights, save_safetensors

STUDENT = "runs/tiny/version_0/student.safetensors"


@pytest.mark.parametrize(
    "command",
    [
        "explain --data images --count 2",
        "evaluate --data images --count 2",
        "analyze --list-layers",
        "export --format torch",
    ],
)
def test_images_that_are_not_square_need_a_size(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The height was taken for both sides, in silence."""
    found = read_weights(STUDENT)
    told = json.loads(found.metadata["camdistill"]) | {"size": [16, 24]}
    metadata = {**found.metadata, "camdistill": json.dumps(told)}
    save_safetensors("wide.safetensors", found.state, metadata)
    assert main([*command.split(), "--checkpoint", "wide.safetensors"]) == 2
    assert "trained on 16x24 images, which this command doesn't show whole: give --size N" in (
        capsys.readouterr().err
    )
    if command.startswith(("explain", "analyze")):
        assert main([*command.split(), "--checkpoint", "wide.safetensors", "--size", "16"]) == 0


@pytest.mark.parametrize(
    "command",
    [
        "explain --images pixels.png --teacher squeezenet1_1",
        "evaluate --images pixels.png --teacher squeezenet1_1",
        "analyze --list-layers --teacher squeezenet1_1",
        "analyze --list-layers --teacher vit_b_32",
    ],
)
def test_a_size_that_the_network_cannot_take_is_told_in_a_line(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save("pixels.png")
    assert main([*command.split(), "--size", "8"]) == 2
    told = capsys.readouterr().err
    assert "the teacher can't run on an image of 3x8x8 (" in told
    assert "); give another --size" in told


@pytest.fixture
def own(folder: Path) -> Path:
    """A file of ours: a ResNet that was trained at 24 pixels, with names and a normalization."""
    torch.manual_seed(0)
    network = build(NetworkSpec("resnet18"), classes=3)
    told = {
        "network": {"name": "resnet18", "weights": None, "args": {}},
        "classes": 3,
        "class_names": ["ant", "bee", "cat"],
        "size": [24, 24],
        "carving": {"split_seed": 3, "test_fraction": 0.3},
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.6, 0.7],
    }
    save_safetensors("own.safetensors", network.state_dict(), {EXPERIMENT: dump_experiment(told)})
    return Path("own.safetensors")


def results(out: str) -> dict[str, object]:
    """What a command wrote, without what differs between any two runs."""
    found = json.loads(Path(out, "results.json").read_text())
    differ = ("seconds", "seconds_a_map", "machine", "versions", "sha256")
    return {key: value for key, value in found.items() if key not in differ}


@pytest.mark.parametrize("data", ["images/train", "images"])
def test_a_network_alone_is_explained_as_its_file_says(data: str, own: Path) -> None:
    """It was run at 224 pixels, with ImageNet's normalization, its classes being numbers."""
    given = f"--data {data} --count 3"
    assert main(f"explain --checkpoint {own} {given} --out one".split()) == 0
    assert main(f"explain --teacher resnet18 --weights {own} {given} --out two".split()) == 0
    one, two = (results(out)["images"] for out in ("one", "two"))
    assert {name: row["network"] for name, row in one.items()} == {
        name: row["teacher"] for name, row in two.items()
    }
    assert {row["teacher"]["class"] for row in two.values()} <= {"ant", "bee", "cat"}
    for path in Path("one").glob("*.npz"):
        first, second = np.load(path), np.load(Path("two") / path.name)
        for key in first.files:
            np.testing.assert_array_equal(second[key.replace("network/", "teacher/")], first[key])


@pytest.mark.parametrize(
    "command",
    [
        "evaluate --count 4 --explainers grad_cam --metrics deletion_mean",
        "analyze --count 4 --layers layer4 --cards 0 --steps 0 --pictures 1",
    ],
)
def test_a_network_alone_is_measured_as_its_file_says(command: str, own: Path) -> None:
    command = f"{command} --data images"
    assert main([*command.split(), "--checkpoint", str(own), "--out", "one"]) == 0
    alone = ["--teacher", "resnet18", "--weights", str(own), "--out", "two"]
    assert main([*command.split(), *alone]) == 0
    one, two = (json.dumps(results(out)).replace("network", "teacher") for out in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("file", [STUDENT, "runs/tiny/version_0/checkpoints/last.ckpt"])
def test_a_student_s_file_gives_the_same_teacher_as_it_gives_a_network(
    file: str, folder: Path
) -> None:
    """A .ckpt lost its normalization; either needed the arguments again."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load(file).network(images)
        for args in ({}, {"channels": [4, 6], "strides": [1, 2]}):
            teacher = Teacher(NetworkSpec("shallow_cnn", file, args))
            assert torch.equal(teacher(images), expected)
    assert teacher.facts.size == (16, 16)


def test_what_a_file_does_not_tell_is_assumed_in_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(build(NetworkSpec("resnet20"), classes=10).state_dict(), "foreign.pth")
    command = "explain --teacher resnet20 --weights foreign.pth --data images --count 1"
    assert main(command.split()) == 0
    assert (
        "'foreign.pth' doesn't tell how its images were: 32x32 pixels (--size N takes others) and "
        "ImageNet's mean and standard deviation are assumed"
    ) in capsys.readouterr().out


def test_a_file_of_another_network_is_told_by_its_name(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"explain --teacher resnet34 --weights {own} --data images"
    assert main(command.split()) == 2
    assert "it was trained as 'resnet18'" in capsys.readouterr().err
