"""Every name of a method gives the maps that it promises, and a wrong one its cure."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from camdistill.data.modules import FolderData, ShapesData
from camdistill.errors import UserError
from camdistill.experiments.ranking.map_sources import MapRequest, code_sha256, parse_source
from camdistill.explain import attribution, gradcam, guided
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.methods import AT_PIXELS, METHODS
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Teacher
from camdistill.store.digest import sha256_of

DATA = ShapesData(train=30, val=10, test=10, classes=6)


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher.from_network(ShallowCNN(6, (4, 6), (2, 2)))


@pytest.fixture
def asked(generator: torch.Generator) -> MapRequest:
    images = torch.rand(4, 3, 32, 32, generator=generator)
    return MapRequest(images, torch.tensor([0, 2, 5, 1]), torch.tensor([7, 3, 20, 0]), False)


def test_methods_are_asked_at_their_layer(teacher: Teacher, asked: MapRequest) -> None:
    for name, layer in (("grad_cam@stage1", "stage1"), ("grad_cam", "stage2")):
        found = parse_source(name, DATA)
        wanted = grad_cam(teacher, asked.images, [layer], asked.classes)[layer]
        torch.testing.assert_close(found.maps(teacher, asked), wanted)
        assert found.of_teacher


# ablation_cam runs a network on more images than it was given, which the shape check refuses;
# contrast's own signature asks for maps as large as the images.
@pytest.mark.parametrize(
    "method", [one for one in METHODS if one not in ("ablation_cam", "contrast")]
)
def test_every_method_gives_maps_and_the_same_again(
    teacher: Teacher, asked: MapRequest, method: str
) -> None:
    found = parse_source(method, DATA)
    maps = found.maps(teacher, asked)
    assert maps.shape == (4, 32, 32) if method in AT_PIXELS else maps.dim() == 3
    assert not maps.requires_grad
    torch.testing.assert_close(found.maps(teacher, asked), maps)


def test_stored_maps_go_with_the_file_that_a_method_is_written_in() -> None:
    """Those of pixels went with the table of methods: a mended formula left its old maps."""
    home = {"guided_backprop": guided, "gradient_x_input": attribution, "grad_cam@layer3": gradcam}
    for name, module in home.items():
        assert parse_source(name, DATA).key["code"] == sha256_of(Path(str(module.__file__))), name


def test_masks_are_those_of_the_images_mirrored_with_them(
    teacher: Teacher, asked: MapRequest
) -> None:
    masks = DATA.shapes("train").render(np.array([7, 3, 20, 0])).masks
    for name in ("parts", "distractor"):
        found = parse_source(f"mask:{name}", DATA)
        assert np.array_equal(found.maps(teacher, asked).numpy(), masks[name])
        mirrored = MapRequest(asked.images, asked.classes, asked.ids, True)
        assert np.array_equal(found.maps(teacher, mirrored).numpy(), masks[name][..., ::-1])
        assert not found.of_teacher


def test_masks_and_boxes_of_a_folder_are_maps(teacher: Teacher, tmp_path: Path) -> None:
    masks = np.zeros((6, 8, 8), np.uint8)
    for number in range(6):
        masks[number, number : number + 2, 3:] = 255
        for place, pixels in (("", np.zeros((8, 8, 3), np.uint8)), ("masks/", masks[number])):
            path = tmp_path / f"{place}train/c{number % 2}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    lines = [f"train/c{k % 2}/{k}.png,1,{k},3,{k + 1}" for k in range(5)]
    (tmp_path / "boxes.csv").write_text("\n".join(["path,xmin,ymin,xmax,ymax", *lines, ""]))
    data = FolderData(tmp_path, val_fraction=1.0, test_fraction=1.0)
    mask, box = parse_source("mask:object", data), parse_source("mask:box", data)
    train = data.train_set
    assert train is not None
    ids, numbers = torch.from_numpy(train.ids), [int(Path(name).stem) for name in train.names]
    images = torch.zeros(len(train), 3, 8, 8)
    for mirrored in (False, True):
        asked = MapRequest(images, torch.zeros(len(train), dtype=torch.int64), ids, mirrored)
        wanted = masks[numbers] / 255.0
        boxes = np.zeros((len(train), 8, 8))
        for row, number in enumerate(numbers):
            if number < 5:
                boxes[row, number : number + 2, 1:4] = 1
        if mirrored:
            wanted, boxes = wanted[..., ::-1], boxes[..., ::-1]
        assert np.array_equal(mask.maps(teacher, asked), wanted)
        assert np.array_equal(box.maps(teacher, asked), boxes)
    with pytest.raises(UserError, match="'mask:parts' is not there"):
        parse_source("mask:parts", data)


def test_files_give_maps_by_id(teacher: Teacher, asked: MapRequest, tmp_path: Path) -> None:
    stored = np.random.default_rng(0).random((30, 5, 6)).astype(np.float32)
    np.savez(tmp_path / "plain.npz", maps=stored)
    plain = parse_source(str(tmp_path / "plain.npz"), DATA)
    assert np.array_equal(plain.maps(teacher, asked), stored[[7, 3, 20, 0]])
    mirrored = MapRequest(asked.images, asked.classes, asked.ids, True)
    assert np.array_equal(plain.maps(teacher, mirrored), stored[[7, 3, 20, 0]][..., ::-1])
    order = np.arange(30)[::-1]
    np.savez(tmp_path / "ids.npz", maps=stored[order], ids=order, mirrored=stored[order] + 1)
    by_id = parse_source(str(tmp_path / "ids.npz"), DATA)
    assert np.array_equal(by_id.maps(teacher, asked), stored[[7, 3, 20, 0]])
    assert np.array_equal(by_id.maps(teacher, mirrored), stored[[7, 3, 20, 0]] + 1)
    assert plain.key != by_id.key


def test_functions_by_path_are_called_if_trusted(
    teacher: Teacher, asked: MapRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign_maps.py").write_text(
        "import torch\n"
        "def of_pixels(network, images, classes):\n"
        "    return images.mean(1)\n"
        "def flat(network, images, classes):\n"
        "    return images\n"
        "def broken(network, images, classes):\n"
        "    return images[:, 0] * torch.nan\n"
        "def by_layer(network, images, classes):\n"
        "    return {'layer3': images[:, 0]}\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="add `--trust foreign_maps`"):
        parse_source("foreign_maps.of_pixels", DATA)
    assert "foreign_maps" not in sys.modules, "it ran code"
    trusted = parse_source("foreign_maps.of_pixels", DATA, ["foreign_maps"])
    torch.testing.assert_close(trusted.maps(teacher, asked), asked.images.mean(1))
    for name, says in (
        ("flat", r"\[4, 3, 32, 32\] for 4 images"),
        ("broken", "not numbers"),
        ("by_layer", "a dict for 4 images"),
        ("of_pixels@layer3", "'foreign_maps.of_pixels' is asked for no layer"),
    ):
        with pytest.raises(UserError, match=says):
            parse_source(f"foreign_maps.{name}", DATA, ["foreign_maps"]).maps(teacher, asked)
    for path, says in (("number", "is a int"), ("absent", "can't import"), ("a.b", "can't import")):
        with pytest.raises(UserError, match=says):
            parse_source(f"foreign_maps.{path}", DATA, ["foreign_maps"])


def test_wrong_names_offer_the_nearest(teacher: Teacher, asked: MapRequest, tmp_path: Path) -> None:
    np.savez(tmp_path / "maps.npz", saliency=np.zeros((3, 4, 4)))
    np.savez(tmp_path / "flat.npz", maps=np.zeros((3, 4)))
    np.savez(tmp_path / "nan.npz", maps=np.full((3, 4, 4), np.nan))
    np.savez(tmp_path / "short.npz", maps=np.zeros((3, 4, 4)))
    np.savez(tmp_path / "uneven.npz", maps=np.zeros((3, 4, 4)), ids=np.arange(2))
    np.savez(tmp_path / "code.npz", maps=np.array([object()], dtype=object))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    for name, says in (
        ("grad_cm@layer3", "nearest: 'grad_cam'"),
        ("gradient@stage1", "explains at the pixels; leave out '@stage1'"),
        ("mask:part", "nearest: 'parts'"),
        (f"{tmp_path}/map.npz", "nearest: 'maps.npz'"),
        (f"{tmp_path}/maps.npz", r"holds \['saliency'\], not 'maps'"),
        (f"{tmp_path}/flat.npz", r"shape \(3, 4\); give finite numbers"),
        (f"{tmp_path}/nan.npz", "give finite numbers"),
        (f"{tmp_path}/uneven.npz", "different lengths"),
        (f"{tmp_path}/code.npz", "can't read .*code.npz"),
        (f"{tmp_path}/torn.npz", "can't read .*torn.npz"),
    ):
        with pytest.raises(UserError, match=says):
            parse_source(name, DATA)
    with pytest.raises(UserError, match="no map of training image 7"):
        parse_source(f"{tmp_path}/short.npz", DATA).maps(teacher, asked)
    with pytest.raises(UserError, match="no layer 'stage9'"):
        parse_source("grad_cam@stage9", DATA).maps(teacher, asked)


class Called:
    def __call__(self, network: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> None:
        """Not asked."""


def test_code_of_whatever_can_be_called_is_the_file_that_it_is_written_in() -> None:
    own = sha256_of(Path(__file__))
    for code in (Called, Called(), partial(Called(), None), partial(partial(code_sha256), len)):
        inner = code.func if isinstance(code, partial) else code
        wanted = own if isinstance(inner, Called) or inner is Called else code_sha256(code_sha256)
        assert code_sha256(code) == wanted
    assert code_sha256(len) is None
