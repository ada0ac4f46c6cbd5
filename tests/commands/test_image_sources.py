"""Images for a command."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from camdistill.commands.image_sources import load_image_source, load_images
from camdistill.commands.networks import load_networks
from camdistill.data.modules import FolderData
from camdistill.distill.checkpoints import write_checkpoint
from camdistill.distill.classifier import Classifier
from camdistill.errors import UserError
from camdistill.networks.teachers import NetworkSpec


@pytest.mark.parametrize("look", [load_images, load_image_source])
def test_another_size_of_images_that_have_one_is_refused(look):
    """It was passed over in silence: a network of 224 pixels was shown 32."""
    with pytest.raises(UserError, match="cifar10's images are 32 pixels wide, and 224"):
        look([], "cifar10", count=4, size=224)


@pytest.mark.parametrize("look", [load_images, load_image_source])
def test_shapes_are_drawn_at_the_size_that_is_asked_for(look):
    found = look([], "shapes", count=3, size=64)
    images = found.images if look is load_images else found.images.pixels
    assert tuple(images.shape[-2:]) == (64, 64)


@pytest.mark.parametrize("look", [load_images, load_image_source])
def test_a_broken_training_image_does_not_keep_from_the_test_images(look, tmp_path: Path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / split / name / "1.png")
    (tmp_path / "train" / "cat" / "2.png").write_bytes(b"no picture")
    assert len(look([], str(tmp_path), count=4, size=16).images) == 2


def test_test_images_are_those_that_a_network_was_not_trained_on(tmp_path: Path) -> None:
    for number in range(60):
        place = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (4 * number, 0, 0)).save(place)
    data = FolderData(tmp_path / "data", split_seed=3, test_fraction=0.2)
    data.prepare_data()
    data.setup("fit")
    assert data.train_set is not None
    module = Classifier(NetworkSpec("shallow_cnn", args={"channels": [4], "strides": [2]}))
    module._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    module.setup("fit")
    module._trainer = None
    path = tmp_path / "network.safetensors"
    write_checkpoint(module, path)
    shown = load_networks(path, None, None, [])
    assert shown.carving == (3, 0.2)
    folder, side = str(tmp_path / "data"), shown.size[0]
    found = load_image_source([], folder, count=60, size=side, carving=shown.carving)
    assert len(found.images) == 12
    assert not set(found.images.names) & set(data.train_set.names)
    others = load_image_source([], folder, count=60, size=side)
    assert set(others.images.names) & set(data.train_set.names)
