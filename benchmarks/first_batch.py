"""How long a start takes from an image folder to its first batch, imports excluded.

    python benchmarks/first_batch.py FOLDER [--size 32]

The first start decodes every file into the cache; later ones check the file list and open it.
"""

import argparse
import time
from pathlib import Path

from camdistill.data.modules import FolderData


def seconds(root: Path, size: int | None) -> float:
    """From nothing to the first training batch."""
    start = time.perf_counter()
    data = FolderData(root, size=size)
    data.prepare_data()
    data.setup("fit")
    next(iter(data.train_dataloader()))
    return time.perf_counter() - start


def main() -> None:
    """Prints the first start's seconds and five later ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=None)
    given = parser.parse_args()
    print(f"first start (decodes, if nothing is cached): {seconds(given.folder, given.size):.2f} s")
    later = sorted(seconds(given.folder, given.size) for _ in range(5))
    print(f"later starts: median {later[2]:.2f} s, from {later[0]:.2f} to {later[-1]:.2f}")


if __name__ == "__main__":
    main()
