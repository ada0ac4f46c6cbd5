"""Images made to excite units against random images, in the README's own `analyze`.

    python benchmarks/made_images.py [--checkpoint checkpoints/shapes-student.safetensors]
        [--layers stage2 stage4] [--out runs/made_images]

Prints, of each of the student's units that `analyze` chooses in these layers, what its image
reached and the 99.9th percentile of the unit's largest value over random images: of those that the
card names, and of 2,000 other ones that are drawn and measured here. A unit succeeds if its image
exceeds both and isn't called failed. 2 minutes on one core.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from camdistill import load
from camdistill.cli import main as camdistill

SHARE = 0.999


def main(arguments: Sequence[str] | None = None) -> tuple[int, int]:
    """Prints a line a unit; returns how many succeed, and of how many."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="checkpoints/shapes-student.safetensors")
    parser.add_argument("--layers", nargs="+", default=["stage2", "stage4"])
    parser.add_argument("--out", type=Path, default=Path("runs/made_images"))
    given = parser.parse_args(arguments)
    command = ["analyze", "--checkpoint", given.checkpoint, "--data", "shapes"]
    if camdistill([*command, "--out", str(given.out)]):
        raise SystemExit("analyze failed")
    units = json.loads((given.out / "results.json").read_text())["units"]["student"]
    network = load(given.checkpoint).network
    succeeded, count = 0, 0
    for layer in given.layers:
        levels = other_random_levels(network, network.network.get_submodule(layer))
        for one in units[layer]:
            other = float(levels[one["unit"]])
            better = not one["failed"] and one["reached"] > max(one["random"], other)
            succeeded, count = succeeded + better, count + 1
            print(
                f"{layer} unit {one['unit']}: reached {one['reached']:.3g}; 99.9 % of random "
                f"images stay below {one['random']:.3g}, of other ones below {other:.3g}"
                f"{'' if better else '   FAILED'}"
            )
    print(f"{succeeded} of {count} units exceed the 99.9th percentile over random images")
    return succeeded, count


def other_random_levels(network: nn.Module, layer: nn.Module, count: int = 2000) -> Tensor:
    """Each unit's percentile over white noise that the product doesn't know."""
    largest: list[Tensor] = []
    handle = layer.register_forward_hook(
        lambda _module, _given, output: largest.append(output.amax((2, 3)))
    )
    generator = torch.Generator().manual_seed(12_345)
    with torch.no_grad():
        for _ in range(count // 100):
            network(torch.rand(100, 3, 32, 32, generator=generator))
    handle.remove()
    return torch.cat(largest).quantile(SHARE, dim=0)


if __name__ == "__main__":
    main()
