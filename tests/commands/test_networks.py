"""Networks for a command."""

import json
from pathlib import Path

import pytest

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
