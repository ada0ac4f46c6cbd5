"""Grad-CAM by camdistill, captum, torchcam and pytorch-grad-cam: the same maps, time and memory.

    python benchmarks/cam_engines.py [--networks resnet18 resnet50 resnet56] [--batch 8]
        [--engines captum torchcam pytorch-grad-cam] [--rounds 15] [--threads 2]
        [--clock wall] [--device cpu] [--against OTHER/src]

Separate maps of every layer and class, all images of a batch having the same classes. Before
anything is measured, the peers' maps are asserted to be ours. All engines take turns in each round,
so that a noisy machine disturbs them alike; ratios are within a round. Memory is the most that
tensors took at any moment above weights and input (on a GPU, that its allocator gave out).

`--against` names the `src` folder of another checkout, whose engine takes its turn as "other": a
multiple below 1 says that it is faster than this one.
"""

import argparse
import copy
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytorch_grad_cam
import torch
import torch.nn.functional as F
import torchcam.methods
import torchvision
from captum.attr import LayerGradCam
from counted import counted
from live_bytes import LiveBytes
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from camdistill import grad_cam
from camdistill.networks.cifar_resnet import CifarResNet

# Maps of a layer are [images, classes, h, w]; pytorch-grad-cam gives pictures of the image's size.
MapsByLayer = dict[str, Tensor]
Engine = Callable[[nn.Module, Tensor, Sequence[str], Sequence[int]], MapsByLayer]

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "resnet18": (torchvision.models.resnet18, 224, ["layer1", "layer2", "layer3", "layer4"]),
    "resnet50": (torchvision.models.resnet50, 224, ["layer1", "layer2", "layer3", "layer4"]),
    "resnet56": (lambda: CifarResNet(56), 32, ["layer1", "layer2", "layer3"]),
}


def ours(
    network: nn.Module, images: Tensor, layers: Sequence[str], classes: Sequence[int]
) -> MapsByLayer:
    table = torch.tensor(classes).expand(len(images), -1)
    return grad_cam(network, images, layers, table)


def captum(
    network: nn.Module, images: Tensor, layers: Sequence[str], classes: Sequence[int]
) -> MapsByLayer:
    found = {}
    for name in layers:
        explainer = LayerGradCam(network, network.get_submodule(name))
        maps = [explainer.attribute(images, target=number).detach() for number in classes]
        found[name] = torch.cat(maps, 1)
    return found


def torchcam_(
    network: nn.Module, images: Tensor, layers: Sequence[str], classes: Sequence[int]
) -> MapsByLayer:
    shape = tuple(images.shape[1:])
    with torchcam.methods.GradCAM(network, list(layers), input_shape=shape) as extractor:
        scores = network(images)
        rows = [
            extractor(number, scores, normalized=False, retain_graph=number != classes[-1])
            for number in classes
        ]
    return {name: torch.stack([row[i] for row in rows], 1) for i, name in enumerate(layers)}


def pytorch_grad_cam_(
    network: nn.Module, images: Tensor, layers: Sequence[str], classes: Sequence[int]
) -> MapsByLayer:
    found = {}
    for name in layers:
        with pytorch_grad_cam.GradCAM(network, [network.get_submodule(name)]) as explainer:
            targets = [[ClassifierOutputTarget(number)] * len(images) for number in classes]
            pictures = [explainer(images, targets=target) for target in targets]
        found[name] = torch.from_numpy(np.stack(pictures, 1))
    return found


ENGINES: dict[str, Engine] = {
    "camdistill": ours,
    "captum": captum,
    "torchcam": torchcam_,
    "pytorch-grad-cam": pytorch_grad_cam_,
}


def other_version(source: Path) -> Engine:
    """The engine of another checkout, imported beside this one."""
    ours = {name: module for name, module in sys.modules.items() if name.startswith("camdistill")}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(source.resolve()))
    try:
        other = importlib.import_module("camdistill")
        assert Path(other.__file__).is_relative_to(source.resolve()), (
            f"{source} holds no camdistill"
        )
        explain = other.grad_cam
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.startswith("camdistill")]:
            del sys.modules[name]
        sys.modules.update(ours)
    return lambda network, images, layers, classes: explain(
        network, images, layers, torch.tensor(classes).expand(len(images), -1)
    )


def assert_same(maps_by_engine: dict[str, MapsByLayer], size: int) -> None:
    """Every engine's maps are ours, by what each does to them."""
    for name, maps in maps_by_engine["camdistill"].items():
        rectified = maps.relu()
        pictures = to_unit(F.interpolate(to_unit(rectified), (size, size), mode="bilinear"))
        for engine, expected in (
            ("other", maps),
            ("captum", maps),
            ("torchcam", rectified),
            ("pytorch-grad-cam", pictures),
        ):
            if engine not in maps_by_engine:
                continue
            theirs = maps_by_engine[engine][name].to(expected)
            apart = float((theirs - expected).abs().max() / expected.abs().max())
            assert apart < 1e-3, f"{engine} at {name}: {apart:.1e} of the largest value apart"


def to_unit(maps: Tensor) -> Tensor:
    """pytorch-grad-cam's min-max."""
    shifted = maps - maps.amin((-2, -1), keepdim=True)
    return shifted / (shifted.amax((-2, -1), keepdim=True) + 1e-7)


def settled(build: Callable[[], nn.Module], size: int) -> nn.Module:
    """Random weights, and the batch statistics that go with them."""
    torch.manual_seed(0)
    network = build().train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(8, 3, size, size))
    return network.eval()


def seconds(call: Callable[[], object], given: argparse.Namespace) -> float:
    now = time.process_time if given.clock == "cpu" else time.perf_counter
    start = now()
    call()
    if given.device == "cuda":
        torch.cuda.synchronize()
    return now() - start


def peak_bytes(call: Callable[[], object], device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        call()
    return live.most


def measure(name: str, given: argparse.Namespace) -> None:
    """Prints the table's rows of one network."""
    build, size, stages = NETWORKS[name]
    network = settled(build, size).to(given.device)
    images = torch.randn(given.batch, 3, size, size).to(given.device)
    # One each, as peers leave gradients on the parameters.
    networks = {engine: copy.deepcopy(network) for engine in ["camdistill", *given.engines]}
    for layers in (stages[-1:], stages):
        for classes in ([1], list(range(10))):
            calls = {
                engine: partial(ENGINES[engine], own, images, layers, classes)
                for engine, own in networks.items()
            }
            assert_same({engine: call() for engine, call in calls.items()}, size)
            peaks = {engine: peak_bytes(call, given.device) for engine, call in calls.items()}
            taken: dict[str, list[float]] = {engine: [] for engine in networks}
            for _ in counted(given.rounds):
                for engine, call in calls.items():
                    taken[engine].append(seconds(call, given))
            what = f"{'last stage' if len(layers) == 1 else f'{len(layers)} stages'}"
            job = f"{name}, {what}, {len(classes)} class{'es' if len(classes) > 1 else ''}"
            print(row(job, taken, peaks), flush=True)


def row(job: str, taken: dict[str, list[float]], peaks: dict[str, int]) -> str:
    base = np.array(taken["camdistill"])
    cells = [job, f"{1e3 * np.median(base):.1f}"]
    peers = list(taken)[1:]
    for engine in peers:
        low, middle, high = np.percentile(np.array(taken[engine]) / base, [25, 50, 75])
        cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]")
    cells.append(f"{peaks['camdistill'] / 1e6:.1f}")
    cells += [f"{peaks[engine] / peaks['camdistill']:.2f}" for engine in peers]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Prints a Markdown table: milliseconds and megabytes of ours, the peers as multiples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument(
        "--engines", nargs="*", choices=list(ENGINES)[1:], default=list(ENGINES)[1:]
    )
    parser.add_argument("--against", type=Path, help="the src folder of another checkout")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.against is not None:
        ENGINES["other"] = other_version(given.against)
        given.engines = [*given.engines, "other"]
    where = torch.cuda.get_device_name() if given.device == "cuda" else f"{given.threads} threads"
    print(
        f"batch {given.batch}, {where}, torch {torch.__version__}, {given.rounds} rounds in turn, "
        f"{given.clock} clock; "
        "times of the peers as multiples of ours, median and quartiles; so their memory\n"
    )
    peers = given.engines
    print("| " + " | ".join(["", "ours, ms", *peers, "ours, MB", *peers]) + " |")
    print("|---" + "|---:" * (2 + 2 * len(peers)) + "|", flush=True)
    for name in given.networks:
        measure(name, given)


if __name__ == "__main__":
    main()
