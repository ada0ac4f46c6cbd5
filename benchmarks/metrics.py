"""What a panel of metrics costs, side by side with Quantus, and ROAD with pytorch-grad-cam.

    python benchmarks/metrics.py [--images 256] [--explainers 6] [--rounds 3]
        [--default-images 2] [--road-images 32]

Five metrics (faithfulness correlation, infidelity, sensitivity-n, deletion, Gini index) over
several explainers, on the teacher of the quickstart and Shapes' test images of 32 px. Maps are made
before the clock starts. "Equal" asks both for as many changed images of each metric: 64 subsets, 64
squares, 96 subsets or steps, 12 levels, filled with gray. "Default" is what each does when nothing
is set. First the numbers that both define alike are compared; what isn't alike is said. Each arm
runs in a process of its own, so that the peak of memory is its own, and the arms take turns.
"""

import argparse
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from counted import counted
from numpy.typing import NDArray

from camdistill import load
from camdistill.data.shapes import Shapes
from camdistill.distill.training import as_images
from camdistill.explain.methods import image_explainer
from camdistill.measure.complexity import gini
from camdistill.measure.faithfulness import (
    faithfulness_correlation,
    infidelity,
    sensitivity_n,
)
from camdistill.measure.removal import deletion, road
from camdistill.perturb.bank import BankPlan, build_bank
from camdistill.perturb.imputers import baseline
from camdistill.perturb.ranks import ranks

TEACHER = Path(__file__).parents[1] / "checkpoints" / "shapes-resnet20.safetensors"
METHODS = (
    *("grad_cam", "layer_cam", "eigen_cam", "gradient", "gradient_x_input", "guided_backprop"),
    *("deconvnet", "smooth_grad"),
)
Array = NDArray[np.floating]
Table = dict[str, Array]


class Work:
    """Network, images and maps, the same for all arms."""

    def __init__(self, images: int, explainers: int) -> None:
        self.network = load(TEACHER).network.eval()
        pixels = Shapes("test", images).render(np.arange(images)).pixels
        self.images = as_images(torch.from_numpy(pixels))
        with torch.no_grad():
            self.classes = torch.cat([self.network(x) for x in self.images.split(64)]).argmax(1)
        generator = torch.Generator().manual_seed(0)
        self.maps: dict[str, torch.Tensor] = {}
        for name in METHODS[:explainers]:
            explain = image_explainer(name)
            parts = [
                explain(self.network, x, c)
                for x, c in zip(self.images.split(64), self.classes.split(64), strict=True)
            ]
            # No two pixels equal, so that both take the same ones.
            whole = torch.cat(parts)
            self.maps[name] = whole + 1e-6 * whole.std() * torch.randn(
                whole.shape, generator=generator
            )


def ours(work: Work, plan: BankPlan, levels: tuple[float, ...]) -> Table:
    """The panel in this package, in batches of 64."""
    found: dict[str, list[Array]] = {}
    for number, images in enumerate(work.images.split(64)):
        rows = slice(64 * number, 64 * number + len(images))
        generator = torch.Generator().manual_seed(number)
        gray, classes = baseline(images, "gray"), work.classes[rows]
        answers = build_bank(work.network, images, gray, generator, classes=classes, plan=plan)
        for name, whole in work.maps.items():
            maps = whole[rows]
            order = ranks(maps, generator)
            curve = deletion(work.network, images, classes, order, gray, levels)
            values = {
                "faithfulness_correlation": faithfulness_correlation(maps, answers),
                "infidelity": infidelity(maps, answers),
                "sensitivity_n": sensitivity_n(maps, answers),
                "deletion": curve.probabilities,
                "gini": gini(maps),
            }
            for metric, value in values.items():
                found.setdefault(f"{name}/{metric}", []).append(value.numpy())
    return {key: np.concatenate(parts) for key, parts in found.items()}


def ours_equal(work: Work) -> Table:
    """As many changes as theirs."""
    plan = BankPlan(subsets={0.25: 64, 0.1: 32, 0.5: 32, 0.75: 32}, occluders=(1,))
    return ours(work, plan, tuple(step / 12 for step in range(1, 13)))


def ours_default(work: Work) -> Table:
    """Nothing set; sensitivity-n's sizes as `evaluate` has them."""
    plan = BankPlan(subsets={0.25: 64, 0.1: 32, 0.5: 32, 0.75: 32})
    return ours(work, plan, tuple(step / 16 for step in range(17)))


def _quantus(work: Work, options: dict[str, dict[str, object]]) -> Table:
    import quantus

    arrays = work.images.contiguous().numpy()
    classes = work.classes.numpy()
    metrics = {
        "faithfulness_correlation": quantus.FaithfulnessCorrelation,
        "infidelity": quantus.Infidelity,
        "sensitivity_n": quantus.SensitivityN,
        "deletion": quantus.PixelFlipping,
        "gini": quantus.Sparseness,
    }
    found = {}
    for name, maps in work.maps.items():
        for metric, build in metrics.items():
            measure = build(
                disable_warnings=True, return_aggregate=False, **options.get(metric, {})
            )
            values = measure(
                model=work.network,
                x_batch=arrays,
                y_batch=classes,
                a_batch=maps.numpy()[:, None].copy(),
                batch_size=64,
                softmax=metric == "deletion",
            )
            found[f"{name}/{metric}"] = np.asarray(values)
    return found


def quantus_equal(work: Work) -> Table:
    """Quantus with as many changes as ours."""
    values = work.images[0].numel()
    raw = {"normalise": False, "abs": False}
    gray = {"perturb_baseline": 0.5}
    return _quantus(
        work,
        {
            "faithfulness_correlation": {
                "nr_runs": 64, "subset_size": values // 4, **raw, **gray
            },
            "infidelity": {"perturb_patch_sizes": [4], "n_perturb_samples": 1, **raw, **gray},
            "sensitivity_n": {
                "features_in_step": 32, "n_max_percentage": 1.0, **raw, **gray
            },
            "deletion": {"features_in_step": 256, **raw, **gray},
            # of signed values Quantus's index isn't the Gini index of anything; here it is |values|
            "gini": {"normalise": False, "abs": True},
        },
    )  # fmt: skip


def quantus_default(work: Work) -> Table:
    """Quantus with nothing set."""
    return _quantus(work, {})


def ours_road(work: Work) -> Table:
    """ROAD combined, nine levels from both ends."""
    found: dict[str, list[Array]] = {name: [] for name in work.maps}
    for number, images in enumerate(work.images.split(64)):
        rows = slice(64 * number, 64 * number + len(images))
        generator = torch.Generator().manual_seed(number)
        for name, maps in work.maps.items():
            order = ranks(maps[rows], generator)
            one = road(work.network, images, work.classes[rows], order, generator)
            found[name].append(one.combine().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def peers_road(work: Work) -> Table:
    """ROADCombined of pytorch-grad-cam."""
    from pytorch_grad_cam.metrics.road import ROADCombined
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    images = work.images.contiguous()
    targets = [ClassifierOutputSoftmaxTarget(number) for number in work.classes.tolist()]
    return {
        name: ROADCombined()(images, maps.numpy(), targets, work.network)
        for name, maps in work.maps.items()
    }


ARMS: dict[str, Callable[[Work], Table]] = {
    "ours, equal": ours_equal,
    "Quantus, equal": quantus_equal,
    "ours, default": ours_default,
    "Quantus, default": quantus_default,
    "ours, ROAD": ours_road,
    "pytorch-grad-cam, ROAD": peers_road,
}


def _timed(arm: str, images: int, explainers: int, threads: int, answer: object) -> None:
    """In a process of its own: seconds, peak memory over what was there before, and values."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    work = Work(images, explainers)
    with torch.no_grad():
        work.network(work.images[:64])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    table = ARMS[arm](work)
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    answer.send((seconds, peak, table))  # type: ignore[attr-defined]


def measured(arm: str, images: int, explainers: int, threads: int) -> tuple[float, float, Table]:
    """Seconds, MiB and values of one arm."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_timed, args=(arm, images, explainers, threads, sender))
    process.start()
    sender.close()
    found: tuple[float, float, Table] = receiver.recv()
    process.join()
    return found


def _agreement(first: Table, second: Table, explainers: int) -> list[str]:
    names = METHODS[:explainers]
    lines = []
    for metric in ("gini", "deletion"):
        # Its steps are of channel values and must divide 1024: every third is of whole pixels.
        whole = np.s_[..., 2::3] if metric == "deletion" else np.s_[...]
        gaps = [
            np.abs(first[f"{n}/{metric}"] - second[f"{n}/{metric}"])[whole].max() for n in names
        ]
        lines.append(f"| {metric} | largest difference {max(gaps):.1e} |")
    pairs = [
        (first[f"{n}/{metric}"].mean(), second[f"{n}/{metric}"].mean())
        for metric in ("faithfulness_correlation",)
        for n in names
    ]
    told = ", ".join(f"{a:.3f} / {b:.3f}" for a, b in pairs)
    lines.append(
        f"| faithfulness_correlation | not alike: cells of 4x4 pixels here, single values there "
        f"(means {told}) |"
    )
    lines.append("| infidelity | not alike: best beta, in [0, 1] here; raw, cumulative there |")
    lines.append("| sensitivity_n | not alike: random subsets here; the order's steps there |")
    return lines


def main() -> None:
    """Prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--explainers", type=int, default=6, choices=range(1, len(METHODS) + 1))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--default-images", type=int, default=2)
    parser.add_argument("--road-images", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the raw numbers")
    given = parser.parse_args()
    if given.default_images < 2:
        parser.error("Quantus correlates sensitivity-n over images: give 2 or more default images")
    sizes = dict(
        zip(ARMS, [given.images] * 2 + [given.default_images] * 2 + [given.road_images] * 2,
            strict=True)
    )  # fmt: skip
    taken: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    tables: dict[str, Table] = {}
    for _ in counted(given.rounds):
        for arm, images in sizes.items():
            seconds, peak, table = measured(arm, images, given.explainers, given.threads)
            taken[arm].append((seconds, peak))
            tables.setdefault(arm, table)
    print(f"{given.explainers} explainers, {given.threads} threads, torch {torch.__version__}\n")
    print("| numbers | |\n|---|---|")
    for line in _agreement(tables["ours, equal"], tables["Quantus, equal"], given.explainers):
        print(line)
    gap = [np.abs(tables["ours, ROAD"][n] - tables["pytorch-grad-cam, ROAD"][n]).mean()
           for n in METHODS[: given.explainers]]  # fmt: skip
    print(f"| ROAD combined | mean difference {np.mean(gap):.1e}, both with noise of 0.01 |")
    print("\n| arm | images | seconds (median, range) | ms an image and explainer | peak MiB |")
    print("|---|---|---|---|---|")
    for arm, values in taken.items():
        seconds = sorted(one for one, _ in values)
        middle = float(np.median(seconds))
        each = 1e3 * middle / sizes[arm] / given.explainers
        print(
            f"| {arm} | {sizes[arm]} | {middle:.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f}) "
            f"| {each:.1f} | {max(peak for _, peak in values):.0f} |"
        )
    names = list(ARMS)
    print("\n| | times faster (median of rounds) |\n|---|---|")
    for first, second in zip(names[::2], names[1::2], strict=True):
        ratios = [b[0] / a[0] for a, b in zip(taken[first], taken[second], strict=True)]
        print(f"| {first} against {second} | {np.median(ratios):.1f} |")
    if given.out:
        given.out.write_text(json.dumps(taken))


if __name__ == "__main__":
    main()
