"""Mistakes in names, files and numbers: one line, quickly, and nothing is written."""

import json
import os
import re
import shlex
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camdistill.cli import main
from camdistill.networks.students import ShallowCNN
from camdistill.networks.weights import read_weights, save_safetensors
from mistakes import Mistake, change_config, mistaken_line

FIT = "fit -c tiny.yaml"
STUDENT = "runs/tiny/version_0/student.safetensors"
LAST = "runs/tiny/version_0/checkpoints/last.ckpt"
EXPLAIN = f"explain --checkpoint {STUDENT} --images images/test/c0"
EVALUATE = f"evaluate --checkpoint {STUDENT} --data images --count 4 --metrics deletion_mean"
ANALYZE = f"analyze --checkpoint {STUDENT} --data images --count 4"
EXPERIMENT = "explain --checkpoint s.safetensors --images images/test/c0"
STUDY = "study --base tiny.yaml --seeds 0 --arms"
LONG = "x" * 300
LATIN = os.fsdecode(b"caf\xe9")


def pipe(name: str) -> Callable[[Path], object]:
    return lambda folder: os.mkfifo(folder / name)


def bound_socket(folder: Path) -> None:
    place = socket.socket(socket.AF_UNIX)
    place.bind("images/test/c0/x.png")
    place.close()


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def laughs(first: str, one: str, all_of: str) -> str:
    """Nine lines that stand for 9 ** 9 values."""
    lines = [f"a: &a {first}"]
    for before, letter in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{letter}: &{letter} {all_of % ', '.join([f'*{before}'] * 9)}")
    return "\n".join(lines) + one


def deflated_maps(folder: Path) -> None:
    """Four maps of 4,096 x 4,096 cells that are all 0: 268 MB in 260 kB."""
    with zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        _write_array(archive, "maps", (4, 4096, 4096), 4 * 4096**2 * 4)


def lying_maps(folder: Path) -> None:
    """A header of 40 TB over 100 bytes."""
    with zipfile.ZipFile(folder / "x.npz", "w") as archive:
        _write_array(archive, "ids", (4, 1638400, 1638400), 100)


def _write_array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], size: int) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, size, 1 << 20):
            file.write(bytes(min(1 << 20, size - start)))


def deflated_checkpoint(folder: Path) -> None:
    """A checkpoint with 512 MB of zeros beside it."""
    with (
        zipfile.ZipFile(folder / LAST) as whole,
        zipfile.ZipFile(folder / "z.ckpt", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
        with archive.open(f"{whole.namelist()[0].split('/')[0]}/data/999", "w") as file:
            for _ in range(512):
                file.write(bytes(1 << 20))


def normalized(mean: str, std: str) -> Callable[[Path], object]:
    """A teacher whose file says another normalization."""

    def prepare(folder: Path) -> None:
        state = ShallowCNN(6, (4, 6), (1, 2)).state_dict()
        save_safetensors(folder / "teacher.safetensors", state, {"mean": mean, "std": std})

    return prepare


def experiment(**changes: object) -> Callable[[Path], object]:
    """A student whose file says another experiment."""

    def prepare(folder: Path) -> None:
        found = read_weights(folder / STUDENT)
        settings = json.loads(found.metadata["camdistill"]) | changes
        metadata = {**found.metadata, "camdistill": json.dumps(settings)}
        save_safetensors(folder / "s.safetensors", found.state, metadata)

    return prepare


def deep_gray(folder: Path) -> None:
    values = (np.arange(256, dtype=np.int32) * 1000).reshape(16, 16)
    Image.fromarray(values).save(folder / "images/test/c0/deep.tiff")


def only_in_test(folder: Path) -> None:
    shutil.copytree(folder / "images/test/c0", folder / "images/test/c9")


def empty_test(folder: Path) -> None:
    shutil.rmtree(folder / "images/test")
    (folder / "images/test").mkdir()


def unreadable_names(folder: Path) -> None:
    for file in (folder / "images/test").rglob("*.png"):
        file.rename(file.with_suffix(".heic"))


MISTAKES = {
    # names
    "run's name beyond 255 bytes": Mistake(f"{FIT} --run {LONG}", r"longer than the 255 bytes"),
    "folder for results beyond 255 bytes": Mistake(f"{EXPLAIN} --out {LONG}", r"255 bytes"),
    "images beyond 255 bytes": Mistake(f"{FIT} --data.root {LONG}", r"255 bytes.*; shorten it"),
    "weights beyond 255 bytes": Mistake(f"{FIT} --model.teacher.weights {LONG}", r"255 bytes"),
    "stored maps beyond 255 bytes": Mistake(f"{EVALUATE} --explainers {LONG}.npz", r"255 bytes"),
    "arm beyond 255 bytes": Mistake(f"{STUDY} '{{{LONG}: {{}}}}'", r"300 bytes; give 200 or less"),
    "explainer's name beyond a line": Mistake(
        f"{EVALUATE} --explainers {LONG}=grad_cam", r"can't name an explainer.*60 at most"
    ),
    "user that is not there, images": Mistake(
        f"{FIT} --data.root ~nouser/x", r"no user 'nouser' with a home folder.*whole path"
    ),
    "user that is not there, weights": Mistake(
        f"{FIT} --model.teacher.weights ~nouser/x", r"no user 'nouser'"
    ),
    "user that is not there, results": Mistake(f"{EXPLAIN} --out ~nouser/x", r"no user 'nouser'"),
    "user that is not there, alone": Mistake(f"{EXPLAIN} --out ~nouser", r"no user 'nouser'"),
    "option that is not UTF-8": Mistake(
        ["fit", "-c", "tiny.yaml", "--run", LATIN], r"'caf\\xe9' is not UTF-8.*rename it"
    ),
    "file for a run": Mistake(f"{FIT} --run tiny.yaml/x", r"a file stands where a folder is meant"),
    "file for a cache": Mistake(
        f"{FIT} --data.cache_dir tiny.yaml",
        r"a file stands where a folder is meant.*name another folder",
    ),
    "file for masks": Mistake(
        FIT, r"masks' is a file; masks lie in a folder", text("images/masks", "")
    ),
    "folder for boxes": Mistake(
        FIT, r"boxes\.csv' is a folder; give a file", lambda f: (f / "images/boxes.csv").mkdir()
    ),
    "folder for stored maps": Mistake(
        f"{EVALUATE} --explainers x.npz", r"'x\.npz' is a folder", lambda f: (f / "x.npz").mkdir()
    ),
    "null for a group": Mistake(
        f"{FIT} --model.optimization null", r"model\.optimization is null; leave it out"
    ),
    "null for results": Mistake(f"{EXPLAIN} --out null", r"--out is null; give a path"),
    # what is there
    "empty test folder": Mistake(FIT, r"no images in 'images/test'; supported: \.jpg", empty_test),
    "class that only the test folder has": Mistake(
        FIT, r"class 'c9' of images/test is not in images/train", only_in_test
    ),
    "test folder of other files": Mistake(
        FIT, r"no images in 'images/test' \(its files end in \.heic\)", unreadable_names
    ),
    "study without test images": Mistake(
        [
            *("study", "--base", "tiny.yaml", "--seeds", "0", "--arms", "{a: {}}"),
            '--overrides=["--data.root=images/train", "--data.test_fraction=0"]',
        ],
        r"no test images: .*test_fraction is 0",
    ),
    "gray values of 32 bits": Mistake(
        EXPLAIN, r"deep\.tiff' \(gray values from 0 to 255000 have no agreed range", deep_gray
    ),
    # what hangs, or fills the memory
    "pipe among training images": Mistake(
        FIT, r"x\.png is a pipe.*remove it", pipe("images/train/c0/x.png")
    ),
    "pipe among images": Mistake(EXPLAIN, r"x\.png is a pipe", pipe("images/test/c0/x.png")),
    "socket among images": Mistake(EXPLAIN, r"x\.png is a pipe, a socket", bound_socket),
    "device as an image": Mistake(
        "explain --teacher shallow_cnn --images /dev/zero", r"'/dev/zero' is .* a device"
    ),
    "pipe for boxes": Mistake(FIT, r"boxes\.csv' is a pipe", pipe("images/boxes.csv")),
    "pipe for stored maps": Mistake(
        f"{EVALUATE} --explainers x.npz", r"'x\.npz' is a pipe", pipe("x.npz")
    ),
    "pipe for a config": Mistake("fit -c x.yaml", r"x\.yaml is a pipe", pipe("x.yaml")),
    "aliases that explode": Mistake(
        "fit -c b.yaml",
        r"b\.yaml, line \d+: its aliases .* more than 100,000 values",
        text("b.yaml", laughs("[x, x, x, x, x, x, x, x, x]", "", "[%s]")),
    ),
    "merges that explode": Mistake(
        "explain -c b.yaml",
        r"its aliases .* more than 100,000 values",
        text("b.yaml", laughs("{k: 1}", "", "{<<: [%s]}")),
    ),
    "alias of itself": Mistake(
        "fit -c b.yaml", r"line 1: the alias contains itself", text("b.yaml", "a: &a [*a]\n")
    ),
    "lists in lists": Mistake(
        "fit -c b.yaml", r"lists inside lists, too deep", text("b.yaml", "a: " + "[" * 5000)
    ),
    "day that is none": Mistake(
        "fit -c b.yaml", r"not YAML: month must be", text("b.yaml", "model: 2024-99-99\n")
    ),
    "maps that unfold": Mistake(
        f"{EVALUATE} --explainers x.npz", r"4096x4096 cells for images of 16x16", deflated_maps
    ),
    "maps that lie": Mistake(
        f"{EVALUATE} --explainers x.npz", r"announces more than it holds", lying_maps
    ),
    "checkpoint that unfolds": Mistake(
        "explain --checkpoint z.ckpt --images images/test/c0",
        r"unfolds to 5\d\d,\d+,\d+, which torch's own files never do",
        deflated_checkpoint,
    ),
    **{
        f"size of 100,000 pixels: {line.split()[0]}": Mistake(
            line, r"size is 100000; give .* in pixels, 1 or more, at most 8,192"
        )
        for line in (
            f"{EXPLAIN} --size 100000",
            f"{ANALYZE} --size 100000",
            f"{EVALUATE} --size 100000",
            f"export --checkpoint {STUDENT} --format torch --size 100000",
            f"{FIT} --data.size 100000",
        )
    },
    # what was accepted in silence
    "shift beyond the image": Mistake(
        f"{FIT} --model.augment.crop pad --model.augment.padding 500",
        r"augment\.padding is 500 for images of 16x16 pixels.*give 8 or less",
    ),
    "negative clipping": Mistake(
        f"{FIT} --trainer.gradient_clip_val=-1", r"gradient_clip_val is -1.*0 \(no clipping\)"
    ),
    "no number for clipping": Mistake(
        f"{FIT} --trainer.gradient_clip_val .nan", r"gradient_clip_val is nan"
    ),
    "learning rate without end": Mistake(
        f"{FIT} --model.optimization.lr .inf", r"lr is inf; a learning rate"
    ),
    "decay that is no number": Mistake(
        f"{FIT} --model.optimization.weight_decay .nan", r"weight_decay is nan; give 0 or more"
    ),
    "beta that is no number": Mistake(f"{FIT} --model.beta .nan", r"beta is nan; .* 0 or more"),
    "temperature without end": Mistake(
        f"{FIT} --model.temperature .inf", r"temperature is inf; give a number above 0"
    ),
    "pairs without weight": Mistake(
        f"{FIT} --model.transfer.pairs '[{{weight: 0}}]'", r"pairs all have weight 0"
    ),
    "pair's weight without end": Mistake(
        f"{FIT} --model.transfer.pairs '[{{weight: .inf}}]'", r"a pair's weight is inf"
    ),
    "test images less than none": Mistake(
        "fit -c tiny.yaml --data.root images/train --data.test_fraction=-0.1",
        r"test_fraction is -0\.1; give a share",
    ),
    "spread of 0 in a file": Mistake(
        FIT,
        r"std is 0\.0; .*teacher\.safetensors' has these in its metadata",
        normalized("[0.5, 0.5, 0.5]", "[0.25, 0.0, 0.25]"),
    ),
    "spread that is no number in a file": Mistake(
        FIT, r"std is nan;", normalized("[0.5, 0.5, 0.5]", "[NaN, 0.2, 0.2]")
    ),
    "mean of images up to 255 in a file": Mistake(
        FIT,
        r"mean is 123\.7; give numbers for images in \[0, 1\]",
        normalized("[123.7, 116.3, 103.5]", "[58.4, 57.1, 57.4]"),
    ),
    "spread without end in a config": Mistake(
        FIT,
        r"std is inf;",
        change_config(
            lambda c: c["model"]["init_args"]["teacher"].update(std=[1.0, 1.0, float("inf")])
        ),
    ),
    "spread of 0 in a checkpoint": Mistake(
        EXPERIMENT, r"std is 0\.0; .*'s\.safetensors' says so", experiment(std=[0.2, 0.0, 0.2])
    ),
    "size below 0 in a checkpoint": Mistake(
        EXPERIMENT, r"size is -3; .*'s\.safetensors' says so", experiment(size=[-3, -3])
    ),
    "size of 0 in a checkpoint": Mistake(EXPERIMENT, r"size is 0;", experiment(size=[0, 0])),
    "classes without end in a checkpoint": Mistake(
        EXPERIMENT, r"weights of shallow_cnn .* take 28\.0 GB", experiment(classes=10**9)
    ),
    "units without end in a checkpoint": Mistake(
        EXPERIMENT,
        r"weights of shallow_cnn .* take 360\.0 GB",
        experiment(
            student={"name": "shallow_cnn", "args": {"channels": [10**5] * 2, "strides": [1, 2]}}
        ),
    ),
    "other names than classes in a checkpoint": Mistake(
        EXPERIMENT, r"names 2 classes, its network has 6", experiment(class_names=["a", "b"])
    ),
    "seed of a part": Mistake(f"{FIT} --model.seed 3", r"--model\.seed is taken from --seed_every"),
    "images without end": Mistake(
        f"{FIT} --data ShapesData --data.train 1000000000",
        r"1,000,000,000 images of 32x32 pixels take",
    ),
    "empty folder for results": Mistake(f"{EXPLAIN} --out ''", r"--out is empty; give a value"),
    "empty folder after a sign": Mistake(f"{EXPLAIN} --out=", r"--out is empty"),
    "empty checkpoint": Mistake(
        "explain --checkpoint '' --images images/test/c0", r"--checkpoint is empty"
    ),
    "empty images": Mistake(f"explain --checkpoint {STUDENT} --images ''", r"--images is empty"),
    "empty run": Mistake(f"{FIT} --run ' '", r"--run is empty"),
    "empty config": Mistake("fit -c ''", r"--config is empty"),
    "empty path in the config": Mistake(
        FIT,
        r"--data\.init_args\.root is empty",
        change_config(lambda content: content["data"]["init_args"].update(root="")),
    ),
    "option twice in the config": Mistake(
        FIT,
        r"tiny\.yaml, line \d+: 'trainer' is given twice; keep one",
        lambda folder: (folder / "tiny.yaml").write_text(
            (folder / "tiny.yaml").read_text() + "trainer: {max_epochs: 9}\n"
        ),
    ),
    "arm above the folder": Mistake(f"{STUDY} '{{..: {{}}}}'", r"arm '\.\.' can't name a folder"),
    "arm outside the folder": Mistake(
        f"{STUDY} '{{a/../../x: {{}}}}'", r"arm 'a/\.\./\.\./x' can't name a folder"
    ),
    "arm with an option's name": Mistake(
        f"{STUDY} '{{seed_everything: {{}}}}'", r"arm 'seed_everything' has the name of an option"
    ),
    "arm with a seed of its own": Mistake(
        f"{STUDY} '{{a: {{seed_everything: 3}}}}'", r"sets seed_everything, .*its seeds: --seeds"
    ),
    "arm with a control's name": Mistake(
        f"{STUDY} '{{mean_map: {{}}}}'", r"arm 'mean_map' has the name of what a study writes"
    ),
    "overrides that the study gives": Mistake(
        [*STUDY.split(), "{a: {}}", '--overrides=["--run=x"]'], r"overrides sets run, .*--out"
    ),
    "negative seed of a study": Mistake(
        "study --base tiny.yaml --seeds=-3 --arms '{a: {}}'", r"a seed is -3; seeds are 0 or more"
    ),
    "explainer twice": Mistake(
        f"{EVALUATE} --explainers grad_cam student grad_cam", r"--explainers has 'grad_cam' twice"
    ),
    "metric twice": Mistake(f"{EVALUATE} deletion_mean", r"--metrics has 'deletion_mean' twice"),
    "list given twice": Mistake(
        f"{EXPLAIN} --images images/test/c1", r"--images is given 2 times, and the last would"
    ),
    "image twice": Mistake(
        f"{EXPLAIN} images/test/c0/0.png", r"--images has '.*/images/test/c0/0\.png' twice"
    ),
    "port beyond the last": Mistake("report --run runs --port 70000", r"port is 70000; .*65535"),
    # values of another kind
    **{
        f"null for {option}": Mistake(
            f"{FIT} --{option} null", rf"^camdistill: {re.escape(option)} is null; leave it out"
        )
        for option in (
            *("data.batch_size", "data.split_seed", "data.val_fraction", "data.test_fraction"),
            *("data.on_broken", "model.beta", "model.temperature", "model.cached"),
            *("model.optimization.lr", "model.transfer.classes"),
        )
    },
    "null for a number in the config": Mistake(
        FIT,
        r"model\.beta is null; leave it out",
        change_config(lambda content: content["model"]["init_args"].update(beta=None)),
    ),
    "null for a number in an arm": Mistake(
        f"{STUDY} '{{a: {{model.beta: null}}}}'", r"model\.beta is null; leave it out"
    ),
    **{
        f"arm that is no text: {arm}": Mistake(
            f"{STUDY} '{{{arm}: {{}}}}'", rf"arm {said} is no text in YAML; give it in quotes"
        )
        for arm, said in (
            *(("5", "5"), ("true", "True"), ("null", "None")),
            ("1.5", r"1\.5"),
        )
    },
    **{
        f"arm {arm}": Mistake(
            [*STUDY.split(), f"{{{json.dumps(arm)}: {{}}}}"], r"arm .* can't name a folder; give"
        )
        for arm in ("a\nb", " a", "results.json ", "version_0", "-x", "null", "a:b", "a\tb", "x.")
    },
    **{
        f"run {name}": Mistake(
            ["fit", "-c", "tiny.yaml", f"--run={name}"],
            r"--run is .*; give a name for a folder under runs/, or a path that ends in one",
        )
        for name in ("..", ".", "/", "a/../..", "./.", "runs/", "../", "~/", "a\nb", "x/..")
    },
    **{
        f"other kind: {option}": Mistake(
            f"{FIT} --{option}",
            rf"^camdistill: [\w.]+ is '{said}'; it takes [a-z ]+(; write 1000)?$",
        )
        for option, said in (
            *(("trainer.max_epochs 1e3", r"1(e3|000\.0)"), ("trainer.max_epochs true", "true")),
            *(("trainer.limit_train_batches true", "true"), ("data.limit true", "true")),
            *(("trainer.max_steps 1.5", "1.5"), ("trainer.log_every_n_steps x", "x")),
        )
    },
    "link to itself": Mistake(
        f"explain --checkpoint {STUDENT} --images loop",
        r"'loop' is a link that leads back to itself",
        lambda folder: (folder / "loop").symlink_to("loop"),
    ),
    "link to nothing": Mistake(
        f"explain --checkpoint {STUDENT} --images link",
        r"'link' is a link to 'gone', which is not there",
        lambda folder: (folder / "link").symlink_to("gone"),
    ),
    # callbacks and profilers
    "profiler's folder that can't be made": Mistake(
        f"{FIT} --trainer.profiler PyTorchProfiler --trainer.profiler.dirpath=/proc/x",
        r"--trainer\.profiler\.dirpath is '/proc/x', .*; name another folder",
    ),
    "profiler's folder that is a file": Mistake(
        f"{FIT} --trainer.profiler SimpleProfiler --trainer.profiler.dirpath=tiny.yaml",
        r"--trainer\.profiler\.dirpath is 'tiny\.yaml', .*; name another folder",
    ),
    **{
        f"checkpoint's name {name}": Mistake(
            f"{FIT} --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.filename='{name}'",
            r"ModelCheckpoint: filename is .*; give names and formats such as \{epoch:02d\}",
        )
        for name in ("{epoch:q}", "{val_loss:d}", "{epoch", "{epoch!x}")
    },
    "averaged weights as a callback": Mistake(
        f"{FIT} --trainer.callbacks+=StochasticWeightAveraging --trainer.callbacks.swa_lrs=0.1",
        r"StochasticWeightAveraging .*--model\.ema",
    ),
    "batch size as a callback": Mistake(
        f"{FIT} --trainer.callbacks+=BatchSizeFinder", r"BatchSizeFinder .*--data\.batch_size"
    ),
}


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy to make mistakes in."""
    copy = tmp_path / "here"
    shutil.copytree(trained, copy)
    monkeypatch.chdir(copy)
    yield copy
    monkeypatch.delenv("CAMDISTILL_RUN_FOLDER", raising=False)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_told_in_one_line_and_writes_nothing(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistake = MISTAKES[name]
    mistake.prepare(folder)
    line = mistaken_line(mistake.line, folder, capsys)
    assert re.search(mistake.says, line), line


@pytest.mark.parametrize(
    "option",
    [
        "--model.student.weights null",
        "--model.student.weights=null",
        "--model.transfer.pairs '[{student: null, teacher: null}]'",
    ],
)
def test_null_in_a_group_is_no_text(option: str, folder: Path) -> None:
    assert main([*FIT.split(), "--run", "other", *shlex.split(option)]) == 0
    one, other = (folder / f"runs/{name}/version_0/config.yaml" for name in ("tiny", "other"))
    alike = {path.read_text().replace("run: other\n", "run: tiny\n") for path in (one, other)}
    assert len(alike) == 1


def test_names_that_are_not_utf8_train_and_explain(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val", "test"):
        Path(f"images/{split}/c0").rename(f"images/{split}/{LATIN}")
    Path("images/test/c1/1.png").rename(os.fsdecode(b"images/test/c1/\xfc.png"))
    assert main([*FIT.split(), "--run", "latin", "--model.cached", "true"]) == 0
    student = "runs/latin/version_0/student.safetensors"
    assert (
        main(["explain", "--checkpoint", student, "--data", "images", "--classes", r"caf\xe9"]) == 0
    )
    assert main(["explain", "--checkpoint", student, "--images", "images/test/c1"]) == 0
    assert r"\xfc.png" in capsys.readouterr().out
    assert main(["evaluate", *EVALUATE.split()[1:]]) == 0


def test_user_without_a_home_names_a_folder_for_caches(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(*args: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CAMDISTILL_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert "has no home folder; name one with CAMDISTILL_CACHE" in mistaken_line(
        FIT, folder, capsys
    )
    line = mistaken_line(f"{FIT} --data.root ~/images", folder, capsys)
    assert "begins with ~, but" in line


@pytest.mark.parametrize(
    "option", ["max_epochs 0", "limit_train_batches 0", "enable_checkpointing false"]
)
def test_only_files_that_are_there_are_named(
    option: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FIT.split(), "--run", "none", *f"--trainer.{option}".split()]) == 0
    out = capsys.readouterr().out
    named = [Path(word) for word in re.findall(r"runs/[\w/.]+\.\w+", out)]
    assert named
    assert all(path.is_file() for path in named), out
    assert ("Nothing was trained (0 steps)" in out) == option.endswith("0")
