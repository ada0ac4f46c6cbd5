"""Numbers that commands and shipped checkpoints gave, and give again.

    python tests/test_numbers.py        writes tests/numbers/*.json anew

A change of names or of structure leaves every digit as it is. Another processor adds up in another
order, and training carries that far. So every digit counts on the kind of machine that wrote the
files; elsewhere predictions alone are compared, to 1e-3.
"""

import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from camdistill import grad_cam, load
from camdistill.cli import main
from camdistill.data.shapes import Shapes
from camdistill.distill.training import as_images

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "numbers"
# Facts about a run that aren't its results.
NO_RESULTS = {
    *("seconds", "machine", "versions", "sha256", "bytes", "device", "minutes", "command"),
    *("seconds_a_map", "seconds_of_runs"),
}

STUDENT = ["--checkpoint", "checkpoints/shapes-student.safetensors"]
STUDY = f"""
base: {ROOT}/configs/shapes.yaml
arms:
  student: {{}}
  kd_only: {{model.beta: 0}}
seeds: [0]
overrides:
  - --trainer.max_epochs=2
  - --trainer.accelerator=cpu
  - --data.train=500
  - --data.val=100
  - --data.test=100
"""
COMMANDS = {
    "study": ["study", "-c", "{config}"],
    "analyze": [
        *("analyze", *STUDENT, "--data", "shapes", "--count", "200", "--probes", "true"),
        *("--cards", "1", "--steps", "8", "--pictures", "1"),
    ],
    "evaluate": ["evaluate", *STUDENT, "--data", "shapes", "--count", "12", "--meta", "true"],
    "rank": [
        *("rank", "-c", "configs/rank-quick.yaml", "--n", "[100]", "--seeds", "[0, 1]"),
        *("--recipe.steps", "40", "--workers", "0", "--device", "cpu"),
    ],
    "refine": [
        *("refine", "-c", "configs/refine-quick.yaml", "--start.epochs", "1"),
        *("--recipe.epochs", "1", "--recipe.images", "256", "--judging.images", "20"),
        *("--data.init_args.train", "1000", "--workers", "0", "--device", "cpu"),
    ],
    "export": ["export", *STUDENT],
}
PREDICTED = 64  # images
LONGEST = 400  # numbers that a file shows


def machine() -> str:
    """The kind of machine on whose bits numbers depend."""
    kinds = {"vendor_id", "cpu family", "model", "stepping"}
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    facts = {line.split(":")[0].strip(): line.split(":")[-1].strip() for line in lines}
    names = [facts[kind] for kind in sorted(kinds & set(facts))]
    return " ".join([*names, torch.backends.cpu.get_cpu_capability(), torch.__version__])


def flatten(tree: object, name: str = "") -> Iterator[tuple[str, object]]:
    """All numbers and verdicts of nested results, each under its dotted name."""
    if isinstance(tree, Mapping):
        for key, branch in tree.items():
            if key not in NO_RESULTS:
                yield from flatten(branch, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list):
        for index, branch in enumerate(tree):
            yield from flatten(branch, f"{name}.{index}")
    elif isinstance(tree, int | float):
        yield name, tree


def summarize(numbers: Mapping[str, object]) -> dict[str, object]:
    """Some of the numbers, to be read, and a digest of all in their order."""
    step = 1 + len(numbers) // LONGEST
    return {
        "count": len(numbers),
        "sha256": hashlib.sha256(repr([*numbers.values()]).encode()).hexdigest(),
        "some": dict(list(numbers.items())[::step]),
    }


def run(name: str, folder: Path) -> dict[str, object]:
    """The numbers in the `results.json` of a command that ran in the project's root."""
    config = folder / "study.yaml"
    config.write_text(STUDY)
    out = folder / name
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        words = [word.replace("{config}", str(config)) for word in COMMANDS[name]]
        assert main([*words, "--out", str(out)]) in (0, None)
    finally:
        os.chdir(before)
    return dict(flatten(json.loads((out / "results.json").read_text())))


def predict(checkpoint: Path) -> dict[str, list[object]]:
    """A shipped checkpoint's logits and the sums of its maps on the first test images."""
    rendered = Shapes("test", PREDICTED).render(np.arange(PREDICTED))
    images = as_images(torch.from_numpy(rendered.pixels))
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        network = load(checkpoint).network
    finally:
        os.chdir(before)
    [maps] = grad_cam(network, images).values()
    with torch.no_grad():
        logits = network(images)
    return {"logits": logits.tolist(), "map_sums": maps.sum((-2, -1)).tolist()}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, as the numbers were written with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read(name: str) -> dict[str, object]:
    return json.loads((FOLDER / f"{name}.json").read_text())


CHECKPOINTS = sorted(path.name for path in (ROOT / "checkpoints").glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_command_gives_its_numbers(name: str, tmp_path: Path, one_thread: None) -> None:
    recorded = read(name)
    if recorded["machine"] != machine():
        pytest.skip(f"written on {recorded['machine']}; this is {machine()}")
    summary = summarize(run(name, tmp_path))
    assert summary["some"] == recorded["some"]
    assert summary == {key: recorded[key] for key in summary}


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_shipped_checkpoint_predicts_the_same(checkpoint: str, one_thread: None) -> None:
    recorded = read("predictions")
    predictions = predict(ROOT / "checkpoints" / checkpoint)
    if recorded["machine"] == machine():
        assert predictions == recorded[checkpoint]
    for kind, values in predictions.items():
        torch.testing.assert_close(
            torch.tensor(values),
            torch.tensor(recorded[checkpoint][kind]),
            rtol=1e-3,
            atol=1e-3,
        )


def write_all(names: list[str]) -> None:
    """Writes the numbers anew: of the commands that are named, or of all."""
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CAMDISTILL_CACHE"] = f"{folder}/cache"
        for name in names or [*COMMANDS, "predictions"]:
            if name == "predictions":
                content = {each: predict(ROOT / "checkpoints" / each) for each in CHECKPOINTS}
            else:
                content = summarize(run(name, Path(folder)))
            text = json.dumps({"machine": machine(), **content}, indent=1)
            (FOLDER / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    write_all(sys.argv[1:])
