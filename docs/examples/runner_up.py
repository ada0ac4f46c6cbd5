"""Does a student's map depend on the class? Pearson of its and its teacher's second class's maps.

    python docs/examples/runner_up.py checkpoints/shapes-student.safetensors --data shapes
    python docs/examples/runner_up.py checkpoints/cifar10-student-seed0.safetensors \
        --weights TEACHER_FILE --data CIFAR10_FOLDER

`same_map` is the student's map of the top class in the second one's place.
"""

import argparse
from pathlib import Path

import numpy as np

from camdistill import load
from camdistill.commands.image_sources import load_image_source
from camdistill.commands.networks import load_networks
from camdistill.distill.comparison import compare, update_meter
from camdistill.distill.training import as_images
from camdistill.measure.fidelity import FidelityMeter, intervals

SHOWN = ("student.agreement", "student.pearson", "student.runner_up", "controls.same_map.runner_up")


def main() -> None:
    """Prints means with 95 % intervals over test images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--weights")
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--count", type=int, default=2000)
    given = parser.parse_args()
    shown = load_networks(given.checkpoint, None, given.weights, [])
    if shown.student is None:
        raise SystemExit("give a student's checkpoint, and its teacher's file as --weights")
    pairs = load(given.checkpoint).pairs
    source = load_image_source([], given.data, count=given.count, size=shown.size)
    meter = FidelityMeter({own: its for own, its, _ in pairs}, runner_up=True)
    for rows in np.array_split(np.sort(source.order), max(given.count // 250, 1)):
        batch = source.images.batch(rows)
        images = as_images(batch.pixels)
        update_meter(
            meter, batch, compare(shown.student, shown.teacher, images, pairs, runner_up=True)
        )
    found = intervals(meter.table())
    for name in SHOWN:
        mean, low, high = found[name]
        print(f"{name:30s} {mean:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
