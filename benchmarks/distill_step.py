"""What a training step costs: cross-entropy, distillation, and Grad-CAM transfer on top of it.

    python benchmarks/distill_step.py [--rounds 15] [--steps 8] [--batch 256]

The student of configs/cifar10.yaml, a ResNet-56 teacher, 32 px images, bf16. All arms take
turns in each round, so that a noisy machine disturbs them alike; ratios are within a round.
The code path of training (`DistilledExplainer.training_step`) without the loop around it.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from counted import counted

from camdistill.data.datasets import ImageSet, shapes_set
from camdistill.data.shapes import Shapes
from camdistill.data.views import Augment
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.distill.teacher_cache import TeacherCache
from camdistill.distill.transfer import LayerPair, Transfer
from camdistill.networks.teachers import NetworkSpec
from camdistill.types import Batch

STUDENT = NetworkSpec("shallow_cnn", args={"residual": True})
STAGES = [LayerPair("stage1", "layer1"), LayerPair("stage2", "layer2"), LayerPair()]


class Step(DistilledExplainer):
    """A module whose steps run without a trainer."""

    progress = 0.5

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Logging is Lightning's cost, the same for every arm."""

    log_dict = log
    stop_if_bad = log


def module(images: ImageSet, folder: Path, *, cached: bool, **options: Any) -> Step:
    """An arm, ready for its steps; its teacher asked beforehand where it is cached."""
    torch.manual_seed(0)
    built = Step(
        NetworkSpec("resnet56"), STUDENT, augment=Augment(crop="pad", flip=True), **options
    )
    built.train().to(memory_format=torch.channels_last)
    built.teacher.to(memory_format=torch.channels_last)
    built._name_pairs(torch.zeros(1, 3, 32, 32))
    if cached:
        layers = [teacher for _, teacher, _ in built.pairs]
        built._caches["train"] = TeacherCache.open_or_build(
            built.teacher, images, layers, root=folder, precision="bfloat16"
        )
    else:
        built._live_teachers = [built.teacher.fuse_batch_norm((32, 32))]
    return built


def seconds(arm: Step, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> float:
    """Mean time of a step."""
    start = time.perf_counter()
    for index, batch in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16):
            loss = arm.training_step(batch, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / len(batches)


def main() -> None:
    """Prints seconds a step and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=256)
    given = parser.parse_args()
    images = shapes_set(Shapes("train", 2048))
    plain = {"ce": 1.0, "kd": 0.0, "beta": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        arms = {
            "cross-entropy, cached": module(images, root, cached=True, **plain),
            "KD, cached": module(images, root, cached=True, beta=0.0),
            "KD + Grad-CAM, cached": module(images, root, cached=True),
            "KD + Grad-CAM at three stages, cached": module(
                images, root, cached=True, transfer=Transfer(pairs=STAGES)
            ),
            "KD, live": module(images, root, cached=False, beta=0.0),
            "KD + Grad-CAM, live": module(images, root, cached=False),
        }
        optimizers = {
            name: torch.optim.SGD(arm.student.network.parameters(), 0.01, momentum=0.9)
            for name, arm in arms.items()
        }
        generator = np.random.default_rng(0)
        taken: dict[str, list[float]] = {name: [] for name in arms}
        for number in counted(given.rounds + 1):
            order = [generator.choice(2048, given.batch, replace=False) for _ in range(given.steps)]
            batches = [images.batch(np.sort(positions)) for positions in order]
            for name, arm in arms.items():
                one = seconds(arm, optimizers[name], batches)
                if number:  # the first round warms up
                    taken[name].append(one)
    _report(taken, given.batch)


def _report(taken: dict[str, list[float]], batch: int) -> None:
    print(f"batch {batch}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, values in taken.items():
        middle = float(np.median(values))
        print(f"{name:40s} {1e3 * middle:8.1f} ms  {batch / middle:8.0f} images/s")
    for name, base in (
        ("KD + Grad-CAM, cached", "KD, cached"),
        ("KD + Grad-CAM, live", "KD, live"),
        ("KD + Grad-CAM, cached", "cross-entropy, cached"),
        ("KD + Grad-CAM at three stages, cached", "KD, cached"),
    ):
        ratios = np.array(taken[name]) / np.array(taken[base])
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        print(f"{name} / {base}: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
