"""Images for a command."""

from pathlib import Path

import pytest
from PIL import Image

from camdistill.commands.sources import images_from, source_from
from camdistill.errors import UserError


@pytest.mark.parametrize("look", [images_from, source_from])
def test_another_size_of_images_that_have_one_is_refused(look):
    """It was passed over in silence: a network of 224 pixels was shown 32."""
    with pytest.raises(UserError, match="cifar10's images are 32 pixels wide, and 224"):
        look([], "cifar10", count=4, size=224)


@pytest.mark.parametrize("look", [images_from, source_from])
def test_shapes_are_drawn_at_the_size_that_is_asked_for(look):
    found = look([], "shapes", count=3, size=64)
    images = found.images if look is images_from else found.images.pixels
    assert tuple(images.shape[-2:]) == (64, 64)


@pytest.mark.parametrize("look", [images_from, source_from])
def test_a_broken_training_image_does_not_keep_from_the_test_images(look, tmp_path: Path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / split / name / "1.png")
    (tmp_path / "train" / "cat" / "2.png").write_bytes(b"no picture")
    assert len(look([], str(tmp_path), count=4, size=16).images) == 2
