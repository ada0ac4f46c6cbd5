"""Networks for a command."""

import json
from pathlib import Path

import pytest
from PIL import Image

from camdistill.cli import main
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
