"""`camdistill explain`: pictures, raw maps and numbers, from a checkpoint or from any network."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from camdistill import grad_cam, load
from camdistill.cli import main
from camdistill.commands.explain import explain
from camdistill.commands.networks import load_networks
from camdistill.data.decode import decode
from camdistill.explain.methods import METHODS
from camdistill.explain.methods import find_method as method_of
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import NetworkSpec, Teacher
from camdistill.networks.weights import save_safetensors
from camdistill.report.figures import depth_maps, maps

STUDENT = "runs/tiny/version_0/student.safetensors"
LAST = "runs/tiny/version_0/checkpoints/last.ckpt"
IMAGENET_MEAN = sum((0.485, 0.456, 0.406)) / 3
IMAGENET_STD = sum((0.229, 0.224, 0.225)) / 3
ALONE = NetworkSpec("shallow_cnn", "teacher.safetensors", {"channels": [4, 6], "strides": [1, 2]})


@pytest.fixture
def folder(folder: Path) -> Path:
    """The copy of the trained run, with a folder of pictures of all kinds."""
    pictures = folder / "pictures"
    pictures.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    for mode, name in (("L", "gray.png"), ("RGBA", "alpha.png"), ("RGB", "photo.jpg")):
        Image.fromarray(pixels).convert(mode).save(pictures / name)
    return folder


def image(name: str) -> Tensor:
    """As the command sees it: 16 pixels, the size that the student was trained on."""
    return torch.from_numpy(decode(Path("pictures") / name, 16)[0].copy())[None].float() / 255


def close(first: np.ndarray, second: Tensor) -> None:  # type: ignore[type-arg]
    np.testing.assert_allclose(first, second.numpy(), rtol=1e-4, atol=1e-6)


def test_checkpoint_shows_student_beside_teacher(folder: Path) -> None:
    results = explain(checkpoint=Path(STUDENT), images=[Path("pictures")], out=Path("out"))
    assert results == {"n": 3, "images": results["images"]}
    names = ["alpha.png", "gray.png", "photo.jpg"]
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(
        [f"{n:03d}_{name[:-4]}{kind}" for n, name in enumerate(names) for kind in (".npz", ".png")]
        + ["overview.png", "results.json"]
    )
    explainer = load(STUDENT)
    assert explainer.teacher is not None
    for number, name in enumerate(names):
        own = explainer.teacher(image(name)).argmax(1)
        kind = f"stage2/c{own.item()}"
        with np.load(f"out/{number:03d}_{name[:-4]}.npz", allow_pickle=False) as maps:
            assert set(maps.files) == {f"teacher/{kind}", f"student/{kind}"}
            close(maps[f"teacher/{kind}"], grad_cam(explainer.teacher, image(name))["stage2"][0])
            student = grad_cam(explainer.network, image(name), classes=own)["stage2"]
            close(maps[f"student/{kind}"], student[0])


def test_results_say_what_was_seen_and_with_which_files(folder: Path) -> None:
    explain(checkpoint=Path(STUDENT), images=[Path("pictures/gray.png")], out=Path("out"))
    results = json.loads(Path("out/results.json").read_text())
    assert set(results) == {"n", "images", "machine", "versions", "sha256"}
    assert set(results["sha256"]) == {"checkpoint", "teacher"}
    row = results["images"]["gray.png"]
    assert set(row) == {"teacher", "student", "maps"}
    assert row["teacher"]["class"] in {f"c{number}" for number in range(6)}
    assert 0 < row["student"]["probability"] <= 1
    ((key, scores),) = row["maps"].items()
    assert key == f"stage2:stage2/{row['teacher']['class']}"
    assert set(scores) == {"pearson", "spearman", "cosine"}


def test_teacher_alone_at_several_layers_for_several_classes(folder: Path) -> None:
    line = (
        "explain --teacher small.network --weights teacher.safetensors --size 16 --out out "
        "--images pictures/photo.jpg pictures/gray.png --layers stage1 stage2 --classes 1 4"
    )
    Path("small.py").write_text(
        "from camdistill.networks.students import ShallowCNN\n"
        "def network(): return ShallowCNN(6, (4, 6), (1, 2))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        assert main(line.split()) == 0
    with np.load("out/000_photo.npz", allow_pickle=False) as maps:
        assert set(maps.files) == {f"teacher/stage{s}/{c}" for s in (1, 2) for c in (1, 4)}
        chosen = torch.tensor([[1, 4]])
        expected = grad_cam(Teacher(ALONE), image("photo.jpg"), ["stage1", "stage2"], chosen)
        for layer in ("stage1", "stage2"):
            for place, number in enumerate((1, 4)):
                close(maps[f"teacher/{layer}/{number}"], expected[layer][0, place])


def test_classes_of_the_images_name_those_of_a_network_that_has_as_many(folder: Path) -> None:
    for classes, named in ((6, True), (9, False)):
        weights = f"{classes}.safetensors"
        save_safetensors(weights, CifarResNet(20, classes).state_dict())
        line = f"explain --teacher resnet20 --weights {weights} --data images --size 16 --count 2"
        assert main([*line.split(), "--out", str(classes)]) == 0
        results = json.loads(Path(f"{classes}/results.json").read_text())
        for row in results["images"].values():
            assert row["teacher"]["class"].startswith("c") == named


@pytest.mark.parametrize("option", ["--layers", "--classes"])
def test_lists_are_words_or_yaml(option: str, folder: Path) -> None:
    word = "stage2:stage1" if option == "--layers" else "c3"
    start = ["explain", "--checkpoint", STUDENT, "--images", "pictures/photo.jpg", option]
    assert main([*start, word, "--out", "a"]) == 0
    assert main([*start, f"[{word!r}]", "--out", "b"]) == 0
    with np.load("a/000_photo.npz") as first, np.load("b/000_photo.npz") as second:
        assert set(first.files) == set(second.files)
        assert all(np.array_equal(first[name], second[name]) for name in first.files)


def test_whole_checkpoint_explains_as_the_small_one(folder: Path) -> None:
    explain(checkpoint=Path(STUDENT), images=[Path("pictures")], out=Path("small"))
    explain(checkpoint=Path(LAST), images=[Path("pictures")], out=Path("whole"))
    for path in Path("small").glob("*.npz"):
        with np.load(path) as small, np.load(Path("whole") / path.name) as whole:
            assert set(small.files) == set(whole.files)
            for name in small.files:
                np.testing.assert_allclose(small[name], whole[name], rtol=1e-5, atol=1e-7)


def test_student_works_alone_where_its_teacher_is_missing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("teacher.safetensors").unlink()
    explain(checkpoint=Path(STUDENT), images=[Path("pictures/gray.png")], out=Path("out"))
    assert "the student alone: no file 'teacher.safetensors'" in capsys.readouterr().out
    row = json.loads(Path("out/results.json").read_text())["images"]["gray.png"]
    assert set(row) == {"student"}
    kind = f"stage2/{row['student']['class']}"
    with np.load("out/000_gray.npz") as maps:
        assert maps.files == [f"student/{kind}"]


def test_files_of_one_name_keep_their_folders_names(folder: Path) -> None:
    for name in ("first", "second"):
        Path(name).mkdir()
        shutil.copy("pictures/gray.png", f"{name}/gray.png")
    found = explain(checkpoint=Path(STUDENT), images=[Path("first"), Path("second")])
    assert set(found["images"]) == {"first/gray.png", "second/gray.png"}  # type: ignore[call-overload]


def test_data_sets_are_explained_by_name_and_class(folder: Path) -> None:
    found = explain(
        checkpoint=Path(STUDENT), data="images", classes=["c1"], count=4, out=Path("out")
    )
    assert found["n"] == 4
    assert all(name.startswith("test/c") for name in found["images"])  # type: ignore[attr-defined]


def test_panel_is_a_picture_with_a_row_for_each_layer(folder: Path) -> None:
    photo, both = [Path("pictures/photo.jpg")], ["stage2:stage2", "stage1:stage1"]
    explain(checkpoint=Path(STUDENT), images=photo, out=Path("one"))
    explain(checkpoint=Path(STUDENT), images=photo, layers=both, out=Path("two"))
    with Image.open("one/000_photo.png") as one, Image.open("two/000_photo.png") as two:
        assert one.width > one.height
        assert two.height > 1.5 * one.height
        assert np.asarray(one).std() > 10


def test_methods_stand_side_by_side_with_their_raw_maps(folder: Path) -> None:
    methods = ["layer_cam", "integrated_gradients", "grad_cam"]
    results = explain(
        checkpoint=Path(STUDENT), images=[Path("pictures")], method=methods, out=Path("out")
    )
    assert results["methods"] == methods
    assert json.loads(Path("out/results.json").read_text())["methods"] == methods
    files = {path.name for path in Path("out").iterdir()}
    assert "001_gray.png" in files
    assert "overview.png" not in files
    explainer = load(STUDENT)
    assert explainer.teacher is not None
    own = explainer.teacher(image("gray.png")).argmax(1)
    with np.load("out/001_gray.npz", allow_pickle=False) as maps:
        for who, network in (("teacher", explainer.teacher), ("student", explainer.network)):
            for method in methods:
                layer = "input" if method == "integrated_gradients" else "stage2"
                true = method_of(method)(network, image("gray.png"), ["stage2"], own)[layer][0]
                close(maps[f"{who}/{layer}/c{own.item()}/{method}"], true)
        assert len(maps.files) == 6
    scores = results["images"]["gray.png"]["maps"]
    assert set(scores) == {
        f"layer_cam/stage2/c{own.item()}",
        f"integrated_gradients/input/c{own.item()}",
        f"grad_cam/stage2/c{own.item()}",
    }


def test_all_methods_leave_out_what_a_network_refuses(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (
        "explain --teacher small.network --weights teacher.safetensors --size 16 --out out "
        "--images pictures/photo.jpg --layers stage1 stage2 --classes 1 4 --method all"
    )
    Path("small.py").write_text(
        "from camdistill.networks.students import ShallowCNN\n"
        "def network(): return ShallowCNN(6, (4, 6), (1, 2))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        assert main(line.split()) == 0
        told = capsys.readouterr().out
        assert "cam is left out: CAM has no weights for layer 'stage1'" in told
        results = json.loads(Path("out/results.json").read_text())
        assert set(results["methods"]) == set(METHODS) - {"cam"}
        with np.load("out/000_photo.npz", allow_pickle=False) as maps:
            assert "teacher/stage1/1/hires_cam" in maps.files
            assert "teacher/input/4/rise" in maps.files
        assert main([*line.split()[:-1], "cam"]) == 2
        assert "CAM has no weights" in capsys.readouterr().err
        assert main([*line.split()[:-1], "layercam"]) == 2
        assert "no method 'layercam'; nearest: 'layer_cam'" in capsys.readouterr().err
        # One method at several layers goes through depth.
        assert main([*line.split()[:-1], "grad_cam", "--out", "deep"]) == 0
        with np.load("deep/000_photo.npz", allow_pickle=False) as maps:
            assert set(maps.files) == {
                f"teacher/stage{s}/{c}/grad_cam" for s in (1, 2) for c in (1, 4)
            }


def test_a_classifier_of_small_images_is_shown_small_images() -> None:
    shipped = Path(__file__).parents[2] / "checkpoints" / "shapes-resnet20.safetensors"
    assert load_networks(shipped, None, None, []).size == (32, 32)


def test_networks_of_gray_images_see_the_mean_of_the_colors(folder: Path) -> None:
    """They ended in a traceback."""
    Path("gray_cnn.py").write_text(
        "from camdistill.networks.students import ShallowCNN\n"
        "def network(): return ShallowCNN(6, (4, 6), (1, 2), in_channels=1)\n"
    )
    with torch.random.fork_rng():
        own = ShallowCNN(6, (4, 6), (1, 2), in_channels=1).eval()
    save_safetensors("gray.safetensors", own.state_dict())
    line = (
        "explain --teacher gray_cnn.network --weights gray.safetensors --size 16 --classes 1 "
        "--images pictures/photo.jpg --layers stage2"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        assert main([*line.split(), "--out", "one"]) == 0
        assert main([*line.split(), "--out", "all", "--method", "grad_cam", "layer_cam"]) == 0
    seen = (image("photo.jpg").mean(1, keepdim=True) - IMAGENET_MEAN) / IMAGENET_STD
    expected = grad_cam(own, seen, ["stage2"], torch.tensor([[1]]))["stage2"][0, 0]
    with np.load("one/000_photo.npz") as maps:
        close(maps["teacher/stage2/1"], expected)
    with np.load("all/000_photo.npz") as maps:
        close(maps["teacher/stage2/1/grad_cam"], expected)


def test_one_map_has_one_maximum_in_all_that_show_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`explain`, `explain --method` at many layers and `analyze` write the same number."""
    shown: list[float] = []

    def peak_of(values: np.ndarray) -> float:  # type: ignore[type-arg]
        shown.append(float(values.max()))
        return max(float(values.max()), 1e-9)

    network = load(STUDENT).teacher
    assert network is not None
    images = image("photo.jpg")
    expected = {
        layer: float(grad_cam(network, images, [layer])[layer].max())
        for layer in ("stage1", "stage2")
    }
    given = ["--checkpoint", STUDENT, "--images", "pictures/photo.jpg"]
    layers = ["--layers", "stage1:stage1", "stage2:stage2"]
    monkeypatch.setattr(maps, "peak_of", peak_of)
    monkeypatch.setattr(depth_maps, "peak_of", peak_of)
    for command in (
        ["explain", *given, *layers, "--out", "a"],
        ["explain", *given, *layers, "--method", "grad_cam", "--out", "b"],
        ["analyze", *given, "--cards", "0", "--pictures", "1", "--out", "c"],
    ):
        shown.clear()
        assert main(command) == 0
        for value in expected.values():
            assert any(one == pytest.approx(value, rel=1e-4) for one in shown), command
