"""Images a second that Shapes renders: `OMP_NUM_THREADS=1 python benchmarks/shapes.py`."""

import time

import numpy as np

from camdistill.data.shapes import Shapes


def main() -> None:
    for size in (32, 64, 96):
        count = 8192 * 32**2 // size**2
        for options in ({}, {"shortcut": 0.9, "objects": 2, "suppressor": 0.5}):
            shapes = Shapes(split="train", length=count, size=size, **options)
            shapes.render(np.arange(64))
            seconds = []
            for _ in range(5):
                start = time.perf_counter()
                shapes.render(np.arange(count))
                seconds.append(time.perf_counter() - start)
            best, middle = count / min(seconds), count / sorted(seconds)[2]
            print(f"{size} px {options or 'defaults'}: {middle:,.0f} images/s (best {best:,.0f})")


if __name__ == "__main__":
    main()
