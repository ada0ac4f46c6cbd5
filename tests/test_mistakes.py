"""Mistakes of the user: one line with a cure, exit code 2, and what was there stays as it was."""

import errno
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from camdistill.cli import main
from camdistill.networks.students import ShallowCNN
from camdistill.networks.weights import read_weights, save_safetensors
from mistakes import Mistake, check_mistake, config, cut, mistaken_line, write

CIFAR = "{class_path: camdistill.data.modules.CIFARData, init_args: {root: nothing}}"
STUDENT = "runs/tiny/version_0/student.safetensors"
LAST = "runs/tiny/version_0/checkpoints/last.ckpt"


class Bomb:
    """Unpickled, it would make a file."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("exploded"),)  # type: ignore[return-value]


def truncated_jpeg(folder: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(folder / "images/train/c0/photo.jpg")
    cut("images/train/c0/photo.jpg")(folder)


def two_classes(folder: Path) -> None:
    for name in ("c0", "c1"):
        shutil.copytree(folder / "images/train" / name, folder / "two" / name)


def one_class(folder: Path) -> None:
    for number in range(1, 6):
        shutil.rmtree(folder / f"images/train/c{number}")


def bomb(folder: Path) -> None:
    (folder / "gift.ckpt").write_bytes(pickle.dumps({"state_dict": {"a": Bomb()}}, protocol=2))


def zipped_bomb(folder: Path) -> None:
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": {"a": Bomb()}}, folder / "z.ckpt")


def other_students(folder: Path) -> None:
    """Students of 3 classes and of other channels."""
    save_safetensors(folder / "three.safetensors", ShallowCNN(3, (4, 6), (1, 2)).state_dict())
    wide = ShallowCNN(6, (5, 6), (1, 2)).state_dict()
    metadata = read_weights(folder / STUDENT).metadata
    save_safetensors(folder / "wide.safetensors", wide, metadata)


def hyperparameters(folder: Path) -> None:
    """A checkpoint that asks for a model of its own, whose import would make a file."""
    content = torch.load(folder / LAST, weights_only=True)
    content["hyper_parameters"] = {"_class_path": "explosive.Model"}
    torch.save(content, folder / "h.ckpt")
    (folder / "explosive.py").write_text("import pathlib\npathlib.Path('exploded').touch()\n")


def stranger(folder: Path) -> None:
    """A checkpoint whose student would be built by someone's code."""
    found = read_weights(folder / STUDENT)
    settings = json.loads(found.metadata["camdistill"])
    settings["student"]["name"] = "stranger.module.Network"
    save_file(found.state, folder / "s.safetensors", {"camdistill": json.dumps(settings)})


def another_last(folder: Path) -> None:
    """A whole checkpoint of a student with other channels."""
    content = torch.load(folder / LAST, weights_only=True)
    state = content["state_dict"]
    name = next(name for name in state if name.endswith("weight"))
    state[name] = torch.cat([state[name], state[name]])
    torch.save(content, folder / "other.ckpt")


FIT = "fit -c tiny.yaml"
EXPLAIN = f"explain --checkpoint {STUDENT} --images images/test/c0"
PAIRS = "--model.transfer.pairs '[{student: stage2, teacher: %s}]'"
ALONE = "explain --teacher shallow_cnn --images images/test/c0"
MISTAKES = {
    # images
    "missing image folder": Mistake(
        f"{FIT} --data.root imagse", r"no folder 'imagse'; .*nearest: 'images'"
    ),
    "file for a folder": Mistake(
        f"{FIT} --data.root teacher.safetensors", r"teacher.safetensors is a file; give the folder"
    ),
    "one class only": Mistake(FIT, r"one class only, 'c0'; add a folder", one_class),
    "empty class": Mistake(
        FIT,
        r"class folder '.*lonely' holds no images .*; fill it or remove it",
        lambda folder: (folder / "images/train/lonely").mkdir(),
    ),
    "no images": Mistake(
        f"{FIT} --data.root texts",
        r"no images in 'texts'; supported: \.jpg",
        lambda folder: (folder / "texts").mkdir(),
    ),
    "truncated JPEG": Mistake(FIT, r"photo\.jpg.*(on_broken|replace)", truncated_jpeg),
    "boxes with a wrong line": Mistake(
        FIT,
        r"boxes\.csv, line 2: 3 columns; give path,xmin",
        write("images/boxes.csv", "path,xmin,ymin,xmax,ymax\ntrain/c0/0.png,1,2\n"),
    ),
    "empty batch": Mistake(f"{FIT} --data.batch_size 0", r"batch_size is 0; give 1 or more"),
    "too large a validation part": Mistake(
        f"{FIT} --data.root images/train --data.val_fraction 1.5",
        r"val_fraction is 1\.5; give a share in \[0, 1\)",
    ),
    "other classes than the teacher's": Mistake(
        f"{FIT} --data.root two",
        r"the images have 2 classes, the teacher 6; --model\.ce 0",
        two_classes,
    ),
    "no labels for cross-entropy": Mistake(
        f"{FIT} --data.root images/train/c0", r"no labels, but ce is 0\.1; --model\.ce 0"
    ),
    "no internet for CIFAR-10": Mistake(
        "fit -c cifar.yaml",
        r"no cifar10 in nothing \(.*no route to host\); put cifar-10-python\.tar\.gz .* nothing",
        config("cifar.yaml", lambda content: content.update(data=yaml.safe_load(CIFAR))),
    ),
    # files of weights
    "missing checkpoint": Mistake(
        "explain --checkpoint runs/tiny/version_0/studnt.safetensors --images images/test/c0",
        r"no file 'studnt\.safetensors' in '.*'; nearest: 'student\.safetensors'",
    ),
    "missing checkpoint to test": Mistake(
        "test -c tiny.yaml --ckpt_path runs/tiny/version_0/checkpoints/lost.ckpt",
        r"no file 'lost\.ckpt' in '.*'; nearest: 'last\.ckpt'",
    ),
    "truncated safetensors": Mistake(EXPLAIN, r"is truncated or damaged .*again", cut(STUDENT)),
    "truncated ckpt to explain": Mistake(
        f"explain --checkpoint {LAST} --images images/test/c0",
        r"last\.ckpt' is truncated or damaged .*again",
        cut(LAST),
    ),
    "truncated ckpt to test": Mistake(
        f"test -c tiny.yaml --ckpt_path {LAST}", r"last\.ckpt' is truncated or damaged", cut(LAST)
    ),
    "pickle with code as a teacher": Mistake(
        f"{FIT} --model.teacher.weights gift.ckpt", r"could run code.*isn't opened", bomb
    ),
    "pickle with code to explain": Mistake(
        "explain --checkpoint gift.ckpt --images images/test/c0", r"could run code", bomb
    ),
    "pickle with code to test": Mistake(
        "test -c tiny.yaml --ckpt_path z.ckpt", r"could run code.*torch\.save", zipped_bomb
    ),
    "pickle with code to go on from": Mistake(
        f"{FIT} --ckpt_path z.ckpt", r"could run code.*torch\.save", zipped_bomb
    ),
    "web page as weights": Mistake(
        f"{FIT} --model.teacher.weights page.pth",
        r"'page\.pth' is a web page, not weights; download the file itself",
        write("page.pth", "<!DOCTYPE html><html></html>"),
    ),
    "weights of another network": Mistake(
        "explain --teacher resnet20 --weights teacher.safetensors --images images/test/c0",
        r"'teacher\.safetensors' doesn't fit resnet20: it lacks .*; it fits|name the network",
    ),
    "weights for other classes": Mistake(
        f"{FIT} --model.student.weights three.safetensors",
        r"'three\.safetensors' is for 3 classes, not 6: give weights for 6 classes",
        other_students,
    ),
    "small checkpoint of another student": Mistake(
        "test -c tiny.yaml --ckpt_path wide.safetensors",
        r"'wide\.safetensors' doesn't fit ShallowCNN: it has '.*' of shape",
        other_students,
    ),
    "whole checkpoint of another student": Mistake(
        "test -c tiny.yaml --ckpt_path other.ckpt",
        r"the checkpoint is of another network .*; give the config that it was trained with",
        another_last,
    ),
    "small checkpoint to go on from": Mistake(
        f"{FIT} --ckpt_path {STUDENT}", r"has weights alone.*: give a last\.ckpt"
    ),
    "teacher's weights as a checkpoint": Mistake(
        "explain --checkpoint teacher.safetensors --images images/test/c0",
        r"no experiment of camdistill in it; .*--teacher resnet56 --weights",
    ),
    "teacher's weights to test": Mistake(
        "test -c tiny.yaml --ckpt_path teacher.safetensors",
        r"no experiment of camdistill in it; give a run's student\.safetensors or last\.ckpt",
    ),
    "a stranger's class in a checkpoint": Mistake(
        "explain --checkpoint s.safetensors --images images/test/c0",
        r"'stranger\.module\.Network' lies outside .*--trust stranger",
        stranger,
    ),
    "last without a run": Mistake(
        f"{FIT} --run fresh --ckpt_path last", r"no checkpoint to go on from under .*fresh; start"
    ),
    "test without a checkpoint": Mistake(
        "test -c tiny.yaml", r"no checkpoint to test: give --ckpt_path FILE, or --ckpt_path last"
    ),
    "no internet for weights": Mistake(
        "explain --teacher resnet18 --weights DEFAULT --images images/test/c0",
        r"can't download resnet18's weights \(.*no route.*\): fetch https://.* put it at",
    ),
    "unknown name of weights": Mistake(
        "explain --teacher resnet18 --weights DEFALT --images images/test/c0",
        r"no weights 'DEFALT' for resnet18; nearest: 'DEFAULT'",
    ),
    # networks and layers
    "unknown network": Mistake(
        "explain --teacher resnet65 --images images/test/c0",
        r"no network 'resnet65'; nearest: 'resnet56'",
    ),
    "unknown class path": Mistake(
        "explain --teacher nowhere.Network --images images/test/c0",
        r"can't import 'nowhere\.Network': there is no module 'nowhere'; check the name",
    ),
    "unknown layer to match": Mistake(
        f"{FIT} {PAIRS % 'stage22'}", r"no layer 'stage22' in ShallowCNN; nearest: 'stage2'"
    ),
    "unknown layer to explain": Mistake(
        f"{ALONE} --layers stag1", r"no layer 'stag1' in ShallowCNN; nearest: 'stage1'"
    ),
    "layer without spatial size to match": Mistake(
        f"{FIT} {PAIRS % 'linear'}", r"layer 'linear'.*(no spatial|height|maps)"
    ),
    "layer without spatial size to explain": Mistake(
        f"{ALONE} --layers linear", r"layer 'linear'.*(no spatial|height|maps)"
    ),
    "layer of one network of two": Mistake(
        f"{EXPLAIN} --layers stage2", r"layer 'stage2': name the student's and the teacher's"
    ),
    "unknown class to explain": Mistake(f"{EXPLAIN} --classes c9", r"no class 'c9'; nearest: 'c"),
    "class beyond the last": Mistake(f"{ALONE} --classes 99", r"class 99.*\b(9|10)\b"),
    "no network": Mistake(
        "explain --images images/test/c0", r"give either --checkpoint FILE .* or --teacher NAME"
    ),
    "two networks": Mistake(
        f"{EXPLAIN} --teacher resnet18", r"give either --checkpoint FILE .* or --teacher NAME"
    ),
    "no pictures": Mistake("explain --teacher shallow_cnn", r"give either --images .* or --data"),
    "missing picture": Mistake(
        "explain --teacher shallow_cnn --images photo.jpg", r"no file or folder 'photo\.jpg'"
    ),
    "place that can't be written": Mistake(
        f"{EXPLAIN} --out teacher.safetensors/here",
        r"--out is '.*here', but '.*teacher\.safetensors' is a file; name a folder",
    ),
    # numbers
    "loss that is no number": Mistake(
        f"{FIT} --model.optimization.lr 1e30 --model.optimization.schedule constant "
        "--model.optimization.warmup 0 --trainer.max_epochs 3",
        r"the loss is not a number .*learning rate 1e\+30\); try a third",
    ),
    "negative beta": Mistake(f"{FIT} --model.beta -1", r"beta is -1\.0; .* 0 or more"),
    "nothing to learn": Mistake(
        f"{FIT} --model.ce 0 --model.kd 0 --model.beta 0", r"are all 0: .*give one a weight"
    ),
    "temperature 0": Mistake(
        f"{FIT} --model.temperature 0", r"temperature is 0\.0; give a number above 0"
    ),
    "decay of 2": Mistake(f"{FIT} --model.ema 2", r"ema is 2\.0; give a decay in \(0, 1\)"),
    "learning rate 0": Mistake(f"{FIT} --model.optimization.lr 0", r"lr is 0\.0; .*above 0"),
    # words
    "unknown command": Mistake("fitt -c tiny.yaml", r"no command 'fitt'; nearest: 'fit'"),
    "port below 0": Mistake(
        "report --run runs/tiny --port -1", r"port is -1; give a port from 0 .* to 65535"
    ),
    "mistyped option in the config": Mistake(
        "fit -c bad.yaml",
        r"no option 'model\.betta'; nearest: 'model\.beta'",
        config("bad.yaml", lambda content: content["model"]["init_args"].update(betta=3)),
    ),
    "row that is not there": Mistake(
        "claims --rows 99", r"no row '99'; nearest: '9'; --rows takes any of 1, 2, 3"
    ),
    "images without a side": Mistake(
        f"export --checkpoint {STUDENT} --size 0",
        r"size is 0; give the images' side in pixels, 1 or more, at most 8,192",
    ),
    "half an option": Mistake(
        f"{FIT} --trainer.max_epoch 8", r"no option '.*max_epoch'; nearest: 'trainer\.max_epochs'"
    ),
    "mistyped option of a command": Mistake(
        "explain --chekpoint x", r"no option 'chekpoint'; nearest: 'checkpoint'"
    ),
    "word without an option": Mistake(
        "explain photo.png", r"'photo\.png' belongs to no option; options begin with --"
    ),
    "number below 0 that reads as an option": Mistake(
        "explain -1", r"'-1' reads as an option; give a number below 0 as --NAME=-1"
    ),
    "list without a value": Mistake(
        "claims --rows --count 16", r"--rows stands without its value; give one or more"
    ),
    "photographs without a folder": Mistake(
        "claims --rows 5c", r"row 5c is about photographs: .*--boxes FOLDER"
    ),
    "photographs in a folder that is not there": Mistake(
        "claims --rows 1 --boxes nowhere", r"no folder 'nowhere' for --boxes"
    ),
    "results where a file is": Mistake(
        "claims --rows 1 --out tiny.yaml/x", r"'.*tiny\.yaml' is a file; name a folder"
    ),
    "explainer that is another file": Mistake(
        "evaluate --teacher resnet20 --data shapes --count 2 --explainers tiny.yaml",
        r"'tiny\.yaml' is a file, but neither \.safetensors, \.ckpt nor \.npz",
    ),
    "stored maps that are not there": Mistake(
        "evaluate --teacher resnet20 --data shapes --count 2 --explainers nope.npz",
        r"no file 'nope\.npz'; there is none",
    ),
    "command that comes from a config": Mistake(
        "rank", r"methods.* are missing; give a config: -c FILE \(configs/ has examples\)"
    ),
    "wrong type": Mistake(f"{FIT} --model.beta abc", r"model\.beta is 'abc'; it takes a number"),
    "wrong choice": Mistake(
        f"{FIT} --model.transfer.distance perason", r"it takes 'pearson'.*; nearest: 'pearson'"
    ),
    "wrong type of a command": Mistake(
        "explain --count many", r"count is 'many'; it takes a whole number"
    ),
    "no such accelerator": Mistake(
        f"{FIT} --trainer.accelerator warp", r"--trainer\.accelerator is 'warp'; give one of .*cpu"
    ),
    "unknown class in the config": Mistake(
        "fit -c bad.yaml",
        r"model names the class '.*Explaner', which is not there; nearest: '.*DistilledExplainer'",
        config(
            "bad.yaml",
            lambda content: content["model"].update(
                class_path="camdistill.distill.distilled_explainer.DistilledExplaner"
            ),
        ),
    ),
    "no teacher": Mistake(
        "fit -c bad.yaml",
        r"model\.teacher\.name is missing; give --model\.teacher\.name",
        config("bad.yaml", lambda content: content["model"]["init_args"].pop("teacher")),
    ),
    "no config": Mistake("fit", r"no model or data: they come from a config; -c configs/"),
    "missing config": Mistake("fit -c tinny.yaml", r"no config file tinny\.yaml; .*'tiny\.yaml'"),
    "config that is not YAML": Mistake(
        "fit -c bad.yaml", r"bad\.yaml, line 2 is not YAML: .*check", write("bad.yaml", "a: [1\n}")
    ),
    "config that is a list": Mistake(
        "fit -c bad.yaml", r"bad\.yaml holds a list; a config has options", write("bad.yaml", "[1]")
    ),
    "weights as a config": Mistake("fit -c teacher.safetensors", r"is not text, so no config"),
    "study without arms": Mistake("study --base tiny.yaml --arms '{}'", r"no arms; give at least"),
    "study of an unknown config": Mistake(
        "study --base tinny.yaml --arms '{a: {}}'", r"no config.* tinny\.yaml; .*'tiny\.yaml'"
    ),
    "seed of an arm": Mistake(
        "study --base tiny.yaml --arms '{a: {seed_everything: 3}}'",
        r"arm 'a' sets seed_everything, but the study chooses its seeds: --seeds; leave it out",
    ),
}


@pytest.fixture
def folder(offline_folder: Path) -> Path:
    return offline_folder


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_told_in_one_line_with_its_cure(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_mistake(MISTAKES[name], folder, capsys)


@pytest.mark.parametrize("command", [f"{FIT} --run full", EXPLAIN])
def test_full_disk_is_told_and_keeps_what_was_done(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)  # results, pictures and small checkpoints
    monkeypatch.setattr("torch.save", full)  # Lightning's checkpoints
    line = mistaken_line(command, folder, capsys)
    assert "space" in line
    assert "free some" in line  # what it says to do


def test_folder_that_may_not_be_written_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("os.makedirs", refused)
    line = mistaken_line(f"{FIT} --run refused", folder, capsys)
    assert re.search(r"refused.*: Permission denied; change its permissions", line), line


def test_class_that_a_checkpoint_asks_for_is_not_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hyperparameters(folder)
    monkeypatch.syspath_prepend(folder)
    assert main(["test", "-c", "tiny.yaml", "--ckpt_path", "h.ckpt"]) == 0
    assert not (folder / "exploded").exists()


def test_unbuilt_networks_are_never_tested(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for loop in ("validate", "test", "predict"):
        assert f"no checkpoint to {loop}" in mistaken_line(f"{loop} -c tiny.yaml", folder, capsys)


def test_weights_of_the_copy_are_those_of_the_run(folder: Path) -> None:
    small, whole = load_file(folder / STUDENT), read_weights(folder / LAST).state
    assert {f"network.{name}" for name in small} == set(whole)
