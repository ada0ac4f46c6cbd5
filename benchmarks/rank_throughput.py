"""Students an hour in a ranking: one after the other, one a process, and stacked into one.

    python benchmarks/rank_throughput.py [--students 16] [--steps 100] [--stack 16] [--rounds 3]

The same students with the same teacher cache in each way: on a CPU one after the other with all
threads, one process of one thread a core (what `rank` does), and a stack; on a GPU one after the
other and stacked (what `rank` does there). Ways take turns in each round; processes are started
before the clock. Times are medians over rounds.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from counted import counted

from camdistill.data.modules import ShapesData
from camdistill.experiments.ranking.ranking_arms import Arm, ArmTrainer, Run
from camdistill.experiments.ranking.ranking_config import RankingStudy
from camdistill.experiments.ranking.ranking_records import StudentRecord
from camdistill.experiments.ranking.ranking_run import prepare_arm_trainer
from camdistill.experiments.ranking.student_task import Recipe
from camdistill.experiments.shared.worker_pool import WorkerPool
from camdistill.networks.teachers import NetworkSpec
from camdistill.report.results import available_cores, machine

ROOT = Path(__file__).parents[1]
STUDENT = NetworkSpec("shallow_cnn", args={"channels": [16, 32, 64], "strides": [2, 2, 1]})
METHODS = ["mask:parts", "grad_cam@layer3"]


def classroom(folder: Path, steps: int, device: str) -> ArmTrainer:
    """What the students have in common, with the teacher's work done."""
    study = RankingStudy(
        NetworkSpec("resnet20", str(ROOT / "checkpoints/shapes-resnet20.safetensors")),
        ShapesData(train=500, val=500, test=2000),
        METHODS,
        {"shallow": STUDENT},
        [300],
        [0],
        controls=[],
        recipe=Recipe(steps=steps, precision="bfloat16"),
        folder=folder,
    )
    return prepare_arm_trainer(study, device)


def runs(count: int) -> list[Run]:
    """Students of three arms, as many seeds as it takes."""
    arms = [Arm(), *(Arm(method) for method in METHODS)]
    return [
        Run("shallow", 300, arms[number % 3], 10.0 * (number % 3 > 0), number // 3)
        for number in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("students", 16), ("steps", 100), ("stack", 16), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    jobs = runs(asked.students)
    with tempfile.TemporaryDirectory() as folder:
        room = classroom(Path(folder), asked.steps, device)
        crew: WorkerPool[list[Run], list[StudentRecord]] = WorkerPool(room, available_cores())
        ways: dict[str, Callable[[], object]] = {
            "one after the other": lambda: [room([job]) for job in jobs],
            f"stacks of {asked.stack}": lambda: [
                room(jobs[start : start + asked.stack])
                for start in range(0, len(jobs), asked.stack)
            ],
        }
        with crew:
            if device == "cpu":
                list(crew.results([[job] for job in jobs[: available_cores()]]))
                ways["one a process"] = lambda: list(crew.results([[job] for job in jobs]))
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in counted(asked.rounds):
                for name, way in ways.items():
                    start = time.perf_counter()
                    way()
                    seconds[name].append(time.perf_counter() - start)
    print({key: machine()[key] for key in ("cpu", "cores", "gpu")})
    base = np.array(seconds["one after the other"])
    for name, taken in seconds.items():
        ratio = np.median(base / np.array(taken))
        hourly = 3600 * len(jobs) / np.median(taken)
        print(f"{name:<22}{hourly:8.0f} students/h   {ratio:5.2f} times one after the other")


if __name__ == "__main__":
    main()
