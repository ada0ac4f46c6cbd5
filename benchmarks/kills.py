"""Kills commands with SIGKILL, goes on as the README says, and compares with what wasn't killed.

    python benchmarks/kills.py [--kills 300] [--only fit study] [--seed 0] [--folder FOLDER]

A command is killed up to three times, at a random moment or at a named point (the end of training,
the config, a rename, a line of the ledger), and goes on after each. What it leaves must be equal to
what an unbroken one leaves, bit for bit, but for times. A refusal in one line is fine where it
leaves everything as it was; the run then starts afresh.

Commands run in forks of this process, which has imported all: 300 kills take up to an hour
on two shared cores. Run in three parts at once there: 313 kills of 199 runs, all equal, 38 times
going on was refused in one line because there was no checkpoint yet.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import camdistill.commands as commands
from camdistill.cli import COMMANDS, main
from camdistill.experiments.training.checkpoint_io import AtomicCheckpointIO
from camdistill.experiments.training.lightning_cli import Experiment
from camdistill.networks.students import ShallowCNN
from camdistill.networks.weights import save_safetensors
from camdistill.report.tensorboard import read_scalars
from camdistill.store.run_log import RunLog

NETWORK = {"name": "shallow_cnn", "args": {"channels": [4, 6], "strides": [1, 2]}}
SHAPES = {
    "class_path": "camdistill.data.modules.ShapesData",
    "init_args": {"train": 48, "val": 24, "test": 24, "classes": 6, "batch_size": 16},
}
FOLDER = {
    "class_path": "camdistill.data.modules.FolderData",
    "init_args": {"root": "images", "batch_size": 16},
}
TRAINER = {"max_epochs": 4, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1}
LIMIT = 120.0  # seconds of one command
MOST = 3  # kills of one run
# Keys of how long something took, and words of lines that say so or that a run went on.
SAYS = ("Milliseconds to make a map", "were looked at by an earlier run")
TIMES = ("seconds", "images_per_second")


def student(**more: object) -> dict[str, object]:
    """A distillation's config of a few steps."""
    teacher = {**NETWORK, "weights": "teacher.safetensors"}
    options = {"teacher": teacher, "student": NETWORK, "cached": False, **more}
    path = "camdistill.distill.distilled_explainer.DistilledExplainer"
    return {
        "model": {"class_path": path, "init_args": options},
        "data": SHAPES,
        "trainer": {**TRAINER, "precision": "32-true", "enable_progress_bar": False},
    }


def classifier() -> dict[str, object]:
    """A classifier's config of a few steps."""
    path = "camdistill.distill.classifier.Classifier"
    options = {"network": NETWORK, "ema": 0.9}
    return student() | {"model": {"class_path": path, "init_args": options}}


RANK = {
    "teacher": {**NETWORK, "weights": "teacher.safetensors"},
    "data": SHAPES,
    "students": {"tiny": NETWORK},
    "n": [16],
    "seeds": [0, 1],
    "tuning": {"betas": [1.0], "seeds": [7]},
    "recipe": {"steps": 2, "batch_size": 8},
    "methods": ["grad_cam@stage2"],
    "controls": ["random"],
    "shares": [],
    "workers": 0,
    "device": "cpu",
}
REFINE = {
    "data": {**SHAPES, "init_args": {**SHAPES["init_args"], "train": 32}},  # type: ignore[dict-item]
    "objective": {"shares": [0.5]},
    "network": {"name": "shallow_cnn", "args": {"channels": [4, 6], "strides": [2, 2]}},
    "seeds": [0],
    "start": {"epochs": 1},
    "recipe": {"epochs": 1},
    "judging": {"images": 6, "held_out": ["gradient"], "road": [0.5]},
    "workers": 0,
    "device": "cpu",
}


@dataclass(frozen=True)
class Kind:
    """A command that is killed.

    Attributes:
        words: The command line.
        config: Its config file; none where the words are all.
        again: What is added to go on.
        points: Named points at which it is killed, besides random moments.
        kept: Whether a cache that was there may be used; else each run fills its own.
    """

    words: str
    config: dict[str, object] | None = None
    again: tuple[str, ...] = ()
    points: tuple[str, ...] = ("rename",)
    kept: bool = True


FIT = ("end of training", "after the last checkpoint", "config", "rename")
ON = ("--ckpt_path", "last")
GIVEN = "--checkpoint student.safetensors --images images/test --out out"
KINDS = {
    "fit": Kind("fit -c it.yaml --run ./out", student(), ON, FIT),
    "fit with ema": Kind("fit -c it.yaml --run ./out", student(ema=0.9), ON, FIT),
    "classifier": Kind("fit -c it.yaml --run ./out", classifier(), ON, FIT),
    "study": Kind(
        "study -c it.yaml --out out",
        {"base": "base.yaml", "arms": {"maps": {}, "kd": {"model.beta": 0}}, "seeds": [0]},
        points=FIT,
    ),
    "rank": Kind("rank -c it.yaml --out out", RANK, points=("rename", "ledger")),
    "refine": Kind("refine -c it.yaml --out out", REFINE, points=("rename", "ledger")),
    "evaluate": Kind(f"evaluate {GIVEN} --batch 4 --metrics deletion_mean insertion_mean"),
    "analyze": Kind(f"analyze {GIVEN} --steps 8 --cards 1 --pictures 2"),
    "cache": Kind(
        "fit -c it.yaml --run ./out",
        {**student(cached=True), "data": FOLDER},
        ON,
        ("rename", "cache"),
        kept=False,
    ),
}


@dataclass
class Tally:
    """What came of a kind's kills."""

    kills: int = 0
    runs: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    points: Counter[str] = field(default_factory=Counter)


def die(*_: object, **__: object) -> None:
    """The end of this process, at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def armed(point: str, chance: random.Random) -> None:
    """Makes this process kill itself at a named point."""
    if point == "end of training":
        at = chance.choice(["on_train_end", "on_fit_end"])
        loops = __import__("pytorch_lightning").Callback
        setattr(loops, at, die)
    elif point == "after the last checkpoint":
        save, seen = AtomicCheckpointIO.save_checkpoint, [0]

        def saved(self: AtomicCheckpointIO, *given: object, **more: object) -> None:
            save(self, *given, **more)  # type: ignore[arg-type]
            seen[0] += 1
            if given[0]["epoch"] + 1 == TRAINER["max_epochs"]:  # type: ignore[index]
                die()

        AtomicCheckpointIO.save_checkpoint = saved  # type: ignore[method-assign]
    elif point == "ledger":
        add, left = RunLog.add, [chance.randrange(4)]

        def added(self: RunLog, records: object) -> None:  # type: ignore[type-arg]
            if left[0] > 0:
                left[0] -= 1
                add(self, records)  # type: ignore[arg-type]
                return
            with self._path.open("a") as file:  # half a line
                file.write('{"key": "')
            die()

        RunLog.add = added  # type: ignore[method-assign, assignment]
    else:
        _at_rename(point, chance)


def _at_rename(point: str, chance: random.Random) -> None:
    """Kills before or after a file is put in place: the config, a cache's, or any."""
    before, left = chance.random() < 0.5, [chance.randrange(6) if point == "rename" else 0]
    for name in ("replace", "rename"):
        move = getattr(Path, name)

        def moved(source: Path, target: Path, move: Callable[..., Path] = move) -> Path:
            target = Path(target)
            meant = {
                "config": target.name == "config.yaml",
                "cache": os.environ["CAMDISTILL_CACHE"] in str(target.absolute()),
                "rename": True,
            }[point]
            if meant and left[0] == 0 and before:
                die()
            result = move(source, target)
            if meant and left[0] == 0:
                die()
            left[0] -= meant
            return result

        setattr(Path, name, moved)


def run(
    words: list[str], place: Path, *, cache: Path, point: str = "", after: float = 0, seed: int = 0
) -> tuple[int, str]:
    """Runs a command in a fork; gives its exit code (-9 when killed) and what it said on stderr.

    Args:
        words: The command line.
        place: Where.
        cache: The folder of caches.
        point: Where it kills itself; empty for nowhere.
        after: Seconds after which it is killed; 0 for never.
        seed: Of what is random in a named point.
    """
    log = place / "stderr.txt"
    child = os.fork()
    if not child:
        code = 70
        try:
            for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
                os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.chdir(place)
            os.environ["CAMDISTILL_CACHE"] = str(cache)
            os.environ.pop("CAMDISTILL_RUN_FOLDER", None)
            if point:
                armed(point, random.Random(seed))
            code = main(words)
            sys.stdout.flush()
        except BaseException:
            __import__("traceback").print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    started = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        seconds = time.monotonic() - started
        if (after and seconds > after) or seconds > LIMIT:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def without_times(value: object) -> object:
    """JSON without how long things took, and which version of a run it was."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.startswith(TIMES)}
    if isinstance(value, list):
        return [without_times(one) for one in value if not says_so(one)]
    return re.sub(r"version_\d+", "version_0", value) if isinstance(value, str) else value


def says_so(line: object) -> bool:
    """Whether a line of a report tells times, or that the run went on."""
    return isinstance(line, str) and any(words in line for words in SAYS)


def content(file: Path) -> object:
    """What a file holds, but for times; equal where nothing that counts differs."""
    if file.suffix == ".safetensors":
        return {name: value.numpy().tobytes() for name, value in load_file(file).items()}
    if file.suffix == ".ckpt":
        whole = torch.load(file, weights_only=True)
        keys = ("state_dict", "current_model_state", "averaging_state")
        states = {key: whole[key] for key in keys if key in whole}
        return {
            f"{key} {name}": value.numpy().tobytes()
            for key, state in states.items()
            for name, value in state.items()
        }
    if file.suffix == ".npz":
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            names = [name for name in arrays if name not in TIMES]
            return {name: (str(arrays[name].dtype), arrays[name].tobytes()) for name in names}
    if file.suffix == ".json":
        return without_times(json.loads(file.read_text()))
    if file.suffix == ".jsonl":
        lines = [without_times(json.loads(line)) for line in file.read_text().splitlines()]
        return sorted(json.dumps(line) for line in lines)
    if file.suffix in (".txt", ".md"):
        return [line for line in file.read_text().splitlines() if not says_so(line)]
    return hashlib.sha256(file.read_bytes()).hexdigest()


def left(place: Path, cache: Path | None) -> dict[str, object]:
    """What a command left: files by name, and the lines of its charts."""
    found: dict[str, object] = {}
    roots = [place / "out"] + ([cache] if cache else [])
    for root in roots:
        for file in sorted(root.rglob("*")):
            name = str(file.relative_to(root))
            if not file.is_file() or file.name in ("written.txt", "hparams.yaml", "training.log"):
                continue
            if "tfevents" in name:
                folder = file.parent
                lines = {
                    tag: points
                    for tag, points in read_scalars(folder).items()
                    if not any(word in tag for word in TIMES)
                }
                found[f"{root.name}/{folder.relative_to(root)} scalars"] = lines
            elif file.suffix not in (".lock", ".partial", ".part"):
                found[f"{root.name}/{name}"] = content(file)
    return found


def differing(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Names of what differs between two that commands left."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


@contextlib.contextmanager
def workplace(shared: Path, kind: Kind, name: str) -> Iterator[Path]:
    """A folder with a command's inputs, under relative names; removed unless something is wrong."""
    place = shared / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for file in ("images", "teacher.safetensors", "student.safetensors", "base.yaml"):
        if (shared / file).exists():
            (place / file).symlink_to(shared / file)
    if kind.config is not None:
        (place / "it.yaml").write_text(yaml.safe_dump(kind.config))
    yield place


def inputs(shared: Path) -> None:
    """Images, a teacher, and a student that was trained from it."""
    for split in ("train", "val", "test"):
        for number in range(48 if split == "train" else 24):
            file = shared / "images" / split / f"c{number % 6}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            random_state = np.random.default_rng([len(split), number])
            Image.fromarray(random_state.integers(0, 255, (32, 32, 3), np.uint8)).save(file)
    torch.manual_seed(0)
    save_safetensors(shared / "teacher.safetensors", ShallowCNN(6, (4, 6), (1, 2)).state_dict(), {})
    (shared / "base.yaml").write_text(yaml.safe_dump(student(ema=0.9)))
    with workplace(shared, KINDS["fit"], "student") as place:
        code, said = run(KINDS["fit"].words.split(), place, cache=shared / "cache")
        if code:
            raise SystemExit(f"the inputs' own fit failed: {said}")
        shutil.copy(place / "out/version_0/student.safetensors", shared)


def one_line(said: str) -> bool:
    """Whether a command was refused in one line."""
    lines = [line for line in said.splitlines() if line.strip()]
    return len(lines) == 1 and lines[0].startswith("camdistill: ")


def trial(
    kind: Kind, place: Path, cache: Path, seconds: float, chance: random.Random, tally: Tally
) -> str:
    """Kills one run some times and lets it end; gives what went wrong, or nothing."""
    words, more = kind.words.split(), ()
    for attempt in range(chance.randint(1, MOST) + 1):
        last = (attempt and chance.random() < 0.4) or attempt == MOST
        point = "" if last or chance.random() < 0.5 else chance.choice(kind.points)
        after = 0.0 if last or point else chance.uniform(0.05, 1) * seconds
        given = [*words, *more]
        options = {"cache": cache, "point": point, "after": after, "seed": chance.randrange(10**6)}
        code, said = run(given, place, **options)  # type: ignore[arg-type]
        if code == 2 and more and one_line(said):  # refused: afresh
            tally.refused += 1
            more = ()
            code, said = run(words, place, **options)  # type: ignore[arg-type]
        if code == -signal.SIGKILL:
            tally.kills += 1
            tally.points[point or "random"] += 1
            more = kind.again
            if attempt < MOST:
                continue
        if code == 0:
            return ""
        if code != -signal.SIGKILL:
            return f"{' '.join(given)} (kill at {point or after}) gave {code}: {said[-1500:]}"
    for given in ([*words, *more], words):
        code, said = run(given, place, cache=cache)
        if code == 0:
            return ""
        if code != 2 or not one_line(said) or given == words:
            break
        tally.refused += 1
    return f"{' '.join(given)} gave {code}: {said[-1500:]}"


def newest(found: dict[str, object]) -> dict[str, object]:
    """Of runs that started afresh in a folder of their own: the last, as the first."""
    version = re.compile(r"(.*?version_)(\d+)(.*)")
    parts = {name: match for name in found if (match := version.fullmatch(name))}
    last: dict[str, int] = {}
    for match in parts.values():
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    rest = {name: value for name, value in found.items() if name not in parts}
    return rest | {
        f"{match[1]}0{match[3]}": found[name]
        for name, match in parts.items()
        if int(match[2]) == last[match[1]]
    }


def measure(name: str, shared: Path, kills: int, seed: int) -> Tally:
    """Kills one kind of command until there were enough kills."""
    kind, tally, chance = KINDS[name], Tally(), random.Random(f"{seed} {name}")
    folder = name.replace(" ", "-")
    own = None if kind.kept else shared / f"{folder}-cache-whole"
    with workplace(shared, kind, f"{folder}-whole") as place:
        started = time.monotonic()
        code, said = run(kind.words.split(), place, cache=own or shared / "cache")
        seconds = time.monotonic() - started
        if code:
            raise SystemExit(f"{name} fails without being killed: {said}")
        whole = left(place, own)
    while tally.kills < kills:
        number = tally.runs
        with workplace(shared, kind, f"{folder}-{number}") as place:
            if own is not None:
                own = shared / f"{folder}-cache-{number}"
                shutil.rmtree(own, ignore_errors=True)
            before = tally.kills
            wrong = trial(kind, place, own or shared / "cache", seconds, chance, tally)
            found = {
                part.replace(f"{folder}-cache-{number}", f"{folder}-cache-whole"): value
                for part, value in newest(left(place, own)).items()
            }
            if not wrong and (parts := differing(whole, found)):
                wrong = f"differs: {', '.join(parts[:5])}"
            if tally.kills > before or wrong:
                tally.runs += 1
            if wrong:
                tally.wrong.append(f"{place}: {wrong}")
            else:
                shutil.rmtree(place)
                if own is not None:
                    shutil.rmtree(own, ignore_errors=True)
    return tally


def start() -> None:
    """Kills, and prints a line a kind."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="kept; default: a temporary one")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells that lines were resumed
    for command in COMMANDS:
        __import__(f"{commands.__name__}.{command}")
    assert Experiment is not None, "imported, for the forks"
    shared = (given.folder or Path(tempfile.mkdtemp(prefix="kills-"))).absolute()
    shared.mkdir(parents=True, exist_ok=True)
    inputs(shared)
    started, total, all_wrong = time.monotonic(), Tally(), []
    share = -(-given.kills // len(given.only))
    print("| command | kills | runs | refused in one line | wrong | kills by point |")
    print("|---|---|---|---|---|---|")
    for name in given.only:
        tally = measure(name, shared, share, given.seed)
        points = ", ".join(f"{point} {count}" for point, count in sorted(tally.points.items()))
        row = (tally.kills, tally.runs, tally.refused, len(tally.wrong))
        print(f"| {name} | {' | '.join(map(str, row))} | {points} |", flush=True)
        for wrong in tally.wrong:
            print(f"    {wrong}", flush=True)
        total.kills += tally.kills
        total.runs += tally.runs
        total.refused += tally.refused
        all_wrong += tally.wrong
    minutes = (time.monotonic() - started) / 60
    print(
        f"\n{total.kills} kills of {total.runs} runs in {minutes:.1f} minutes: "
        f"{total.runs - len(all_wrong)} runs equal, {len(all_wrong)} wrong; {total.refused} times "
        "going on was refused in one line"
    )
    if not all_wrong and given.folder is None:
        shutil.rmtree(shared)
    raise SystemExit(bool(all_wrong))


if __name__ == "__main__":
    start()
