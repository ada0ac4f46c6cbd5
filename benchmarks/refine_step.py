"""Seconds of one step of a refinement and of judging, on one thread.

    python benchmarks/refine_step.py [--batch 64] [--judged 50] [--rounds 3] [--objectives ...]

A step is what `refine` does with a batch of 32 x 32 images: cross-entropy, the map with its graph,
the objective and the backward, in float32 and in bfloat16. Ways take turns in each round; times are
of the processor, medians over rounds. Judging asks what `refine` asks of some test images by
default: the refined and the start's map, three explainers, ROAD at nine levels.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from counted import counted

from camdistill.data.modules import ShapesData
from camdistill.data.views import identity_view
from camdistill.distill.differentiable_maps import eval_mode, explain_with_graph
from camdistill.distill.losses import cross_entropy
from camdistill.distill.refinement_targets import Objective, Refinement, RefinementArm, ViewBatch
from camdistill.distill.training import as_images, build_with_seed
from camdistill.experiments.refinement.refinement_config import JudgingOptions
from camdistill.experiments.refinement.refinement_measurement import Judge
from camdistill.networks.students import ShallowCNN, parameter_count
from camdistill.networks.teachers import Preprocessed
from camdistill.report.results import machine

KINDS = ("insertion_deletion", "faithfulness", "consistency", "energy")
ROWS: dict[str, tuple[Objective, RefinementArm]] = {
    "ce": (Objective(), "ce"),
    **{kind: (Objective(kind=kind), "objective") for kind in KINDS},  # type: ignore[arg-type]
    "detached": (Objective(), "detached"),
    "random": (Objective(), "random"),
}


def network(seed: int) -> Preprocessed:
    """The network of refine-cifar10.yaml, untrained."""
    net = Preprocessed(build_with_seed(seed, lambda: ShallowCNN(8))).eval()
    return net.to(memory_format=torch.channels_last)


def stepper(
    net: Preprocessed, data: ShapesData, row: str, dtype: torch.dtype
) -> Callable[[], None]:
    """A step of an arm, again and again with the same images."""
    objective, arm = ROWS[row]
    refinement = Refinement(objective, arm, 0)
    train = data.train_set
    assert train is not None, "setup made it"
    batch = train.batch(np.arange(len(train)))
    images, view = as_images(batch.pixels), identity_view(len(batch.ids))
    masks = None if train.masks is None else torch.from_numpy(np.asarray(train.masks[:]) > 0)

    def step() -> None:
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), eval_mode(net):
            if arm == "ce":
                loss = cross_entropy(net(images), batch.labels).mean()
            else:
                logits, classes, maps = explain_with_graph(net, images, objective.cam)
                seen = ViewBatch(images, batch.ids, view, classes.detach(), maps, masks)
                loss = cross_entropy(logits, batch.labels).mean()
                loss = loss + refinement.loss(net, seen, 0).mean()
        loss.backward()

    return step


def medians(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds of the processor, the first round left out."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in counted(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if number:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Prints a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--judged", type=int, default=50, help="test images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--objectives", nargs="*", choices=list(ROWS), default=list(ROWS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = ShapesData(train=asked.batch, val=2, test=max(asked.judged, 2))
    data.setup("fit")
    data.setup("test")
    net = network(0)
    print(f"{machine()}\nShallowCNN of {parameter_count(net)} numbers, batch {asked.batch}")
    dtypes = (torch.float32, torch.bfloat16)
    ways = {
        f"{row:20} {str(dtype).removeprefix('torch.')}": stepper(net, data, row, dtype)
        for row in asked.objectives
        for dtype in dtypes
    }
    for name, seconds in medians(ways, asked.rounds).items():
        print(f"{name:30} {seconds:.3f} s a step, {seconds / asked.batch * 1e3:.2f} ms an image")
    test = data.test_set
    assert test is not None, "setup made it"
    if asked.judged:
        judge, start = Judge(test, Objective(), JudgingOptions(), 0), network(1)
        (seconds,) = medians({"judging": lambda: void(judge(net, start))}, 1).values()
        print(f"{'judging':30} {seconds:.2f} s, {seconds / len(test) * 1e3:.1f} ms an image")


def void(_: object) -> None:
    """Forgets a result."""


if __name__ == "__main__":
    main()
