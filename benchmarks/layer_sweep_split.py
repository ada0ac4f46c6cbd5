"""Whether two processes find what one finds: the largest difference in every part of the state.

    python benchmarks/layer_sweep_split.py --checkpoint FILE [--teacher FILE] [--data FOLDER]
        [--count 10000] [--batch 128]

The networks of a checkpoint over the test split of an image folder (Shapes without one), in one
process and in two that take every other batch; states go through files. Integers must be equal;
sums of floats may differ by the rounding of their order.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from camdistill import load
from camdistill.data.datasets import ImageSet, load_folder, shapes_set
from camdistill.data.shapes import Shapes
from camdistill.layers.findings import findings
from camdistill.layers.sweep.layer_sweep import LayerSweep
from camdistill.layers.sweep.sweep_plan import SweepOptions
from camdistill.layers.sweep.sweep_state import load_sweep_state, save_sweep_state

Given = argparse.Namespace


def images_of(given: Given) -> ImageSet:
    if given.data is None:
        return shapes_set(Shapes("test", given.count))
    return load_folder(given.data, "test")


def fetched(images: ImageSet, positions: np.ndarray) -> torch.Tensor:
    floats = images.batch(positions).pixels.float().div_(255)
    return floats.contiguous(memory_format=torch.channels_last)


def order_of(images: ImageSet, given: Given) -> np.ndarray:
    return np.random.default_rng(0).permutation(len(images))[: given.count]


def started(given: Given, images: ImageSet) -> LayerSweep:
    loaded = load(given.checkpoint, teacher=given.teacher)
    networks = {"student": loaded.network}
    if loaded.teacher is not None:
        networks = {"teacher": loaded.teacher, **networks}
    example = fetched(images, order_of(images, given)[:64])
    options = SweepOptions(cam_share=min(256 / given.count, 1.0))
    return LayerSweep(networks, example, options=options)


def swept(given: Given, rank: int, world: int, file: Path) -> None:
    """Every `world`-th batch, from batch `rank` on."""
    torch.set_num_threads(1)
    images = images_of(given)
    state, order = started(given, images), order_of(images, given)
    for start in range(rank * given.batch, len(order), world * given.batch):
        part = order[start : start + given.batch]
        state.update(fetched(images, part), torch.from_numpy(part))
    save_sweep_state(file, state.state_dict())


def relative_gap(one: torch.Tensor, two: torch.Tensor) -> float:
    """The largest difference over the largest finite value; infinite where NaN meets a number."""
    one, two = one.double(), two.double()
    same = (one == two) | (one.isnan() & two.isnan())
    gap = torch.where(same, 0, (one - two).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    largest = float(gap.max()) if gap.numel() else 0.0
    if largest == 0:
        return 0.0
    finite = two[two.isfinite()].abs()
    scale = float(finite.max()) if len(finite) else 0.0
    return largest / scale if scale else torch.inf


def main() -> None:
    """Prints differences by statistic, and what stands out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=128)
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        files = {shard: Path(place) / f"{shard[0]}{shard[1]}" for shard in ((0, 1), (0, 2), (1, 2))}
        for world in (1, 2):
            start = time.perf_counter()
            running = [
                context.Process(target=swept, args=(given, rank, world, files[rank, world]))
                for rank in range(world)
            ]
            for process in running:
                process.start()
            for process in running:
                process.join()
            assert all(process.exitcode == 0 for process in running)
            print(f"{world} process{'es' * (world > 1)}: {time.perf_counter() - start:.0f} s")
        whole, *halves = (load_sweep_state(file) for file in files.values())
    images = images_of(given)
    one, two = (started(given, images).load_state_dict(half) for half in halves)
    merged = one.merge(two).state_dict()
    differences: dict[str, float] = {}
    for name, value in whole.items():
        key = name.rpartition("/")[2].rstrip(".0123456789")
        relative = relative_gap(merged[name], value)
        exact = not value.is_floating_point()
        key = f"{key}{' (integers)' * exact}"
        differences[key] = max(differences.get(key, 0.0), relative)
    print(f"{one.images:,} images; largest difference over the largest value, by statistic:")
    for key, value in differences.items():
        print(f"  {key:32s} {value:.1e}")
    for found in findings(one.result()):
        print(found.text)


if __name__ == "__main__":
    main()
