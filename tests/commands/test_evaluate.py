"""`camdistill evaluate`: tables with their controls, for any explainer, on any images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from camdistill import grad_cam, load
from camdistill.cli import main
from camdistill.commands.evaluate import evaluate
from camdistill.commands.image_sources import load_image_source
from camdistill.distill.training import as_images
from camdistill.errors import UserError
from camdistill.experiments.evaluation.evaluation_values import read_values
from camdistill.experiments.evaluation.pooling import read_pool
from camdistill.report.results import read_results

STUDENT = "runs/tiny/version_0/student.safetensors"
LAYERS = ["", "@stage2", "@stage1"]
QUICK = ["faithfulness_correlation", "insertion_blur", "gini"]


def test_table_holds_explainers_and_controls_with_intervals(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"evaluate --checkpoint {STUDENT} --data images --count 9 --batch 4 --out out"
    assert main([*line.split(), "--metrics", *QUICK, "random_logit"]) == 0
    results = read_results(Path("out/results.json"))
    assert results["n"] == 9
    assert set(results["explainers"]) == {"grad_cam", "student"}  # type: ignore[call-overload]
    assert "random" in results["controls"]  # type: ignore[operator]
    row = results["explainers"]["grad_cam"]  # type: ignore[index]
    assert set(row) == {*QUICK, "random_logit"}
    with np.load("out/values.npz") as values:
        for metric, found in row.items():
            assert found["mean"] == pytest.approx(values[f"grad_cam/{metric}"].mean(), abs=1e-6)
            assert found["low"] <= found["mean"] <= found["high"]
    assert set(results["sha256"]) == {"checkpoint", "teacher"}  # type: ignore[call-overload]
    printed = capsys.readouterr().out
    assert Path("out/table.txt").read_text() in printed
    for name in ("faithfulness", "curves", "best_and_worst"):
        with Image.open(f"out/{name}.png") as picture:
            assert np.asarray(picture).std() > 10
    assert list(Path("out/tensorboard").glob("events.*"))


def test_stored_maps_and_callables_stand_beside_the_networks_own(folder: Path) -> None:
    network = load(STUDENT).teacher
    assert network is not None
    found = load_image_source([], "images", count=6, size=16)
    images = as_images(found.images.batch(np.sort(found.order)).pixels)
    (maps,) = grad_cam(network, images).values()
    np.savez("mine.npz", maps=maps.numpy())
    Path("own_maps.py").write_text(
        "def brightness(network, images, classes): return images.mean(1)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        results = evaluate(
            checkpoint=Path(STUDENT),
            data="images",
            explainers=["grad_cam", "mine.npz", "own_maps.brightness"],
            metrics=QUICK,
            count=6,
            out=Path("out"),
        )
    rows = results["explainers"]
    for metric in QUICK:
        assert rows["mine"][metric] == pytest.approx(rows["grad_cam"][metric], abs=1e-5)  # type: ignore[index]
    assert rows["own_maps.brightness"]["gini"] != rows["grad_cam"]["gini"]  # type: ignore[index]


def test_another_students_file_and_a_methods_layer_are_explainers(folder: Path) -> None:
    shutil.copy(STUDENT, "other.safetensors")
    rows = evaluate(
        checkpoint=Path(STUDENT),
        data="images",
        explainers=[
            "student",
            "other.safetensors",
            "grad_cam@stage2",
            "grad_cam",
            "grad_cam@stage1",
        ],
        metrics=["gini"],
        count=4,
        out=Path("out"),
    )["explainers"]
    values = {name: row["gini"] for name, row in rows.items()}  # type: ignore[attr-defined]
    assert values["other"] == values["student"]
    assert values["grad_cam@stage2"] == values["grad_cam"] != values["grad_cam@stage1"]


def test_explainers_of_one_name_are_its_seeds_and_evaluations_are_pooled(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"evaluate --checkpoint {STUDENT} --data images --count 6 --metrics gini insertion_blur"
    named = "--explainers grad_cam student=student student=grad_cam@stage1"
    for seed in (0, 1):
        assert (
            main([*line.split(), *named.split(), "--seed", str(seed), "--out", f"run{seed}"]) == 0
        )
    capsys.readouterr()
    assert main(["pool", "--runs", "run0", "run1", "--out", "pooled"]) == 0
    printed = capsys.readouterr().out
    assert "student (2 seeds) minus grad_cam" in printed
    assert Path("pooled/table.txt").read_text() in printed
    alone, pooled = (read_results(Path(name) / "results.json") for name in ("run0", "pooled"))
    assert alone["seeds"] == pooled["seeds"] == {"grad_cam": 1, "student": 2}
    assert set(pooled["explainers"]) == {"grad_cam", "student"}  # type: ignore[call-overload]
    with np.load("run0/values.npz") as one, np.load("run1/values.npz") as two:
        gains = [
            values[f"student#{number}/insertion_blur"] - values["grad_cam/insertion_blur"]
            for values in (one, two)
            for number in (1, 2)
        ]
    minus = pooled["minus_first"]["student"]["insertion_blur"]  # type: ignore[index]
    assert minus["mean"] == pytest.approx(np.mean(gains), abs=1e-6)
    with Image.open("pooled/faithfulness.png") as picture:
        assert np.asarray(picture).std() > 10
    assert list(Path("pooled/tensorboard").glob("events.*"))
    assert main(["pool", "--runs", "run0", "run0", "--out", "pooled"]) == 2
    assert "named before" in capsys.readouterr().err
    assert main(["pool", "--runs", "run0", "run1", "--out", "run1"]) == 2
    assert "would be written over" in capsys.readouterr().err


def test_another_method_under_the_same_name_is_another_evaluation(folder: Path) -> None:
    line = f"evaluate --checkpoint {STUDENT} --data images --count 4 --metrics gini"
    for number, method in enumerate(("grad_cam", "gradient")):
        named = ["--explainers", f"one={method}", "--out", f"run{number}"]
        assert main([*line.split(), *named]) == 0
    first, second = (read_values(Path(f"run{number}")) for number in (0, 1))
    assert first[1] != second[1]
    assert not np.array_equal(first[0].table, second[0].table)
    with pytest.raises(UserError, match="compares other explainers"):
        read_pool([Path("run0"), Path("run1")])


def test_networks_of_gray_images_are_evaluated(folder: Path) -> None:
    Path("gray.py").write_text(
        "import torch\n"
        "def network():\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(),\n"
        "        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        results = evaluate(
            teacher="gray.network", data="images", metrics=QUICK, count=3, size=16, out=Path("out")
        )
    assert set(results["explainers"]) == {"grad_cam"}  # type: ignore[call-overload]


def test_student_is_explained_with_the_teacher_beside_it(folder: Path) -> None:
    results = evaluate(
        checkpoint=Path(STUDENT), images=[Path("images/test/c1")], of="student", count=3,
        metrics=["gini"], out=Path("out"),
    )  # fmt: skip
    assert set(results["explainers"]) == {"grad_cam", "teacher"}  # type: ignore[call-overload]


def test_boxes_are_ground_truth_where_there_are_no_masks(folder: Path) -> None:
    rows = [
        f"test/{path.parent.name}/{path.name},2,3,9,12"
        for path in Path("images/test").rglob("*.png")
    ]
    Path("images/boxes.csv").write_text("\n".join(rows))
    results = evaluate(
        checkpoint=Path(STUDENT), data="images", count=4, metrics=["iou"], out=Path("out")
    )
    oracle = results["controls"]["oracle"]  # type: ignore[index]
    assert oracle["iou"].mean == 1


def test_meta_puts_the_metrics_to_the_test_on_shapes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (
        f"evaluate --checkpoint {STUDENT} --data shapes --size 32 --count 6 --meta true --out out"
    )
    assert main([*line.split(), "--metrics", *QUICK]) == 0
    results = json.loads(Path("out/results.json").read_text())
    assert set(results["meta"]) == {*QUICK, "deletion_rerendered", "rank_accuracy"}
    verdict = results["meta"]["faithfulness_correlation"]
    assert set(verdict["tau"]) == {"deletion_rerendered", "rank_accuracy"}
    assert "put to the test" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--metrics insertion_blurr", "no metric 'insertion_blurr'; nearest: 'insertion_blur'"),
        ("--metrics iou", "metric 'iou' needs masks"),
        ("--explainers gradcam", "no explainer 'gradcam'; nearest: 'grad_cam'"),
        ("--explainers none.npz", "no file 'none.npz'"),
        ("--explainers nowhere.maps", "can't import 'nowhere.maps'"),
        ("--of techer", "of is 'techer'; it takes 'teacher', 'student'"),
        ("--device gpu", "device is 'gpu'"),
        ("--layer layer9", "no layer 'layer9'"),
        ("--explainers own.txt", "can't import 'own.txt'"),
        ("--batch 0", "batch is 0; give 1 or more"),
        ("--seed -1", "seed is -1; give 0 or more"),
        ("--size 0", "size is 0; give the images' side in pixels, 1 or more"),
        ("--count 0", "count is 0; give 1 or more"),
        ("--explainers random=grad_cam", "'random' is the name of a control"),
        ("--explainers a/b=grad_cam", "'a/b' can't name an explainer"),
        (f"--explainers {'x' * 300}", "no explainer 'xxx"),
        ("--metrics deletion_rerendered", "which Shapes alone can"),
        ("--explainers grad_cam=eigen_cam grad_cam", "2 explainers are called 'grad_cam'"),
        (
            "--explainers one=grad_cam one=eigen_cam two=layer_cam two=gradient two=deconvnet",
            "as many as each other, these have one 2, two 3",
        ),
    ],
)
def test_mistakes_are_one_line(
    words: str, told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"evaluate --checkpoint {STUDENT} --data images --out out {words}"
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(folder: Path) -> None:
    with pytest.raises(UserError, match="torch finds no GPU"):
        evaluate(checkpoint=Path(STUDENT), data="images", device="cuda", out=Path("out"))


def test_stored_maps_of_other_images_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("mine.npz", maps=np.zeros((3, 4, 4)))
    line = f"evaluate --checkpoint {STUDENT} --data images --count 6 --explainers mine.npz"
    assert main(line.split()) == 2
    assert "has the shape [3, 4, 4] for 6 images" in capsys.readouterr().err
    Path("mine.npz").write_bytes(Path("mine.npz").read_bytes()[:300])
    assert main(line.split()) == 2
    assert "is no .npz of arrays" in capsys.readouterr().err
    np.savez("mine.npz", maps=np.full((6, 4, 4), 1j))
    assert main(line.split()) == 2
    assert "give real numbers" in capsys.readouterr().err
    np.savez("mine.npz", maps=np.ones((6, 4, 4)))
    assert main([*line.split(), "--metrics", "max_sensitivity"]) == 2
    assert "all of these are stored" in capsys.readouterr().err


def test_what_is_so_by_construction_is_left_out_with_its_reason(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A student's map is its own, whatever the weights of the teacher that is explained."""
    line = f"evaluate --checkpoint {STUDENT} --data images --count 6 --batch 6"
    gates = ["--metrics", "randomization", "smooth_randomization", "gini"]
    assert main([*line.split(), "--out", "both", *gates]) == 0
    explainers = read_results(Path("both/results.json"))["explainers"]
    assert {"randomization", "smooth_randomization"} <= set(explainers["grad_cam"])  # type: ignore[index]
    assert set(explainers["student"]) == {"gini"}  # type: ignore[index]
    printed = capsys.readouterr().out
    assert "student: no randomization, which would be 0 by construction" in printed
    assert "student: no smooth_randomization, which would be 1 by construction" in printed

    alone = ["--explainers", "student", "--out", "alone"]
    assert main([*line.split(), *alone, *gates]) == 2
    assert "would be 0 by construction: leave it out" in capsys.readouterr().err
    assert not Path("alone").exists()
    assert main([*line.split(), *alone]) == 0
    assert "randomization is left out: it would be 0 by construction" in capsys.readouterr().out
