"""What a sweep costs beside plain forwards of the same networks, and how large its state is.

    python benchmarks/layer_sweep.py [--rounds 15] [--batch 128] [--every]
        [--checkpoint FILE [--teacher FILE]]

ResNet-56 and the student of configs/cifar10.yaml at 32 px, float32, channels_last; the checkpoint's
networks if one is given. All arms take turns in each round on the same images, so that a noisy
machine disturbs them alike; ratios are within a round. `--every` sweeps every ReLU call (55 of the
ResNet) in place of the 28 block outputs.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from counted import counted
from torch import nn

from camdistill import load
from camdistill.data.datasets import shapes_set
from camdistill.data.shapes import Shapes
from camdistill.layers.sweep.layer_sweep import LayerSweep
from camdistill.layers.sweep.sweep_plan import SweepOptions
from camdistill.networks.cifar_resnet import CifarResNet
from camdistill.networks.students import ShallowCNN

ARMS = {
    "sweep without CKA": SweepOptions(cka=False),
    "sweep": SweepOptions(),
    "sweep, probes": SweepOptions(probes=10),
    "sweep, Grad-CAM of 5 % of the images": SweepOptions(cam_share=0.05),
}


def networks(checkpoint: Path | None, teacher: Path | None) -> dict[str, nn.Module]:
    """Teacher and student, in eval mode and channels_last."""
    if checkpoint is None:
        torch.manual_seed(0)
        pair: dict[str, nn.Module] = {
            "teacher": CifarResNet(56),
            "student": ShallowCNN(residual=True),
        }
    else:
        loaded = load(checkpoint, teacher=teacher)
        assert loaded.teacher is not None, loaded.teacher_missing
        pair = {"teacher": loaded.teacher, "student": loaded.network}
    return {
        name: network.eval().to(memory_format=torch.channels_last) for name, network in pair.items()
    }


def batch(size: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [0, 1] and their labels."""
    images = shapes_set(Shapes("test", size, seed=start))
    taken = images.batch(np.arange(size))
    floats = taken.pixels.float().div_(255)
    return floats.contiguous(memory_format=torch.channels_last), taken.labels


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def timed(
    pair: Mapping[str, nn.Module], sweeps: Mapping[str, LayerSweep], rounds: int, size: int
) -> dict[str, list[float]]:
    """Seconds of a batch by arm; the first round warms up and doesn't count."""

    @torch.no_grad()
    def forwards(images: torch.Tensor) -> None:
        for network in pair.values():
            network(images)

    taken: dict[str, list[float]] = {"both forwards": [], **{name: [] for name in sweeps}}
    for number in counted(rounds + 1):
        images, labels = batch(size, number)
        ids = torch.arange(number * size, (number + 1) * size)
        for name, values in taken.items():
            if name in sweeps:
                one = seconds(lambda n=name: sweeps[n].update(images, ids, labels))  # noqa: B023
            else:
                one = seconds(lambda: forwards(images))  # noqa: B023
            if number:
                values.append(one)
    return taken


def state_sizes(pair: Mapping[str, nn.Module], layers: list[str] | None, size: int) -> None:
    """Bytes after 1,000 and 10,000 images; the images repeat under new numbers."""
    images, labels = batch(size, 0)
    for name in ("sweep", "sweep, probes"):
        state = LayerSweep(pair, images[:64], layers=layers, options=ARMS[name])
        for target in (1_000, 10_000):
            while state.images < target:
                count = min(size, target - state.images)
                ids = torch.arange(state.images, state.images + count)
                state.update(images[:count], ids, labels[:count])
            print(f"{name}: {state.bytes / 2**20:.2f} MiB of state at {state.images:,} images")


def main() -> None:
    """Prints milliseconds an image, ratios and the state's size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--teacher", type=Path, help="weights, if not where the file says")
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--skip-sizes", action="store_true")
    given = parser.parse_args()
    pair = networks(given.checkpoint, given.teacher)
    layers = ["*relu*"] if given.every else None
    example, _ = batch(64, 0)
    sweeps = {
        name: LayerSweep(pair, example, layers=layers, options=options)
        for name, options in ARMS.items()
    }
    counts = {name: len(found) for name, found in sweeps["sweep"].plan.layers.items()}
    print(f"layers {counts}, batch {given.batch}, {torch.get_num_threads()} threads")
    taken = timed(pair, sweeps, given.rounds, given.batch)
    base = np.array(taken["both forwards"])
    for name, values in taken.items():
        middle = float(np.median(values))
        low, ratio, high = np.percentile(np.array(values) / base, [25, 50, 75])
        print(
            f"{name:40s} {1e3 * middle / given.batch:7.2f} ms an image, "
            f"{ratio:.2f} x the forwards (quartiles {low:.2f} to {high:.2f})"
        )
    if not given.skip_sizes:
        state_sizes(pair, layers, given.batch)


if __name__ == "__main__":
    main()
